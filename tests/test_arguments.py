"""Every argument of every layer is checked when the layer is built, and again where it may be set afterwards."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distnorm import ConfigError, GhostBatchNorm, NormSpec, SyncBatchNorm, convert
from distnorm.norms import (
    BatchNormLSTMCell,
    BatchRenorm,
    FilterResponseNorm,
    FrozenBatchNorm,
    RecurrentBatchNorm,
    ThresholdedLinearUnit,
    weight_normalize,
)
from distnorm.norms.weight import standardized, standardized_transposed

pytestmark = pytest.mark.unit

NAN, INF = float("nan"), float("inf")
LAYERS = {
    "sync": lambda n=3, **options: SyncBatchNorm(n, **options),
    "ghost": lambda n=3, ghost_batch=2, **options: GhostBatchNorm(n, ghost_batch, **options),
    "renorm": lambda n=3, **options: BatchRenorm(n, **options),
    "recurrent": lambda n=3, t_max=2, **options: RecurrentBatchNorm(n, t_max, **options),
    "lstm": lambda n=3, t_max=2, **options: BatchNormLSTMCell(n, 4, t_max, **options),
    "frozen": lambda n=3, **options: FrozenBatchNorm(n, **options),
    "response": lambda n=3, **options: FilterResponseNorm(n, **options),
    "threshold": lambda n=3, **options: ThresholdedLinearUnit(n, **options),
}
BATCH = ("sync", "ghost", "renorm")
RECURRENT = ("recurrent", "lstm")
OVER_RANKS = ("sync", "renorm", *RECURRENT)
MOMENTUM = (r"None or a number in \[0, 1\]", "momentum=0.1")
COUNT = ("a whole number of at least 1", "Give the")
GROUP = ("different rank numbers of at least 0, in ascending order", "group_ranks=")
FLAG = ("True or False", "Give ")
EPS = [-1, -1e-5, NAN, INF, "1e-5", None, True, torch.tensor(1e-5)]
DTYPE = ("torch.float32, bfloat16, float16, float64", "dtype=torch.float32")
REFUSED = [
    # layers, argument, values, rule and remedy
    ((*BATCH, *RECURRENT, "frozen"), "eps", EPS, ("a finite number of at least 0", "eps=1e-5")),
    (("response",), "eps", [*EPS, 0], ("a finite number above 0", "1e-6")),
    ((*BATCH, *RECURRENT), "momentum", [-0.1, 1.5, NAN, INF, "0.1", True, torch.tensor(0.1)], MOMENTUM),
    (tuple(LAYERS), "n", [0, -1, 3.0, "3", None, True, (3,)], COUNT),
    (("ghost",), "ghost_batch", [0, -1, 2.5, "2", None, True], COUNT),
    (RECURRENT, "t_max", [0, -1, 2.5, "2", None, True], COUNT),
    (BATCH, "affine", ["no", None, 2, 0.0], FLAG),
    (BATCH, "track_running_stats", ["no", None, 2], FLAG),
    ((*BATCH, "recurrent", "frozen"), "bias", ["no", None, 2], FLAG),
    (("response",), "learnable_eps", ["no", None, 2], FLAG),
    (tuple(LAYERS), "dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, "float32"], DTYPE),
    (OVER_RANKS, "group_ranks", [(1, 0), (0, 0), (-1, 0), (), (0.0, 1.0), "01", 2, (True, 2), [0, "1"]], GROUP),
]


@pytest.mark.parametrize(
    ("kind", "argument", "value", "rule"),
    [(kind, name, value, rule) for kinds, name, values, rule in REFUSED for kind in kinds for value in values],
    ids=str,
)
def test_an_argument_out_of_its_range_is_refused_with_value_and_remedy(kind, argument, value, rule):
    with pytest.raises(ConfigError, match=rf"{rule[0]}.*{rule[1]}") as caught:
        LAYERS[kind](**{argument: value})
    shown = {"n": "input_size" if kind == "lstm" else "num_features"}.get(argument, argument)
    assert f"{shown}={value!r:.60}, which must be" in str(caught.value)


@pytest.mark.parametrize("kind", OVER_RANKS)
@pytest.mark.parametrize("value", [0, -2, True, False, "2", 2.0, NAN])
def test_sync_ranks_that_are_no_number_of_ranks_are_refused(kind, value):
    with pytest.raises(ConfigError, match=r"must be at least 1\. Give a number of ranks, or None for all") as caught:
        LAYERS[kind](sync_ranks=value)
    assert f"sync_ranks={value!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["r_max", "d_max", "warmup", "ramp"])
@pytest.mark.parametrize("value", [-1, NAN, INF, "3", None, True])
def test_limits_of_renormalization_are_refused_by_the_layer_and_by_a_decision(name, value):
    with pytest.raises(ConfigError, match=rf"{name}={value!r} must be at least \d, and finite\. Give such a number"):
        BatchRenorm(3, **{name: value})
    with pytest.raises(ConfigError, match=rf"norm\.renorm\.{name}={value!r} must be a finite number of at least"):
        NormSpec(kind="renorm", normalization_batch=8, renorm={name: value})


@pytest.mark.parametrize("kind", LAYERS)
def test_whole_numbers_of_numpy_become_pythons(kind):
    layer = LAYERS[kind](np.int64(3))
    assert type(layer.input_size if kind == "lstm" else layer.num_features) is int


@pytest.mark.parametrize("kind", BATCH)
def test_numbers_of_numpy_are_numbers(kind):
    layer = LAYERS[kind](3, eps=np.float32(1e-3), momentum=np.float64(0.25))
    assert layer(torch.randn(4, 3)).isfinite().all()


@given(eps=st.floats(), momentum=st.none() | st.floats())
def test_what_is_built_trains_to_finite_values(eps, momentum):
    try:
        layer = SyncBatchNorm(3, eps, momentum)
    except ConfigError:
        assert not (0 <= eps < INF and (momentum is None or 0 <= momentum <= 1))
        return
    x = torch.randn(8, 3)
    if eps == 0:
        with pytest.raises(ConfigError, match=r"eps=-?0"):
            layer(x)
    else:
        assert layer(x).isfinite().all()
    assert layer.eval()(x).isfinite().all()
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


@pytest.mark.parametrize("kind", BATCH)
def test_eps_0_is_for_evaluation_alone_as_in_torch(kind):
    layer, theirs = LAYERS[kind](eps=0), nn.BatchNorm1d(3, eps=0)
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer.eval()(x), theirs.eval()(x))
    with pytest.raises(
        ConfigError, match=r"\(3\) has eps=0, which must be a finite number above 0\. Use e\.g\. eps=1e-5"
    ):
        layer.train()(x)
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize("value", [-1, NAN])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*BATCH, "recurrent", "frozen", "response"])
def test_an_eps_that_was_set_later_is_refused_in_the_forward(kind, training, value):
    layer = LAYERS[kind]().train(training)
    layer.eps, layer.layer_name = value, "head.bn"
    with pytest.raises(ConfigError, match=rf"head\.bn has eps={value!r}, which must be a finite number"):
        layer(torch.randn(4, 3, 2), *([0] if kind == "recurrent" else []))


@pytest.mark.parametrize("to", ["batch", "sync", "ghost", "renorm", "frozen", "group", "layer", "response"])
@pytest.mark.parametrize(("setting", "value"), [("eps", -1), ("eps", NAN), ("momentum", 2), ("momentum", "0.1")])
def test_a_norm_whose_settings_no_layer_could_have_is_not_converted(to, setting, value):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **{setting: value}))
    spec = NormSpec(kind=to, normalization_batch=8, ghost_batch=4 if to == "ghost" else None)
    if setting == "momentum" and to not in {"batch", "sync", "ghost", "renorm"}:
        convert(model, spec)  # the new layer has no momentum
        return
    with pytest.raises(ConfigError, match=rf"layer '1' has {setting}={value!r}, which must be.*Use e\.g\. {setting}="):
        convert(model, spec)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("kind", ["sync", "ghost", "renorm", "recurrent", "frozen"])
def test_a_layer_without_bias_learns_its_weight_alone(kind):
    layer = LAYERS[kind](bias=False)
    assert layer.bias is None
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    x = torch.randn(4, 3, 2)
    y = layer(x, 0) if kind == "recurrent" else layer(x)
    if kind in BATCH:
        torch.testing.assert_close(y, nn.BatchNorm1d(3, bias=False)(x) if kind != "ghost" else y)
        assert layer.state_dict().keys() == nn.BatchNorm1d(3, bias=False).state_dict().keys()
        assert LAYERS[kind](affine=False, bias=True).bias is None


@pytest.mark.parametrize(
    ("cls", "extra"), [(SyncBatchNorm, "process_group"), (BatchRenorm, None), (GhostBatchNorm, "ghost_batch")]
)
def test_positions_and_defaults_are_torchs(cls, extra):
    ours = {name: p for name, p in inspect.signature(cls).parameters.items() if name != extra}
    theirs = inspect.signature(nn.BatchNorm2d).parameters
    positional = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert all((ours[name].default, ours[name].kind) == (p.default, p.kind) for name, p in theirs.items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: standardized(torch.randn(2, 3), eps=-1), r"eps=-1, which must be a finite number of at least 0"),
        (lambda: standardized_transposed(torch.randn(2, 3), 1, NAN), r"eps=nan, which must be a finite number"),
        (lambda: standardized_transposed(torch.randn(3, 2, 1), 2), r"groups=2 .* 3 input channels.* Use 1 or 3"),
        (
            lambda: weight_normalize(nn.Linear(2, 2), torch.randn(4, 2), nn.Linear),
            r"include=[\s\S]*Use e\.g\. include=\(",
        ),
        (
            lambda: weight_normalize(nn.Linear(2, 2), torch.randn(4, 2), ("Linear",)),
            r"include=[\s\S]*Use e\.g\. include=",
        ),
        (lambda: weight_normalize(nn.Linear(2, 2), torch.randn(4, 2), ()), r"include=\(\)[\s\S]*Use e\.g\. include"),
    ],
)
def test_arguments_of_functions_are_checked_too(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
