"""Run the jobs of a sweep in processes of their own: one that fails takes no other along, one done is not repeated."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distnorm.errors import ConfigError, DistNormError
from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.run_dir import RunFolder, code_hash
from distnorm.settings import Settings
from distnorm.sweep import results
from distnorm.sweep.jobs import Job

Start = Callable[[Settings, RunFolder], None]


class SweepError(DistNormError):
    """Some of a sweep's jobs failed; the others are done."""

    exit_code = 1


def conduct(jobs: Sequence[Job], start: Start, environ: Mapping[str, str] = os.environ) -> Path:
    """Run what has not been run yet; in a task of a SLURM array, that task's job alone. Then write the results.

    Args:
        jobs: all of the sweep.
        start: runs one in its folder, and goes on from a checkpoint there.
        environ: where a SLURM array leaves its task's number.

    Returns:
        The sweep's folder.

    Raises:
        ConfigError: the array has a task more than the sweep has jobs.
        SweepError: a job failed; those that did not will be skipped the next time. Or an array's task found its job
            running elsewhere.
        RunInterruptedError: a job was told to stop, and has saved; the same command goes on.
    """
    folder = jobs[0].run.path.parents[1]
    mine = _mine(jobs, environ)
    if not _is_first(environ):  # a rank of an array's task: the first has the lock, and the word
        for job in mine:
            _follow(job, start)
        return folder
    print(f"sweep     {folder}\n          {len(jobs)} jobs, {_share(jobs, mine)}{_done(mine)}", flush=True)
    elsewhere: list[Job] = []
    try:
        elsewhere = [job for job in mine if not _run(job, start)]
    finally:
        rows = results.collect(jobs)
        results.write(rows, folder)
        results.show(rows, folder)
    if elsewhere and "SLURM_ARRAY_TASK_ID" in environ:  # other ranks wait for this one: it must not end well
        raise SweepError(
            f"Job {mine[0].number}, {mine[0].name}, runs in another process already. "
            "Wait for it, or cancel it; then requeue this task."
        )
    failed = [job for job in mine if job.state == "failed"]
    if failed:
        raise SweepError(
            f"{len(failed)} of {len(mine)} jobs failed; the reasons stand above. "
            "The same command runs them again, and skips what is done."
        )
    return folder


def _mine(jobs: Sequence[Job], environ: Mapping[str, str]) -> list[Job]:
    """Choose this process's share: everything, or one job of an array."""
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return list(jobs)
    task = int(environ["SLURM_ARRAY_TASK_ID"])
    if not 0 <= task < len(jobs):
        raise ConfigError(
            f"The array has a task {task}, and the sweep has {len(jobs)} jobs, numbered from 0.\n"
            f"Submit it with --array=0-{len(jobs) - 1}."
        )
    return [jobs[task]]


def _share(jobs: Sequence[Job], mine: Sequence[Job]) -> str:
    return "" if len(mine) == len(jobs) else f"number {mine[0].number} here, "


def _done(mine: Sequence[Job]) -> str:
    """Say how many jobs are done, and by what code."""
    done = [job for job in mine if job.state == "done"]
    other = sum(json.loads(job.run.result.read_text()).get("code_hash") != code_hash() for job in done)
    note = f" ({other} by other code: remove their folders to run them again)" if other else ""
    return f"{len(done)} done already{note}"


def _is_first(environ: Mapping[str, str]) -> bool:
    """Tell whether this process is the only one of its job, or the first of srun's."""
    return environ.get("SLURM_PROCID", "0") == "0"


def _run(job: Job, start: Start) -> bool:
    """Run one job, unless it is done; its failure stays its own.

    Returns:
        Whether it was free: another process may have it.
    """
    if job.run.result.is_file():
        return True
    print(f"--- {job.name}", flush=True)
    job.run.path.mkdir(parents=True, exist_ok=True)
    with job.claimed() as is_free:
        if not is_free:
            print("    runs elsewhere, left alone", flush=True)
            return False
        job.begin()
        try:
            _start(job, start)
        except RunInterruptedError:
            raise
        except (DistNormError, OSError, RuntimeError) as error:  # the other jobs go on
            print(f"{job.name}: {error}", file=sys.stderr, flush=True)
            job.fail(error)
    return True


def _follow(job: Job, start: Start) -> None:
    """Take part in a job as one of its other ranks; what is wrong ends this process, and is not hidden."""
    if not job.run.result.is_file():
        _start(job, start)


def _start(job: Job, start: Start) -> None:
    if isinstance(job.settings, DistNormError):
        raise job.settings
    start(job.settings, job.run)
