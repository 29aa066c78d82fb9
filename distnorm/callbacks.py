"""Callbacks for any Lightning Trainer: evaluation with the statistics that were decided, apart from the training's."""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from distnorm import checkpoint as checkpoints
from distnorm import collectives
from distnorm.calibration import calibrate
from distnorm.convert import normalization_layers
from distnorm.freezing import HeldLayers, first_frozen_step
from distnorm.lightning_names import EitherName
from distnorm.norms.apart import shares_one_set
from distnorm.population import (
    Statistics,
    gather_running_stats,
    own_running_stats,
    pooled,
    swap_in,
    write_into,
)
from distnorm.replay import (
    again,
    has_training_loader,
    model_of,
    training_forward,
    training_inputs,
    training_loader,
)
from distnorm.spec import NormSpec
from distnorm.trainer_checks import check_buffers_stay, check_whole_checkpoints

_log = logging.getLogger(__name__)


class EvaluationStatistics(EitherName, Callback):
    """Evaluate, and save, with the statistics that the decision asks for; go on training with each rank's own.

    `spec.evaluation` says which: the `running` ones, those of all ranks `pooled`, or `precise` ones, that `calibrate`
    measures with the weights of the moment. Before a validation or test they are swapped in, after it the rank's own
    are back: the training is the same, bit for bit, whichever it is. They are computed once after a training step, and
    where no step was made since the start, pooled. They are the same on all ranks: where the ranks' statistics differ,
    `running` means rank 0's, as with DDP. A checkpoint's `state_dict` holds them: what is evaluated is what is saved.
    Each rank's own travel beside them, and are put back when training resumes on as many ranks; on another number every
    rank starts from the saved ones. A model without batch norms has no statistics, and nothing is done.

    A checkpoint that is there to go on from, and must be quick, is saved within `quick_saves()`.

    With `spec.frozen_last` = p, in the last p of the optimizer's steps the same statistics become constants on all
    ranks: the batch norms stay in eval mode, their weights and biases go on learning. Training that resumes from there
    goes on frozen.

    Args:
        spec: the decision; it is kept in the checkpoint for `distnorm.load`.
        batches: what `precise` statistics are measured over, on this rank: any iterable that can be gone through again,
            of inputs, or of tuples, lists or dictionaries whose first entry is the input, once the module's hooks of
            the batch transfer have had the batch, as in training. `None`: the batches of the
            training DataLoader's epoch from its beginning, through a copy of it, its samplers and generators. The data
            set is shared: one that draws from a stream of its own would be moved by it, so give it `batches`.
        num_samples: samples that they are measured over, over all ranks.

    Collective: where the ranks' statistics differ by construction (a batch norm that not all ranks pool over), 1
        agreement before each evaluation or checkpoint on whether a step was made, and if so 1 gather of 2C + 1 float64
        numbers a layer, all layers in one; else none. `precise`: the agreement always, and those of `calibrate`.
        `frozen_last`: 1 agreement at the start; none after the switch.

    Raises:
        ConfigError: (before the first step) `precise` has nothing to run (the module has neither a `forward` nor a
            `model`) or no batches that it could take; `pooled` or `precise` under a DDP that sends rank 0's buffers
            around and cannot be kept from it; a `ModelCheckpoint` saves weights only; or `frozen_last` is a share of a
            training whose steps are not known.

    Source: Wu & Johnson 2021, section 3.2 (precise) and 3.4 (frozen late).
    """

    def __init__(self, spec: NormSpec, batches: Iterable[Any] | None = None, num_samples: int = 1024) -> None:
        self._spec, self._batches, self._num_samples = spec, batches, num_samples
        self._gathered: list[Statistics] | None = None
        self._evaluated: Statistics | None = None
        self._own: Statistics | None = None
        self._stored: dict[str, Any] | None = None
        self._weights_moved = self._frozen = self._quick = False
        self._freeze_at = math.inf
        self._constant = HeldLayers()
        self._loader: Any = None  # the trainer forgets it when training ends

    @contextlib.contextmanager
    def quick_saves(self) -> Iterator[None]:
        """Save within with pooled statistics where precise ones would have to be measured; alike on all ranks.

        They are measured when the next evaluation asks for them, after a resume too.
        """
        self._quick = True
        try:
            yield
        finally:
            self._quick = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put this rank's own statistics back on resume: DDP's constructor has just made them rank 0's."""
        check_whole_checkpoints(trainer)
        if self._is_precise(pl_module):
            model_of(pl_module)
        self._forget()
        self._weights_moved = False
        stored, self._stored = self._stored or {}, None
        self._frozen = bool(stored.get("frozen")) and self._spec.frozen_last > 0
        ranks = stored.get("rank_statistics")
        if ranks is None or self._frozen:  # all ranks share one set: the saved one
            return
        self._weights_moved = not stored.get("evaluated", True)
        if len(ranks) == collectives.world_size():
            if not self._weights_moved:
                self._evaluated = own_running_stats(pl_module)  # the saved ones, until a step is made
            swap_in(pl_module, ranks[collectives.rank()])
        elif self._spec.evaluation != "running" or not _alike(ranks):
            _log.warning(
                "The checkpoint has the statistics of %d ranks, and there are %d now: all start from the saved ones.",
                len(ranks),
                collectives.world_size(),
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the step from which on the statistics are constants; refuse what would fail at the first validation."""
        if self._spec.evaluation != "running":
            check_buffers_stay(trainer, pl_module)
        if self._is_precise(pl_module) and self._batches is None:
            again(trainer.train_dataloader)
        self._loader = trainer.train_dataloader
        self._freeze_at = first_frozen_step(trainer, self._spec.frozen_last)

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
        if self._frozen:
            self._constant.hold(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let frozen layers follow the module's mode again."""
        self._constant.release(pl_module)

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
        statistics = self._statistics(trainer, pl_module, quick=self._quick)
        write_into(checkpoint["state_dict"], pl_module, statistics)
        ranks, evaluated = self._gather(pl_module), self._evaluated is not None
        entry = checkpoints.entry(self._spec, ranks, frozen=self._frozen, evaluated=evaluated)
        checkpoint.setdefault(checkpoints.ENTRY, {}).update(entry)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what each rank goes on with until training starts; what is loaded is evaluated as it is.

        Unless it was saved within `quick_saves()`: then its precise statistics are measured now.
        """
        stored = checkpoint.get(checkpoints.ENTRY) or {}
        self._weights_moved = False
        if trainer.state.fn == TrainerFn.FITTING:
            self._stored = stored
        elif not stored.get("evaluated", True) and self._is_precise(pl_module):
            self._weights_moved = not (self._batches is None and self._loader is None) or has_training_loader(trainer)
            if not self._weights_moved and trainer.is_global_zero:
                _log.warning(
                    "The checkpoint has pooled statistics where precise ones were decided, and there are no training "
                    "batches to measure them over. Give EvaluationStatistics(spec, batches=…)."
                )

    def _forget(self) -> None:
        self._gathered = self._evaluated = None

    def _statistics(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, quick: bool = False) -> Statistics:
        """Compute what evaluation normalizes with, once a training step; pooled, where precise would not be quick.

        The same on every rank.
        """
        shared, precise = self._is_shared(pl_module), self._is_precise(pl_module) and not self._frozen
        stale, moved = self._evaluated is None, self._weights_moved
        if precise or not shared:  # a rank whose batches have ended made no step, and must come along
            every = collectives.agree((stale, moved), "the agreement on new evaluation statistics")
            stale, moved = (any(told) for told in zip(*every, strict=True))
        if stale or self._evaluated is None:
            self._forget()
            ranks = self._gather(pl_module)
            if quick and precise and moved:
                return pooled(ranks)
            self._evaluated = dict(ranks[0]) if shared or self._spec.evaluation == "running" else pooled(ranks)
            if precise and moved:
                self._evaluated |= self._calibrate(trainer, pl_module)
        return self._evaluated

    def _gather(self, pl_module: pl.LightningModule) -> list[Statistics]:
        if self._gathered is None and self._is_shared(pl_module):
            self._gathered = [own_running_stats(pl_module)] * collectives.world_size()
        elif self._gathered is None:
            self._gathered = gather_running_stats(pl_module)
        return self._gathered

    def _is_shared(self, pl_module: pl.LightningModule) -> bool:
        return self._frozen or all(shares_one_set(layer) for _, layer in normalization_layers(pl_module))

    def _is_precise(self, pl_module: pl.LightningModule) -> bool:
        return self._spec.evaluation == "precise" and any(True for _ in normalization_layers(pl_module))

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Statistics:
        batches = self._batches
        if batches is None:  # where nothing was left to train, there was no loader
            batches = again(training_loader(trainer) if self._loader is None else self._loader)
        inputs, forward = training_inputs(trainer, pl_module, batches), training_forward(trainer, pl_module)
        return calibrate(pl_module, inputs, self._num_samples, forward=forward)


def _alike(ranks: list[Statistics]) -> bool:
    return all(torch.equal(own[key], value) for own in ranks for key, value in ranks[0].items())
