"""A run that is told to stop: all ranks agree on a step, save there together, and end; and saves every few minutes.

Legend: K = 2 wishes of a rank: the reason to stop, and whether a checkpoint is due.
"""

import contextlib
import enum
import functools
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from distnorm import collectives
from distnorm.launch import signals
from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.run_dir import RunFolder

_VOTE = "the vote on whether to stop"
_LOOK_EVERY_S = 1.0
_SLURM_MARGIN_S = 60.0


class Reason(enum.IntEnum):
    """Why a run stops; of several the greatest counts: who asks by a file wants no requeue."""

    NONE = 0
    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGTERM = 3
    FILE = 4


class Preemption(Callback):
    """Stop at a step that all ranks agree on, saved, when one of them is told to; save every `every_s` seconds.

    A rank is told by USR1, by TERM, by a time limit, or (rank 0, that looks about once a second) by the file `stop` in
    the run folder. A signal's handler only notes it. At the end of every batch the ranks start a vote beside the
    training and hear the outcome of the one before: so all act at the same step, that of an optimizer's, at most one
    later than told. The training then ends in `RunInterruptedError`, without validation. What is told after the last
    vote of the training counts when it ends. A test at the end is not interrupted: it goes on.

    Lightning's own handling of signals, that broadcasts inside a handler and at every batch, is switched off.

    Args:
        run: its folder; the file `stop` in it is removed once obeyed.
        save: saves the last checkpoint, and says why it could not; called on all ranks.
        every_s: seconds between checkpoints, by rank 0's clock.
        time_limit_s: seconds from now until the run stops; `None`: no limit. A SLURM job stops a minute before its end.
        requeue: whether a SLURM job asks to be requeued, unless stopped by the file.
        patience_s: how much longer than its longest recent step a rank that was told to stop waits for the others.

    Collective: 1 vote of 2 integers a batch, one more a validation and two at the end of the training; those of a
        checkpoint when it is due. With one rank: none.

    Raises:
        RunInterruptedError: (on all ranks) the run was told to stop, and has saved.
        GroupError: a rank did not come to the vote; nothing is saved then, and the old checkpoint stays.
    """

    def __init__(
        self,
        run: RunFolder,
        save: Callable[[pl.Trainer], str | None],
        *,
        every_s: float,
        time_limit_s: float | None = None,
        requeue: bool = False,
        patience_s: float = 10.0,
    ) -> None:
        self._run, self._save, self._every_s = run, save, every_s
        self._requeue, self._patience_s = requeue, patience_s
        self._ends_at = time.time() + min(time_limit_s or math.inf, _seconds_of_job())
        self._signals = contextlib.ExitStack()
        self._vote: collectives.Vote | None = None
        self._asked_by_file = Reason.NONE
        self._looked = self._saved = self._batch_ended = time.monotonic()
        self._recent_s: deque[float] = deque([0.0], maxlen=100)
        self._step = 0
        self._outcome = (Reason.NONE, False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note signals from here on; they count from the first step."""
        _switch_off_lightnings_own(trainer)
        _make_workers_stay(trainer.strategy)
        if stage == "fit":
            self._signals.enter_context(signals.listening())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals back from whoever took them since, and start the first vote and the clocks."""
        self._signals.enter_context(signals.listening())
        self._saved = self._batch_ended = time.monotonic()
        self._step = trainer.global_step
        self._vote = collectives.start_vote(self._wishes(), _VOTE)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep evaluation out of the time of a step."""
        self._batch_ended = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise, and let what was told meanwhile count in the next batch already: hold the vote anew."""
        self._batch_ended = time.monotonic()
        if self._vote is not None:
            self._hear()
            self._vote = collectives.start_vote(self._wishes(), _VOTE)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hear the last vote; save and stop where it says so and the optimizer has stepped; start the next."""
        self._hear()
        now = time.monotonic()
        self._recent_s.append(now - self._batch_ended)
        self._batch_ended = now
        reason, save = self._outcome
        if (reason or save) and trainer.global_step != self._step:
            if reason:
                _finish_batch(trainer, pl_module, outputs, batch, batch_idx)
            failure = self._save(trainer)
            if reason:
                self._stop(trainer, reason, failure)
            self._outcome = (Reason.NONE, False)
            self._saved = self._batch_ended = time.monotonic()
        self._step = trainer.global_step
        self._vote = collectives.start_vote(self._wishes(), _VOTE)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hear the last vote, and hold one more for what was told since; what training made is saved already."""
        self._hear()
        self._vote = collectives.start_vote(self._wishes(), _VOTE)
        self._hear()
        self._vote = None
        reason, _ = self._outcome
        if reason:
            self._stop(trainer, reason)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the handlers back that were there."""
        self._vote = None
        self._signals.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self.on_fit_end(trainer, pl_module)

    def _told(self) -> Reason:
        """Say why this rank should stop."""
        heard = signals.heard()
        by_signal = Reason.NONE if heard is None else Reason[heard.name]
        by_clock = Reason.TIME_LIMIT if time.time() >= self._ends_at else Reason.NONE
        if collectives.rank() == 0 and not self._asked_by_file and time.monotonic() - self._looked >= _LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._asked_by_file = _read(self._run)
        return max(by_signal, by_clock, self._asked_by_file)

    def _wishes(self) -> torch.Tensor:
        is_due = collectives.rank() == 0 and time.monotonic() - self._saved >= self._every_s
        return torch.tensor([self._told(), is_due], dtype=torch.int32)

    def _hear(self) -> None:
        """Add the outcome of the vote that is under way: what was decided stays so until it is done."""
        assert self._vote is not None
        timeout_s = self._patience_s + max(self._recent_s) if self._told() else None
        told, is_due = self._vote.wait(timeout_s).tolist()
        self._outcome = (max(self._outcome[0], Reason(told)), self._outcome[1] or bool(is_due))

    def _stop(self, trainer: pl.Trainer, reason: Reason, failure: str | None = None) -> NoReturn:
        if trainer.is_global_zero:
            self._run.stop.unlink(missing_ok=True)
        how = {Reason.TIME_LIMIT: "its time limit", Reason.FILE: f"the file {self._run.stop}"}.get(reason, reason.name)
        saved = f"saved in {self._run.checkpoints / 'last.ckpt'}"
        if failure is not None:
            saved = f"could not save ({failure}): the checkpoint before it stays"
        raise RunInterruptedError(
            f"Stopped by {how} after step {trainer.global_step}, and {saved}.\n"
            f"Go on with the same command and ckpt_path={self._run.path}",
            wants_requeue=self._requeue and reason != Reason.FILE,
        )


def _read(run: RunFolder) -> Reason:
    """Read the request in the run's folder: the name of a signal that the launching process had, or anything."""
    try:
        words = run.stop.read_text().strip()
    except FileNotFoundError:
        return Reason.NONE
    except (OSError, UnicodeDecodeError):
        return Reason.FILE
    return Reason[words] if words in ("SIGUSR1", "SIGTERM") else Reason.FILE


def _switch_off_lightnings_own(trainer: pl.Trainer) -> None:
    """Let Lightning leave signals alone, which 2.6.6 has no switch for.

    Its handler broadcasts where the ranks are not at one place, and it broadcasts at the start of every batch whether a
    handler has run: a wait for the device each step, and for a peer that stalls as long as the group's timeout.
    """
    connector: Any = getattr(trainer, "_signal_connector")  # noqa: B009
    connector.register_signal_handlers = lambda: None
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None  # noqa: SLF001


def _make_workers_stay(strategy: Any) -> None:
    """Let the processes of every loader ignore what the run is told: schedulers signal all processes there are.

    One that dies of it takes its rank along, before that could save.
    """
    process: Any = strategy.process_dataloader

    def processed(loader: Any) -> Any:
        loader = process(loader)
        if getattr(loader, "num_workers", 0):
            loader.worker_init_fn = functools.partial(_stay, before=loader.worker_init_fn)
        return loader

    strategy.process_dataloader = processed


def _stay(worker: int, before: Callable[[int], None] | None) -> None:
    for told in signals.LISTENED:
        signal.signal(told, signal.SIG_IGN)
    if before is not None:
        before(worker)


def _seconds_of_job(environ: Mapping[str, str] = os.environ) -> float:
    """Give the seconds that a SLURM job has left to train, where it says when it ends."""
    end = environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - _SLURM_MARGIN_S - time.time() if end.isdigit() else math.inf


def _finish_batch(trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
    """Do what Lightning does after the callbacks at the end of a batch: the module's own hook, and the logging."""
    pl_module.on_train_batch_end(outputs, batch, batch_idx)
    connector: Any = getattr(trainer, "_logger_connector")  # noqa: B009
    connector.on_batch_end()
    connector.update_train_step_metrics()
