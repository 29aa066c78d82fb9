"""When a run writes checkpoints, how, and which of them is tested.

`best.ckpt` has the lowest validation loss (accuracy ties, and would keep the earliest), `last.ckpt` the end.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from distnorm.launch.run_dir import RunFolder
from distnorm.loop_state import is_between_steps


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
    """Save `last.ckpt` after every epoch and when training ends, in the middle of an epoch too, and whenever asked.

    Lightning's `save_last` writes only where a *best* checkpoint was written as well (2.6.6).

    Args:
        run: the folder.

    Collective: Lightning's own for a checkpoint, and those of the callbacks that add to it.
    """

    def __init__(self, run: RunFolder) -> None:
        self._path = run.checkpoints / "last.ckpt"
        self._saved_at = (-1, -1)

    def save(self, trainer: pl.Trainer) -> bool:
        """Save at the end of a batch, from a callback's `on_train_batch_end`; every rank must call, after the same one.

        Returns:
            Whether it is saved: alike on all ranks. Not where the optimizer has not stepped, because gradients are
            accumulated over several batches: call again after the next one.
        """
        if not is_between_steps(trainer):
            return False
        place = (trainer.global_step, trainer.fit_loop.epoch_progress.state_dict()["current"]["processed"])
        if place != self._saved_at:
            trainer.save_checkpoint(self._path)
            self._saved_at = place
        return True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, where steps were made since the last time; alike on every rank."""
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what the last epoch has added."""
        self.save(trainer)


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint with the lowest validation loss, over a resume too: a new folder starts with the old best.

    Lightning forgets the best score whenever the folder changes, as it does at every resume.

    Args:
        run: the folder.
        resumed_from: the checkpoint that training goes on from.
    """

    def __init__(self, run: RunFolder, resumed_from: str | None) -> None:
        # After a validation, not at the end of its epoch: `last.ckpt`, saved there, must know of it.
        own: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": False}
        super().__init__(run.checkpoints, "best", monitor="val/loss", **own)
        self._before = Path(resumed_from).with_name("best.ckpt") if resumed_from else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best checkpoint and its score over; alike on every rank, but the first alone copies."""
        before, self._before = self._before, None  # the test at the end loads the state once more
        score = state_dict["best_model_score"]
        if before is None or score is None or not before.is_file():
            return
        path = str(Path(str(self.dirpath)) / "best.ckpt")
        if getattr(rank_zero_only, "rank", 0) == 0 and before.resolve() != Path(path).resolve():
            partial = f"{path}.partial"
            shutil.copyfile(before, partial)
            Path(partial).replace(path)
        self.best_model_path = self.kth_best_model_path = path
        self.best_model_score = self.kth_value = self.current_score = score
        self.best_k_models = {path: score}


def checkpoint_callbacks(run: RunFolder, resumed_from: str | None) -> list[Callback]:
    """Make the callbacks that write both checkpoints."""
    return [BestCheckpoint(run, resumed_from), LastCheckpoint(run)]


def test(
    trainer: pl.Trainer, task: pl.LightningModule, data: pl.LightningDataModule, run: RunFolder
) -> tuple[Path, dict[str, float]]:
    """Test the best checkpoint, or the last one where training ended before its first validation.

    Returns:
        The checkpoint that was tested, and its metrics over all ranks.
    """
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    resumed_from = trainer.ckpt_path or ""  # a training that was whole already writes none
    written = (Path(path) for path in (best, run.checkpoints / "last.ckpt", resumed_from) if path)
    tested = next(path for path in written if path.is_file())
    trainer.test(task, datamodule=data, ckpt_path=tested, verbose=False)
    return tested, {name: float(value) for name, value in trainer.callback_metrics.items()}
