"""Launches that the plain stack hangs in, or trains half the data with: each is refused, with what to type instead."""

import resource
import shutil
from pathlib import Path

import pytest
import torch

import distnorm
from distnorm.errors import ConfigError
from distnorm.launch import ranks
from tests import runs, tasks

pytestmark = pytest.mark.run

BATCH = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "distnorm"}  # what a batch script finds
TYPING = {**BATCH, "SLURM_JOB_NAME": "interactive"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
ALONE = {**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
TWO = {**STEP, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

LAUNCHES = [
    # what was typed, what it left, what was asked for → who starts how many ranks
    ("srun -n1", ALONE, "devices=1", ("nobody", 1)),
    ("srun -n2", TWO, "devices=1", ("slurm", 2)),
    ("srun -n2, in salloc's shell", TWO | {"SLURM_JOB_NAME": "interactive"}, "devices=1", ("slurm", 2)),
    ("srun --job-name=bash -n2", TWO | {"SLURM_JOB_NAME": "bash"}, "devices=2", ("slurm", 2)),
    ("srun -n2 --pty bash, then python", TWO | {"SLURM_PTY_PORT": "1"}, "devices=1", ("nobody", 1)),
    ("srun -n1, ranks of ours in it", ALONE, "devices=2 ranks_from=local", ("distnorm", 2)),
    ("sbatch -n1, python", {**BATCH, "SLURM_NTASKS": "1"}, "devices=1", ("nobody", 1)),
    ("sbatch, python", BATCH, "devices=2", ("distnorm", 2)),
    ("sbatch -n2, python, on purpose", {**BATCH, "SLURM_NTASKS": "2"}, "devices=2 ranks_from=local", ("distnorm", 2)),
    (
        "salloc -n2, python",
        {**BATCH, "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "interactive"},
        "devices=2",
        ("distnorm", 2),
    ),
    ("srun torchrun", ALONE | TORCHRUN, "devices=2", ("torchrun", 2)),
]
WRONG = [
    # … → the values, the remedy
    ("srun -n1", ALONE, "devices=2", "trainer.devices=2, and srun started 1 task", "srun --ntasks-per-node=2 python"),
    ("srun -n1 trainer=slurm", ALONE, "devices=2 ranks_from=slurm", "slurm started 1", "Use --ntasks-per-node=2"),
    ("sbatch -n2, python", {**BATCH, "SLURM_NTASKS": "2"}, "devices=2", "job 77 has 2 tasks", "srun python train.py"),
    (
        "sbatch -N2, python",
        {**BATCH, "SLURM_JOB_NUM_NODES": "2"},
        "devices=1",
        "has 2 nodes",
        "sbatch slurm/train.sbatch",
    ),
    ("srun --ntasks-per-node=2", TWO, "devices=4", "trainer.devices=4, but slurm started 2", "--ntasks-per-node=4, or"),
    ("torchrun of 2", TORCHRUN, "devices=4", "trainer.devices=4, but torchrun started 2", "--nproc-per-node=4, or"),
]


def find(environ, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changes = [f"trainer.{change}" for change in asked.split()]
    return ranks.find(runs.composed("trainer.num_nodes=auto", *changes).trainer, environ)


@pytest.mark.parametrize(("typed", "environ", "asked", "expected"), LAUNCHES, ids=lambda part: str(part)[:40])
def test_who_starts_the_ranks(typed, environ, asked, expected, monkeypatch):
    found = find(environ, asked, monkeypatch)
    assert (found.started_by, found.world_size) == expected


@pytest.mark.parametrize(("typed", "environ", "asked", "value", "remedy"), WRONG, ids=lambda part: str(part)[:40])
def test_a_launch_without_its_ranks_is_refused(typed, environ, asked, value, remedy, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        find(environ, asked, monkeypatch)
    words = str(caught.value)
    assert value in words
    assert remedy in words
    assert len(words.splitlines()) <= 3


def in_three_lines(task):
    assert task.returncode == 2
    assert "Traceback" not in task.stdout + task.stderr
    assert len(task.stderr.strip().splitlines()) <= 3


def test_other_code_on_one_rank_is_refused_on_both_within_30_s(tmp_path):
    copy = tmp_path / "other" / "distnorm"
    shutil.copytree(Path(distnorm.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "errors.py").open("a") as file:
        file.write("# an older version\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    overrides = ("trainer=slurm", "trainer.accelerator=cpu", "logger.mode=disabled", f"runs_dir={tmp_path / 'runs'}")
    command = ("-P", str(runs.ROOT / "train.py"), *overrides)  # -P: PYTHONPATH alone says whose distnorm it is
    first, second = tasks.srun(*command, of=lambda rank: {"PYTHONPATH": str(tmp_path / "other" if rank else runs.ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30  # of both together
    in_three_lines(first)
    in_three_lines(second)
    assert second.stderr == ""
    assert first.stderr.startswith("The ranks run different code of distnorm: ")
    assert f"in {runs.ROOT / 'distnorm'} (rank 0 on " in first.stderr
    assert f"in {copy} (rank 1 on " in first.stderr
    assert "Install the same version on every node" in first.stderr


LAUNCHED = """#!/bin/bash
doctor="-m distnorm.cli doctor trainer.accelerator=cpu trainer.timeout_s=60 runs_dir=$1"
one="--exact --nodes=1 --ntasks=1"
$PYTHON $doctor > $1/without_srun 2>&1 &
srun $one $PYTHON $doctor trainer.devices=2 > $1/one_task 2>&1 &
srun --exact --nodes=2 --ntasks-per-node=1 $PYTHON $doctor trainer=slurm trainer.devices=2 > $1/other_number 2>&1 &
srun --exact --nodes=2 --ntasks-per-node=1 $PYTHON $doctor trainer=slurm > $1/as_it_should 2>&1 &
wait
"""


@pytest.mark.slow
def test_slurm_leaves_what_these_checks_read(slurm, tmp_path):
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4"]
    job = slurm.submit(LAUNCHED, tmp_path, options=options)
    assert slurm.wait(job, "COMPLETED"), slurm.output(job)
    said = {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
    assert f"SLURM job {job} has 2 tasks, and python was started without srun" in said["without_srun"]
    assert "trainer.devices=2, and srun started 1 task" in said["one_task"]
    assert "trainer.devices=2, but slurm started 1 on this node" in said["other_number"]
    assert "failure" not in said["as_it_should"]
    assert "2 CPU ranks, 1 on each of 2 nodes, started by srun" in said["as_it_should"]


def test_a_rank_that_dies_in_a_job_without_a_word_is_named_last(slurm, tmp_path):
    quick = ("trainer.accelerator=cpu", "norm=sync", "logger.mode=disabled", "drift=none", f"runs_dir={tmp_path}")
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = slurm.submit("slurm/train.sbatch", *quick, "model._target_=tests.faulty.DiesOnRank1", options=options)
    assert slurm.wait(job, "FAILED"), slurm.output(job)
    last = slurm.output(job).strip().splitlines()[-3:]
    assert "rank 1 left before stages.1.0.bn1 (step 4)" in "\n".join(last)
    assert last[-1].startswith("rank 1 failed first, without a word")
