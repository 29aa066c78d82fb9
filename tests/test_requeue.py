"""What becomes of a SLURM job that was told to stop; `tests/test_campaign.py` has one requeued by a real SLURM."""

import os

import pytest

from distnorm.launch.endings import REQUEUE, STOPPED, RunInterruptedError
from distnorm.launch.requeue import job_id, requeue

pytestmark = pytest.mark.unit

IN_JOB = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "distnorm"}
TOLD = RunInterruptedError("Stopped by SIGTERM after step 3.", wants_requeue=True)


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({}, None),
        (IN_JOB, "12"),
        (IN_JOB | {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}, "10_2"),
        (IN_JOB | {"SLURM_JOB_NAME": "interactive"}, None),
    ],
)
def test_the_job_is_named_as_scontrol_wants_it(environ, job):
    assert job_id(environ) == job


@pytest.mark.parametrize(
    ("ending", "environ"),
    [(TOLD, {}), (RunInterruptedError("Stopped by the file stop."), IN_JOB)],
    ids=["shell", "file"],
)
def test_nothing_is_asked_outside_a_job_or_where_nobody_wants_it(ending, environ):
    assert requeue(ending, environ) is ending
    assert ending.exit_code == STOPPED


def test_without_scontrol_the_exit_code_asks_the_batch_script(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    ending = requeue(TOLD, IN_JOB)
    assert ending.exit_code == REQUEUE
    assert "scontrol could not requeue job 12" in str(ending)
    assert "exit code 76 asks for it" in str(ending)
    assert len(str(ending).splitlines()) <= 3


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_job_that_somebody_cancels_is_left_alone(monkeypatch, tmp_path, state):
    asked = scontrol(monkeypatch, tmp_path, f'echo "JobId=12 JobState={state} Reason=None"')
    ending = requeue(TOLD, IN_JOB)
    assert ending.exit_code == STOPPED
    assert f"SLURM job 12 is {state}: it is not requeued." in str(ending)
    assert asked() == ["show job --oneliner 12"]


def test_a_running_job_is_requeued(monkeypatch, tmp_path):
    asked = scontrol(monkeypatch, tmp_path, 'echo "JobId=12 JobState=RUNNING Reason=None"')
    ending = requeue(TOLD, IN_JOB)
    assert ending.exit_code == STOPPED
    assert str(ending).endswith("SLURM requeues job 12, which goes on by itself.")
    assert asked() == ["show job --oneliner 12", "requeue 12"]


def test_a_refusal_is_told_in_slurms_words(monkeypatch, tmp_path):
    scontrol(
        monkeypatch, tmp_path, 'echo "JobState=RUNNING"; [ "$1" = show ] || { echo "Invalid job id" >&2; exit 1; }'
    )
    ending = requeue(TOLD, IN_JOB)
    assert ending.exit_code == REQUEUE
    assert "(Invalid job id)" in str(ending)


def scontrol(monkeypatch, folder, script):
    """Put a command of that name first, that notes what it is asked."""
    command, log = folder / "scontrol", folder / "asked"
    command.write_text(f'#!/bin/sh\necho "$*" >> {log}\n{script}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda: log.read_text().splitlines()
