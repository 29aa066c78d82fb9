"""What a norm has learned: nothing, statistics, or weights that carry them; and what a conversion says of it."""

import pytest
import torch
from torch import nn

from distnorm import NormSpec, convert
from distnorm.norms import FrozenBatchNorm
from distnorm.trained import is_carried_by_weights, saw_no_batch
from tests.nasty import FROZEN, KINDS, DetrFrozenBatchNorm2d, FrozenBatchNorm2d

pytestmark = pytest.mark.unit

LEARNS = [kind for kind in KINDS if kind != "frozen"]


def learned(norm):
    """Weight and bias hold the whole map: statistics stay 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(4, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(4, generator=generator))
    return norm


def seen(norm):
    norm.running_mean.copy_(torch.arange(4.0))
    norm.running_var.copy_(torch.arange(4.0) + 1)
    return norm


CONSTANTS = {
    "torchvision": lambda: FrozenBatchNorm2d(4),
    "ours": lambda: FrozenBatchNorm(4),
    **{name: lambda cls=cls: cls(4) for name, cls in FROZEN.items()},
}
NORMS = {"torch": lambda: nn.BatchNorm2d(4), "weight only": lambda: nn.BatchNorm2d(4, bias=False), **CONSTANTS}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def named(kind):
    fields = {name: getattr(KINDS[kind], name) for name in ("kind", "groups", "ghost_batch", "sync_ranks")}
    return NormSpec("batch", 8, layers={"0": fields})


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_a_norm_that_does_nothing_is_told_from_weights_that_carry_statistics(make, caplog):
    """Also where there is no count of batches, and where a variance of 1 - eps makes 1 with eps."""
    empty = make()
    assert saw_no_batch(empty)
    assert not is_carried_by_weights(empty)
    convert(nn.Sequential(empty, seen(nn.BatchNorm2d(4))), named("frozen"))
    (said,) = warnings(caplog)
    assert said.startswith(
        "norm=frozen: 1 of 1 layers have seen no batch: constants 0 and 1, as if there were no norms"
    )
    caplog.clear()
    carrying = make()
    if carrying.bias is None:
        return
    model = nn.Sequential(learned(carrying), seen(nn.BatchNorm2d(4))).eval()
    assert is_carried_by_weights(model[0])
    x = torch.randn(8, 4, 3, 3)
    expected = model[0](x)
    conversion = convert(model, named("frozen"))
    assert not warnings(caplog)
    assert conversion.layers[0].why.endswith("; weight and bias carry the statistics (0 and 1)")
    torch.testing.assert_close(model.train()[0](x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LEARNS)
@pytest.mark.parametrize("make", [NORMS["torch"], *CONSTANTS.values()], ids=["torch", *CONSTANTS])
def test_weights_that_carry_statistics_do_not_become_silently_something_else(make, kind, caplog):
    model = nn.Sequential(learned(make()), seen(nn.BatchNorm2d(4)))
    conversion = convert(model, named(kind))
    (said,) = warnings(caplog)
    assert said.startswith("1 of 2 layers (0, …) have statistics 0 and 1, and weights and biases that differ")
    assert "the layers compute something else" in said
    assert "Keep them as constants (kind='frozen', or exclude=['0'])" in said
    assert len(said.splitlines()) <= 3
    why = {row.name: row.why for row in conversion.layers}
    assert "statistics 0 and 1, weight and bias carry them: it computes something else now" in why["0"]
    assert "carry" not in why["1"]


@pytest.mark.parametrize("kind", LEARNS)
@pytest.mark.parametrize("make", CONSTANTS.values(), ids=CONSTANTS)
def test_trained_constants_say_what_becomes_of_them(make, kind, caplog):
    model = nn.Sequential(seen(learned(make())))
    (row,) = convert(model, named(kind)).layers
    assert not warnings(caplog)
    now = "training takes batch statistics now" if kind in {"batch", "sync", "ghost", "renorm"} else "they are gone now"
    assert f"; these were constants: {now}" in row.why


def test_statistics_that_count_no_batch(caplog):
    """Of a checkpoint without `num_batches_tracked`: a cumulative average would forget them at the first batch."""
    cumulative = nn.Sequential(seen(nn.BatchNorm2d(4, momentum=None)))
    (row,) = convert(cumulative, NormSpec("sync", 8)).layers
    assert row.why.endswith("; its statistics count no batch: with momentum=None the first one replaces them")
    cumulative(torch.zeros(8, 4, 3, 3))
    assert not cumulative[0].running_mean.any()  # as it said
    (row,) = convert(nn.Sequential(seen(nn.BatchNorm2d(4, momentum=None))), NormSpec("sync", 8, momentum=0.1)).layers
    assert "count no batch" not in row.why
    (row,) = convert(nn.Sequential(seen(nn.BatchNorm2d(4))), KINDS["renorm"]).layers
    assert row.why.endswith("; its statistics count no batch: no correction in the first steps")
    uncounted = seen(nn.BatchNorm2d(4))
    uncounted.num_batches_tracked = None
    assert not saw_no_batch(uncounted)
    (row,) = convert(nn.Sequential(uncounted), NormSpec("frozen", 1)).layers
    assert "count" not in row.why
    counted = seen(nn.BatchNorm2d(4, momentum=None))
    counted.num_batches_tracked.fill_(5)
    assert "count" not in convert(nn.Sequential(counted), NormSpec("sync", 8)).layers[0].why
    assert not warnings(caplog)


@pytest.mark.parametrize(
    "initial",
    [
        lambda norm: nn.init.zeros_(norm.weight),
        lambda norm: nn.init.normal_(norm.weight, 1, 0.02),
        lambda norm: nn.init.constant_(norm.bias, 1e-4),
        lambda norm: norm.to(torch.bfloat16),
        lambda norm: norm.to("meta"),
    ],
    ids=["zero gain", "random gain", "constant bias", "bfloat16", "meta"],
)
def test_common_initial_values_are_not_taken_for_learned_ones(initial, caplog):
    norm = nn.BatchNorm2d(4)
    initial(norm)
    assert not is_carried_by_weights(norm)
    convert(nn.Sequential(norm), NormSpec("sync", 8))
    assert not warnings(caplog)


def test_a_named_constant_of_hugging_face_without_a_count_is_seen_as_empty():
    assert saw_no_batch(DetrFrozenBatchNorm2d(4))
    assert not saw_no_batch(seen(DetrFrozenBatchNorm2d(4)))
    assert not saw_no_batch(nn.BatchNorm2d(4, track_running_stats=False))
