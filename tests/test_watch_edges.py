"""The watch where little is to be seen: single samples, constants, sinks that fail, layers that never ran."""

import math

import pytest
import torch
from torch import nn

from distnorm import ConfigError, SyncBatchNorm
from distnorm.drift.watch import DriftWatch
from distnorm.norms import FrozenBatchNorm
from tests import ranks
from tests.test_watch import Memory, measurements

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", ["light", "full"])
@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False)],
    ids=lambda n: type(n).__name__,
)
def test_a_model_of_norms_of_single_samples_alone_is_watched_from_the_start(kind, layer):
    memory = Memory()
    with DriftWatch(nn.Sequential(nn.Linear(3, 4), layer), [memory], kind=kind, interval=1) as watch:
        for _ in range(7):
            with watch.step():
                watched_model(watch)(torch.randn(8, 3))
    assert [event.step for event in measurements(memory)] == list(range(1, 8))
    assert ["jeffreys" in event.values for event in measurements(memory)] == [False] * 5 + [True] * 2


def watched_model(watch):
    """The layer alone, given inputs of its channels."""
    layer = watch._in_order[0].layer
    return lambda x: layer(torch.cat((x, x[:, :1]), 1))


def test_constants_do_not_lag():
    layer, memory = FrozenBatchNorm(3), Memory()
    with DriftWatch(nn.Sequential(layer), [memory], interval=1) as watch:
        for _ in range(11):
            with watch.step():
                layer(torch.randn(8, 3) + 5)
    last = measurements(memory)[-1].values
    assert math.isnan(last["lag"][0])
    assert last["jeffreys"][0] > 5


class Full:
    """A sink on a full disk."""

    def take(self, event):
        raise OSError("No space left on device")


def test_a_sink_that_fails_is_dropped_with_one_warning_and_training_goes_on(caplog):
    layer, memory = nn.BatchNorm1d(3), Memory()
    with DriftWatch(nn.Sequential(layer), [Full(), memory], interval=1) as watch:
        for _ in range(3):
            with watch.step():
                layer(torch.randn(8, 3))
    assert len(measurements(memory)) == 3
    assert [r.message for r in caplog.records if "takes no more" in r.message] == [
        "Full takes no more of the drift: OSError('No space left on device')"
    ]


def test_a_glob_alone_is_no_list():
    with pytest.raises(ConfigError, match=r"drift.include='layer4' must be a list of globs. Give \['layer4'\]"):
        DriftWatch(nn.Sequential(nn.BatchNorm1d(2)), include="layer4")


def with_torchs_own():
    """Body: who shares statistics in torch's synchronized layer, that cannot run here."""
    from distnorm.drift.capture import WatchedNorm

    return WatchedNorm("", nn.SyncBatchNorm(3)).blocks(4), WatchedNorm("", SyncBatchNorm(3)).blocks(4)


def test_torchs_synchronized_layer_shares_over_all_ranks():
    assert set(ranks.run(with_torchs_own, world=4)) == {(((0, 1, 2, 3),), ((0, 1, 2, 3),))}


def test_layers_that_never_ran_are_told_once(caplog):
    layer, memory = nn.BatchNorm1d(3), Memory()
    with DriftWatch(nn.Sequential(layer), [memory], interval=1) as watch:
        for _ in range(3):
            with watch.step():
                pass
    assert [r.message for r in caplog.records] == [
        "Step 1: none of 1 watched layers ran. Watch a model before it is compiled, and unwrapped."
    ]


def test_layers_keep_names_of_their_own():
    both = nn.ModuleDict({"model": nn.ModuleDict({"a": nn.BatchNorm1d(2)}), "a": nn.BatchNorm1d(2)})
    assert DriftWatch(both).names == ["model.a", "a"]
    assert DriftWatch(nn.ModuleDict({"model": both["model"]})).names == ["a"]


def test_a_layer_used_twice_in_a_step_is_measured_at_the_first():
    layer, memory = nn.BatchNorm1d(3), Memory()
    first = torch.randn(8, 3)
    with DriftWatch(nn.Sequential(layer), [memory], interval=1) as watch, watch.step():
        layer(first)
        layer(first + 100)
    seen = memory[-1].layers["0"]
    assert seen["batch_mean"] == pytest.approx(first.double().mean(0).tolist(), abs=1e-6)
    assert seen["running_mean"] == [0, 0, 0]
