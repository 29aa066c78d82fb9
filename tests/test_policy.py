"""The policy: its table, its promises over all inputs, and every refusal's value and remedy."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnorm import ConfigError, NormSpec, decide
from distnorm.spec import KINDS, group_count

pytestmark = pytest.mark.unit

TABLE = [
    # device batch, ranks, options → kind, ranks that sync, normalization batch, a reason
    (2, 2, {"kind": "batch"}, "batch", 1, 2, "its own 2 samples"),
    (2, 4, {"kind": "batch"}, "batch", 1, 2, "its own 2 samples"),
    (2, 2, {"kind": "sync"}, "sync", 2, 4, "over all ranks: 2 × 2 = 4"),
    (2, 4, {"kind": "sync"}, "sync", 4, 8, "over all ranks: 4 × 2 = 8"),
    (2, 4, {"kind": "sync", "sync_ranks": 2}, "sync", 2, 4, "norm.sync_ranks=2"),
    (2, 2, {}, "group_ws", 1, 1, "a normalization batch of 4 < 16"),
    (2, 4, {}, "group_ws", 1, 1, "a normalization batch of 8 < 16"),
    (2, 4, {"pretrained": True}, "group", 1, 1, "pretrained weights are kept"),
    (2, 2, {"min_normalization_batch": 4}, "sync", 2, 4, "reach 4"),
    (2, 4, {"min_normalization_batch": 4}, "sync", 4, 8, "reach 8"),
    (8, 4, {}, "sync", 4, 32, "device batch 8 < least normalization batch 16"),
    (8, 64, {}, "sync", 4, 32, "4 × 8 = 32"),
    (8, 6, {}, "sync", 6, 48, "6 × 8 = 48"),
    (16, 8, {}, "batch", 1, 16, "device batch 16 ≥ least normalization batch 16"),
    (2, 64, {"ranks_per_node": 8}, "sync", 8, 16, "8 ranks of a node together reach 16"),
    (1, 64, {"ranks_per_node": 8}, "sync", 32, 32, "32 × 1 = 32"),
    (4, 16, {"ranks_per_node": 8}, "sync", 8, 32, "8 × 4 = 32"),
    (32, 1, {"exact": True}, "batch", 1, 32, "exactly"),
    (16, 2, {"exact": True}, "sync", 2, 32, "2 ranks × device batch 16 = 32"),
    (8, 4, {"exact": True}, "sync", 4, 32, "4 ranks × device batch 8 = 32"),
    (64, 4, {"exact": True}, "ghost", 1, 32, "2 ghost batches of 32"),
    (2, 4, {"sync_ranks": 2}, "sync", 2, 4, "norm.sync_ranks=2"),
    (8, 1, {"kind": "ghost", "normalization_batch": 4}, "ghost", 1, 4, "ghosts of 4"),
    (8, 1, {"kind": "group"}, "group", 1, 1, "asked for"),
]


@pytest.mark.parametrize(("device_batch", "world", "options", "kind", "sync_ranks", "nbs", "reason"), TABLE)
def test_table(device_batch, world, options, kind, sync_ranks, nbs, reason):
    spec = decide(device_batch, world, **options)
    assert (spec.kind, spec.sync_ranks, spec.normalization_batch) == (kind, sync_ranks, nbs)
    assert reason in " ".join(spec.reasons)
    assert reason in str(spec)


@pytest.mark.parametrize(("world", "reachable"), [(2, 4), (4, 8)])
def test_group_norm_names_what_could_be_reached(world, reachable):
    spec = decide(2, world)
    assert f"norm.min_normalization_batch={reachable}" in str(spec)
    assert decide(2, world, min_normalization_batch=reachable).normalization_batch == reachable


numbers = st.integers(1, 512)


@given(numbers, st.integers(1, 256), numbers, numbers, st.integers(1, 16))
def test_promises_hold_for_every_input(device_batch, world, asked, least, per_node):
    spec = decide(
        device_batch, world, normalization_batch=asked, min_normalization_batch=least, ranks_per_node=per_node
    )
    assert world % spec.sync_ranks == 0
    assert spec.reasons
    if spec.kind == "sync":
        assert spec.normalization_batch == device_batch * spec.sync_ranks >= least
    if spec.kind == "batch":
        assert spec.normalization_batch == device_batch >= least
    if spec.kind == "group_ws":
        assert device_batch * world < least
    assert NormSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@given(st.integers(1, 64), st.integers(1, 64), st.integers(2, 256))
def test_exact_hits_the_number_or_names_only_numbers_that_work(device_batch, world, asked):
    try:
        spec = decide(device_batch, world, normalization_batch=asked, exact=True)
    except ConfigError as error:
        remedy = str(error).split("Use ")[1].split(";")[0]
        for number in map(int, remedy.split(", ")):
            reached = decide(device_batch, world, normalization_batch=number, exact=True)
            assert reached.normalization_batch == number
    else:
        assert spec.normalization_batch == asked
        inside = spec.ghost_batch or device_batch
        assert inside * spec.sync_ranks == asked


@given(st.integers(1, 64), st.integers(1, 64))
def test_more_samples_a_device_never_need_more_ranks(device_batch, world):
    few, more = (
        decide(b, world, min_normalization_batch=1, normalization_batch=64) for b in (device_batch, device_batch + 1)
    )
    assert more.sync_ranks <= few.sync_ranks


@pytest.mark.parametrize(
    ("options", "value", "remedy"),
    [
        ({"kind": "snyc"}, "norm.kind='snyc'", "Did you mean 'sync'?"),
        ({"sync_ranks": 3}, "norm.sync_ranks=3 does not divide world_size=4", "Use 1, 2 or 4."),
        ({"sync_ranks": 2, "kind": "group"}, "norm.sync_ranks=2", "Use norm=sync"),
        ({"normalization_batch": 0}, "normalization_batch=0 must be at least 1", "normalization_batch=16"),
        ({"min_normalization_batch": -3}, "min_normalization_batch=-3", "=16"),
        ({"ranks_per_node": -1}, "ranks_per_node=-1 must be at least 1", "ranks_per_node=16"),
        ({"normalization_batch": 8.0}, "normalization_batch=8.0", "a whole number"),
        ({"momentum": 5}, "momentum=5 must be in (0, 1]", "momentum=0.1"),
        (
            {"kind": "ghost", "normalization_batch": 3},
            "device_batch=8 into ghosts of norm.normalization_batch=3",
            "1, 2, 4 or 8",
        ),
        ({"normalization_batch": 24, "exact": True}, "norm.normalization_batch=24", "Use 2, 4, 8, 16, 32; or"),
        ({"normalization_batch": 64, "exact": True, "kind": "sync"}, "gives a normalization batch of 32", "norm=auto"),
    ],
)
def test_refusals_carry_value_and_remedy(options, value, remedy):
    with pytest.raises(ConfigError) as caught:
        decide(8, 4, **options)
    assert value in str(caught.value)
    assert remedy in str(caught.value)
    assert str(caught.value).count("\n") <= 2


@pytest.mark.parametrize("which", ["device_batch", "world_size"])
def test_no_samples_or_no_ranks_are_refused(which):
    with pytest.raises(ConfigError, match=f"{which}=0 must be at least 1"):
        decide(**{"device_batch": 8, "world_size": 4, which: 0})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ("snyc", 8),
            (
                "NormSpec.kind='snyc' is not one of batch, sync, ghost, renorm, frozen, group, group_ws, layer, "
                "instance, response, none. Did you mean 'sync'?"
            ),
        ),
        (("sync", 8, 0), "sync_ranks=0"),
        (("ghost", 8), "ghost_batch=None"),
    ],
)
def test_a_spec_that_no_layer_could_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        NormSpec(*values)


def test_ranks_given_to_auto_are_the_reason_themselves():
    assert decide(2, 4, sync_ranks=2).reasons == ("norm.sync_ranks=2: 2 × 2 = 4",)


def test_what_is_asked_for_and_not_done_is_said():
    assert "norm.min_normalization_batch=64" in str(decide(16, 8, normalization_batch=64))
    assert "0.3 points" in str(decide(16, 8))
    assert "0.3 points" not in str(decide(1, 1, min_normalization_batch=1))


def test_local_statistics_are_pooled_for_evaluation_and_shared_ones_need_not_be():
    assert decide(16, 4).evaluation == "pooled"
    assert decide(2, 4, kind="sync", sync_ranks=2).evaluation == "pooled"
    assert decide(8, 4).evaluation == "running"
    assert decide(16, 1).evaluation == "running"
    assert decide(1, 4).evaluation == "running"


def test_every_kind_is_said_in_words():
    for kind in KINDS[1:]:
        assert decide(8, 2, kind=kind).in_words()


@given(st.integers(1, 4096))
def test_groups_divide_and_leave_two_channels(channels):
    groups = group_count(channels)
    assert channels % groups == 0
    assert groups <= 32
    assert groups == 1 or channels // groups >= 2
    larger = [g for g in range(groups + 1, 33) if channels % g == 0]
    assert all(channels // g < 2 for g in larger)
