"""Start this machine's ranks through torch's elastic launcher, torchrun's engine; name the one that failed first.

Each rank is a fresh process of the same script, that reads its configuration from the run folder. Rank 0 keeps the
console; the others write to files. When one ends badly the others are ended, and none outlives this process.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distnorm.errors import DistNormError
from distnorm.launch import console, failures, signals
from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.run_dir import RUN_DIR, RunFolder, write_json, write_whole

_PATIENCE_S = 3
_TIME_TO_SAVE_S = 10
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


class RankError(DistNormError):
    """A rank ended badly; the message names the first, with its traceback unless the mistake is the user's."""

    exit_code = 1


def start_ranks(script: str, run: RunFolder, num_ranks: int) -> None:
    """Run `num_ranks` processes of `script` on this machine, and wait for them.

    USR1 or TERM to this process asks them to stop, through the run's folder; they are given the time to. Told again
    after 10 s, it ends them as they are, as Ctrl-C does at once.

    Args:
        script: the Python file that each rank executes.
        run: its folder holds the configuration, and takes the ranks' output.
        num_ranks: how many.

    Raises:
        RankError: a rank ended with an exception or by a signal; all others have been ended.
        RunInterruptedError: they were told to stop, and have saved.
    """
    with tempfile.TemporaryDirectory(prefix="distnorm-") as scratch:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=run.path.name,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
            **_shutdown_timeout(),
        )
        os.environ[RUN_DIR] = str(run.path)
        os.environ.setdefault("OMP_NUM_THREADS", str(_threads(run, num_ranks)))
        failures.forget(run)
        _ending_of(run).unlink(missing_ok=True)
        started = time.time()
        try:
            with _passing_on(run):
                elastic_launch(config, sys.executable)("-u", script)
        except ChildFailedError as error:
            raise RankError(failures.in_words(run, started, _how_ended(error))) from None
        except SignalException as error:
            print(*failures.where_the_ranks_were(run, started), sep="\n", file=sys.stderr, flush=True)
            raise SystemExit(128 + error.sigval) from None
        finally:
            del os.environ[RUN_DIR]
        _raise_ending(run)


def _threads(run: RunFolder, num_ranks: int) -> int:
    """Choose the threads of a rank's libraries, where torch's launcher would give 1 to all.

    On the CPU it is the number that torch has too, on any machine: another gives other bits. Beside a GPU it is a fair
    share of the cores.
    """
    trainer = run.read_settings().trainer
    on_cpu = trainer.accelerator == "cpu" or not torch.cuda.is_available()
    return trainer.threads_per_rank or (1 if on_cpu else max(1, (os.cpu_count() or 1) // num_ranks))


@contextlib.contextmanager
def _passing_on(run: RunFolder) -> Iterator[None]:
    """Ask the ranks to stop when this process is told to: their pids are torch's, and starting up they would die."""
    told_at: list[float] = []

    def ask(told: int, _: FrameType | None) -> None:
        told_at.append(time.monotonic())
        if told_at[-1] - told_at[0] > _TIME_TO_SAVE_S:
            raise SignalException("told to stop again", signal.Signals(told))
        write_whole(run.stop, signal.Signals(told).name)  # in one piece: rank 0 looks any time

    before = {told: signal.signal(told, ask) for told in signals.LISTENED}
    if already := signals.heard():
        ask(already, None)
    try:
        yield
    finally:
        for told, handler in before.items():
            signal.signal(told, handler)
        if told_at:  # they ended before they looked
            run.stop.unlink(missing_ok=True)


def become_rank(run: RunFolder, rank: int) -> None:
    """Prepare this process to be a rank: end with the launcher, and leave the console to rank 0."""
    end_with_parent()
    if rank:
        console.leave_to(run.log_of(rank))


def end_with_parent() -> None:
    """Make this process end when the one that started it does, however that ends."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if parent == 1 or os.getppid() != parent:  # it died before it could be watched
        raise SystemExit(1)


def note_ending(run: RunFolder, rank: int, error: RunInterruptedError) -> None:
    """Leave word, on rank 0, that the run was told to stop, for the launcher to say."""
    if rank == 0:
        write_json(_ending_of(run), {"message": str(error), "wants_requeue": error.wants_requeue})


def _raise_ending(run: RunFolder) -> None:
    """Raise what rank 0 left word of, where the ranks ended so."""
    file = _ending_of(run)
    if file.exists():
        note = json.loads(file.read_text())
        raise RunInterruptedError(note["message"], wants_requeue=note["wants_requeue"])


def _ending_of(run: RunFolder) -> Path:
    return run.ranks / "stopped.json"


def _shutdown_timeout() -> dict[str, Any]:
    """Ask for a quick end where this torch can be asked: 2.11 waits 30 s."""
    fields = {field.name for field in dataclasses.fields(LaunchConfig)}
    return {"shutdown_timeout": _PATIENCE_S} if "shutdown_timeout" in fields else {}


def _how_ended(error: ChildFailedError) -> dict[int, str]:
    """Say how ranks ended, those apart that the launcher itself ended for another's sake."""
    how = {
        rank: f"signal {failure.signal_name()}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        for rank, failure in error.failures.items()
    }
    themselves = [rank for rank in how if -error.failures[rank].exitcode not in (signal.SIGTERM, signal.SIGINT)]
    return {rank: f"{how[rank]} (process {error.failures[rank].pid})" for rank in themselves or how}
