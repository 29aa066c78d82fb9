"""Where numbers go: the record file in the run folder, always, and wandb."""

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import wandb
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from distnorm.drift.events import Event
from distnorm.drift.record import Record
from distnorm.launch.run_dir import RunFolder
from distnorm.lightning_names import EitherName
from distnorm.settings import LoggerSettings
from distnorm.wandb_logger import DriftWandbLogger, start_wandb

_log = logging.getLogger(__name__)
_OF_A_LAYER = re.compile(r"drift/(?!worst/|model/)")


class RecordLogger(EitherName, Logger):
    """A Lightning logger that appends every number, and what the drift monitor tells, to the run's `record.jsonl`.

    Args:
        run: the folder.
        about: named values for the record's first line.
    """

    def __init__(self, run: RunFolder, about: Mapping[str, Any]) -> None:
        super().__init__()
        self._run, self._about = run, about
        self._record: Record | None = None
        self._has_warned = False

    @property
    def name(self) -> str:
        """What Lightning calls this logger."""
        return "record"

    @property
    def version(self) -> str:
        """The run."""
        return self._run.path.name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; Lightning's own `epoch` goes with the rest, single layers' drift is in the events already."""
        rest = {key: value for key, value in metrics.items() if not _OF_A_LAYER.match(key)}
        if not rest:
            return
        try:
            self._opened().append(step or 0, rest)
        except OSError as error:  # a full disk is no reason to lose a training; the next row tries again
            if not self._has_warned:
                _log.warning("%s lacks rows from step %d on: %s. Make room there.", self._run.record, step or 0, error)
            self._has_warned, self._record = True, None

    @rank_zero_only
    def take(self, event: Event) -> None:
        """Append what the drift monitor tells."""
        self._opened().take(event)

    @rank_zero_only
    def rewind(self, step: int, time_s: float) -> None:
        """Take away what a run wrote after the checkpoint that it goes on from, in the same folder."""
        if self._run.record.exists():
            self._opened().rewind(step, time_s)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Leave them out: `config.yaml` has them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later row opens it again."""
        if self._record is not None:
            with contextlib.suppress(OSError):  # of a row that was said to be lost
                self._record.close()
            self._record = None

    def _opened(self) -> Record:
        if self._record is None:
            self._record = Record(self._run.record, self._about)
        return self._record


def make_loggers(
    settings: LoggerSettings, run: RunFolder, config: Mapping[str, Any], *, is_first: bool
) -> list[Logger]:
    """Make the record and, unless disabled, wandb; online without a key falls back to offline with one warning.

    Args:
        settings: mode and names.
        run: where files go.
        config: what wandb keeps as the run's configuration, and the record as its first line.
        is_first: whether this is rank 0; only there a warning is given.

    Collective: none; on other ranks the loggers do nothing.
    """
    loggers: list[Logger] = [RecordLogger(run, {"run": run.path.name, **config})]
    if settings.mode == "disabled":
        return loggers
    offline = settings.mode == "offline"
    if not offline and not _has_key():
        offline = True
        if is_first:
            _log.warning("logger.mode=online, and wandb has no API key here: logging offline. Run `wandb login` first.")
    started = start_wandb(settings, run, config, offline=offline) if is_first else None
    return [*loggers, DriftWandbLogger(started)]


def _has_key() -> bool:
    return bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.login(prompt=False, verify=False))
