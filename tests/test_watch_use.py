"""The watch in use: what it tells when, alarms, whole layers, options, and what it does when something fails."""

import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from distnorm import ConfigError, SyncBatchNorm, collectives
from distnorm.drift.catalogue import BY_KEY, MEASURES
from distnorm.drift.events import Alarm, Snapshot, Watched
from distnorm.drift.watch import DriftWatch
from tests import ranks, reference_watch
from tests.test_watch import Memory, measurements, watched

pytestmark = pytest.mark.unit


def test_measurements_come_once_an_interval_in_the_layers_order():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    memory = Memory()
    with DriftWatch(model, [memory], interval=3) as watch:
        for _ in range(10):
            with watch.step():
                model(torch.randn(8, 3))
    first, *rest = memory
    assert isinstance(first, Watched)
    assert [(layer.name, layer.kind, layer.channels, layer.samples) for layer in first.layers] == [
        ("0", "BatchNorm1d", 3, 8), ("2", "BatchNorm1d", 4, 8),
    ]  # fmt: skip
    assert (first.world_size, first.interval) == (1, 3)
    assert [event.step for event in measurements(rest)] == [3, 6, 9]
    assert {len(row) for event in measurements(rest) for row in event.values.values()} == {2}
    assert not [handle for layer in model for handle in layer._forward_pre_hooks]


def test_masked_values_are_left_out():
    layer, memory = SyncBatchNorm(2), Memory()
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0], [999.0, 999.0]])
    with DriftWatch(nn.Sequential(layer), [memory], interval=1) as watch, watch.step():
        layer(x, mask=torch.tensor([True, True, False]))
    snapshot = next(event for event in memory if isinstance(event, Snapshot))
    assert snapshot.layers["0"]["batch_mean"] == [2.0, 3.5]
    assert snapshot.layers["0"]["batch_var"] == [1.0, 2.25]


def normalized_before():
    """Body: the ratio of a layer whose input's mean is 0 on every rank, but for rounding."""
    torch.manual_seed(collectives.rank())
    model, memory = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), Memory()
    with DriftWatch(model, [memory], interval=1) as watch:
        for _ in range(14):
            with watch.step():
                model(torch.randn(8, 3))
    return [event.values["between_ranks.max"][1] for event in measurements(memory) if "between_ranks" in event.values]


def test_rounding_is_no_difference_between_ranks():
    ratios = ranks.run(normalized_before, world=2)[0]
    assert len(ratios) == 5
    assert max(ratios) < 1e-3


def with_branch():
    """Body: rank 1 leaves a layer out every other step."""
    model, memory = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)]), Memory()
    torch.manual_seed(collectives.rank())
    with DriftWatch(model, [memory], interval=1) as watch:
        for step in range(14):
            with watch.step():
                model[0](torch.randn(8, 3))
                if collectives.rank() == 0 or step % 2:
                    model[1](torch.randn(8, 3))
    return [dict(event.values) for event in measurements(memory)]


def test_a_layer_that_a_rank_leaves_out_is_measured_where_it_was_reached():
    rows = ranks.run(with_branch, world=2)[0]
    assert all(math.isfinite(row["jeffreys"][1]) for row in rows)
    assert math.isfinite(rows[-1]["between_ranks"][1])
    assert rows[-1]["non_finite"] == [0, 0]


def test_a_layer_in_use_nowhere_has_no_numbers():
    model, memory = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)]), Memory()
    with DriftWatch(model, [memory], interval=1) as watch:
        for _ in range(11):
            with watch.step():
                model[0](torch.randn(8, 3))
    last = measurements(memory)[-1]
    for key in ("jeffreys", "lag", "effective_samples"):
        assert [math.isnan(value) for value in last.values[key]] == [False, True]
    assert list(next(event for event in memory if isinstance(event, Snapshot)).layers) == ["0"]


def test_dead_and_infected_channels_are_counted():
    layer, memory = nn.BatchNorm1d(4), Memory()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 1e-5, 1.0, 1.0])), layer.bias.copy_(torch.tensor([0.0, 0.0, -3.1, -2.9]))
    x = torch.randn(8, 4)
    x[0, 3] = torch.inf
    with DriftWatch(nn.Sequential(layer), [memory], interval=1) as watch, watch.step():
        layer(x)
    values = measurements(memory)[0].values
    assert (values["dead_channels"], values["dead_relus"], values["non_finite"]) == ([0.25], [0.25], [1.0])
    (alarm,) = [event for event in memory if isinstance(event, Alarm)]
    assert (alarm.measure, alarm.layer, alarm.state) == ("non_finite", "0", "raised")


def test_weights_and_biases_that_move_are_seen():
    layer, memory = nn.BatchNorm1d(4), Memory()
    with DriftWatch(nn.Sequential(layer), [memory], interval=1, kind="full") as watch:
        for _ in range(2):
            with watch.step():
                layer(torch.randn(8, 4))
                with torch.no_grad():
                    layer.weight.mul_(1.5), layer.bias.add_(0.3)
    assert "weight_drift" not in measurements(memory)[0].values
    last = measurements(memory)[1].values
    assert last["weight_drift"] == pytest.approx([0.5])
    assert last["bias_drift"] == pytest.approx([0.3 * 2 / (1.5 * 2)])


def test_snapshots_come_at_growing_distances_and_at_the_end():
    events, seen = watched(("local",), steps=11, silent=set(BY_KEY))
    snapshots = [event for event in events if isinstance(event, Snapshot)]
    assert [event.step for event in snapshots] == [1, 2, 4, 8, 11]
    layer = snapshots[-1].layers["0"]
    x, mean, var = seen[0][-1]
    for key, values in {
        "channel": range(5), "running_mean": mean, "running_var": var,
        "batch_mean": reference_watch.flat(x).mean(0), "batch_var": reference_watch.flat(x).var(0),
    }.items():  # fmt: skip
        assert layer[key] == pytest.approx(list(values), rel=1e-4)
    assert "rank_means" not in layer


def test_a_snapshot_of_ranks_has_a_row_each_and_of_a_wide_layer_some_channels():
    found = ranks.run(watched, ("local", "world"), world=2)
    layers = [event for event in found[0][0] if isinstance(event, Snapshot)][-1].layers
    for place, name in enumerate(("0", "1")):
        expected = [reference_watch.flat(found[rank][1][place][-1][0]) for rank in (0, 1)]
        np.testing.assert_allclose(layers[name]["rank_means"], [x.mean(0) for x in expected], rtol=1e-4)
        np.testing.assert_allclose(layers[name]["rank_vars"], [x.var(0) for x in expected], rtol=1e-4)
    wide, memory = nn.BatchNorm1d(300), Memory()
    with DriftWatch(nn.Sequential(wide), [memory], interval=1) as watch, watch.step():
        wide(torch.randn(8, 300))
    assert memory[-1].layers["0"]["channel"] == list(range(0, 300, 3))


OTHERS = {measure.key for measure in MEASURES} - {"between_ranks"}


def stopping(on_alarm):
    """Body: after how many steps a watch over sorted shards says stop."""
    torch.manual_seed(collectives.rank())
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False))
    with DriftWatch(model, interval=2, on_alarm=on_alarm, silent=OTHERS) as watch:
        for step in range(40):
            with watch.step():
                model[0](x := torch.randn(8, 3) + 3 * collectives.rank())
                model[1](x)
            if watch.is_stopped:
                return step + 1
    return None


def test_an_alarm_stops_all_ranks_at_the_same_step_and_only_if_asked_to():
    first, second = ranks.run(stopping, "stop", world=2)
    assert first == second is not None
    # From the 10th measurement on chance is known, the 12th is the third in a row; the word goes with the 13th, and
    # arrives at the end of the step after it.
    assert first == 2 * 13 + 1
    assert ranks.run(stopping, "warn", world=2) == [None, None]


def test_an_alarm_is_logged_once(caplog):
    model = nn.Sequential(nn.BatchNorm1d(3))
    nn.init.constant_(model[0].bias, -5.0)
    silent = set(BY_KEY) - {"dead_relus"}
    with caplog.at_level(logging.INFO, "distnorm"), DriftWatch(model, interval=1, silent=silent) as watch:
        for step in range(8):
            with watch.step():
                model(torch.randn(8, 3))
                if step == 4:
                    nn.init.zeros_(model[0].bias)
    messages = [(record.levelname, record.message.split(":")[0]) for record in caplog.records]
    assert messages[0][0] == "WARNING"
    assert messages[0][1].startswith("Step 3")
    assert [level for level, _ in messages] == ["WARNING", "INFO"]


def test_names_can_be_chosen():
    model = nn.ModuleDict({name: nn.BatchNorm1d(2) for name in ("stem", "body", "head")})
    assert DriftWatch(model, include=["*e*"], exclude=["head"]).names == ["stem"]
    with pytest.raises(ConfigError, match=r"drift.include='boby' matches no watched layer: there are stem, body, head"):
        DriftWatch(model, include=["boby"])
    with pytest.raises(ConfigError, match="Did you mean 'body'"):
        DriftWatch(model, exclude=["boby"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "lite"}, r"drift.kind='lite' is not one of light, full. Did you mean 'light'\?"),
        ({"interval": 0}, r"drift.interval=0 must be a whole number of at least 1. Use e.g. 20."),
        (
            {"evaluation": "poled"},
            r"drift.evaluation='poled' is not one of running, pooled, precise. Did you mean 'pooled'",
        ),
        ({"on_alarm": "stpo"}, r"drift.on_alarm='stpo' is not one of warn, stop. Did you mean 'stop'\?"),
    ],
)
def test_wrong_options_are_refused_with_a_remedy(options, words):
    with pytest.raises(ConfigError, match=words):
        DriftWatch(nn.Sequential(nn.BatchNorm1d(2)), **options)


def test_a_model_without_norms_is_watched_in_silence():
    memory = Memory()
    with DriftWatch(nn.Linear(2, 2), [memory], interval=1, on_alarm="stop") as watch, watch.step():
        pass
    assert memory == []


def train_until(model, memory, bad_step):
    with DriftWatch(model, [memory], interval=1) as watch:
        for step in range(5):
            with watch.step():
                model(torch.randn(1 if step == bad_step else 8, 3))


def test_what_failed_is_let_go_with_the_last_snapshot():
    model, memory = nn.Sequential(nn.BatchNorm1d(3)), Memory()
    with pytest.raises(ValueError, match="more than 1 value"):
        train_until(model, memory, bad_step=4)
    assert [event.step for event in measurements(memory)] == [1, 2, 3]
    assert (type(memory[-1]), memory[-1].step) == (Snapshot, 3)
    assert not model[0]._forward_pre_hooks
