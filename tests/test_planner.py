"""The planner against published predictions and measurements, and against what our layers really exchange."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distnorm import ConfigError, SyncBatchNorm, collectives, planner
from distnorm.evidence import cite
from distnorm.norms import pooling
from tests import ranks

pytestmark = pytest.mark.unit

GROUPS = [2**power for power in range(1, 13)]
TORCH_MS = (0.80, 1.0, 1.4, 2.8, 4.5, 7.4, 12.7, 22.9, 42.6, 81, 159, 313)
SUMS_MS = (0.83, 1.1, 1.6, 2.7, 3.8, 4.8, 5.9, 6.9, 8.0, 9.1, 10.1, 11.2)


@pytest.mark.parametrize(("group", "torchs", "sums"), [*zip(GROUPS, TORCH_MS, SUMS_MS, strict=True)])
def test_resnet50_on_nodes_of_8_is_predicted_as_published(group, torchs, sums):
    assert planner.torch_step_ms(ranks=group, ranks_per_node=8) == pytest.approx(torchs, rel=0.02)
    assert planner.sums_step_ms(ranks=group, ranks_per_node=8) == pytest.approx(sums, rel=0.02)


def test_eight_ranks_spread_over_eight_nodes_cost_near_three_times_as_much():
    assert planner.torch_step_ms(ranks=8, ranks_per_node=1) == pytest.approx(4.3, abs=0.06)
    assert planner.sums_step_ms(ranks=8, ranks_per_node=1) == pytest.approx(3.9, abs=0.06)


@pytest.mark.parametrize(
    ("group", "per_node", "fabric", "measured_us", "tolerance"),
    [
        (4, 4, planner.NVLINK, 9.85, 0.2),  # A100 NVLink node, 8 bytes: nccl-tests 331
        (2, 1, planner.NVLINK, 19.5, 0.2),  # 2 nodes, InfiniBand HDR: nccl-tests 150
    ],
)
def test_a_sum_takes_as_long_as_people_measured(group, per_node, fabric, measured_us, tolerance):
    assert planner.sum_us(group, per_node, fabric) == pytest.approx(measured_us, rel=tolerance)


def test_other_fabrics_and_layouts_follow_the_same_formulas():
    assert planner.sum_us(8, fabric=planner.PCIE) == pytest.approx(20.6)
    assert planner.sum_us(24, 8) == pytest.approx(25.2)
    slow = planner.NVLINK.with_latency(50)
    assert (slow.tree_hop_us, slow.ring_hop_us) == (50, pytest.approx(27))
    assert planner.sum_us(16, 8, slow) == pytest.approx(25.2 + 2 * 45)


def test_resnet50_has_53_norms_and_26560_channels():
    assert (len(planner.RESNET50), sum(planner.RESNET50)) == (53, 26560)
    assert (planner.RESNET50[0], max(planner.RESNET50), planner.RESNET50.count(2048)) == (64, 2048, 4)


def test_above_16_ranks_a_sum_takes_over_as_in_the_layer():
    assert planner.GATHER_UP_TO == pooling.GATHER_UP_TO
    gathers, sums = planner.gather_us(16, 8), planner.sum_us(17, 8)
    assert planner.step_cost([1], 16, 8).wire_ms * 1e3 == pytest.approx(gathers + planner.sum_us(16, 8), abs=0.1)
    assert planner.step_cost([1], 17, 8).wire_ms * 1e3 == pytest.approx(2 * sums, abs=0.1)


def exchanged():
    sent, own = [], (collectives.gather, collectives.start_sum)

    def counted(call):
        def send(values, *arguments):
            sent.append(values.numel() * values.element_size())
            return call(values, *arguments)

        return send

    collectives.gather, collectives.start_sum = map(counted, own)
    try:
        layers = nn.Sequential(SyncBatchNorm(5), nn.ReLU(), SyncBatchNorm(5))
        layers(torch.randn(3, 5, requires_grad=True)).sum().backward()
    finally:
        collectives.gather, collectives.start_sum = own
    return sent


def test_the_evidence_for_nodes_is_the_planners():
    milliseconds = [f"{planner.step_cost(sync_ranks=8 * nodes, ranks_per_node=8).wire_ms:.1f}" for nodes in (2, 4, 8)]
    assert f"over 2, 4, 8 nodes of 8 GPUs at 5 µs a hop take {', '.join(milliseconds)} ms" in cite("cost-nodes")[0]


def test_what_is_charged_is_what_the_layers_exchange():
    sent = ranks.run(exchanged, world=2)[0]
    cost = planner.step_cost([5, 5], 2)
    assert (len(sent), sum(sent)) == (cost.collectives, cost.sent_bytes)


channels = st.lists(st.integers(1, 4096), min_size=1, max_size=20)


@settings(deadline=None)
@given(channels, st.integers(1, 4096), st.integers(1, 16))
def test_one_rank_is_free_and_more_never_cost_less(layers, group, per_node):
    one = planner.step_cost(layers, 1, per_node, host_us=9, step_jitter_ms=1)
    assert one == planner.Cost(0, 0, 0, 0, 0)
    cost, more = (planner.step_cost(layers, g, per_node, step_jitter_ms=0.1) for g in (group, group + 1))
    if group not in {1, planner.GATHER_UP_TO}:  # there the cheaper algorithm takes over
        assert more.wire_ms >= cost.wire_ms
    assert more.skew_ms > cost.skew_ms
    assert more.total_ms == more.wire_ms + more.host_ms + more.skew_ms


@given(channels, st.sampled_from([2, 4, 8]))
def test_a_groups_cost_does_not_know_the_world(layers, group):
    """Blocks of a node cost the same whatever else there is; only the nodes that a group itself spans count."""
    assert planner.step_cost(layers, group, 8) == planner.step_cost(layers, group)
    assert planner.step_cost(layers, group, 1).wire_ms > planner.step_cost(layers, group).wire_ms


@pytest.mark.parametrize(
    ("group", "barrier", "step"), [(8, 0.6, 6.3), (64, 0.9, 8.9), (512, 1.1, 10.9), (4096, 1.2, 12.6)]
)
def test_skew_is_kept_apart_and_as_published(group, barrier, step):
    assert planner.skew_ms(1, group, 0.3) == pytest.approx(barrier, abs=0.06)
    cost = planner.step_cost(planner.RESNET50, group, 8, host_us=10, step_jitter_ms=0.3)
    assert cost.skew_ms == pytest.approx(step, abs=0.06)
    assert cost.host_ms == pytest.approx(1.06)
    assert cost.collectives == 106


def test_skew_is_the_largest_of_normal_draws():
    """The expected largest of many draws comes near sigma · sqrt(2 ln n) from below."""
    torch.manual_seed(0)
    largest = torch.randn(2000, 512, dtype=torch.float64).amax(1).mean().item()
    assert largest <= planner.skew_ms(1, 512, 1.0) <= 1.2 * largest
    assert planner.skew_ms(4, 512, 1.0) == pytest.approx(2 * math.sqrt(2 * math.log(512)))


@pytest.mark.parametrize(
    ("arguments", "value"),
    [(([64], 0), "sync_ranks=0"), (([64, 0], 2), "channels=0"), (([64], 2, -1), "ranks_per_node=-1")],
)
def test_what_has_no_cost_is_refused(arguments, value):
    with pytest.raises(ConfigError) as caught:
        planner.step_cost(*arguments)
    assert value in str(caught.value)
    assert "at least 1. Give e.g." in str(caught.value)


def test_a_fabric_is_plain_data():
    assert dataclasses.asdict(planner.PCIE)["intra_hop_us"] == 1.0
