"""A callback for any Lightning Trainer: ranks that differ end with a message, and a hang says who left before what."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

from distnorm import agreement, positions
from distnorm.conversion import Conversion
from distnorm.errors import ConfigError
from distnorm.lightning_names import EitherName, is_either
from distnorm.norms.base import AbstractBatchStatisticsNorm


class RankDiagnosis(EitherName, Callback):
    """Check before the first step that all ranks train the same layers, and keep their positions for a hang.

    Positions are kept, and debugging stays on, after the fit too: an evaluation that pools statistics can hang as well.

    Args:
        conversion: what `convert` returned; its layers must still be ours when training starts.
        folder: for the ranks' positions, one for all; `None` keeps none.
        debug: compare all ranks before every exchange of a layer: slow.

    Collective: 6 gathers over a gloo side group of all ranks before the first step: nothing in a step, without `debug`.

    Raises:
        ConfigError: the ranks differ, or a converted layer was replaced; on every rank alike.
        GroupError: a rank never came.
    """

    def __init__(
        self, conversion: Conversion | None = None, folder: str | Path | None = None, *, debug: bool = False
    ) -> None:
        self._conversion, self._debug = conversion, debug
        self._folder = None if folder is None else Path(folder)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare the ranks' layers: the process group exists, and DDP's own check of shapes is still to come."""
        if stage != "fit":
            return
        agreement.name_layers(pl_module)
        complaint = _lightnings_own_conversion(trainer, pl_module)
        started = agreement.compare(pl_module, modes=False, debug=self._debug, complaint=complaint)
        agreement.prepare(pl_module, self._folder, started, debug=self._debug)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether somebody replaced converted layers: the last conversion has run."""
        complaint = None
        try:
            if self._conversion is not None:
                self._conversion.check()
        except ConfigError as error:
            complaint = str(error)
        agreement.compare(pl_module, modes=False, debug=self._debug, complaint=complaint)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare which layers train: a rank whose layer evaluates would not come to the exchange of the others."""
        agreement.compare(pl_module, modes=True, debug=self._debug)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step."""
        positions.at_step(trainer.global_step)


def _lightnings_own_conversion(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
    ours = [layer for layer in pl_module.modules() if isinstance(layer, AbstractBatchStatisticsNorm)]
    if ours and is_either(getattr(trainer.strategy, "_layer_sync", None), TorchSyncBatchNorm):
        return (
            f"Trainer(sync_batchnorm=True) would replace {ours[0].name_in_words()}, a {type(ours[0]).__name__} of "
            "distnorm's, with torch's.\nLeave sync_batchnorm out: convert() has decided which layers synchronize."
        )
    return None
