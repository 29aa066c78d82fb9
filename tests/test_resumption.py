"""Going on with other hardware, or another optimizer setting: what is kept, what is refused, what is said."""

import collections
import random

import pytest
import torch

from distnorm import ConfigError, NormSpec, checkpoint
from distnorm.launch import resumption
from tests import interrupted, runs

pytestmark = pytest.mark.unit

EXACT = (
    "trainer.precision=64-true",
    "model._target_=distnorm.models.ConvNet",
    "trainer.max_epochs=2",
    "drift=none",
    "norm.evaluation=running",
)
MOVES = {(1, 2): ("batch", 64), (2, 1): ("sync", 32), (2, 4): ("batch", 32), (4, 2): ("sync", 16)}


def weights(folder):
    return {key: value for key, value in interrupted.stored(folder)["state_dict"].items() if "weight" in key}


@pytest.mark.parametrize(("before", "now"), MOVES)
def test_other_ranks_go_on_with_the_same_samples_and_statistics(tmp_path, before, now):
    kind, device_batch = MOVES[before, now]
    overrides = [*EXACT, f"norm={kind}"] + (["norm.sync_ranks=2"] if kind == "sync" and before == 4 else [])
    own = f"data.device_batch={device_batch}"
    whole = interrupted.in_pool_drawing(tmp_path / "whole", before, *overrides, own)[2]
    stop = random.Random(f"{before}→{now}").randrange(1, 27)  # of 28 steps of 64 samples, in two epochs
    first = interrupted.in_pool_drawing(tmp_path / "first", before, *overrides, own, stop_at=stop)[2]
    path = interrupted.last(tmp_path / "first")
    _, said, then = interrupted.in_pool_drawing(tmp_path / "then", now, *overrides, f"ckpt_path={path}")
    count = lambda *trainings: collections.Counter(p for t in trainings for rank in t for p in rank)  # noqa: E731
    assert count(first, then) == count(whole)
    was, spec = (
        NormSpec.from_dict(checkpoint.entry_of(f)["spec"]) for f in (path, interrupted.last(tmp_path / "then"))
    )
    assert spec.normalization_batch == was.normalization_batch
    assert spec.device_batch * now == was.device_batch * before
    assert f"{before} rank{'s' * (before > 1)} before, {now} now: device batch {was.device_batch} → " in said
    assert f"{was.in_words()} → {spec.in_words()}: the same normalization batch" in said
    assert "random streams begin anew, from seed, rank and step" in said
    for key, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "then")[key], value, rtol=1e-7, atol=1e-7)


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """A run that stopped in the middle of an epoch: local batch norm, 2 ranks of 16."""
    folder = tmp_path_factory.mktemp("middle") / "run"
    options = ["data.device_batch=16", "norm=batch", "task.schedule=constant", "task.warmup_fraction=0", "drift=none"]
    interrupted.in_pool(folder, 2, *options, "trainer.max_epochs=1", stop_at=20)
    runs.RunFolder(folder).write_settings(interrupted.settled(2, *options))
    return folder


def resume(folder, world, *overrides):
    return interrupted.settled(world, f"ckpt_path={folder}", "drift=none", *overrides)


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (
            3,
            ["norm=batch"],
            r"trains on 32 samples a step, that do not divide over 3 ranks\.\nUse 1, 2, 4, 8, 16, 32 r",
        ),
        (
            4,
            ["norm=batch", "data.device_batch=16"],
            r"middle of an epoch, 20 steps of 32 samples, and this run has 64 ",
        ),
        (4, ["norm=batch", "data.global_batch=64"], r"lost or repeated\.\nLeave out .* or use data\.global_batch=32"),
        (
            2,
            ["norm=batch", "optimizer=adamw"],
            r"_target_=torch\.optim\.AdamW, and .* torch\.optim\.SGD\.\nUse optimizer=sgd",
        ),
        (2, ["norm=group"], r"was trained with local batch norm.*[\s\S]*Use norm=batch to go on"),
    ],
)
def test_what_cannot_go_on_is_refused(middle, world, overrides, message):
    with pytest.raises(ConfigError, match=message):
        resume(middle, world, *overrides)


def test_norms_that_somebody_changed_are_decided_anew(middle):
    assert resume(middle, 4, "norm=batch").decide(4, 4).normalization_batch == 16
    assert resume(middle, 4, "norm=sync").decide(4, 4).normalization_batch == 32


def test_a_chain_of_resumes_keeps_the_normalization_batch(middle, tmp_path):
    second = runs.RunFolder(tmp_path / "second")
    second.checkpoints.mkdir(parents=True)
    settings = resume(middle, 4, "norm=batch")
    second.write_settings(settings)
    stored = torch.load(interrupted.last(middle), weights_only=True)
    stored["distnorm"]["spec"] = settings.decide(4, 4).to_dict()
    torch.save(stored, interrupted.last(second.path))
    third = resume(second.path, 1, "norm=batch").decide(1, 1)
    assert (third.kind, third.ghost_batch) == ("ghost", 16)


def test_renormalization_keeps_its_ranks(middle):
    before = NormSpec("renorm", 16, device_batch=16, world_size=2)
    keep = resumption._keep_normalization_batch
    settings = interrupted.settled(4, "data.device_batch=8", "norm=renorm")
    assert keep(settings, before).decide(4, 4).sync_ranks == 2
    with pytest.raises(ConfigError, match=r"over 16 samples.* device batch 32\.\nUse as many ranks as before: 2"):
        keep(interrupted.settled(1, "data.device_batch=32", "norm=renorm"), before)


def test_a_setting_of_the_optimizer_applies_from_the_resumed_step_on(middle, tmp_path):
    options = ["norm=batch", "task.schedule=constant", "task.warmup_fraction=0", "drift=none", "trainer.max_epochs=1"]
    on = [*options, f"ckpt_path={middle}"]
    _, said = interrupted.in_pool(tmp_path / "same", 2, *on)
    assert "the optimizer's state is the checkpoint's\n" in said
    changes = ["optimizer.lr=0.05", "optimizer.weight_decay=0.001"]
    _, said = interrupted.in_pool(tmp_path / "changed", 2, *on, *changes)
    assert "optimizer.lr 0.1 → 0.05 from this step on" in said
    assert "optimizer.weight_decay 0.0005 → 0.001 from this step on" in said
    before, same, other = (interrupted.stored(f) for f in (middle, tmp_path / "same", tmp_path / "changed"))
    groups = [
        [(g["lr"], g["weight_decay"]) for g in s["optimizer_states"][0]["param_groups"]] for s in (before, same, other)
    ]
    assert groups == [[(0.1, 0.0005), (0.1, 0.0)], [(0.1, 0.0005), (0.1, 0.0)], [(0.05, 0.001), (0.05, 0.0)]]
    assert other["lr_schedulers"][0]["base_lrs"] == [0.05, 0.05]
    rows = [row for row in runs.rows(runs.RunFolder(tmp_path / "changed")) if "lr" in row]
    assert {row["lr"] for row in rows} == {0.1, 0.05}  # the step that was saved is logged as it was made
    assert [row["lr"] for row in rows if row["step"] > 20] == [0.05] * len(rows[1:])
    losses = [
        {row["step"]: row["train/loss"] for row in runs.rows(runs.RunFolder(tmp_path / f)) if "train/loss" in row}
        for f in ("same", "changed")
    ]
    assert losses[0][21] == losses[1][21]  # the momentum stayed, and the first step after it sees the same weights
    assert losses[0][22] != losses[1][22]
