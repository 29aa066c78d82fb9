"""Norms merged into the layers before them: the same output, and only where that is certain."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distnorm import ConfigError, SyncBatchNorm, convert
from distnorm.fold import fold
from distnorm.models import ResNet
from distnorm.norms import FrozenBatchNorm
from distnorm.norms.weight import StandardizedConv2d, StandardizedConvTranspose1d
from tests.nasty import KINDS, BatchNormAct2d, FrozenBatchNorm2d, OwnForward, Swish, picture, same_values, values

pytestmark = pytest.mark.unit


def lived(model):
    """Give every tensor of a model a value of its own, and put it to eval."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if name.endswith("var") else torch.randn_like(tensor))
    return model.eval()


LAYERS = {
    "Linear": (nn.Linear, 0),
    "Conv1d": (nn.Conv1d, 1),
    "Conv2d": (nn.Conv2d, 2),
    "Conv3d": (nn.Conv3d, 3),
    "ConvTranspose1d": (nn.ConvTranspose1d, 1),
    "ConvTranspose2d": (nn.ConvTranspose2d, 2),
    "ConvTranspose3d": (nn.ConvTranspose3d, 3),
    "StandardizedConv2d": (StandardizedConv2d, 2),
    "StandardizedConvTranspose1d": (StandardizedConvTranspose1d, 1),
}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(LAYERS)),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    padding_mode=st.sampled_from(["zeros", "reflect", "circular"]),
    bias=st.booleans(),
    affine=st.booleans(),
    norm=st.sampled_from(["torch", "sync", "frozen"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_the_output_stays(
    name, groups, per_group, kernel, stride, dilation, padding, padding_mode, bias, affine, norm, dtype, seed
):
    torch.manual_seed(seed)
    cls, dimensions = LAYERS[name]
    channels, into = groups * per_group[1], groups * per_group[0]
    options = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    if "Transpose" not in name:
        options["padding_mode"] = padding_mode
    layer = cls(into, channels, bias=bias, **(options if dimensions else {}))
    affine = affine or norm == "frozen"
    after = {"torch": NORMS[dimensions], "sync": SyncBatchNorm, "frozen": FrozenBatchNorm}[norm]
    model = lived(nn.Sequential(layer, after(channels, **({} if norm == "frozen" else {"affine": affine}))).to(dtype))
    x = torch.randn(2, into, *[6] * dimensions, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        assert fold(model).folded == (("0", "1"),)
        error = (model(x) - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= (1e-5 if dtype is torch.float32 else 1e-12)
    assert type(model[1]) is nn.Identity
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert not type(model[0]).__name__.startswith("Standardized")


@pytest.mark.parametrize("kind", ["batch", "sync", "ghost", "renorm", "frozen"])
def test_a_whole_network_of_any_kind(kind):
    model = lived(ResNet(widths=(4, 8)).double())
    convert(model, KINDS[kind])
    model.eval()
    x = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    expected, weight = model(x), model.conv.weight
    folding = fold(model, example=x)
    assert len(folding.folded) == 6
    assert folding.left == ()
    assert model.conv.weight is weight
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12 * float(expected.detach().abs().max()))
    assert "shortcut.1  folded into stages.1.0.shortcut.0" in str(folding)
    assert fold(lived(ResNet().double()), {"x_NCHW": x}).folded


@pytest.mark.parametrize("norm", [BatchNormAct2d(4), Swish(4), FrozenBatchNorm2d(4)], ids=lambda n: type(n).__name__)
def test_known_classes_keep_their_activation(norm):
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3), copy.deepcopy(norm)))
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    fold(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class Joined(nn.Module):
    def __init__(self, joined, prepare=nn.Module.eval, norm=None):
        super().__init__()
        self.conv, self.norm, self.joined = nn.Conv2d(4, 4, 1), norm or nn.BatchNorm2d(4), joined
        self.last = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        prepare(self)

    def forward(self, x):
        return self.last(self.joined(self, x))


def plain(m, x):
    return m.norm(m.conv(x))


def residual(m, x):
    y = m.conv(x)
    return m.norm(y) + y


def tie(m):
    m.last[0].weight = m.conv.weight


LEFT = {
    "residual": (Joined(residual), "something else takes the output"),
    "relu": (Joined(lambda m, x: m.norm(m.conv(x).relu())), "no layer alone"),
    "leaf between": (Joined(lambda m, x: m.norm(m.act(m.conv(x))), lambda m: m.add_module("act", nn.ReLU())), "a ReLU"),
    "norm twice": (Joined(lambda m, x: m.norm(m.norm(m.conv(x)))), "it is called 2 times"),
    "conv twice": (Joined(lambda m, x: m.norm(m.conv(m.conv(x)))), "the layer before it is called 2 times"),
    "not called": (Joined(lambda m, x: m.conv(x)), "it is not called"),
    "used apart": (Joined(lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum()), "used apart from their layer"),
    "own code": (Joined(plain, norm=OwnForward(4)), "OwnForward has code of its own"),
    "statless": (Joined(plain, norm=nn.BatchNorm2d(4, track_running_stats=False)), "no running statistics"),
    "hooked": (Joined(plain, lambda m: m.conv.register_forward_hook(lambda *_: None)), "hooks watch it"),
    "tied": (Joined(lambda m, x: m.norm(m.conv(x)), tie), "tied to others"),
    "parametrized": (Joined(plain, lambda m: nn.utils.parametrizations.weight_norm(m.conv)), "a ParametrizedConv2d"),
    "mask": (Joined(lambda m, x: m.norm(m.conv(x), x[:, 0] > 0), norm=SyncBatchNorm(4)), "no layer alone"),
}


@pytest.mark.parametrize("way", ["traced", "watched"])
@pytest.mark.parametrize(("model", "why"), LEFT.values(), ids=LEFT)
def test_what_is_uncertain_is_left_with_a_reason(model, why, way):
    torch.manual_seed(0)
    model = lived(copy.deepcopy(model))
    x = torch.randn(2, 4, 5, 5)
    if way == "watched":
        model.joined = lambda m, x, joined=model.joined: joined(m, x) if x.sum() < 1e9 else x  # now fx cannot trace it
    expected = model(x)
    if why == "tied to others":  # nothing else is left to merge
        with pytest.raises(ConfigError, match=r"no batch norm to merge in Joined.*tied to others[\s\S]*as it is"):
            fold(model, x if way == "watched" else None)
        return
    folding = fold(model, x if way == "watched" else None)
    assert folding.folded == (("last.0", "last.1"),)
    (name, reason), *others = folding.left
    assert (name, others) == ("norm", [])
    assert why in reason
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_watched_model_keeps_its_hooks_and_folds():
    model = lived(Joined(lambda m, x: plain(m, x) if x.shape[0] and x.sum() < 1e9 else x)).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected, hooks = model(x), [len(m._forward_hooks) for m in model.modules()]
    assert len(fold(model, (x,)).folded) == 2
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert hooks == [len(m._forward_hooks) for m in model.modules()]


class Fickle(nn.Module):
    """Computes something else each time."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) * self.calls


def test_an_output_that_changes_undoes_everything():
    model = lived(Fickle())
    before, state = picture(model.body), values(model)
    with pytest.raises(ConfigError, match=r"changed the output of Fickle by [\s\S]*undid it[\s\S]*forward hook"):
        fold(model, torch.randn(2, 3, 4, 4))
    assert picture(model.body) == before
    assert same_values(values(model), state)
    wide = lived(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))  # positions in dimension 1: not what is assumed
    with pytest.raises(ConfigError, match="changed the output"):
        fold(wide, torch.randn(2, 4, 3))


def partly_training():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    model[1].train()
    return model


@pytest.mark.parametrize(
    ("model", "example", "value", "remedy"),
    [
        (ResNet(), None, "in training mode (ResNet)", "model.eval()"),
        (partly_training(), None, "in training mode (layer '1')", "model.eval()"),
        (ResNet, None, "the class ResNet", "ResNet(…)"),
        (nn.DataParallel(ResNet().eval()), None, "DataParallel model", "pass model.module"),
        (nn.Sequential(nn.Linear(2, 2)).eval(), None, "no batch norm to merge in Sequential (it has no", "as it is"),
        (nn.Sequential(nn.BatchNorm1d(2)).eval(), None, "0: it takes the output of no layer", "follows a convolution"),
        (lived(Joined(lambda m, x: x if x.sum() > 0 else m.conv(x))), None, "could not trace Joined", "example=x"),
    ],
)
def test_refusals_name_value_and_remedy(model, example, value, remedy):
    state = values(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(ConfigError) as caught:
        fold(model, example)
    assert value in str(caught.value)
    assert remedy in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert not state or same_values(values(model), state)


def test_a_watched_model_is_known_on_the_path_of_its_example_only():
    """What the other path computes may change, and the record says so."""
    two_paths = Joined(lambda m, x: plain(m, x) if x.sum() > 0 else m.conv(x))
    model, x = lived(two_paths), torch.rand(2, 4, 5, 5)
    expected, other = model(x), model(-x)
    folding = fold(model, x)
    assert folding.warning == "torch.fx could not trace the model: only the path of the example was checked"
    assert str(folding).splitlines()[-1] == f"warning: {folding.warning}"
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(-x), other, atol=1e-2)
    assert "warning" not in str(fold(lived(ResNet()), torch.randn(2, 1, 12, 12)))


@pytest.mark.parametrize(
    ("example", "given"), [(torch.randn(2, 7, 4, 4), r"shape \(2, 7, 4, 4\)"), (5, "type int"), ({"y": 1}, "type dict")]
)
def test_an_example_that_the_model_cannot_take_is_refused(example, given):
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    state = values(model)
    with pytest.raises(ConfigError, match=rf"could not run .* on example of {given}: .+\nGive it what Sequential"):
        fold(model, example)
    assert same_values(values(model), state)
    assert type(model[1]) is nn.BatchNorm2d


def test_constants_fold_in_a_model_whose_norms_all_are():
    """Their own mode is of no account."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm(4)).eval()
    model[1].train()
    assert fold(model).folded == (("0", "1"),)
