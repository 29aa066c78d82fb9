"""What happens to ranks' own statistics between loading, keeping them apart, and keeping more of them apart."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distnorm import GhostBatchNorm, NormSpec, SyncBatchNorm, collectives, convert
from distnorm.norms import apart
from tests import ranks
from tests.joined import Parent, logged, net, own_batches, train

pytestmark = pytest.mark.unit

LOADED = 100.0
KINDS = pytest.mark.parametrize("kind", ["kept", "ours"])


def make(kind):
    model = net() if kind == "kept" else net(GhostBatchNorm(1, 4))
    if kind == "kept":
        convert(model, NormSpec("batch", 16, world_size=collectives.world_size()))
    return DistributedDataParallel(Parent(model)), model[0]


def load(ddp):
    value = torch.full((1,), LOADED + collectives.rank())
    ddp.load_state_dict({**ddp.state_dict(), "module.inner.0.running_mean": value})


def training_outside(kind):
    """Load, train without DDP as `update_bn` does, and go through DDP once."""
    ddp, norm = make(kind)
    load(ddp)
    with torch.no_grad():
        for x in own_batches(40):
            ddp.module(x)
    before, x = norm.running_mean.item(), own_batches(1)[0]
    train(ddp, [x])
    return before, x.mean().item(), norm.running_mean.item()


@KINDS
def test_what_was_loaded_does_not_return_over_what_was_trained_since(kind):
    found = ranks.run(training_outside, kind, world=2)
    for before, mean, after in found:
        sent = found[0][0]  # the first sending comes before anything could keep this rank's own apart
        assert before < 10
        assert after == pytest.approx(0.9 * sent + 0.1 * mean, rel=1e-4)


def moving(kind):
    """Load, and move the model before DDP wraps it: what was loaded is in other buffers now."""
    model = net() if kind == "kept" else net(GhostBatchNorm(1, 4))
    if kind == "kept":
        convert(model, NormSpec("batch", 16, world_size=2))
    model.load_state_dict({**model.state_dict(), "0.running_mean": torch.full((1,), LOADED)})
    before = weakref.ref(model[0].running_mean)
    model.double()
    gc.collect()
    gone = before() is None
    train(DistributedDataParallel(Parent(model).double()), [x.double() for x in own_batches(1)])
    return gone, model[0].running_mean.dtype, model[0] in apart._loaded


@KINDS
def test_buffers_from_before_a_move_are_not_kept(kind):
    assert ranks.run(moving, kind, world=2) == [(True, torch.float64, False)] * 2


def widening(every_first):
    """A DDP with a layer of ours, seen in its forward, and one of torch's that no `convert` has seen."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), GhostBatchNorm(1, 4))
    ddp = DistributedDataParallel(Parent(model))
    if every_first:
        apart.keep_apart(ddp, every=True)
    (_, first), keeps = logged(lambda: train(ddp, own_batches(1))), apart.keep_apart
    done, second = logged(lambda: (keeps(ddp, every=True), keeps(ddp, every=True), keeps(ddp)))
    model[0].reset_running_stats()
    train(ddp, own_batches(40))
    return model[0].running_mean.item(), done, first, second


@pytest.mark.parametrize("every_first", [False, True])
def test_every_layer_is_kept_apart_after_some_were(every_first):
    (mean, done, first, second), (other, *_) = ranks.run(widening, every_first, world=2)
    assert done == (True, True, True)
    assert mean == pytest.approx(0, abs=0.2)
    assert other == pytest.approx(4, abs=0.2)
    assert [len(first), len(second)] == ([0, 0] if every_first else [1, 1])
    assert all("of 1 layers that belong to each rank: they are kept apart" in said for said in first + second)


def without_the_name():
    """Layers in a torch whose DDP does not tell that its forward runs: first one that all ranks share."""
    apart._say_unseen.cache_clear()
    name = "_active_ddp_module"
    runs = getattr(DistributedDataParallel, name)
    delattr(DistributedDataParallel, name)
    try:
        shared = logged(lambda: train(net(SyncBatchNorm(1)), own_batches(1)))[1]
        own = logged(lambda: train(net(GhostBatchNorm(1, 4)), own_batches(3)))[1]
    finally:
        setattr(DistributedDataParallel, name, runs)
    return shared, own


def test_a_torch_that_does_not_tell_which_ddp_runs_is_named_once():
    (shared, (said,)), other = ranks.run(without_the_name, world=2)
    assert not shared
    assert said.startswith("This torch does not tell which DDP's forward runs: ")
    assert "DistributedDataParallel(model, forward_sync_buffers=False)" in said
    assert len(said.splitlines()) <= 3
    assert other == ([], [])
