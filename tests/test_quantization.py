"""Quantization, by torch.ao itself: revert first, and every other way names `revert()`."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao
from torch.ao.quantization import quantize_fx

from distnorm import ConfigError, ShapeError, convert, fold
from tests.nasty import KINDS

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore")]

ENGINE = next((e for e in ("fbgemm", "x86", "qnnpack") if e in torch.backends.quantized.supported_engines), None)
OURS = [kind for kind in KINDS if kind not in {"batch", "group", "layer", "instance"}]
"""Kinds that put in a class of distnorm's."""
TRIPLES = [["net.0", "net.1", "net.2"], ["net.3", "net.4"]]


@pytest.fixture(autouse=True)
def _engine():
    if ENGINE is None:
        pytest.skip("this torch has no engine for quantized layers")
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, ENGINE
    yield
    torch.backends.quantized.engine = before


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        blocks = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.stub, self.net, self.back = ao.QuantStub(), nn.Sequential(*blocks), ao.DeQuantStub()

    def forward(self, x):
        return self.back(self.net(self.stub(x)))


def batch(seed=0):
    return torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def trained(kind):
    model = Net()
    conversion = convert(model, KINDS[kind])
    for seed in range(30):
        model(batch(seed))
    return model, conversion


def close(found, expected):
    """Tell how far quantized values are off, of the largest."""
    return float((found - expected).abs().max() / expected.abs().max()) < 0.1


@pytest.mark.parametrize("kind", ["sync", "ghost", "renorm"])
def test_a_reverted_model_trains_quantized_and_is_converted(kind):
    model, conversion = trained(kind)
    conversion.revert()
    model.qconfig = ao.get_default_qat_qconfig(ENGINE)
    prepared = ao.prepare_qat(ao.fuse_modules_qat(model.train(), TRIPLES))
    assert type(prepared.net[0]) is torch.ao.nn.intrinsic.qat.ConvBnReLU2d
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for seed in range(5):
        optimizer.zero_grad()
        prepared(batch(seed)).square().mean().backward()
        optimizer.step()
    expected = prepared.eval()(batch())
    assert close(ao.convert(prepared)(batch()), expected)


def test_a_folded_model_is_quantized_after_training():
    model, _ = trained("sync")
    expected = model.eval()(batch())
    fold(model)
    model.qconfig = ao.get_default_qconfig(ENGINE)
    prepared = ao.prepare(model)
    prepared(batch())
    assert close(ao.convert(prepared)(batch()), expected)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("fuse", [ao.fuse_modules, ao.fuse_modules_qat])
def test_fusing_a_converted_model_names_the_remedy(kind, fuse):
    model, _ = trained(kind)
    model.train(fuse is ao.fuse_modules_qat)
    for names in TRIPLES:
        with pytest.raises(ConfigError) as caught:
            fuse(copy.deepcopy(model), [names])
        first, second = (type(layer).__name__ for layer in model.net[:2])
        assert f"{fuse.__name__}() got {first}, {second}" in str(caught.value)
        assert "Call conversion.revert() before prepare() and fuse_modules()" in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind != "none"])
def test_quantized_values_in_a_converted_layer_name_the_remedy(kind):
    model, _ = trained(kind)
    model.eval().qconfig = ao.get_default_qconfig(ENGINE)
    prepared = ao.prepare(model)
    prepared(batch())
    with pytest.raises(ShapeError) as caught:
        ao.convert(prepared)(batch())
    assert "got an input of torch.quint8" in str(caught.value)
    assert "Call conversion.revert() before prepare()" in str(caught.value)
    assert "input.float()" not in str(caught.value)


def test_torchs_own_pairs_keep_torchs_own_answer():
    with pytest.raises(AssertionError, match="did not find fuser method"):
        ao.fuse_modules(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).eval(), [["0", "1"]])


@pytest.mark.parametrize("kind", KINDS)
def test_fx_quantization_leaves_a_converted_norm_in_floating_point(kind):
    model, _ = trained(kind)
    mapping = ao.get_default_qconfig_mapping(ENGINE)
    prepared = quantize_fx.prepare_fx(model.net.eval(), mapping, (batch(),))
    expected = prepared(batch())
    quantized = quantize_fx.convert_fx(prepared)
    kept = [m for m in quantized.modules() if type(m) is type(model.net[1])]
    assert len(kept) == (0 if kind == "batch" else 2)
    error = (quantized(batch()) - expected).abs().max() / expected.abs().max()
    assert error < 0.2
