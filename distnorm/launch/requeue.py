"""A SLURM job that was told to stop asks to be started again, and goes on in its run folder."""

import os
import re
import subprocess
from collections.abc import Mapping

from distnorm.launch.endings import REQUEUE, STOPPED, RunInterruptedError
from distnorm.launch.ranks import INTERACTIVE

_TIMEOUT_S = 20


def requeue(ending: RunInterruptedError, environ: Mapping[str, str] = os.environ) -> RunInterruptedError:
    """Have SLURM requeue the job that this is a part of, if the ending wants that; on one rank only.

    A job that is being canceled gets TERM too, as one that is preempted does; its state tells them apart, and it is
    left alone. Where `scontrol` cannot be run, as in many containers, or fails, the exit code asks the batch script.

    Args:
        ending: what ended the run, once all is saved and closed: SLURM ends the job at once.
        environ: where SLURM leaves the job's id.

    Returns:
        The ending, with a line on what becomes of the job, and the exit code for it.
    """
    job = job_id(environ)
    if not ending.wants_requeue or job is None:
        return ending
    try:
        state = _state(_scontrol("show", "job", "--oneliner", job))
        if state != "RUNNING":
            return _with(ending, f"SLURM job {job} is {state}: it is not requeued.", STOPPED)
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip().splitlines()[0][:120]
        return _with(ending, f"scontrol could not requeue job {job} ({why}): exit code {REQUEUE} asks for it.", REQUEUE)
    return _with(ending, f"SLURM requeues job {job}, which goes on by itself.", STOPPED)


def job_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """Name the SLURM job that this is a part of, an array's task as `<array job>_<task>`; `None` at a shell."""
    if environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def _with(ending: RunInterruptedError, line: str, exit_code: int) -> RunInterruptedError:
    return RunInterruptedError(f"{ending}\n{line}", exit_code)


def _scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout


def _state(job: str) -> str:
    found = re.search(r"\bJobState=(\w+)", job)
    return found.group(1) if found else "UNKNOWN"
