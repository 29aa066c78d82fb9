"""The policy: every row of its table, requests, statistics, prices and alternatives."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnorm import ConfigError, NormSpec, decide
from distnorm.evidence import TABLE as EVIDENCE
from distnorm.policy import TASKS
from distnorm.spec import KINDS, group_count

pytestmark = pytest.mark.unit

TWO_NODES = {"ranks_per_node": 8}
ROWS = {
    # row: device batch, ranks, options → kind, ranks that sync, normalization batch, a reason, evidence
    "1 sequence": (8, 4, {"task": "sequence"}, "layer", 1, 1, "existing LayerNorms stay", "text"),
    "1 sequence, large": (512, 4, {"task": "sequence", "pretrained": True}, "layer", 1, 1, "time steps", "recurrent"),
    "2 generative": (8, 4, {"task": "generative"}, "group", 1, 1, "generative: the other samples", "alone"),
    "2 reinforcement": (64, 1, {"task": "reinforcement"}, "group", 1, 1, "noise to the loss", "alone"),
    "3 contrastive": (32, 64, {"task": "contrastive"}, "sync", 8, 256, "8 × 32 = 256 ≥ 256", "contrast"),
    "3 contrastive, never local": (256, 4, {"task": "contrastive"}, "sync", 2, 512, "belong together", "leak"),
    "3 contrastive, too few": (16, 4, {"task": "contrastive"}, "sync", 4, 64, "192 short of 256", "contrast"),
    "3 contrastive, fewer than the least": (
        (2, 2, {"task": "contrastive"}),
        *("group", 1, 1, "a normalization batch of 4 < 16: each sample alone", "alone"),
    ),
    "3 contrastive, slow network": (
        (2, 64, {"task": "contrastive", **TWO_NODES, "internode_latency_us": 500}),
        *("group", 1, 1, "500 µs a hop > 20 µs: each sample alone (norm=sync insists)", "cost-nodes"),
    ),
    "3 contrastive, one rank": (64, 1, {"task": "contrastive"}, "batch", 1, 64, "none leaks", "leak"),
    "3 contrastive, one sample": (1, 1, {"task": "contrastive"}, "group", 1, 1, "one sample has no batch", "alone"),
    "3 contrastive, sorted": (256, 4, {"task": "contrastive", "iid": False}, "sync", 4, 1024, "4 × 256", "leak"),
    "4 sorted": (32, 16, {"iid": False, **TWO_NODES}, "sync", 16, 512, "fix the sampler", "sorted"),
    "4 sorted, over budget": (
        (2, 64, {"iid": False, **TWO_NODES, "step_ms": 10}),
        *("group_ws", 1, 1, "64 ranks of 8 nodes: 4.8 ms are 48% of a 10 ms step > 10%", "cost-nodes"),
    ),
    "4 sorted, slow network": (
        (2, 64, {"iid": False, **TWO_NODES, "internode_latency_us": 500, "pretrained": True}),
        *("group", 1, 1, "500 µs a hop > 20 µs (norm=sync insists): each sample alone", "sorted"),
    ),
    "4 sorted, slow network, one node": (8, 8, {"iid": False, "step_ms": 1}, "sync", 8, 64, "the whole mix", "sorted"),
    "4 sorted, too few": (2, 4, {"iid": False}, "group_ws", 1, 1, "all 4 ranks reach", "sorted"),
    "4 sorted, pretrained": (2, 4, {"iid": False, "pretrained": True}, "group", 1, 1, "each sample alone", "alone"),
    "4 sorted, one rank": (64, 1, {"iid": False}, "group_ws", 1, 1, "one rank alone sees its own order", "sorted"),
    "5 pretrained, too few": (2, 4, {"pretrained": True}, "frozen", 1, 1, "learned before are better", "unfrozen"),
    "5 pretrained, too far": (
        (2, 16, {"pretrained": True, "ranks_per_node": 4, "internode_latency_us": 50}),
        *("frozen", 1, 1, "50 µs a hop > 20 µs", "head"),
    ),
    "6 pretrained": (2, 64, {"pretrained": True, **TWO_NODES}, "sync", 8, 16, "8 × 2 = 16 ≥ 16", "fine-tune"),
    "6 pretrained, half": (16, 8, {"pretrained": True}, "sync", 2, 32, "2 × 16 = 32", "fine-tune"),
    "6 pretrained, enough": (32, 8, {"pretrained": True}, "batch", 1, 32, "1 × 32 = 32", "fine-tune"),
    "7 local": (16, 8, {}, "batch", 1, 16, "device batch 16 ≥ least normalization batch 16", "mlperf-local"),
    "7 local, largest": (256, 8, {}, "batch", 1, 256, "device batch 256 ≥", "curve"),
    "8 in a node": (8, 64, TWO_NODES, "sync", 4, 32, "4 × 8 = 32 ≥ normalization batch 32", "mlperf-sync"),
    "8 in a node, 4": (4, 64, TWO_NODES, "sync", 8, 32, "8 × 4 = 32", "cost"),
    "8 no more than needed": (8, 6, {}, "sync", 6, 48, "6 × 8 = 48", "batch-size"),
    "9 a whole node": (2, 64, TWO_NODES, "sync", 8, 16, "8 ranks of a node together reach 16", "scratch"),
    "9 all ranks": (4, 4, {}, "sync", 4, 16, "all ranks together reach 16", "scratch"),
    "10 two nodes": (2, 16, {"ranks_per_node": 4}, "sync", 16, 32, "over 4 nodes: 3.4 ms are 8%", "cost-nodes"),
    "10 its own step": (
        (2, 16, {"ranks_per_node": 4, "step_ms": 100, "channels": [64] * 10}),
        *("sync", 16, 32, "0.6 ms are 1% of a 100 ms step ≤ 10%", "cost-nodes"),
    ),
    "10 less within the budget": (
        (1, 64, {**TWO_NODES, "max_overhead": 0.07}),
        *("sync", 16, 16, "over 2 nodes: 2.9 ms are 7%", "cost-nodes"),
    ),
    "11 foldable": (2, 4, {"foldable": True}, "renorm", 4, 8, "inference must fold", "frozen-late"),
    "11 over nodes": (1, 64, {"foldable": True, "ranks_per_node": 2}, "renorm", 8, 8, "must fold", "folding"),
    "12 too few": (2, 2, {}, "group_ws", 1, 1, "a normalization batch of 4 < 16", "standardized"),
    "12 slow network": (
        (2, 16, {"ranks_per_node": 4, "internode_latency_us": 20.1}),
        *("group_ws", 1, 1, "16 samples would take 8 ranks of 2 nodes, 20.1 µs a hop > 20 µs", "group"),
    ),
    "12 over budget": (2, 8, {"ranks_per_node": 4, "step_ms": 5}, "group_ws", 1, 1, "of a 5 ms step > 10%", "group"),
    "12 too many nodes": (1, 64, {"ranks_per_node": 2}, "group_ws", 1, 1, "16 ranks of 8 nodes, more than 4", "group"),
    "13 ghosts": (512, 8, {}, "ghost", 1, 64, "device batch 512 > 256: parts of 64", "ghost"),
    "13 odd ghosts": (320 + 8, 8, {}, "ghost", 1, 41, "parts of 41", "ghost"),
    "13 no divisor": (257, 8, {}, "batch", 1, 257, "device batch 257 ≥", "batch-size"),
    "13 not the whole": (512, 8, {"normalization_batch": 512}, "batch", 1, 512, "device batch 512 ≥", "curve"),
    "15 by hand alone": (8, 4, {"kind": "response"}, "response", 1, 1, "asked for", None),
}


def flat(row):
    return (*row[0], *row[1:]) if isinstance(row[0], tuple) else row


@pytest.mark.parametrize("row", list(map(flat, ROWS.values())), ids=ROWS)
def test_every_row_decides_with_its_reason_and_evidence(row):
    device_batch, world, options, kind, sync_ranks, nbs, reason, evidence = row
    spec = decide(device_batch, world, **options)
    assert (spec.kind, spec.sync_ranks, spec.normalization_batch) == (kind, sync_ranks, nbs)
    assert spec.ghost_batch == (nbs if kind == "ghost" else None)
    assert reason in str(spec)
    assert evidence is None or str(EVIDENCE[evidence]) in spec.evidence


@pytest.mark.parametrize("task", TASKS)
def test_filter_response_is_never_chosen(task):
    assert all(decide(2**n, 4, task=task).kind != "response" for n in range(11))


EXACT = [
    (32, 1, 32, "batch", 1, "exactly"),
    (16, 2, 32, "sync", 2, "2 ranks × device batch 16 = 32"),
    (8, 4, 32, "sync", 4, "4 ranks × device batch 8 = 32"),
    (64, 4, 32, "ghost", 1, "2 ghost batches of 32"),
    (512, 4, 512, "batch", 1, "exactly"),
]


@pytest.mark.parametrize(("device_batch", "world", "asked", "kind", "sync_ranks", "reason"), EXACT)
def test_an_order_comes_before_every_row(device_batch, world, asked, kind, sync_ranks, reason):
    for options in ({}, {"pretrained": True}, {"task": "contrastive"}, {"iid": False}):
        spec = decide(device_batch, world, normalization_batch=asked, exact=True, **options)
        assert (spec.kind, spec.sync_ranks, spec.normalization_batch) == (kind, sync_ranks, asked)
        assert reason in str(spec)


@pytest.mark.parametrize(
    ("device_batch", "options", "reason"),
    [
        (8, {"iid": False}, "before norm.iid=false: 32 samples of 4 of 8 ranks share statistics, and fit that part"),
        (32, {"iid": False}, "before norm.iid=false: 32 samples of 1 of 8 ranks"),
        (64, {"task": "contrastive"}, "before norm.task=contrastive: 32 samples of 1 of 8 ranks"),
    ],
)
def test_an_order_says_what_it_comes_before(device_batch, options, reason):
    assert reason in str(decide(device_batch, 8, exact=True, **options))
    assert "comes before" not in str(decide(device_batch, 8, exact=True))
    assert "comes before" not in str(decide(4, 8, exact=True, **options))  # all ranks share statistics


def test_exact_names_only_alternatives_that_hit_the_number():
    found = decide(8, 16, exact=True, pretrained=True).alternatives
    assert [other.setting for other in found] == ["norm=group", "norm=frozen"]
    found = [other.setting for other in decide(64, 2, kind="group", normalization_batch=16, exact=True).alternatives]
    assert "norm=ghost norm.normalization_batch=16" in found
    assert not {"norm=batch", "norm=sync norm.sync_ranks=2"} & set(found)


REQUESTS = [
    ({"kind": "batch"}, "batch", 1, 2, "its own 2 samples"),
    ({"kind": "sync"}, "sync", 4, 8, "over all ranks: 4 × 2 = 8"),
    ({"kind": "sync", "sync_ranks": 2}, "sync", 2, 4, "norm.sync_ranks=2: 2 × 2 = 4"),
    ({"sync_ranks": 2}, "sync", 2, 4, "norm.sync_ranks=2: 2 × 2 = 4"),
    ({"kind": "renorm"}, "renorm", 1, 2, "norm.sync_ranks=1: 1 × 2 = 2"),
    ({"kind": "renorm", "sync_ranks": 4}, "renorm", 4, 8, "norm.sync_ranks=4: 4 × 2 = 8"),
    ({"kind": "ghost"}, "ghost", 1, 2, "in ghosts of 2"),
    *(({"kind": kind}, kind, 1, 1, "asked for") for kind in KINDS[5:]),
]


@pytest.mark.parametrize(("options", "kind", "sync_ranks", "nbs", "reason"), REQUESTS)
def test_what_is_asked_for_is_done_whatever_the_task(options, kind, sync_ranks, nbs, reason):
    for task in TASKS:
        spec = decide(2, 4, task=task, iid=task != "dense", **options)
        assert (spec.kind, spec.sync_ranks, spec.normalization_batch) == (kind, sync_ranks, nbs)
        assert reason in str(spec)
        assert spec.in_words()


def test_a_bad_request_is_obeyed_and_a_much_better_one_named():
    spec = decide(2, 4, kind="batch")
    assert spec.penalty == 10.2
    assert str(spec).splitlines()[-1].startswith("  or norm=group_ws: ")
    assert "  or " not in str(decide(32, 4, kind="batch"))


def test_what_is_asked_for_and_not_done_is_said():
    assert "norm.min_normalization_batch=64 or norm.exact=true" in str(decide(16, 8, normalization_batch=64))
    assert "norm.min_normalization_batch=8 would accept it" in str(decide(2, 4))
    assert decide(2, 4, min_normalization_batch=8).in_words() == "sync over 4 ranks, normalization batch 8"
    assert "0.3 points" in str(decide(16, 8))
    assert "0.3 points" not in str(decide(8, 8, min_normalization_batch=8))


@pytest.mark.parametrize(
    ("samples", "momentum"), [(2, 0.004), (8, 0.016), (32, 0.062), (52, 0.0989), (53, 0.1), (1024, 0.1)]
)
def test_the_momentum_holds_1000_samples_and_never_passes_torchs(samples, momentum):
    assert decide(samples, 1, kind="batch").momentum == pytest.approx(momentum, rel=0.01)


def test_the_momentum_is_said_taken_or_left_alone():
    forgets = "and takes about {} steps to forget its start (0 and 1)"
    holds = "momentum {}: a running average holds {}, " + forgets
    assert holds.format(0.062, "1000 samples", 16) in decide(8, 4).reasons
    assert holds.format(0.032, "1000 samples, those of 4 pooled 4000", 32) in decide(16, 4).reasons
    assert holds.format(0.1, "9700 samples, those of 2 pooled 19400", 10) in decide(512, 2).reasons
    assert "16 steps to forget the pretrained ones" in str(decide(8, 4, pretrained=True))
    assert decide(8, 4, momentum=0.3).momentum == 0.3
    assert decide(8, 4, momentum=None).momentum is None
    assert not [why for why in decide(8, 4, momentum=None).reasons if "momentum" in why]
    assert decide(2, 4).momentum is None


def test_another_world_with_the_same_normalization_batch_has_the_same_momentum():
    assert len({decide(32 // n, n, exact=True).momentum for n in (1, 2, 4, 8)}) == 1
    assert decide(64, 4, exact=True).momentum == decide(8, 4, exact=True).momentum


EVALUATION = [
    (16, 4, {}, "pooled"),
    (16, 1, {}, "running"),
    (15, 1, {"kind": "batch"}, "precise"),
    (8, 4, {}, "running"),
    (8, 8, {}, "pooled"),
    (2, 4, {"kind": "sync"}, "precise"),
    (2, 4, {"kind": "sync", "evaluation": "running"}, "running"),
    (2, 64, {"pretrained": True}, "precise"),
    (32, 1, {"kind": "renorm"}, "precise"),
    (2, 4, {}, "running"),
    (2, 4, {"kind": "group", "evaluation": "precise"}, "running"),
    (16, 4, {"evaluation": "precise"}, "precise"),
    (2, 4, {"layers": {"head.*": "sync"}}, "precise"),
    (64, 4, {"layers": {"head.*": "group"}, "kind": "sync"}, "running"),
]


@pytest.mark.parametrize(("device_batch", "world", "options", "evaluation"), EVALUATION)
def test_evaluation_is_repaired_where_running_statistics_mislead(device_batch, world, options, evaluation):
    spec = decide(device_batch, world, **options)
    assert spec.evaluation == evaluation
    says = any("precise statistics" in why for why in spec.reasons)
    assert says == (evaluation == "precise" and "evaluation" not in options)


NO_EFFECT = [
    ({"kind": "group", "evaluation": "precise", "momentum": 0.5}, "norm.momentum=0.5 and norm.evaluation=precise have"),
    ({"task": "generative", "frozen_last": 0.2}, "norm.frozen_last=0.2 has no effect: norm=group shares"),
    ({"kind": "none", "exact": True}, "norm.exact=true has no effect"),
]


@pytest.mark.parametrize(("options", "reason"), NO_EFFECT)
def test_a_request_without_a_meaning_is_named(options, reason):
    assert reason in str(decide(8, 4, **options))
    assert "no effect" not in str(decide(8, 4, **options | {"layers": {"head.*": "batch"}}))
    assert "no effect" not in str(decide(8, 4, **options | {"kind": "sync", "normalization_batch": 32}))
    assert "no effect" not in str(decide(8, 4, kind="group", momentum=None, evaluation="running"))


def test_constants_that_nobody_learned_are_warned_of():
    assert "constants 0 and 1, as without norms, unless" in str(decide(8, 4, kind="frozen"))
    assert "constants 0 and 1" not in str(decide(8, 4, kind="frozen", pretrained=True))


def test_nobody_measured_batch_renormalization_frozen_late():
    assert decide(2, 4, foldable=True).penalty is None
    assert {a.penalty for a in decide(2, 4).alternatives if "renorm" in a.setting} == {None}


def test_frozen_at_the_end_where_there_is_something_to_freeze():
    assert decide(2, 4, foldable=True).frozen_last == 0.2
    assert decide(2, 4, foldable=True, frozen_last=0.1).frozen_last == 0.1
    assert decide(8, 4, frozen_last=0.3).frozen_last == 0.3
    assert decide(2, 4, frozen_last=0.3).frozen_last == 0.0
    assert decide(8, 4, frozen_last=0.2).penalty > decide(8, 4).penalty


def test_the_price_comes_from_curve_and_planner():
    assert (decide(8, 4).penalty, decide(8, 4).cost_ms) == (0.1, 1.0)
    assert decide(8, 4, channels=[64] * 5).cost_ms < 0.2
    assert (decide(2, 4, task="generative").penalty, decide(8, 4, task="contrastive").penalty) == (None, None)
    assert decide(64, 4, iid=False, kind="batch").penalty is None  # nobody measured a part of a mixture
    assert decide(8, 4, iid=False).penalty == 0.1
    far = decide(2, 16, ranks_per_node=4, internode_latency_us=20, step_ms=1000)
    assert far.cost_ms > decide(2, 16, ranks_per_node=4).cost_ms + 2


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, ["norm=group_ws", "norm=batch", "norm=renorm norm.frozen_last=0.2"]),
        ({"task": "contrastive"}, ["norm=group_ws"]),
        ({"pretrained": True}, ["norm=group", "norm=batch", "norm=frozen", "norm=renorm norm.frozen_last=0.2"]),
        ({"iid": False}, ["norm=group_ws"]),
        ({"foldable": True}, ["norm=batch", "norm=renorm norm.frozen_last=0.2"]),
        ({"task": "sequence"}, ["norm=group"]),
        ({"task": "generative"}, ["norm=instance", "norm=layer", "norm=none"]),
        ({"memory_bound": True}, [..., "activation checkpointing"]),
    ],
)
def test_alternatives_are_ranked_and_fit_the_task(options, settings):
    found = decide(8, 4, **options).alternatives
    names = [other.setting for other in found]
    assert names == settings or (settings[0] is ... and names[-1:] == settings[-1:])
    known = [other.penalty for other in found if other.penalty is not None]
    assert known == sorted(known)


def test_fine_tuning_on_few_samples_names_the_norms_of_new_heads():
    assert decide(2, 4, pretrained=True).alternatives[-1].setting == "'norm.layers={head.*: group}'"


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
        (("sync", 8, 0), "NormSpec.sync_ranks=0 must be a whole number of at least 1. Use e.g. sync_ranks=4."),
        (("sync", 8, "4"), "NormSpec.sync_ranks='4' must be a whole number of at least 1. Use e.g. sync_ranks=4."),
        (("sync", 0), "NormSpec.normalization_batch=0 must be a whole number of at least 1. Use e.g. normalization_"),
        (("ghost", 8), "ghost_batch=None: a ghost has a size.\nLet decide() make it, or give both."),
        (("ghost", 8, 1, -1), "ghost_batch=-1 must be None or a whole number of at least 2. Use e.g. ghost_batch=16."),
        (("group", 1, 1, None, 0), "NormSpec.groups=0 must be a whole number of at least 1. Use e.g. groups=32."),
        (("batch", 8, 1, None, 32, {}, 5), "NormSpec.momentum=5 must be None or in (0, 1]. Use e.g. momentum=0.1."),
        (("batch", 8, 1, None, 32, {}, None, "running", 20), "frozen_last=20 must be a share of training, in [0, 1)."),
        (
            ("batch", 8, 1, None, 32, {}, None, "exact"),
            "not one of running, pooled, precise. Use e.g. evaluation='running'.",
        ),
        ((3, 8), "NormSpec.kind=3 is not one of batch, "),
        ((7, 8), "response, none. Use e.g. kind='sync'."),
    ],
)
def test_a_spec_that_no_layer_could_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        NormSpec(*values)


@given(st.integers(1, 4096))
def test_groups_divide_and_leave_two_channels(channels):
    groups = group_count(channels)
    assert channels % groups == 0
    assert groups <= 32
    assert groups == 1 or channels // groups >= 2
    larger = [g for g in range(groups + 1, 33) if channels % g == 0]
    assert all(channels // g < 2 for g in larger)
