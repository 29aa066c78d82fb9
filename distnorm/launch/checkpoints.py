"""When a run writes checkpoints, how, and which of them is tested.

`best.ckpt` has the lowest validation loss (accuracy ties, and would keep the earliest), `last.ckpt` the end.
"""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from distnorm.launch.run_dir import RunFolder


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and rename it: a kill leaves the old one or the new one, never half.

    Lightning's own writes in the system's temporary folder and moves, which copies where that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one checkpoint; Lightning calls this on rank 0."""
        place = Path(path)
        partial = place.with_name(f".{place.name}.{os.getpid()}")
        super().save_checkpoint(checkpoint, partial, storage_options)
        partial.replace(place)


class LastCheckpoint(Callback):
    """Save `last.ckpt` after every epoch and when training ends, in the middle of an epoch too.

    Lightning's `save_last` writes only where a *best* checkpoint was written as well (2.6.6).

    Args:
        run: the folder.

    Collective: Lightning's own for a checkpoint.
    """

    def __init__(self, run: RunFolder) -> None:
        self._path = run.checkpoints / "last.ckpt"
        self._saved_at = -1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, where steps were made since the last time; alike on every rank."""
        if trainer.global_step != self._saved_at:
            trainer.save_checkpoint(self._path)
            self._saved_at = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what the last epoch has added."""
        self.on_train_epoch_end(trainer, pl_module)


def checkpoint_callbacks(run: RunFolder) -> list[Callback]:
    """Make the callbacks that write both checkpoints."""
    best = ModelCheckpoint(run.checkpoints, "best", monitor="val/loss", enable_version_counter=False)
    return [best, LastCheckpoint(run)]


def test(
    trainer: pl.Trainer, task: pl.LightningModule, data: pl.LightningDataModule, run: RunFolder
) -> tuple[Path, dict[str, float]]:
    """Test the best checkpoint, or the last one where training ended before its first validation.

    Returns:
        The checkpoint that was tested, and its metrics over all ranks.
    """
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    tested = Path(best) if best else run.checkpoints / "last.ckpt"
    trainer.test(task, datamodule=data, ckpt_path=tested, verbose=False)
    return tested, {name: float(value) for name, value in trainer.callback_metrics.items()}
