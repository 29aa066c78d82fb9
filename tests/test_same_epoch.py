"""An epoch is ended as it was begun: another order of its samples is refused before any rank starts."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from distnorm import ConfigError, checkpoint, resume
from distnorm.data.sampler import GlobalBatchSampler
from distnorm.launch import entry
from distnorm.launch.ranks import Ranks
from tests import interrupted, runs

pytestmark = pytest.mark.unit

OPTIONS = ("norm=batch", "drift=none")


def stopped(folder, step, *overrides):
    """A run of 2 ranks that stopped after a step, or ended."""
    options = ("data.device_batch=16", *OPTIONS, *overrides)
    interrupted.in_pool(folder, 2, *options, stop_at=step)
    runs.RunFolder(folder).write_settings(interrupted.settled(2, *options))
    return folder


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """A run that stopped in the middle of an epoch."""
    return stopped(tmp_path_factory.mktemp("middle") / "run", 3)


def launch(before, runs_dir, *overrides, world=2):
    """What the launcher does before it starts a rank."""
    options = (*runs.QUICK, f"trainer.devices={world}", *interrupted.SMALL, *OPTIONS, f"runs_dir={runs_dir}")
    ranks = Ranks(world, world, 1, 0, 0, "distnorm", "cpu")
    return entry._open(runs.composed(*options, f"ckpt_path={before}", *overrides), ranks, None)[1]


@pytest.mark.parametrize(
    ("change", "was", "now"),
    [
        ("seed=1", "seed=0", "seed=1"),
        ("data.split=60-20-20", "data of 901 training samples", "data of 1078 training samples"),
        ("data.last_batch=keep", "data.last_batch=drop", "data.last_batch=keep"),
        ("data.shards=sorted", "data.shards=shuffled", "data.shards=sorted"),
    ],
)
def test_another_order_is_refused_before_any_rank_starts(middle, tmp_path, change, was, now):
    with pytest.raises(ConfigError) as refused:
        launch(middle, tmp_path / "runs", change)
    assert str(refused.value).splitlines() == [
        f"The checkpoint is from the middle of an epoch with {was}, and this run has {now}.",
        "Its steps have other samples: some would be lost, others repeated.",
        f"Use {was} to go on, or a checkpoint from the end of an epoch.",
    ]
    assert not (tmp_path / "runs").exists()


def test_ranks_that_nobody_has_checked_refuse_alike(middle, tmp_path):
    options = ("data.device_batch=16", *OPTIONS, f"ckpt_path={middle}", "seed=1")
    assert "with seed=0, and this run has seed=1." in interrupted.in_pool(tmp_path / "run", 2, *options)[1]


def test_sorted_shards_stay_on_as_many_ranks(tmp_path):
    before = stopped(tmp_path / "run", 3, "data.shards=sorted")
    message = r"with sorted shards on 2 ranks, and this run has sorted shards on 1 ranks\.\n.*\nUse sorted shards on 2 "
    with pytest.raises(ConfigError, match=message):
        launch(before, tmp_path / "runs", "data.shards=sorted", world=1)
    launch(before, tmp_path / "runs", "data.shards=sorted")


def test_what_does_not_order_the_epoch_may_change(middle, tmp_path):
    launch(middle, tmp_path / "runs", "data.augmentation=none")
    launch(middle, tmp_path / "runs", world=1)


def test_at_the_end_of_an_epoch_anything_may_change(tmp_path):
    before = stopped(tmp_path / "run", None, "trainer.max_epochs=1")
    assert checkpoint.entry_of(interrupted.last(before))["place"]["step"] == 0
    launch(before, tmp_path / "runs", "seed=1", "data.split=60-20-20", "data.shards=sorted", "data.last_batch=keep")


def test_a_checkpoint_that_does_not_know_its_order_goes_on(middle, tmp_path):
    stored = torch.load(interrupted.last(middle), weights_only=True)
    del stored["distnorm"]["place"]["order"]
    old = tmp_path / "old.ckpt"
    torch.save(stored, old)
    launch(old, tmp_path / "runs", "seed=1")


@pytest.mark.parametrize("change", [{"seed": 2}, {"num_samples": 21}, {"shuffle": False}, {"last_batch": "keep"}])
def test_a_loader_of_the_users_own_is_held_against_its_order(change):
    options = {"num_samples": 20, "device_batch": 2, "rank": 0, "world_size": 2, "seed": 1}
    before, now = (GlobalBatchSampler(**options | changes) for changes in ({}, change))
    trainer = SimpleNamespace(train_dataloader=DataLoader(range(21), batch_sampler=now), is_global_zero=True)
    [value] = change.values()
    with pytest.raises(ConfigError, match=rf"and this run has .*{value}.*\n.*\nUse .* to go on"):
        resume._go_to(trainer, epoch=2, step=3, global_batch=4, order=before.order)
    resume._go_to(trainer, epoch=2, step=0, global_batch=4, order=before.order)
