"""Frozen norms of detection libraries, known by what they hold and compute: listed, converted where named, folded."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from distnorm import ConfigError, NormSpec, convert, decide, fold, identity_init
from distnorm.norms import FrozenBatchNorm, surgery
from tests import nasty
from tests.nasty import FROZEN, KINDS, Constants, MaskFrozenBatchNorm2d, trained_constants

pytestmark = pytest.mark.unit

SYNC = decide(8, 4, momentum=None)


@pytest.mark.parametrize("cls", FROZEN.values(), ids=FROZEN)
def test_frozen_norms_are_listed_and_stay(cls):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), trained_constants(cls(4)), nn.BatchNorm2d(4))
    before = nasty.picture(model[1:2]), nasty.values(model)
    conversion = convert(model, SYNC)
    assert [(row.name, row.channels, row.why) for row in conversion.left] == [
        ("1", 4, "constants, that no entry of layers names")
    ]
    assert (nasty.picture(model[1:2])) == before[0]
    assert nasty.same_values(nasty.values(model), before[1])
    assert "left: constants" in str(convert(nn.Sequential(cls(4)), SYNC))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", FROZEN.values(), ids=FROZEN)
def test_frozen_norms_convert_where_they_are_named(cls, kind):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), trained_constants(cls(4))).eval(), torch.randn(4, 3, 5, 5)
    before, expected = nasty.picture(model), model(x)
    spec = NormSpec("sync", 32, layers={"1": {f: getattr(KINDS[kind], f) for f in ("kind", "groups", "ghost_batch")}})
    conversion = convert(model, spec)
    assert [row.name for row in conversion.layers if row.name == "1"]
    if kind in {"batch", "sync", "ghost", "renorm", "frozen"}:
        had_none = cls is MaskFrozenBatchNorm2d and kind != "frozen"
        assert ("; eps 1e-5, since it had 0, which training refuses" in conversion.layers[0].why) == had_none
        if had_none:
            held = model[1].running_mean, model[1].running_var, model[1].weight, model[1].bias
            expected = functional.batch_norm(model[0](x), *held, training=False, eps=1e-5)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        assert all(parameter.requires_grad == (kind != "frozen") for parameter in model[1].parameters())
    assert type(model[1]).__module__.startswith(("distnorm.", "torch.nn."))
    model.train()(x)
    if kind == "sync":
        plain = functional.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, True)
        torch.testing.assert_close(model(x), plain, rtol=1e-3, atol=1e-3)
    conversion.revert()
    assert nasty.picture(model.eval()) == before


def test_an_eps_of_0_is_replaced_also_after_another_conversion():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), trained_constants(MaskFrozenBatchNorm2d(4)))
    convert(model, NormSpec("frozen", 1, layers={"1": {}}))
    assert model[1].eps == 0
    convert(model, NormSpec("sync", 8, layers={"1": {}}))
    assert model[1].eps == 1e-5
    model(torch.randn(4, 3, 5, 5)).sum().backward()


@pytest.mark.parametrize("cls", FROZEN.values(), ids=FROZEN)
def test_frozen_norms_fold_and_start_as_identity(cls):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), trained_constants(cls(4))).eval()
    x = torch.randn(4, 3, 5, 5)
    expected = model(x)
    assert fold(model).folded == (("0", "1"),)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    layer, y = cls(3), torch.randn(16, 3, 4, 4) * 0.01 + 2
    torch.testing.assert_close(identity_init(layer, y)(y), y, rtol=1e-4, atol=1e-4)


class Squared(Constants):
    """Holds the same, and does something else."""

    def forward(self, x):
        weight, *_ = self.wide()
        return x * weight**2


def test_what_only_looks_like_constants_is_not_taken_for_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), trained_constants(Squared(4)), nn.BatchNorm2d(4)).eval()
    before = nasty.picture(model)
    with pytest.raises(ConfigError, match=r"'1' is a Squared, which holds what[\s\S]*register_norm\(Squared, after"):
        convert(model, NormSpec("sync", 8, layers={"1": {}}))
    assert nasty.picture(model) == before
    squared = trained_constants(Squared(4))
    folding = fold(nn.Sequential(nn.Conv2d(3, 4, 1), squared, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval())
    assert folding.left == (("1", "Squared holds what a frozen batch norm does, and computes something else"),)


def test_torchs_own_norms_are_not_taken_for_constants():
    assert surgery.source_of(nn.InstanceNorm2d(4, track_running_stats=True)) is None
    assert surgery.source_of(FrozenBatchNorm(4)) is not None
