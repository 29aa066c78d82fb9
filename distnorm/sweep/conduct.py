"""Run the jobs of a sweep in processes of their own: one that fails takes no other along, one done is not repeated."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distnorm.errors import ConfigError, DistNormError
from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.run_dir import RunFolder
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
        SweepError: a job failed; those that did not will be skipped the next time.
        RunInterruptedError: a job was told to stop, and has saved; the same command goes on.
    """
    folder = jobs[0].run.path.parents[1]
    mine = _mine(jobs, environ)
    done = sum(job.state == "done" for job in mine)
    if _speaks(environ):
        print(f"sweep     {folder}\n          {len(jobs)} jobs, {_share(jobs, mine)}{done} done already", flush=True)
    try:
        for job in mine:
            _run(job, start, speaks=_speaks(environ))
    finally:
        if _speaks(environ):
            rows = results.collect(jobs)
            results.write(rows, folder)
            results.show(rows, folder)
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
    if task >= len(jobs):
        raise ConfigError(
            f"The array has a task {task}, and the sweep has {len(jobs)} jobs, numbered from 0.\n"
            f"Submit it with --array=0-{len(jobs) - 1}."
        )
    return [jobs[task]]


def _share(jobs: Sequence[Job], mine: Sequence[Job]) -> str:
    return "" if len(mine) == len(jobs) else f"number {mine[0].number} here, "


def _speaks(environ: Mapping[str, str]) -> bool:
    """Tell whether this process writes: the only one, or the first of srun's."""
    return environ.get("SLURM_PROCID", "0") == "0"


def _run(job: Job, start: Start, *, speaks: bool) -> None:
    """Run one job, unless it is done or another process has it; its failure stays its own."""
    if job.run.result.is_file():
        return
    if speaks:
        print(f"--- {job.name}", flush=True)
        job.begin()
    with job.claimed() as is_free:
        if speaks and not is_free:
            print("    runs elsewhere, left alone", flush=True)
            return
        try:
            if isinstance(job.settings, DistNormError):
                raise job.settings
            start(job.settings, job.run)
        except RunInterruptedError:
            raise
        except (DistNormError, OSError, RuntimeError) as error:  # the other jobs go on
            print(f"{job.name}: {error}", file=sys.stderr, flush=True)
            if speaks:
                job.fail(error)
