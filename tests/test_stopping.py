"""The launching process and the ranks it starts are told to stop, as people, batch scripts and schedulers do it."""

import re
import signal
import time

import pytest
import torch

from tests import runs

pytestmark = pytest.mark.run

QUIET = ("trainer=cpu_ddp", "norm=sync", "logger.mode=disabled", "drift=none", "trainer.log_every_n_steps=1")


def training(folder, *overrides):
    """A run that trains."""
    process = runs.start(*QUIET, *overrides, folder=folder)
    runs.wait_for(lambda: any(len(file.read_text().splitlines()) > 3 for file in folder.glob("*/record.jsonl")))
    return process, runs.RunFolder(next(folder.iterdir()))


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
