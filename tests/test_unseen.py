"""Batch normalization that is no batch norm layer: listed with what it does, converted where it is named."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from distnorm import ConfigError, NormSpec, SyncBatchNorm, convert, decide, register_norm
from distnorm.norms import surgery
from tests import nasty
from tests.nasty import KINDS, trained_constants

pytestmark = pytest.mark.unit

SYNC = decide(8, 4, momentum=None)


class MyNorm(nn.Module):
    """A batch norm that somebody wrote round the function: no `affine`, no `num_features`, no count."""

    def __init__(self, channels, eps=1e-3):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        held = self.running_mean, self.running_var, self.weight, self.bias
        return functional.batch_norm(x, *held, self.training, 0.1, self.eps)


class Through(MyNorm):
    """The function, called by another function."""

    def forward(self, x):
        return normalize(x, self.running_mean, self.running_var)


def normalize(x, mean, var):
    return torch.batch_norm(x, None, None, mean, var, False, 0.1, 1e-5, False)


class Active(MyNorm):
    """It does more."""

    def forward(self, x):
        return super().forward(x).relu()


class ByHand(nn.Module):
    """Running statistics without the function."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))

    def forward(self, x):
        return (x - self.running_mean) / self.running_var.sqrt()


class Stateless(nn.Module):
    def forward(self, x):
        return functional.instance_norm(x)


OWN = {
    "function": (MyNorm, "applies F.batch_norm in code of its own; layers={'1': …} converts it"),
    "more": (Active, "applies F.batch_norm in code of its own, which convert() cannot replace"),
    "through": (Through, "applies torch.batch_norm in code of its own, which convert() cannot replace"),
    "by hand": (ByHand, "keeps running statistics in code of its own, which convert() cannot replace"),
    "stateless": (lambda _: Stateless(), "applies F.instance_norm in code of its own, which convert() cannot replace"),
}


@pytest.mark.parametrize(("make", "why"), OWN.values(), ids=OWN)
def test_modules_that_normalize_by_themselves_are_listed(make, why, caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(4), nn.BatchNorm2d(4))
    conversion = convert(model, SYNC)
    assert [(row.name, row.why) for row in conversion.left] == [("1", why)]
    assert f"left: {conversion.left[0].why}" in str(conversion)
    assert caplog.records[0].getMessage().startswith("convert() left '1' as it was: ")
    assert [row.name for row in conversion.layers] == ["2"]
    with pytest.raises(ConfigError, match=r"found no batch norm layer in Sequential, but '1': a \w+, which") as caught:
        convert(nn.Sequential(nn.Conv2d(3, 4, 1), make(4)), SYNC)
    remedy = "layers={'1': {}}" if "converts it" in why else "after=(…)"
    assert remedy in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "group_ws"])
def test_one_that_is_a_batch_norm_converts_where_it_is_named(kind):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), MyNorm(4)), torch.randn(4, 3, 5, 5)
    trained_constants(model[1])
    before, state = nasty.picture(model), nasty.values(model)
    reference = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(4, eps=1e-3))
    reference.load_state_dict(model.state_dict(), strict=False)
    spec = NormSpec("sync", 32, layers={"1": {f: getattr(KINDS[kind], f) for f in ("kind", "groups", "ghost_batch")}})
    conversion = convert(model, spec)
    convert(reference, NormSpec("sync", 32, layers={"1": spec.layers["1"]}))
    torch.manual_seed(0)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), reference.train(mode)(x))
    if kind in {"sync", "ghost", "renorm"}:
        assert "; momentum 0.1, since it named none" in conversion.layers[0].why
    conversion.revert()
    assert nasty.picture(model.train()) == before
    assert list(nasty.values(model)) == list(state)


def test_a_glob_is_no_name_and_more_than_a_norm_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), MyNorm(4), nn.BatchNorm2d(4))
    assert [row.name for row in convert(model, NormSpec("sync", 8, layers={"*": {"kind": "layer"}})).left] == ["1"]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Active(4), nn.BatchNorm2d(4))
    before = nasty.picture(model)
    with pytest.raises(ConfigError, match=r"'1' is a Active with code of its own[\s\S]*register_norm\(Active, after"):
        convert(model, NormSpec("sync", 8, layers={"1": {}}))
    assert nasty.picture(model) == before


def test_a_registered_class_needs_no_name(monkeypatch):
    monkeypatch.setattr(surgery, "SOURCES", dict(surgery.SOURCES))
    register_norm(MyNorm)
    model = nn.Sequential(MyNorm(4), nn.BatchNorm2d(4))
    conversion = convert(model, SYNC)
    assert [type(layer) for layer in model] == [SyncBatchNorm] * 2
    assert model[0].eps == 1e-3
    assert not conversion.left


def test_code_without_source_is_seen_on_an_example():
    space = {"nn": nn, "functional": functional}
    code = "def forward(self, x): return functional.batch_norm(x, None, None, training=True)"
    exec(f"class Secret(nn.Module):\n    {code}\n", space)
    model = nn.Sequential(space["Secret"](), nn.BatchNorm2d(3))
    assert not convert(model, SYNC).left
    model = nn.Sequential(space["Secret"](), nn.BatchNorm2d(3))
    state, stream = nasty.values(model), torch.get_rng_state()
    (row,) = convert(model, SYNC, example=torch.randn(4, 3, 5, 5, generator=torch.Generator())).left
    assert (row.name, row.why.partition(",")[0]) == ("0", "applies F.batch_norm in code of its own")
    assert nasty.same_values(nasty.values(model), state)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    named = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert not convert(named, SYNC, example={"input": torch.randn(2, 3)}).left


def test_without_a_batch_norm_the_message_lists_what_was_seen():
    norm_free = type("NormFreeBlock", (nn.Identity,), {})
    model = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.Linear(3, 3), norm_free())
    with pytest.raises(ConfigError, match=r"It has 2 LayerNorm, 1 GroupNorm\.[\s\S]*norm_layer=") as caught:
        convert(model, SYNC)
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(ConfigError, match="It has no other norm either"):
        convert(nn.Sequential(nn.Linear(3, 3)), SYNC)


def test_norms_of_other_kinds_and_torchs_own_are_not_listed():
    model = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))
    assert not convert(model, SYNC, example=torch.randn(2, 4, 3, 3)).left


class StandardizedByNorm(nn.Conv2d):
    """As timm 1.0.31 standardizes weights, in normalizer-free networks too: the function, applied to filters."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias)


def test_standardized_weights_are_no_batch_normalization():
    assert not convert(nn.Sequential(StandardizedByNorm(3, 4, 3), nn.BatchNorm2d(4)), SYNC).left
    with pytest.raises(ConfigError, match="found no batch norm in Sequential: there is nothing to decide"):
        convert(nn.Sequential(StandardizedByNorm(3, 4, 3)), SYNC)
