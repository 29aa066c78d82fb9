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

from distnorm import averaging, collectives
from distnorm import checkpoint as checkpoints
from distnorm.evaluation import ComputedStatistics
from distnorm.freezing import HeldLayers, first_frozen_step
from distnorm.lightning_names import EitherName
from distnorm.population import Statistics, pooled, swap_in, write_into
from distnorm.replay import again, model_of
from distnorm.spec import NormSpec
from distnorm.swapping import SwappedStatistics
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

    With Lightning's `WeightAveraging` or `EMAWeightAveraging`, before or after this in the list of callbacks, the
    statistics are those of the averaged weights: `precise` is measured with them, `pooled` and `running` use the
    running statistics that the average holds on each rank. Validation, checkpoints and the model after `fit` have the
    averaged weights with these statistics, alike on all ranks. The trained weights, and each rank's own statistics of
    both, are saved too. A callback of yours that saves within an epoch belongs after the averaging one. A callback of
    yours that swaps weights belongs before this one, and swaps in `on_validation_start`; otherwise a warning says that
    the statistics belong to other weights.

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
        numbers a layer, all layers in one; else none. `precise`: the agreement always, and those of `calibrate`. With
        averaged weights a checkpoint has 1 gather more, of the trained weights' own statistics.
        `frozen_last`: 1 agreement at the start; none after the switch.

    Raises:
        ConfigError: (before the first step) `precise` has nothing to run (the module has neither a `forward` nor a
            `model`) or no batches that it could take; `pooled` or `precise` under a DDP that sends rank 0's buffers
            around and cannot be kept from it; a `ModelCheckpoint` saves weights only; or `frozen_last` is a share of a
            training whose steps are not known.

    Source: Wu & Johnson 2021, section 3.2 (precise) and 3.4 (frozen late).
    """

    def __init__(self, spec: NormSpec, batches: Iterable[Any] | None = None, num_samples: int = 1024) -> None:
        self._spec, self._batches = spec, batches
        self._swapped = SwappedStatistics()
        self._computed = ComputedStatistics(spec, batches, num_samples, self._swapped)
        self._is_unchecked = self._warned = self._quick = False
        self._stored: dict[str, Any] | None = None
        self._freeze_at = math.inf
        self._constant = HeldLayers()

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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let a later `test` use the model's own weights, not the average of a fit that has ended, or failed."""
        if stage != "fit":
            averaging.forget_average(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put this rank's own statistics back on resume: DDP's constructor has just made them rank 0's."""
        check_whole_checkpoints(trainer)
        averaging.check_averages(trainer, self._spec.frozen_last)
        if self._computed.is_precise(pl_module):
            model_of(pl_module)
        self._computed.forget()
        self._computed.has_moved = False
        stored, self._stored = self._stored or {}, None
        self._computed.is_frozen = bool(stored.get("frozen")) and self._spec.frozen_last > 0
        if "rank_statistics" in stored and not self._computed.is_frozen:  # else all ranks share one set: the saved one
            self._resume(trainer, pl_module, stored)
        if averaging.has_averaging(trainer) and trainer.is_global_zero:
            words = "Evaluation, checkpoints and the model after training have the averaged weights"
            _log.info("%s, with %s statistics of their own.", words, self._spec.evaluation)

    def _resume(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stored: dict[str, Any]) -> None:
        ranks, average = stored["rank_statistics"], averaging.find_average(trainer)
        self._computed.has_moved = not stored.get("evaluated", True)
        if len(ranks) == collectives.world_size():
            evaluated = pl_module if average is None else average.module
            if not self._computed.has_moved:
                self._computed.keep(trainer, evaluated)  # the saved ones, until a step is made
            swap_in(pl_module, ranks[collectives.rank()])
            if average is not None:
                swap_in(average.module, stored.get("average_statistics", ranks)[collectives.rank()])
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
        if self._computed.is_precise(pl_module) and self._batches is None:
            again(trainer.train_dataloader)
        self._computed.loader = trainer.train_dataloader
        self._freeze_at = first_frozen_step(trainer, self._spec.frozen_last)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget what was computed, for training moves on; or keep the statistics as constants, when it is time."""
        self._swapped.forget()
        if not self._computed.is_frozen and trainer.global_step >= self._freeze_at:
            swap_in(pl_module, self._computed.compute(trainer, pl_module))
            self._computed.is_frozen = True
            if trainer.is_global_zero:
                words = "the statistics of the batch norms are constants from here on"
                _log.info("Step %d: %s (%s).", trainer.global_step, words, self._spec.evaluation)
        self._computed.forget()
        self._computed.has_moved, self._computed.loader = True, trainer.train_dataloader
        if self._computed.is_frozen:
            self._constant.hold(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let frozen layers follow the module's mode again."""
        self._constant.release(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave averaged weights with the statistics they were evaluated with, alike on all ranks."""
        average = averaging.current_average(trainer, pl_module)
        if average is not None:
            quick = not self._computed.can_measure(trainer)  # nothing was left to train
            statistics = self._computed.compute(trainer, pl_module, average, quick=quick)
            averaging.leave_average(trainer, pl_module)
            swap_in(pl_module, statistics)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the evaluation statistics in, where the weights are that will be evaluated."""
        if trainer.state.fn != TrainerFn.FITTING:  # no training step says when the statistics moved
            self._computed.forget()
        average = averaging.current_average(trainer, pl_module)
        statistics = self._computed.compute(trainer, pl_module, average)
        self._swapped.put(pl_module if average is None else average.module, statistics)
        self._is_unchecked = True

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Warn, once, if the first batch meets other weights or statistics than were swapped in."""
        unchecked, self._is_unchecked = self._is_unchecked, False
        if not unchecked or self._warned:
            return
        moved = [] if self._computed.is_of(trainer, pl_module) else ["weights"]
        moved += [] if self._swapped.is_in(pl_module) else ["batch norms' statistics"]
        if moved:
            self._warned = True
            _log.warning(
                "The evaluation does not use the %s statistics of its weights: the %s changed after "
                "EvaluationStatistics had put these in.\nPlace a callback that swaps weights before "
                "EvaluationStatistics in callbacks=[…] and let it swap in on_validation_start, or use Lightning's "
                "EMAWeightAveraging.",
                self._spec.evaluation,
                " and the ".join(moved),
            )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what layers that were in training mode have made of the statistics."""
        self._swapped.note_end(pl_module if self._computed.is_of(trainer, pl_module) else None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the rank's own back in."""
        self._swapped.take_out()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the evaluation statistics in; a loaded checkpoint's are alike on all ranks, and pool to themselves."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Check the first batch; see `on_validation_batch_start`."""
        self.on_validation_batch_start(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what is left of the statistics; see `on_validation_epoch_end`."""
        self.on_validation_epoch_end(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the rank's own back in."""
        self.on_validation_end(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the evaluation statistics in."""
        self.on_validation_start(trainer, pl_module)

    def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Check the first batch; see `on_validation_batch_start`."""
        self.on_validation_batch_start(trainer, pl_module)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what is left of the statistics; see `on_validation_epoch_end`."""
        self.on_validation_epoch_end(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the rank's own back in."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as training left it, also when evaluation failed."""
        average = averaging.find_average(trainer)
        if average is not None and self._swapped.is_in(pl_module) and not self._swapped.is_in(average.module):
            averaging.swap_weights(pl_module, average)
        self._swapped.forget()
        self.on_train_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the evaluation statistics into the `state_dict`, each rank's own beside it; called on all ranks."""
        if averaging.find_average(trainer) is not None:
            self._swapped.take_out()  # a callback may save before this one has seen the validation's end
        average = averaging.current_average(trainer, pl_module)
        statistics = self._computed.compute(trainer, pl_module, average, quick=self._quick)
        ranks, evaluated = self._computed.gather(pl_module), self._computed.is_evaluation
        entry = checkpoints.entry(self._spec, ranks, frozen=self._computed.is_frozen, evaluated=evaluated)
        if average is None:
            write_into(checkpoint["state_dict"], pl_module, statistics)
        else:
            own = ranks[0] if self._spec.evaluation == "running" else pooled(ranks)
            averaging.write_average(checkpoint, pl_module, average, statistics, own)
            entry["average_statistics"] = self._computed.gather(pl_module, average)
        checkpoint.setdefault(checkpoints.ENTRY, {}).update(entry)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what each rank goes on with until training starts; what is loaded is evaluated as it is.

        Unless it was saved within `quick_saves()`: then its precise statistics are measured now.
        """
        stored = checkpoint.get(checkpoints.ENTRY) or {}
        self._computed.has_moved = False
        if trainer.state.fn == TrainerFn.FITTING:
            self._stored = stored
            if not averaging.has_averaging(trainer) and averaging.load_trained_weights(pl_module, checkpoint):
                self._stored = {**stored, "evaluated": False}  # the saved statistics are the average's
                if trainer.is_global_zero:
                    _log.warning(
                        "The checkpoint has averaged weights, and this trainer averages none: training continues with "
                        "the trained weights, without an average. To keep it, use trainer.ema, or EMAWeightAveraging."
                    )
        elif not stored.get("evaluated", True) and self._computed.is_precise(pl_module):
            self._computed.has_moved = self._computed.can_measure(trainer)
            if not self._computed.has_moved and trainer.is_global_zero:
                _log.warning(
                    "The checkpoint has pooled statistics where precise ones were decided, and there are no training "
                    "batches to measure them over. Give EvaluationStatistics(spec, batches=…)."
                )


def _alike(ranks: list[Statistics]) -> bool:
    return all(torch.equal(own[key], value) for own in ranks for key, value in ranks[0].items())
