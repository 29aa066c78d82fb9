"""Runs that are told to stop: one agreed step, one save, one end; and what must not become of the checkpoint."""

import random
import re

import pytest
import torch

from distnorm.launch.run_dir import RunFolder
from tests import preempted, ranks, runs

pytestmark = pytest.mark.unit

LONG = ("trainer.max_steps=40", "trainer.max_epochs=9", "drift=none", "model._target_=tests.preempted.Told")


def told(folder, world, *overrides):
    """Train in the pool until told to stop; what each rank says, and the run's folder."""
    complete = runs.composed(*runs.QUICK, *LONG, f"trainer.devices={world}", *overrides).with_batches(world)
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    return ranks.run(preempted.train, complete, run, world=world), run


def saved(run):
    return torch.load(run.checkpoints / "last.ckpt", weights_only=True)


def step_of(ended):
    return int(re.search(r"after step (\d+), and saved", ended["message"]).group(1))


@pytest.mark.parametrize("what", ["SIGUSR1", "SIGTERM"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_signal_on_one_rank_stops_all_at_one_step_though_another_is_late(tmp_path, what, seed):
    at, rank = random.Random(seed).randint(3, 15), seed
    deeds = [f"+model.at={at}", f"+model.rank={rank}", f"+model.what={what}", f"+model.slow={1 - rank}"]
    every, run = told(tmp_path / "run", 2, *deeds)
    assert {ended["exit_code"] for ended in every} == {75}
    assert all(ended["wants_requeue"] and ended["handlers"] for ended in every)
    assert {step_of(ended) for ended in every} == {at + 1}
    assert saved(run)["global_step"] == at + 1
    assert f"Stopped by {what} after step {at + 1}" in every[0]["message"]
    assert f"ckpt_path={run.path}" in every[0]["message"]
    assert len(every[0]["message"].splitlines()) <= 3
    assert "val/loss" not in run.record.read_text(), "it validated"
    losses = [row["step"] for row in runs.rows(run) if "train/loss" in row]
    assert losses == list(range(1, at + 2)), "the last step is logged too"
