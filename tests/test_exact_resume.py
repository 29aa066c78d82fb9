"""Resumed is uninterrupted, bit for bit: stopped at random steps, in the middle of an epoch, on as many ranks."""

import random

import pytest
import torch
from torch.utils.data import DataLoader

from distnorm import ConfigError
from distnorm.data.sampler import GlobalBatchSampler
from distnorm.replay import again
from tests import interrupted, runs

pytestmark = pytest.mark.unit

LAST_OF_AN_EPOCH = 8
CASES = {
    "one rank, precise": (1, ["data.device_batch=112", "norm=batch", "norm.evaluation=precise"]),
    "two ranks, pooled": (2, ["data.device_batch=56", "norm=batch", "norm.evaluation=pooled"]),
    "workers": (2, ["data.device_batch=56", "norm=sync", "data.num_workers=2"]),
    "uneven": (2, ["data.device_batch=58", "norm=sync", "data.last_batch=keep", "trainer.check_val_every_n_epoch=2"]),
    "steps": (1, ["data.device_batch=112", "trainer.max_steps=20", "trainer.max_epochs=9", "optimizer=adamw"]),
    "accumulated": (1, ["data.device_batch=28", "data.last_batch=keep", "trainer.accumulate_grad_batches=3"]),
    "validated within": (1, ["data.device_batch=112", "+trainer.lightning.val_check_interval=4"]),
}
LOGGED = "trainer.log_every_n_steps=3"


def rows(folder):
    """The rows of a record, without their times; what an end adds is left out: a test, last snapshots."""
    kept = [
        row for row in runs.rows(runs.RunFolder(folder)) if {"train/loss", "val/loss", "drift", "alarm"} & row.keys()
    ]
    return [{key: value for key, value in row.items() if key != "time"} for row in kept if "test/loss" not in row]


def by_kind(*folders):
    """The rows of trainings that follow on one another, each kind in its order."""
    every = [row for folder in folders for row in rows(folder)]
    return {kind: [row for row in every if kind in row] for kind in ("train/loss", "val/loss", "drift", "alarm")}


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(tmp_path, case):
    world, overrides = CASES[case]
    interrupted.in_pool(tmp_path / "whole", world, *overrides, LOGGED)
    whole = interrupted.stored(tmp_path / "whole")
    at_random = random.Random(case).randrange(2, 23 if case != "steps" else 19)
    for stop in [at_random] if case == "workers" else [LAST_OF_AN_EPOCH, at_random]:
        first, then = tmp_path / f"first{stop}", tmp_path / f"then{stop}"
        assert interrupted.in_pool(first, world, *overrides, LOGGED, stop_at=stop)[0]
        interrupted.in_pool(then, world, *overrides, LOGGED, f"ckpt_path={interrupted.last(first)}")
        assert interrupted.differences(whole, interrupted.stored(then)) == []
        assert by_kind(first, then) == by_kind(tmp_path / "whole")


def test_a_stop_saves_pooled_statistics_and_measures_precise_ones_later(tmp_path):
    precise = ["data.device_batch=56", "norm=batch", "norm.evaluation=precise"]
    interrupted.in_pool(tmp_path, 2, *precise, stop_at=4)
    stored = interrupted.stored(tmp_path)
    assert stored["distnorm"]["evaluated"] is False
    means = [key for key in stored["state_dict"] if key.endswith("running_mean")]
    assert means
    for key in means:
        ranks = [own[key] for own in stored["distnorm"]["rank_statistics"]]
        torch.testing.assert_close(stored["state_dict"][key], torch.stack(ranks).mean(0))


@pytest.mark.parametrize("stop", [LAST_OF_AN_EPOCH, 10, 12])  # the drift of even steps is measured: one is under way
def test_a_requeue_repeats_and_loses_no_row_of_the_record(tmp_path, stop):
    overrides = ["data.device_batch=112", "norm=batch", "drift.interval=2"]
    interrupted.in_pool(tmp_path / "whole", 1, *overrides)
    interrupted.in_pool(tmp_path / "run", 1, *overrides, stop_at=stop, dies_after=3)
    assert max(row["step"] for row in rows(tmp_path / "run")) > stop
    interrupted.in_pool(tmp_path / "run", 1, *overrides, f"ckpt_path={tmp_path / 'run'}")
    assert by_kind(tmp_path / "run") == by_kind(tmp_path / "whole")
    run, whole = (interrupted.stored(tmp_path / run) for run in ("run", "whole"))
    assert interrupted.differences(run, whole) == []


def test_a_requeue_before_the_first_checkpoint_begins_the_record_anew(tmp_path):
    interrupted.in_pool(tmp_path / "whole", 1, "data.device_batch=112")
    interrupted.in_pool(tmp_path / "run", 1, "data.device_batch=112", stop_at=4)
    interrupted.in_pool(tmp_path / "run", 1, "data.device_batch=112")
    assert by_kind(tmp_path / "run") == by_kind(tmp_path / "whole")


def test_more_steps_go_on_where_fewer_ended(tmp_path):
    constant = ["data.device_batch=112", "task.schedule=constant", "task.warmup_fraction=0", "trainer.max_epochs=9"]
    interrupted.in_pool(tmp_path / "whole", 1, *constant, "trainer.max_steps=20")
    before = None
    for steps in (5, 16, 20):  # within an epoch, at the end of one, within one
        resumed = [] if before is None else [f"ckpt_path={interrupted.last(before)}"]
        before = tmp_path / f"{steps}"
        interrupted.in_pool(before, 1, *constant, f"trainer.max_steps={steps}", *resumed)
    assert interrupted.differences(interrupted.stored(tmp_path / "whole"), interrupted.stored(before)) == []


def test_the_best_checkpoint_goes_on_as_well_as_the_last(tmp_path):
    overrides = ["data.device_batch=112", "norm=batch"]
    interrupted.in_pool(tmp_path / "whole", 1, *overrides)
    interrupted.in_pool(tmp_path / "first", 1, *overrides, stop_at=12)
    best = tmp_path / "first" / "checkpoints" / "best.ckpt"
    assert torch.load(best, weights_only=True)["global_step"] == LAST_OF_AN_EPOCH
    interrupted.in_pool(tmp_path / "then", 1, *overrides, f"ckpt_path={best}")
    assert interrupted.differences(*(interrupted.stored(tmp_path / run) for run in ("whole", "then"))) == []


def sampler(**changes):
    options = {"num_samples": 20, "device_batch": 2, "rank": 0, "world_size": 2, "seed": 1} | changes
    return GlobalBatchSampler(**options)


def test_an_epoch_begins_at_a_step_once():
    whole = list(sampler())
    late = sampler()
    late.start_at(3)
    assert len(late) == len(whole)
    assert list(late) == whole[3:]
    assert list(late) == whole
    late.start_at(len(late))
    assert list(late) == []
    late.start_at(4)
    late.set_epoch(0)  # announced once more, as Lightning does
    assert list(late) == whole[4:]
    late.start_at(4)
    late.set_epoch(1)
    assert len(list(late)) == len(whole)


@pytest.mark.parametrize("step", [-1, 6])
def test_a_step_that_the_epoch_has_not_is_refused(step):
    with pytest.raises(ConfigError, match=rf"start_at\({step}\) is beyond this epoch, that has 5 steps. Give .*0\.\.5"):
        sampler().start_at(step)


def test_statistics_are_measured_from_the_beginning_of_the_epoch():
    late = sampler()
    late.start_at(3)
    copied = again(DataLoader([0] * 20, batch_sampler=late))
    assert list(copied.batch_sampler) == list(sampler())
    assert len(list(late)) == len(late) - 3
