"""Image classification: cross entropy, accuracy, warm-up and cosine decay. Knows nothing of norms.

Legend: N samples of this rank.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from distnorm import collectives
from distnorm.errors import ConfigError, did_you_mean
from distnorm.lightning_names import EitherName, check_trainer
from distnorm.uneven import EvenLoader

SCHEDULES = ("cosine", "constant")


class Classification(EitherName, pl.LightningModule):
    """Train and evaluate a classifier.

    The loss is the mean over the samples of *all* ranks, also where the last batch is dealt unevenly: each rank divides
    its sum by the global number of samples a rank, and DDP averages. The training loader (`EvenLoader`) or the data
    module gives that number, by `global_count(step)`. Logged: `train/loss` (mean over all samples since the last log,
    over all ranks), `lr`; `val/…` and `test/…` `loss` and `accuracy`, every sample of all ranks counted once.

    Args:
        model: maps [N, …] to logits [N, num_classes].
        optimizer: makes the optimizer of parameter groups.
        num_classes: classes.
        label_smoothing: of the training loss, in [0, 1).
        warmup_fraction: of all steps, in which the learning rate rises linearly.
        schedule: `cosine` decay to 0, or `constant`, after the warm-up.
        norm_weight_decay: weight decay of parameters with one dimension: norms' weights, and biases.

    Collective: 1 sum of 2 numbers over all ranks each `log_every_n_steps`; torchmetrics' own at the end of an
        evaluation; those of an `EvenLoader`, whose `check` every rank runs at the start of a fit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        num_classes: int,
        label_smoothing: float = 0.0,
        warmup_fraction: float = 0.05,
        schedule: str = "cosine",
        norm_weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            near = did_you_mean(schedule, SCHEDULES)
            raise ConfigError(f"task.schedule={schedule!r} is not one of {', '.join(SCHEDULES)}.{near}")
        if not 0 <= warmup_fraction <= 1:
            raise ConfigError(
                f"task.warmup_fraction={warmup_fraction} is no share of all steps in [0, 1]. Use e.g. 0.05."
            )
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={label_smoothing} is not in [0, 1). Use e.g. 0.1.")
        self.model = model
        self._optimizer = optimizer
        self._label_smoothing, self._warmup_fraction, self._schedule = label_smoothing, warmup_fraction, schedule
        self._norm_weight_decay = norm_weight_decay
        self._since_log: Tensor | None = None
        self._logged_at = 0
        self._batches_done = 0
        self._scores = {split: _Scores(num_classes) for split in ("val", "test")}
        self.scores = nn.ModuleDict(
            self._scores
        )  # on the device, and in the module tree, where Lightning looks for metrics

    def on_train_start(self) -> None:
        """Refuse layers that cannot take an empty batch, where the loader may give one."""
        self._batches_done = 0
        loader = self.trainer.train_dataloader
        if isinstance(loader, EvenLoader):
            loader.check(self.model)

    def on_train_epoch_start(self) -> None:
        """Begin to count the batches of a pass through the data."""
        self._batches_done = 0

    def rank_state(self) -> dict[str, Any]:
        """Give what `distnorm.resume` saves of each rank: the loss since it was last logged."""
        return {"since_log": None if self._since_log is None else self._since_log.cpu(), "logged_at": self._logged_at}

    def load_rank_states(self, states: Sequence[dict[str, Any]], own: Sequence[int]) -> None:
        """Go on from what `rank_state` gave on this rank, or on those that it goes on for."""
        self._logged_at = states[0]["logged_at"]
        if states[0]["since_log"] is not None:
            seen = torch.zeros(2, dtype=torch.float64, device=self.device)
            self._since_log = sum((states[rank]["since_log"].to(self.device) for rank in own), seen)
            self._log_training()  # a checkpoint at the end of a batch is saved before the batch is logged

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return this rank's share of the global mean loss."""
        inputs, targets = batch
        losses_N = functional.cross_entropy(
            self.model(inputs), targets, reduction="none", label_smoothing=self._label_smoothing
        )
        loss: Tensor = losses_N.sum() / self._samples_a_rank(batch_idx, len(targets))
        count = torch.full((), float(len(targets)), dtype=torch.float64, device=losses_N.device)
        seen = torch.stack((losses_N.detach().sum().double(), count))
        self._since_log = seen if self._since_log is None else self._since_log + seen
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the mean loss over all ranks since the last time."""
        self._batches_done += 1
        self._log_training()

    def _log_training(self) -> None:
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every or step == self._logged_at or self._since_log is None:
            return
        everyone = tuple(range(collectives.world_size()))
        loss_sum, samples = collectives.start_sum(self._since_log, everyone, "the training loss").wait().tolist()
        self._since_log, self._logged_at = None, step
        self._log({"train/loss": loss_sum / samples, "lr": self.trainer.optimizers[0].param_groups[0]["lr"]})

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch of the validation set."""
        self._evaluate(batch, "val")

    def on_validation_end(self) -> None:
        """Log the validation at the number of steps done: Lightning's own logging counts from 0."""
        self._log_evaluation("val")

    def on_test_end(self) -> None:
        """Log the test likewise."""
        self._log_evaluation("test")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch of the test set."""
        self._evaluate(batch, "test")

    def probe_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Give the mean training loss over a batch of this rank, and the logits [N, num_classes]; logs nothing.

        What the train/eval gap and the probes ask for: `train_eval_gap(task.model, batch, task.probe_loss)`.

        Args:
            model: maps [N, …] to logits; the task's own, unless another is to be looked at.
            batch: inputs and targets.
        """
        inputs, targets = batch
        logits: Tensor = model(inputs)
        return functional.cross_entropy(logits, targets, label_smoothing=self._label_smoothing), logits

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add no callback; refuse a Trainer of `pytorch_lightning`: this is the first hook that a fit calls."""
        check_trainer(self.trainer, self)
        return []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer over two groups, and its schedule over all steps."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.dim() > 1]},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": self._norm_weight_decay},
        ]
        optimizer = self._optimizer([group for group in groups if group["params"]])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        steps = self.trainer.estimated_stepping_batches
        warmup = self._warmup_fraction * steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self._schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, steps - warmup))))

    def _samples_a_rank(self, batch_idx: int, own: int) -> float:
        """Samples of this step over all ranks, divided by the ranks; the data knows them."""
        # Not `batch_idx`: resumed within an epoch it goes on where it was, and the loader begins anew.
        if counted := getattr(self.trainer.train_dataloader, "global_count", None):
            return float(max(1, counted(self._batches_done)) / self.trainer.world_size)
        count = getattr(self.trainer.datamodule, "global_count", None)  # type: ignore[attr-defined]
        share = count(batch_idx) / self.trainer.world_size if count else own
        # Dealt evenly, a rank has the share rounded up or down; another number is a step of another place in the epoch.
        return float(share if abs(share - own) < 1 else own)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        inputs, targets = batch
        scores = self._scores[split]
        if len(targets):
            logits = self.model(inputs)
            scores.loss.update(functional.cross_entropy(logits, targets), len(targets))
            scores.accuracy.update(logits, targets)
        for name, metric in {"loss": scores.loss, "accuracy": scores.accuracy}.items():
            self.log(f"{split}/{name}", metric, on_epoch=True, logger=False, prog_bar=True, batch_size=1)

    def _log_evaluation(self, split: str) -> None:
        if not self.trainer.sanity_checking:
            metrics = self.trainer.callback_metrics
            self._log({name: float(value) for name, value in metrics.items() if name.startswith(f"{split}/")})

    def _log(self, values: dict[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics({**values, "epoch": self.trainer.current_epoch}, step=self.trainer.global_step)


class _Scores(nn.Module):
    """What an evaluation counts; torchmetrics adds the ranks up."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
