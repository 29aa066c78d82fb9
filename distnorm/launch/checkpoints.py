"""When a run writes checkpoints, how, and which of them is tested.

`best.ckpt` has the lowest validation loss (accuracy ties, and would keep the earliest), `last.ckpt` the end.
"""

import contextlib
import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from distnorm import checkpoint, collectives
from distnorm.callbacks import EvaluationStatistics
from distnorm.errors import ConfigError
from distnorm.launch.run_dir import RunFolder
from distnorm.loop_state import is_between_steps

_log = logging.getLogger(__name__)
_SCORES = (
    "best_k_models",
    "best_model_path",
    "best_model_score",
    "current_score",
    "kth_best_model_path",
    "kth_value",
)


class LastCheckpoint(Callback):
    """Save `last.ckpt` after every epoch and when training ends, in the middle of an epoch too, and whenever asked.

    Lightning's `save_last` writes only where a *best* checkpoint was written as well (2.6.6).

    Args:
        run: the folder.

    Attributes:
        failure: why the last save failed, alike on all ranks: a full disk; `None` where it did not.

    Collective: Lightning's own for a checkpoint, those of the callbacks that add to it, and 1 agreement.
    """

    def __init__(self, run: RunFolder) -> None:
        self._path = run.checkpoints / checkpoint.LAST
        self._saved_at = (-1, -1)
        self.failure: str | None = None

    def save(self, trainer: pl.Trainer) -> bool:
        """Save at the end of a batch, from a callback's `on_train_batch_end`; every rank must call, after the same one.

        Returns:
            Whether it was time to, alike on all ranks. It is not while gradients are accumulated over several batches:
            call again after the next one.
        """
        if not is_between_steps(trainer):
            return False
        place = (trainer.global_step, trainer.fit_loop.epoch_progress.state_dict()["current"]["processed"])
        if place != self._saved_at:
            trainer.save_checkpoint(self._path)
            self.failure = collectives.agree(_failure_of(trainer), "the news of a save")[0]
            self._saved_at = place if self.failure is None else (-1, -1)
        return True

    def save_quickly(self, trainer: pl.Trainer) -> str | None:
        """Save to go on from, without measuring what only an evaluation needs; otherwise as `save`.

        Returns:
            Why it failed, alike on all ranks; `None` where it did not.
        """
        with contextlib.ExitStack() as quick:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning adds it late
                if isinstance(callback, EvaluationStatistics):
                    quick.enter_context(callback.quick_saves())
            self.save(trainer)
        return self.failure

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, where steps were made since the last time; alike on every rank."""
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what the last epoch has added."""
        self.save(trainer)


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint with the lowest validation loss, over a resume too: a new folder starts with the old best.

    Lightning forgets the best score whenever the folder changes, as it does at every resume. It also keeps the score
    of a checkpoint that the disk refused: here the score is that of the file which is there.

    Args:
        run: the folder.
        resumed_from: the checkpoint that training goes on from.

    Collective: Lightning's own for a checkpoint, and 1 agreement on whether it was saved.
    """

    def __init__(self, run: RunFolder, resumed_from: str | None) -> None:
        # After a validation, not at the end of its epoch: `last.ckpt`, saved there, must know of it.
        own: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": False}
        super().__init__(run.checkpoints, "best", monitor="val/loss", **own)
        self._before = Path(resumed_from).with_name("best.ckpt") if resumed_from else None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what is better than before; where that fails, what was before stays the best, alike on every rank."""
        before = {name: copy.copy(getattr(self, name)) for name in _SCORES}
        score = self.current_score
        super().on_validation_end(trainer, pl_module)
        if self.current_score is not score and collectives.agree(_failure_of(trainer), "the news of a save")[0]:
            vars(self).update(before)

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
    """Test the best checkpoint, or the last one where training ended before its first validation, or best is damaged.

    Returns:
        The checkpoint that was tested, and its metrics over all ranks.

    Collective: 1 agreement on the checkpoint; Lightning's own.

    Raises:
        ConfigError: no checkpoint could be saved, or none can be read; alike on all ranks.
    """
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    found: Path | ConfigError | None = None
    if collectives.rank() == 0:
        try:
            found = _good(Path(best) if best else None, run, trainer.ckpt_path)
        except ConfigError as error:
            found = error
    tested = collectives.agree(found, "the checkpoint to test")[0]
    if isinstance(tested, ConfigError):
        raise tested
    trainer.test(task, datamodule=data, ckpt_path=tested, verbose=False)
    return tested, {name: float(value) for name, value in trainer.callback_metrics.items()}


def _good(best: Path | None, run: RunFolder, resumed_from: str | Path | None = None) -> Path:
    """Choose the best checkpoint, else the last, else the one that training had nothing to add to."""
    if best is None or not best.is_file():
        if any(run.checkpoints.glob("*.ckpt")):
            return checkpoint.find(run.path)
        if resumed_from:
            return checkpoint.find(resumed_from)
        raise ConfigError(f"{run.checkpoints} holds no checkpoint to test: none could be saved. Make room there first.")
    if (damage := checkpoint.damage_of(best)) is None:
        return best
    last = checkpoint.find(run.path)
    _log.warning("%s is damaged (%s): %s is tested instead.", best, damage, last)
    return last


def _failure_of(trainer: pl.Trainer) -> str | None:
    """Give what this rank's disk said to the last save."""
    return getattr(trainer.strategy.checkpoint_io, "failure", None)
