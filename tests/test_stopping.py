"""The launching process and the ranks it starts are told to stop, as people, batch scripts and schedulers do it."""

import os
import re
import signal
import sys
import time

import pytest
import torch

from distnorm.drift import wandb_file
from tests import runs

pytestmark = pytest.mark.run

QUIET = ("trainer=cpu_ddp", "norm=sync", "logger.mode=disabled", "drift=none", "trainer.log_every_n_steps=1")


def training(folder, *overrides):
    """A run that trains."""
    process = runs.start(*QUIET, *overrides, folder=folder)
    runs.wait_for(lambda: lines_of(folder) > 3)
    return process, runs.RunFolder(next(folder.iterdir()))


def lines_of(folder):
    return max((len(file.read_text().splitlines()) for file in folder.glob("*/record.jsonl")), default=0)


def saved_step(run):
    return torch.load(run.checkpoints / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGUSR1], ids=lambda told: told.name)
def test_the_launcher_passes_it_on_and_ends_with_75_and_words(tmp_path, told):
    process, run = training(tmp_path)
    started = time.monotonic()
    process.send_signal(told)
    time.sleep(0.3)
    process.send_signal(told)  # nobody minds
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert process.returncode == 75
    step = int(re.search(rf"Stopped by {told.name} after step (\d+), and saved", output).group(1))
    assert output.count("Stopped by") == 1
    assert "Traceback" not in output
    assert saved_step(run) == step
    assert not run.stop.exists()
    assert not list(run.ranks.glob("*.error.json"))
    runs.wait_for(lambda: not runs.descendants(process), 10)


def test_torchruns_ranks_stop_though_every_process_is_told(tmp_path):
    overrides = ["trainer.accelerator=cpu", "trainer.devices=auto", "data.num_workers=1", "logger.mode=offline"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    process = runs.start_command([*command, *QUIET[1:2], *QUIET[3:], *overrides, f"runs_dir={tmp_path}"])
    runs.wait_for(lambda: lines_of(tmp_path) > 3)
    run = runs.RunFolder(next(tmp_path.iterdir()))
    everyone = runs.descendants(process)
    assert len(everyone) >= 6, "an agent, two ranks, a loader's process each, wandb's"
    for pid in everyone.keys() - {process.pid}:
        os.kill(pid, signal.SIGTERM)  # as SLURM does with a step
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, "torchrun knows no other"
    step = int(re.search(r"Stopped by SIGTERM after step (\d+), and saved", output).group(1))
    assert output.count("Stopped by") == 1
    assert saved_step(run) == step
    assert max(row["step"] for row in runs.rows(run) if "train/loss" in row) == step
    wandb_file.read(next(run.path.glob("wandb/*/*.wandb")))  # wandb's process takes TERM as its own end: readable
