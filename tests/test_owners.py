"""Modules that read a norm's attributes rather than call it: left alone with the reason, or refused; never a crash."""

import logging

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from distnorm import ConfigError, convert, decide
from distnorm.models import ResNet
from distnorm.owners import Owners
from tests import nasty, ranks
from tests.nasty import KINDS

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore")]

ALL = set(KINDS)
BATCH = {"batch", "sync", "ghost", "renorm"}
"""Kinds that keep all attributes; `frozen` keeps the statistics, without momentum."""


class Block(nn.Module):
    """A norm that an owner uses as its forward says, and a plain one after it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.plain = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.plain(self.use(self.conv(x)))


class Functional(Block):
    def use(self, x):
        bn = self.bn
        return functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)


class ByConstants(Block):
    def use(self, x):
        return (x - self.bn.running_mean.view(-1, 1, 1)) * self.bn.running_var.view(-1, 1, 1).rsqrt()


class BothWays(Block):
    """Calls it in training, folds it by hand in evaluation, as efficient implementations do."""

    def use(self, x):
        return self.bn(x) if self.training else x * helper(self.conv, self.bn)


def helper(_, norm):
    return (norm.weight / torch.sqrt(norm.running_var + norm.eps)).view(-1, 1, 1)


class InList(Block):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([self.bn])

    def use(self, x):
        for _, (norm, _) in enumerate(zip(self.norms, [0], strict=True)):
            x = x - norm.running_mean.view(-1, 1, 1)
        return x


class ByName(Block):
    def use(self, x):
        return self.bn(x) + getattr(self, f"b{'n'}").running_mean.view(-1, 1, 1)


class ByProperty(Block):
    @property
    def shift(self):
        return self.bn.running_mean.view(-1, 1, 1)

    def use(self, x):
        return self.bn(x) - self.shift


class Momentum(Block):
    def use(self, x):
        return self.bn(x) * (1 + self.bn.momentum)


class Weighs(Block):
    def use(self, x):
        return self.bn(x) * self.bn.weight.view(-1, 1, 1)


class Settings(Block):
    def use(self, x):
        return self.bn(x) * self.bn.eps if self.bn.training else self.bn(x)


class Guarded(Block):
    def use(self, x):
        mean = getattr(self.bn, "running_mean", None)
        return self.bn(x) if mean is None else self.bn(x) + 0


class Regularized(Block):
    """Reads outside of forward only: how it is built, a penalty on the gain, its fused filters after training."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.bn.weight)

    def use(self, x):
        return checkpoint(self.bn, x, use_reentrant=False)

    def penalty(self):
        return self.bn.weight.abs().sum() + self.plain.weight.abs().sum()

    def fuse(self):
        return self.conv.weight * (self.bn.weight / self.bn.running_var.sqrt()).view(-1, 1, 1, 1)


class Inherited(ByConstants):
    def forward(self, x):
        return super().forward(x) + 1


def patched():
    model = Weighs()
    model.forward = lambda x: model.plain(model.bn.running_mean.view(-1, 1, 1) + model.conv(x))
    return model


CASES = {
    "functional": (Functional, {"batch"}),
    "by constants": (ByConstants, {"batch"}),
    "both ways": (BothWays, BATCH | {"frozen"}),
    "in a list": (InList, {"batch"}),
    "by name": (ByName, BATCH | {"frozen"}),
    "by property": (ByProperty, BATCH | {"frozen"}),
    "momentum": (Momentum, BATCH),
    "weighs": (Weighs, ALL - {"none"}),
    "settings": (Settings, ALL),
    "guarded": (Guarded, ALL),
    "regularized": (Regularized, ALL),
    "inherited": (Inherited, {"batch"}),
    "patched": (patched, {"batch"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("make", "converts"), CASES.values(), ids=CASES)
def test_what_an_owner_reads_decides(make, converts, kind):
    model, x = make(), torch.randn(4, 3, 5, 5)
    model(x)
    conversion = convert(model, KINDS[kind])
    left = {row.name: row.why for row in conversion.left}
    assert ("bn" in left) == (kind not in converts), left
    if left:
        assert type(model.bn) is nn.BatchNorm2d
        assert "reads its" in left["bn"] or "normalizes with its" in left["bn"]
        assert left["bn"] in str(conversion)
    assert "plain" not in left
    for mode in (True, False):
        assert model.train(mode)(x).isfinite().all()
    conversion.revert()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_torchs_fused_modules(kind, dims):
    """`qat.ConvBn1d/2d/3d` read statistics and call the norm: it may pool over ranks, and not lose them."""
    cls = getattr(torch.ao.nn.intrinsic.qat, f"ConvBn{dims}d")
    engine = ao.get_default_qat_qconfig("fbgemm")
    fused = cls(3, 4, 3, qconfig=engine)
    plain = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](4)
    model = nn.Sequential(fused, plain)
    x = torch.randn(4, 3, *[6] * dims)
    conversion = convert(model, KINDS[kind])
    left = {row.name: row.why for row in conversion.left}
    assert ("0.bn" in left) == (kind not in BATCH | {"frozen"})
    assert all(" reads its running_" in why and ", which a " in why for why in left.values())
    assert model(x).isfinite().all()


@pytest.mark.parametrize("kind", ["group", "layer", "response", "none"])
def test_nothing_else_to_convert_is_refused(kind):
    model = nn.Sequential(torch.ao.nn.intrinsic.qat.ConvBn2d(3, 4, 3, qconfig=ao.get_default_qat_qconfig("fbgemm")))
    before = nasty.picture(model)
    with pytest.raises(ConfigError) as caught:
        convert(model, KINDS[kind])
    assert "can change no batch norm of this Sequential: '0.bn' must stay" in str(caught.value)
    assert "reads its running_" in str(caught.value)
    assert "Choose a kind that keeps what is read (batch, sync)" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert nasty.picture(model) == before


def test_a_fused_pair_waits_for_its_preparation(caplog):
    pair = ao.fuse_modules_qat(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train(), [["0", "1"]])
    model = nn.Sequential(pair, nn.BatchNorm2d(4))
    conversion = convert(model, KINDS["sync"])
    (row,) = conversion.left
    assert "in a fused ConvBn2d, which prepare_qat() rebuilds" in row.why
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage().startswith(f"convert() left {row.name!r} as it was: in a fused ConvBn2d")
    conversion.revert()
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    prepared = ao.prepare_qat(model.train())
    assert [row.was for row in convert(prepared, KINDS["sync"]).layers] == ["BatchNorm2d"] * 2


def test_methods_besides_forward_are_named():
    model = Regularized()
    conversion = convert(model, KINDS["group"])
    rows = {row.name: row.why for row in conversion.layers}
    assert rows["bn"].endswith("; Regularized.fuse reads its running_var, which is gone")
    assert rows["plain"] == "2 groups of 2 channels"
    model.penalty().backward()
    conversion.revert()
    rows = {row.name: row.why for row in convert(model, KINDS["sync"]).layers}
    assert not any("which is gone" in why for why in rows.values())
    assert "penalty reads its weight, which is gone" in str(convert(Regularized(), KINDS["none"]))


def test_code_without_source_is_seen_on_an_example():
    space: dict = {"Block": Block}
    exec("class Secret(Block):\n    def use(self, x): return x * self.bn.running_var.view(-1, 1, 1)\n", space)
    x = torch.randn(4, 3, 5, 5)
    model = space["Secret"]()
    assert not convert(model, KINDS["sync"]).left
    model = space["Secret"]()
    state = nasty.values(model)
    (row,) = convert(model, KINDS["sync"], example=x).left
    assert row.name == "bn"
    assert row.why.startswith("Secret.forward normalizes with its running_var by itself")
    assert nasty.same_values(nasty.values(model), state)
    assert model.training


def test_an_example_that_does_not_fit_is_refused():
    model = Weighs()
    before = nasty.picture(model)
    said = r"convert\(\) could not run the model on example of shape \(4, 5\)[\s\S]*Weighs"
    with pytest.raises(ConfigError, match=said):
        convert(model, KINDS["sync"], example=torch.randn(4, 5))
    assert nasty.picture(model) == before


def test_plain_models_are_read_in_no_time_and_keep_nothing_back():
    for make in nasty.MODELS.values():
        model = make()
        norms = {m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        owners = Owners.of(model, norms)
        assert not owners.use.reads
        assert not owners.use.functions
    model = ResNet(widths=(8, 16))
    norms = {m for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert Owners.of(model, norms).use.calls == norms


def step(make):
    """Body: a converted owner that reads and calls, over two ranks: its norm pools."""
    torch.manual_seed(0)
    model = make()
    convert(model, decide(4, 2, kind="sync", momentum=None))
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    model(x).square().sum().backward()
    return model.bn.running_mean.tolist(), x


@pytest.mark.parametrize("make", [BothWays, Weighs])
def test_what_is_converted_pools_over_ranks(make):
    (first, x), (second, y) = ranks.run(step, make, world=2)
    torch.manual_seed(0)
    model = make()
    model(torch.cat([x, y]))
    torch.testing.assert_close(torch.tensor(first), model.bn.running_mean)
    assert first == second
