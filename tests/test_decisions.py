"""What holds for every decision, the overrides of layers, and every refusal's value and remedy."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm import ConfigError, NormSpec, decide
from distnorm.policy import TASKS, render
from distnorm.spec import BATCH_KINDS, EVALUATIONS, KINDS, Alternative

pytestmark = pytest.mark.unit

numbers = st.integers(1, 600)
worlds = st.one_of(st.integers(1, 96), st.sampled_from([128, 512, 4096]))
flags = st.booleans()
conditions = st.fixed_dictionaries(
    {},
    optional={
        "normalization_batch": numbers,
        "min_normalization_batch": numbers,
        "ranks_per_node": st.integers(1, 16),
        "task": st.sampled_from(TASKS),
        "pretrained": flags,
        "iid": flags,
        "foldable": flags,
        "memory_bound": flags,
        "max_overhead": st.floats(0, 1),
        "internode_latency_us": st.floats(0.1, 100),
        "step_ms": st.floats(0.1, 1e4),
        "channels": st.lists(st.integers(1, 4096), max_size=5),
        "momentum": st.one_of(st.none(), st.just("auto"), st.floats(0.001, 1)),
        "evaluation": st.sampled_from(("auto", *EVALUATIONS)),
        "frozen_last": st.one_of(st.none(), st.floats(0, 0.99)),
    },
)
requests = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(KINDS),
        "exact": flags,
        "sync_ranks": st.integers(1, 16),
        "layers": st.dictionaries(st.sampled_from(["a.*", "b"]), st.sampled_from(KINDS[1:]), max_size=2),
    },
)


def parts(spec):
    """The decision for layers of each sort."""
    changes = [{}, *spec.per_kind.values(), *spec.layers.values()]
    return [dataclasses.replace(spec, per_kind={}, layers={}, **change) for change in changes]


@settings(max_examples=300, deadline=None)
@given(numbers, worlds, conditions, requests)
def test_every_input_has_an_answer_that_keeps_the_promises_or_a_refusal(device_batch, world, given_, asked):
    try:
        spec = decide(device_batch, world, **given_, **asked)
    except ConfigError:
        assert asked.keys() & {"exact", "sync_ranks", "layers", "kind"}
        return
    assert spec == decide(device_batch, world, **given_, **asked)
    assert spec.reasons
    for part in parts(spec):
        assert world % part.sync_ranks == 0
        inside = part.ghost_batch or device_batch
        assert device_batch % inside == 0
        assert part.normalization_batch == (inside * part.sync_ranks if part.kind in BATCH_KINDS else 1)
        assert part.kind in BATCH_KINDS or (part.sync_ranks == 1 and part.momentum is None)
    if asked.get("kind", "auto") == "auto" and "sync_ranks" not in asked and spec.kind in BATCH_KINDS:
        assert spec.normalization_batch >= 2
    one = dataclasses.replace(spec, layers={}).of("", "vector")
    assert one.kind not in BATCH_KINDS or one.normalization_batch >= 4
    if asked.get("exact") and spec.kind in BATCH_KINDS and "sync_ranks" not in asked:
        assert spec.normalization_batch == given_.get("normalization_batch", 32)
    assert NormSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert render(spec)


@settings(max_examples=300, deadline=None)
@given(numbers, st.integers(1, 300), worlds, conditions)
def test_more_samples_a_device_never_need_more_ranks(device_batch, more, world, given_):
    few, many = (decide(b, world, **given_) for b in (device_batch, device_batch + more))
    if few.kind in BATCH_KINDS and many.kind in BATCH_KINDS:
        assert many.sync_ranks <= few.sync_ranks
    few, many = few.of("", "vector"), many.of("", "vector")
    if few.kind in BATCH_KINDS and many.kind in BATCH_KINDS:
        assert many.sync_ranks <= few.sync_ranks


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(2, 256))
def test_exact_hits_the_number_or_names_only_numbers_that_work(device_batch, world, asked):
    try:
        spec = decide(device_batch, world, normalization_batch=asked, exact=True)
    except ConfigError as error:
        remedy = str(error).split("Use ")[1].split(";")[0]
        if device_batch * world == 1:
            assert remedy == "a larger data.device_batch"
            return
        for number in map(int, remedy.split(", ")):
            reached = decide(device_batch, world, normalization_batch=number, exact=True)
            assert reached.normalization_batch == number
    else:
        assert (spec.ghost_batch or device_batch) * spec.sync_ranks == asked == spec.normalization_batch


ONE_DIMENSION = [
    (16, 8, {}, "sync", 2, "norms of vectors sync over 2 ranks, 32 samples"),
    (16, 8, {"ranks_per_node": 1}, "batch", 1, ""),
    (32, 8, {}, "batch", 1, ""),
    (16, 1, {}, "batch", 1, ""),
    (16, 8, {"kind": "batch"}, "batch", 1, ""),
    (2, 8, {}, "sync", 8, ""),
    (2, 2, {}, "layer", 1, "2 come out as ±1"),
    (2, 2, {"kind": "instance"}, "layer", 1, "2 come out as ±1"),
    (2, 2, {"kind": "response"}, "layer", 1, "a channel has 1 value"),
    (2, 2, {"kind": "batch"}, "layer", 1, "2 < 4 give"),
    (3, 1, {"min_normalization_batch": 2}, "layer", 1, "3 < 4 give"),
    (2, 2, {"kind": "sync"}, "sync", 2, ""),
    (2, 4, {"pretrained": True}, "frozen", 1, ""),
]


@pytest.mark.parametrize(("device_batch", "world", "options", "kind", "ranks", "reason"), ONE_DIMENSION)
def test_norms_of_vectors_get_enough_samples_or_layer_norm(device_batch, world, options, kind, ranks, reason):
    spec = decide(device_batch, world, **options)
    assert (spec.of("head", "vector").kind, spec.of("head", "vector").sync_ranks) == (kind, ranks)
    assert spec.of("head", "2d").kind == spec.kind
    assert reason in str(spec)
    assert bool(reason) == ("norms of vectors" in str(spec))


def test_overrides_by_name_are_filled_in_and_come_first():
    changes = {"a": "group", "b": {"kind": "sync", "sync_ranks": 2, "momentum": 0.5}, "c": {"kind": "sync"}}
    more = {"d": {"kind": "ghost", "ghost_batch": 4}, "e": {"kind": "group", "groups": 8}}
    spec = decide(8, 4, layers=changes | more)
    found = {name: spec.of(name, "vector") for name in "abcdef"}
    assert [one.kind for one in found.values()] == ["group", "sync", "sync", "ghost", "group", "sync"]
    assert [found[name].sync_ranks for name in "abcf"] == [1, 2, 4, 4]
    assert [found[name].normalization_batch for name in "abcdf"] == [1, 16, 32, 4, 32]
    assert [found[name].momentum for name in "abcdf"] == [None, 0.5, 0.062, 0.00797, 0.062]
    assert (found["d"].ghost_batch, found["e"].groups, found["f"].groups) == (4, 8, 32)
    assert decide(2, 2, layers={"head": "batch"}).of("head", "vector").kind == "batch"
    assert decide(8, 4, layers=spec.layers).layers == spec.layers


def test_what_may_be_converted_is_kept():
    spec = decide(8, 4, include="layer4.*", exclude=["*.bn1", "stem"])
    assert (spec.include, spec.exclude) == (("layer4.*",), ("*.bn1", "stem"))
    assert (decide(8, 4).include, decide(8, 4).exclude) == (("*",), ())


def test_a_spec_of_an_earlier_version_is_read():
    old = {"kind": "group", "normalization_batch": 1, "reasons": ["r"], "alternatives": ["a larger data.device_batch"]}
    spec = NormSpec.from_dict(old)
    assert spec.alternatives == (Alternative("a larger data.device_batch"),)
    assert (spec.evidence, spec.include) == ((), ("*",))
    spec = NormSpec.from_dict(old | {"per_kind": {"1d": {"kind": "layer"}, "2d": {"kind": "none"}}})
    assert [spec.of("", dimension).kind for dimension in ("vector", "1d", "2d")] == ["layer", "group", "none"]


@pytest.mark.parametrize(
    ("values", "value", "remedy"),
    [
        (
            {"kind": "group", "normalization_batch": 1, "shards": 3, "colour": 1},
            "not know: colour, shards",
            "Update dist",
        ),
        (
            decide(8, 4).to_dict() | {"alternatives": [{"setting": "a", "joules": 3}]},
            "joules",
            "that wrote them is newer",
        ),
        ({"kind": "group"}, "{'kind': 'group'} is no NormSpec", "Give what NormSpec.to_dict wrote."),
        ([], "[] is no NormSpec", "Give what NormSpec.to_dict wrote."),
    ],
)
def test_what_another_version_wrote_is_named(values, value, remedy):
    with pytest.raises(ConfigError) as caught:
        NormSpec.from_dict(values)
    assert value in str(caught.value)
    assert remedy in str(caught.value)


REFUSED = [
    ({"kind": "snyc"}, "norm.kind='snyc'", "Did you mean 'sync'?"),
    ({"kind": 3}, "norm.kind=3 is not one of auto", "Use e.g. norm.kind=auto."),
    ({"task": "sequences"}, "norm.task='sequences' is not one of classification", "Did you mean 'sequence'?"),
    (
        {"evaluation": "exact"},
        "norm.evaluation='exact' is not one of auto, running, pooled, precise",
        "Use e.g. norm.evaluation=auto.",
    ),
    ({"task": "detection"}, "norm.task='detection'", "Use norm.task=dense."),
    ({"task": "GAN"}, "norm.task='GAN'", "Use norm.task=generative."),
    ({"task": "rnn"}, "norm.task='rnn'", "Use norm.task=sequence."),
    ({"task": "rl"}, "norm.task='rl'", "Use norm.task=reinforcement."),
    ({"sync_ranks": 3}, "norm.sync_ranks=3 does not divide world_size=4", "Use 1, 2 or 4."),
    ({"sync_ranks": 2, "kind": "group"}, "norm.sync_ranks=2", "Use norm=sync"),
    ({"device_batch": 0}, "device_batch=0 must be at least 1", "device_batch=16"),
    ({"world_size": 0}, "world_size=0 must be at least 1", "world_size=16"),
    ({"normalization_batch": 0}, "normalization_batch=0 must be at least 1", "normalization_batch=16"),
    ({"min_normalization_batch": -3}, "min_normalization_batch=-3", "=16"),
    ({"ranks_per_node": -1}, "ranks_per_node=-1 must be at least 1", "ranks_per_node=16"),
    ({"world_size": 10**12}, "world_size=1000000000000 must be at least 1, and at most 10", "world_size=16"),
    ({"channels": 64}, "channels=64 must be a list", "Leave it out"),
    ({"frozen_last": "x"}, "frozen_last='x' must be in [0, 1)", "frozen_last=0.2"),
    ({"include": None}, "include=None must be globs", 'include=["layer4.*"]'),
    ({"normalization_batch": 8.0}, "normalization_batch=8.0", "a whole number"),
    ({"groups": 0}, "groups=0 must be at least 1, a whole number", "e.g. groups=16"),
    ({"groups": "8"}, "groups='8' must be at least 1, a whole number", "e.g. groups=16"),
    ({"renorm": 3}, "norm.renorm=3 must be limits by name: r_max of at least 1", "Use e.g. norm.renorm.r_max=3."),
    ({"renorm": {"r_max": "3"}}, "norm.renorm.r_max='3' must be a finite number of at least 1", "norm.renorm.r_max=3."),
    (
        {"renorm": {"ramp": -1}},
        "norm.renorm.ramp=-1 must be a finite number of at least 0",
        "Use e.g. norm.renorm.ramp=800.",
    ),
    ({"renorm": {"rmax": 3}}, "and has 'rmax'", "Did you mean 'r_max'?"),
    ({"renorm": {7: 3}}, "and has 7", "Leave it out."),
    ({"iid": "no"}, "iid='no' must be true or false", "iid=False"),
    ({"momentum": 5}, "momentum=5 must be in (0, 1]", "momentum=0.1"),
    ({"momentum": "fast"}, "momentum='fast' must be in (0, 1]", "momentum=0.1"),
    ({"frozen_last": 1}, "frozen_last=1 must be in [0, 1)", "frozen_last=0.2"),
    ({"max_overhead": -0.1}, "max_overhead=-0.1 must be 0 or more", "max_overhead=0.1"),
    ({"internode_latency_us": 0}, "internode_latency_us=0 must be above 0", "=5.0"),
    ({"step_ms": float("nan")}, "step_ms=nan must be above 0", "step_ms=50.0"),
    ({"channels": [64, 0]}, "channels=[64, 0] must be a list of whole numbers", "Leave it out for ResNet-50's"),
    ({"include": []}, "include=[] must be globs", 'include=["layer4.*"]'),
    ({"exclude": [3]}, "exclude=[3] must be globs", 'exclude=["layer4.*"]'),
    (
        {"kind": "ghost", "normalization_batch": 3},
        "device_batch=8 into ghosts of norm.normalization_batch=3",
        "of 8: 2, 4 or 8.",
    ),
    ({"kind": "ghost", "device_batch": 1}, "norm.kind=ghost with device_batch=1: a ghost", "at least 2, or norm=inst"),
    ({"kind": "ghost", "device_batch": 7, "normalization_batch": 3}, "device_batch=7 into ghosts", "divisor of 7: 7."),
    (
        {"exact": True, "sync_ranks": 2},
        "norm.sync_ranks=2 gives a normalization batch of 16",
        "Leave norm.sync_ranks out",
    ),
    (
        {"exact": True, "sync_ranks": 2, "kind": "sync"},
        "norm.kind=sync gives a normalization batch of 16",
        "Use norm=auto without norm.sync_ranks, or norm.normalization_batch=16.",
    ),
    ({"kind": "ghost", "normalization_batch": 1}, "normalization_batch=1 and device_batch=8", "or norm=instance"),
    ({"normalization_batch": 24, "exact": True}, "norm.normalization_batch=24", "Use 2, 4, 8, 16, 32; or"),
    ({"normalization_batch": 1, "exact": True}, "norm.normalization_batch=1", "Use 2, 4, 8, 16, 32; or"),
    ({"device_batch": 1, "normalization_batch": 1, "exact": True}, "normalization_batch=1 cannot", "Use 2, 4; or"),
    ({"normalization_batch": 64, "exact": True, "kind": "sync"}, "gives a normalization batch of 32", "norm=auto"),
    ({"layers": ["a"]}, "norm.layers=['a'] must map globs", "e.g. 'norm.layers={layer4.*: group}'"),
    ({"layers": {"a": 3}}, "norm.layers['a']=3 must be a kind", "{kind: sync, sync_ranks: 2}"),
    ({"layers": {"a": "grup"}}, "norm.layers['a'].kind='grup'", "Did you mean 'group'?"),
    ({"layers": {"a": {"sync_rank": 2}}}, "norm.layers['a'].sync_rank is not one of", "Did you mean 'sync_ranks'?"),
    (
        {"layers": {"a": {"kind": "sync", "sync_ranks": 3}}},
        "norm.layers['a'].sync_ranks=3 does not divide",
        "1, 2 or 4",
    ),
    ({"layers": {"a": {"kind": "group", "sync_ranks": 2}}}, "norm.layers['a'].sync_ranks=2 has no meaning", "leave"),
    (
        {"layers": {"a": {"kind": "ghost", "ghost_batch": 3}}},
        "norm.layers['a'] cannot part device_batch=8",
        "of 8: 2, 4 or 8.",
    ),
    ({"layers": {"a": {"kind": "ghost", "ghost_batch": "x"}}}, "norm.layers['a'].ghost_batch='x'", "ghost_batch=16"),
    ({"layers": {"a": {"kind": "group", "ghost_batch": 4}}}, "norm.layers['a'].ghost_batch=4 has no", "Use kind=ghost"),
    ({"layers": {"a": {"kind": "sync", "normalization_batch": 8}}}, "normalization_batch=8, and", "change sync_ranks"),
    ({"layers": {"a": {"kind": "group", "groups": 0}}}, "norm.layers['a'].groups=0", "e.g. groups=32"),
    ({"layers": {"a": {"momentum": 2}}}, "norm.layers['a'].momentum=2 must be in (0, 1]", "momentum=0.1"),
]


@pytest.mark.parametrize(("options", "value", "remedy"), REFUSED)
def test_refusals_carry_value_and_remedy(options, value, remedy):
    with pytest.raises(ConfigError) as caught:
        decide(**{"device_batch": 8, "world_size": 4, **options})
    assert value in str(caught.value)
    assert remedy in str(caught.value)
    assert str(caught.value).count("\n") <= 2


def test_deciding_needs_no_torch():
    code = (
        "import sys, types; package = types.ModuleType('distnorm'); package.__path__ = ['distnorm']; "
        "sys.modules['distnorm'] = package; from distnorm.policy import decide; print(decide(8, 4).in_words(), "
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "sync over 4 ranks, normalization batch 32 False\n"
