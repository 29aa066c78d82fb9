"""Callbacks for any Lightning Trainer: evaluation with the statistics that were decided, apart from the training's."""

import copy
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader

from distnorm import checkpoint as checkpoints
from distnorm import collectives
from distnorm.calibration import calibrate, input_of
from distnorm.convert import normalization_layers
from distnorm.errors import ConfigError
from distnorm.population import (
    Statistics,
    gather_running_stats,
    own_running_stats,
    pooled,
    swap_in,
    write_into,
)
from distnorm.spec import NormSpec
from distnorm.uneven import EvenLoader

_log = logging.getLogger(__name__)


class EvaluationStatistics(Callback):
    """Evaluate, and save, with the statistics that the decision asks for; go on training with each rank's own.

    `spec.evaluation` says which: the `running` ones, those of all ranks `pooled`, or `precise` ones, that `calibrate`
    measures with the weights of the moment. Before a validation or test they are swapped in, after it the rank's own
    are back: the training is the same, bit for bit, whichever it is. They are computed once after a training step, and
    where no step was made since the start, pooled. A checkpoint's `state_dict` holds them: what is evaluated is what is
    saved. Each rank's own travel beside them, and are put back when training resumes on as many ranks; on another
    number every rank starts from the saved ones.

    With `spec.frozen_last` = p, in the last p of the optimizer's steps the same statistics become constants on all
    ranks: the batch norms stay in eval mode, their weights and biases go on learning. Training that resumes from there
    goes on frozen.

    Args:
        spec: the decision; it is kept in the checkpoint for `distnorm.load`.
        batches: what `precise` statistics are measured over, on this rank: any iterable that can be gone through again,
            of inputs, or of tuples, lists or dictionaries whose first entry is the input. `None`: the batches of the
            training DataLoader's epoch from its beginning, through a copy of it, its samplers and generators. The data
            set is shared: one that draws from a stream of its own would be moved by it, so give it `batches`.
        num_samples: samples that they are measured over, over all ranks.

    Collective: where the ranks' statistics differ (`spec.evaluation` is not `running`), 1 gather of 2C + 1 float64
        numbers a layer, all layers in one, before each evaluation or checkpoint after a training step; else none.
        `precise`: those of `calibrate` besides. `frozen_last`: 1 agreement at the start; none after the switch.

    Raises:
        ConfigError: `precise` has nothing to run (the module has neither a `forward` nor a `model`) or no batches that
            it could take; or `frozen_last` is a share of a training without an end.

    Source: Wu & Johnson 2021, section 3.2 (precise) and 3.4 (frozen late).
    """

    def __init__(self, spec: NormSpec, batches: Iterable[Any] | None = None, num_samples: int = 1024) -> None:
        self._spec, self._batches, self._num_samples = spec, batches, num_samples
        self._gathered: list[Statistics] | None = None
        self._evaluated: Statistics | None = None
        self._own: Statistics | None = None
        self._stored: dict[str, Any] | None = None
        self._weights_moved = self._frozen = False
        self._freeze_at = math.inf
        self._constant: set[nn.Module] = set()
        self._loader: Any = None  # the trainer forgets it when training ends

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put this rank's own statistics back on resume: DDP's constructor has just made them rank 0's."""
        if self._spec.evaluation == "precise":
            _model_of(pl_module)
        self._forget()
        self._weights_moved = False
        stored, self._stored = self._stored or {}, None
        self._frozen = bool(stored.get("frozen")) and self._spec.frozen_last > 0
        ranks = stored.get("rank_statistics")
        if (
            ranks is None or self._frozen or self._spec.evaluation == "running"
        ):  # all ranks share one set: the saved one
            return
        if len(ranks) == collectives.world_size():
            self._evaluated = own_running_stats(pl_module)  # the saved ones, until a step is made
            swap_in(pl_module, ranks[collectives.rank()])
        else:
            _log.warning(
                "The checkpoint has the statistics of %d ranks, and there are %d now: all start from the saved ones.",
                len(ranks),
                collectives.world_size(),
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the step from which on the statistics are constants."""
        self._freeze_at = _first_frozen_step(trainer, self._spec.frozen_last) if self._spec.frozen_last else math.inf

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget what was computed, for training moves on; or keep the statistics as constants, when it is time."""
        if not self._frozen and trainer.global_step >= self._freeze_at:
            swap_in(pl_module, self._statistics(trainer, pl_module))
            self._frozen = True
            if trainer.is_global_zero:
                words = "the statistics of the batch norms are constants from here on"
                _log.info("Step %d: %s (%s).", trainer.global_step, words, self._spec.evaluation)
        self._forget()
        self._weights_moved, self._loader = True, trainer.train_dataloader
        if self._frozen:  # each time: Lightning and users call train()
            self._constant |= {layer for _, layer in normalization_layers(pl_module) if layer.training}
            for layer in self._constant:
                layer.eval()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let frozen layers follow the module's mode again."""
        while self._constant:
            self._constant.pop().train(pl_module.training)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the evaluation statistics in."""
        if trainer.state.fn != TrainerFn.FITTING:  # no training step says when the statistics moved
            self._forget()
        self._own = swap_in(pl_module, self._statistics(trainer, pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the rank's own back in."""
        if self._own is not None:
            swap_in(pl_module, self._own)
        self._own = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the evaluation statistics in; a loaded checkpoint's are alike on all ranks, and pool to themselves."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the rank's own back in."""
        self.on_validation_end(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the evaluation statistics in."""
        self.on_validation_start(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the rank's own back in."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as training left it, also when evaluation failed."""
        self.on_validation_end(trainer, pl_module)
        self.on_train_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the evaluation statistics into the `state_dict`, each rank's own beside it; called on all ranks."""
        write_into(checkpoint["state_dict"], pl_module, self._statistics(trainer, pl_module))
        ranks = self._gather(pl_module)
        checkpoint[checkpoints.ENTRY] = checkpoints.entry(self._spec, ranks, frozen=self._frozen)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what each rank goes on with until training starts; what is loaded is evaluated as it is."""
        self._weights_moved = False
        if trainer.state.fn == TrainerFn.FITTING:
            self._stored = checkpoint.get(checkpoints.ENTRY)

    def _forget(self) -> None:
        self._gathered = self._evaluated = None

    def _statistics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Statistics:
        """Compute what evaluation normalizes with, once a training step; the same on every rank."""
        if self._evaluated is None:
            ranks = self._gather(pl_module)
            shared = self._frozen or self._spec.evaluation == "running"
            self._evaluated = dict(ranks[0]) if shared else pooled(ranks)
            if not shared and self._spec.evaluation == "precise" and self._weights_moved:
                self._evaluated |= self._calibrate(trainer, pl_module)
        return self._evaluated

    def _gather(self, pl_module: pl.LightningModule) -> list[Statistics]:
        if self._gathered is None and (self._frozen or self._spec.evaluation == "running"):
            self._gathered = [own_running_stats(pl_module)] * collectives.world_size()
        elif self._gathered is None:
            self._gathered = gather_running_stats(pl_module)
        return self._gathered

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Statistics:
        model = _model_of(pl_module)

        def run(_: nn.Module, inputs: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return model(trainer.strategy.batch_to_device(inputs))

        batches = _again(self._loader) if self._batches is None else self._batches
        return calibrate(pl_module, _inputs_of(batches), self._num_samples, forward=run)


def _model_of(pl_module: pl.LightningModule) -> nn.Module:
    """Find what maps an input to an output: the module itself, or its `model`."""
    if type(pl_module).forward is not pl.LightningModule.forward:
        return pl_module
    model = getattr(pl_module, "model", None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"Precise statistics need a model to run, and {type(pl_module).__name__} has neither a forward nor a model."
            "\nGive it forward(self, inputs), or use norm.evaluation=pooled.",
        )
    return model


def _inputs_of(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield input_of(batch)


def _again(loader: Any) -> Iterable[Any]:
    """Give the batches of a training loader from the beginning; whoever goes through it now notices nothing.

    A copy has samplers, generator and workers of its own; the data set is the same.
    """
    loader = loader.loader if isinstance(loader, EvenLoader) else loader
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"Precise statistics cannot take batches from a training loader of type {type(loader).__name__} without "
            "disturbing it.\nGive EvaluationStatistics(spec, batches=…) a loader of its own.",
        )
    names = ("sampler", "batch_sampler", "generator")
    theirs = {name: getattr(loader, name) for name in names}
    ours = copy.deepcopy(theirs, {id(loader.dataset): loader.dataset})
    again = copy.copy(loader)
    vars(again).update(ours, persistent_workers=False, _iterator=None)  # a DataLoader refuses to be set otherwise
    return again


def _first_frozen_step(trainer: pl.Trainer, share: float) -> int:
    """Count the steps before the last share of training; alike on all ranks."""
    steps = trainer.estimated_stepping_batches
    total: float = min(collectives.agree(steps, "the agreement on the number of steps"))
    if not 0 < total < math.inf:
        raise ConfigError(
            f"norm.frozen_last={share} is a share of all steps, and this training has no end that is known.\n"
            "Give it trainer.max_steps, or norm.frozen_last=0.",
        )
    last = math.floor(share * total + 1e-9)  # 0.29 * 100 is a little less than 29
    return int(total) - last
