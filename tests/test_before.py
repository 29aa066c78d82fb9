"""What norms are fed decides their groups, and which convolutions are standardized: by the flow, not by the order."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from distnorm import NormSpec, SyncBatchNorm, convert
from distnorm.norms.weight import STANDARDIZED, StandardizedConv1d, StandardizedConv2d
from tests.nasty import FrozenBatchNorm2d

pytestmark = pytest.mark.unit


class Net(nn.Module):
    """Some layers, registered in one order, and joined as a function says."""

    def __init__(self, joined, **layers):
        super().__init__()
        self.joined = joined
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.joined(self, x)


def linear(norm):
    return nn.Sequential(nn.Linear(3, 8), norm)


def by_function(joined, norm=None, **layers):
    return Net(lambda m, x: m.norm(joined(m, x)), norm=norm or nn.BatchNorm1d(8), **layers)


def untraceable(joined):
    return lambda m, x: joined(m, x) if x.sum() < 1e9 else x


def conv1d():
    return nn.Conv1d(3, 8, 3)


def conv2d():
    return nn.Conv2d(3, 8, 3)


VECTOR = {
    "linear": linear(nn.BatchNorm1d(8)),
    "no layer": nn.Sequential(nn.BatchNorm1d(8)),
    "torch's synchronized": linear(nn.SyncBatchNorm(8)),
    "ours": linear(SyncBatchNorm(8)),
    "activation between": nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(), nn.BatchNorm1d(8)),
    "flattened": nn.Sequential(conv2d(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), SyncBatchNorm(8)),
    "torch.flatten": by_function(lambda m, x: torch.flatten(m.conv(x).amax(2, keepdim=True), 1), conv=conv1d()),
    "mean": by_function(lambda m, x: m.conv(x).mean((2, 3)), SyncBatchNorm(8), conv=conv2d()),
    "max": by_function(lambda m, x: m.conv(x).max(dim=-1)[0], conv=conv1d()),
    "view": by_function(lambda m, x: m.conv(x).mean((2, 3), keepdim=True).view(x.size(0), -1), conv=conv2d()),
    "one position": by_function(lambda m, x: m.conv(x)[:, :, 0], conv=conv1d()),
    "other order": by_function(lambda m, x: m.lin(x) + 1, lin=nn.Linear(3, 8), conv=conv1d()),
    "functional": by_function(lambda m, x: functional.linear(x, m.lin.weight), lin=nn.Linear(3, 8)),
    "untraceable": Net(untraceable(lambda m, x: m.norm(m.lin(x))), lin=nn.Linear(3, 8), norm=SyncBatchNorm(8)),
    "untraceable, pooled": Net(
        untraceable(lambda m, x: m.norm(m.conv(x).mean((2, 3)))), conv=conv2d(), norm=nn.BatchNorm1d(8)
    ),
    "part": Net(untraceable(lambda m, x: m.part(x)), part=linear(SyncBatchNorm(8))),
}
MAPS = {
    "conv": nn.Sequential(conv1d(), nn.BatchNorm1d(8)),
    "ours": nn.Sequential(conv1d(), SyncBatchNorm(8)),
    "first": nn.Sequential(nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3)),
    "turned": by_function(lambda m, x: m.lin(x).transpose(1, 2), lin=nn.Linear(3, 8)),
    "flattened positions": by_function(lambda m, x: m.conv(x).flatten(2), conv=conv2d()),
    "pre-activation": Net(lambda m, x: m.norm(m.a(x) + m.b(x)), norm=nn.BatchNorm1d(8), a=conv1d(), b=conv1d()),
    "untraceable": Net(untraceable(lambda m, x: m.norm(m.conv(x))), conv=conv1d(), norm=nn.BatchNorm1d(8)),
    "2d": nn.Sequential(nn.Linear(3, 8), nn.BatchNorm2d(8)),
    "any dimension": nn.Sequential(SyncBatchNorm(8)),
}


def the_norm(model):
    return next(m for m in model.modules() if isinstance(m, nn.GroupNorm) or type(m).__name__ == "FilterResponseNorm")


@pytest.mark.parametrize("kind", ["group", "group_ws", "instance", "response"])
@pytest.mark.parametrize("model", VECTOR.values(), ids=VECTOR)
def test_vectors_are_one_group(model, kind):
    conversion = convert(model, NormSpec(kind, 1))
    (row,) = conversion.layers
    conversion.revert()
    assert row.now == "GroupNorm"
    assert row.why == f"1 group of 8 channels: fed vectors, of which {kind!r} would leave too little"


@pytest.mark.parametrize("model", VECTOR.values(), ids=VECTOR)
def test_the_override_for_vectors_finds_them(model):
    conversion = convert(model, NormSpec("sync", 8, per_kind={"vector": {"kind": "layer"}}))
    assert type(the_norm(model)) is nn.GroupNorm
    conversion.revert()


@pytest.mark.parametrize("model", MAPS.values(), ids=MAPS)
def test_maps_get_the_groups_that_were_decided(model):
    conversion = convert(model, NormSpec("group", 1, per_kind={"vector": {"kind": "layer"}}))
    assert the_norm(model).num_groups == 4
    conversion.revert()


def test_vectors_are_one_group_by_an_override_too():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    convert(model, NormSpec("batch", 8, layers={"1": {"kind": "group", "groups": 4}}))
    assert model[1].num_groups == 1
    x = torch.randn(5, 8)
    torch.testing.assert_close(model[1](x), functional.layer_norm(x, (8,)))


def test_a_net_of_positions_in_1d_is_standardized():
    model = nn.Sequential(conv1d(), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8))
    convert(model, NormSpec("group_ws", 1, groups=2, per_kind={"vector": {"kind": "layer"}}))
    assert [type(model[0]), type(model[3])] == [StandardizedConv1d] * 2
    assert [model[1].num_groups, model[4].num_groups] == [2, 2]


# -- which convolutions are standardized


def standardized(model):
    return [name for name, m in model.named_modules() if type(m) in STANDARDIZED.values()]


def test_layers_in_lists_of_their_own_are_paired_as_they_are_called():
    def joined(m, x):
        for conv, norm in zip(m.convs, m.norms, strict=True):
            x = norm(conv(x))
        return x

    def layers():
        convs = nn.ModuleList([conv2d(), *(nn.Conv2d(8, 8, 3) for _ in range(2))])
        return {"convs": convs, "norms": nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))}

    model = Net(joined, **layers())
    convert(model, NormSpec("group_ws", 1))
    assert standardized(model) == ["convs.0", "convs.1", "convs.2"]
    model = Net(untraceable(joined), **layers())
    assert "no convolution stands alone before it" in str(convert(model, NormSpec("group_ws", 1)))
    assert standardized(model) == []


def test_a_convolution_whose_output_goes_on_beside_the_norm_stays():
    """As before the sum of a pre-activation ResNet, where registration puts the next norm right after it."""

    def joined(m, x):
        x = m.first(x)
        x = x + m.conv2(m.norm2(m.conv1(m.norm1(x))))
        return m.last(x)

    layers = {
        "first": conv2d(),
        "norm1": nn.BatchNorm2d(8),
        "conv1": nn.Conv2d(8, 8, 3, padding=1),
        "norm2": nn.BatchNorm2d(8),
        "conv2": nn.Conv2d(8, 8, 3, padding=1),
        "last": nn.BatchNorm2d(8),
    }
    model = Net(joined, **layers)
    table = str(convert(model, NormSpec("group_ws", 1))).splitlines()
    assert standardized(model) == ["conv1"]
    why = "not standardized: no convolution stands alone before it"
    assert [line.split()[0] for line in table if why in line] == ["norm1", "last"]


def test_what_cannot_be_standardized_is_named():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(conv2d()),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
    )
    conversion = convert(model, NormSpec("group_ws", 1))
    why = {row.name: row.why for row in conversion.layers}
    assert "the ParametrizedConv2d before it keeps its weights" in why["1"]
    assert "the Conv2d before it has filters of one weight" in why["3"]
    assert "not standardized" not in why["5"]
    assert standardized(model) == ["4"]


def test_where_nothing_can_be_traced_neighbours_are_paired():
    model = Net(untraceable(lambda m, x: m.norm(m.conv(x))), conv=conv2d(), norm=nn.BatchNorm2d(8))
    convert(model, NormSpec("group_ws", 1))
    assert type(model.conv) is StandardizedConv2d


def test_constants_of_two_dimensions_are_no_vectors():
    model = nn.Sequential(nn.Linear(3, 8), FrozenBatchNorm2d(8))
    convert(model, NormSpec("group", 1, layers={"1": {}}))
    assert model[1].num_groups == 4
