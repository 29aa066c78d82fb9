"""Callbacks for any Lightning Trainer: evaluation with pooled statistics, that never reach the training."""

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from distnorm import checkpoint as checkpoints
from distnorm import collectives
from distnorm.population import (
    Statistics,
    gather_running_stats,
    own_running_stats,
    pooled,
    swap_in,
    write_into,
)
from distnorm.spec import NormSpec

_log = logging.getLogger(__name__)


class EvaluationStatistics(Callback):
    """Evaluate, and save, with the running statistics of all ranks pooled; go on training with each rank's own.

    Before a validation or test the pooled statistics are swapped in, after it the rank's own are back. A checkpoint's
    `state_dict` holds the pooled ones: what is evaluated is what is saved. Each rank's own travel beside them, and are
    put back when training resumes on as many ranks; on another number every rank starts from the pooled ones.

    Args:
        spec: the decision; it is kept in the checkpoint for `distnorm.load`.

    Collective: where the ranks' statistics differ (`spec.evaluation` is `pooled`), 1 gather of 2C + 1 float64 numbers a
        layer, all layers in one, before each evaluation or checkpoint after a training step; else none.
    """

    def __init__(self, spec: NormSpec) -> None:
        self._spec = spec
        self._gathered: list[Statistics] | None = None
        self._own: Statistics | None = None
        self._stored: list[Statistics] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put this rank's own statistics back on resume: DDP's constructor has just made them rank 0's."""
        self._gathered = None
        if self._stored is None or self._spec.evaluation == "running":  # all ranks share one set: the pooled one
            return
        ranks = collectives.world_size()
        if len(self._stored) == ranks:
            swap_in(pl_module, self._stored[collectives.rank()])
        else:
            _log.warning(
                "The checkpoint has the statistics of %d ranks, and there are %d now: all start from the pooled ones.",
                len(self._stored),
                ranks,
            )
        self._stored = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget what was pooled: training moves on."""
        self._gathered = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the pooled statistics in."""
        if trainer.state.fn != TrainerFn.FITTING:  # no training step says when the statistics moved
            self._gathered = None
        self._own = swap_in(pl_module, pooled(self._gather(pl_module)))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the rank's own back in."""
        if self._own is not None:
            swap_in(pl_module, self._own)
        self._own = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the pooled statistics in; a loaded checkpoint's are alike on all ranks, and pool to themselves."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the rank's own back in."""
        self.on_validation_end(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the pooled statistics in."""
        self.on_validation_start(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the rank's own back in."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as training left it, also when evaluation failed."""
        self.on_validation_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the pooled statistics into the `state_dict`, each rank's own beside it; called on all ranks."""
        ranks = self._gather(pl_module)
        write_into(checkpoint["state_dict"], pl_module, pooled(ranks))
        checkpoint[checkpoints.ENTRY] = checkpoints.entry(self._spec, ranks)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep each rank's own statistics until training starts."""
        self._stored = checkpoint.get(checkpoints.ENTRY, {}).get("rank_statistics")

    def _gather(self, pl_module: pl.LightningModule) -> list[Statistics]:
        if self._gathered is None and self._spec.evaluation == "running":
            self._gathered = [own_running_stats(pl_module)] * collectives.world_size()
        elif self._gathered is None:
            self._gathered = gather_running_stats(pl_module)
        return self._gathered
