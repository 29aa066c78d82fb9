"""Conversion in place: what layers become, and the table."""

import copy
import threading

import pytest
import torch
from torch import nn

from distnorm import GhostBatchNorm, NormSpec, SyncBatchNorm, convert, decide
from distnorm.models import ResNet
from distnorm.norms.weight import StandardizedConv2d, standardized
from tests.nasty import Nasty

pytestmark = pytest.mark.unit

SYNC = decide(8, 4, momentum=None)
SPECS = [decide(8, 4), decide(64, 1, exact=True), decide(2, 2), decide(2, 2, kind="group"), decide(32, 1)]


def test_layers_become_what_the_spec_says_and_stay_the_same_objects():
    model = Nasty()
    norms = [model.shared, model.in_list[2], model.in_dict["norm"], *model.deep[0][0]]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model, SYNC)
    assert [type(norm) for norm in norms] == [SyncBatchNorm] * 5
    assert model.again is model.shared is model.in_list[1]
    assert model.held[0] is model.in_dict["norm"]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert optimizer.param_groups[0]["params"][0] is parameters[0]
    assert not model.in_dict["norm"].training
    assert not model.in_dict["norm"].weight.requires_grad
    assert model.in_dict["norm"].momentum is None
    assert model.deep[0][0][1].momentum == 0.03


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[4]], ids=lambda spec: spec.kind)
def test_state_dict_loads_before_and_after(spec):
    plain = ResNet()
    plain(torch.randn(4, 1, 12, 12))
    converted = ResNet()
    conversion = convert(converted, spec)
    converted.load_state_dict(plain.state_dict())
    ResNet().load_state_dict(converted.state_dict())
    assert conversion.lost_keys == ()
    x = torch.randn(4, 1, 12, 12)
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x))


def test_group_norm_keeps_weight_and_bias_and_names_the_lost_keys():
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12))
    weight = model[1].weight
    conversion = convert(model, decide(2, 2, kind="group"))
    norm = model[1]
    assert type(norm) is nn.GroupNorm
    assert norm.weight is weight
    assert (norm.num_groups, norm.num_channels) == (6, 12)
    assert conversion.lost_keys == ("1.num_batches_tracked", "1.running_mean", "1.running_var")
    x = torch.randn(2, 12, 3, 3)
    torch.testing.assert_close(norm(x), nn.functional.group_norm(x, 6, norm.weight, norm.bias))


def test_standardized_weights_go_only_before_norms():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
    convert(model, decide(2, 2))
    assert type(model[0]) is StandardizedConv2d
    assert type(model[3]) is nn.Conv2d
    w = model[0].weight.detach().double().flatten(1).numpy()
    expected = (w - w.mean(1, keepdims=True)) / (w.var(1, keepdims=True) + 1e-5) ** 0.5
    torch.testing.assert_close(standardized(model[0].weight.detach().double()).flatten(1), torch.from_numpy(expected))
    x = torch.randn(2, 3, 5, 5)
    as_written = nn.functional.conv2d(x, torch.from_numpy(expected).float().view_as(model[0].weight))
    torch.testing.assert_close(model[0](x), as_written, rtol=1e-4, atol=1e-5)


def test_exact_ghosts_replace_a_larger_batch():
    model = nn.Sequential(nn.BatchNorm1d(4))
    convert(model, decide(64, 1, exact=True))
    assert type(model[0]) is GhostBatchNorm
    assert model[0].ghost_batch == 32


def test_momentum_of_the_spec_reaches_the_layers():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=0.3))
    conversion = convert(model, decide(8, 4, momentum=0.02))
    assert [norm.momentum for norm in model] == [0.02, 0.02]
    conversion.revert()
    assert [norm.momentum for norm in model] == [0.1, 0.3]


def test_the_table_shows_each_layer_once_in_order():
    conversion = convert(ResNet(), SYNC)
    lines = str(conversion).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert "normalization batch" in lines[0]
    assert len(lines) == 2 + 9
    assert lines[2].split()[:5] == ["bn", "16", "BatchNorm2d", "SyncBatchNorm", "32"]
    assert lines[2].endswith("sync over 4 ranks, normalization batch 32")


def test_converting_again_follows_the_newer_spec():
    model = nn.Sequential(nn.BatchNorm2d(4))
    convert(model, SYNC)
    convert(model, decide(4, 4, kind="sync", sync_ranks=2))
    assert model[0].sync_ranks == 2
    convert(model, decide(32, 1))
    x = torch.randn(4, 4, 2, 2)
    torch.testing.assert_close(model[0](x), nn.BatchNorm2d(4)(x))


def test_torchs_layer_leaves_its_process_group_behind_and_gets_it_back():
    model = nn.Sequential(nn.SyncBatchNorm(4))
    group = model[0].process_group = threading.Lock()  # like a process group, nothing that could be copied
    conversion = convert(model, SYNC)
    copy.deepcopy(model)
    assert conversion.revert()[0].process_group is group


def test_filters_of_one_weight_are_not_standardized():
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8))
    convert(model, decide(2, 2))
    assert [type(model[0]), type(model[2])] == [nn.Conv2d] * 2


class Skip(nn.Module):
    """A residual block, whose activation works in place on what the norm gives out."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv(x)
        return self.act(self.norm(y)) + y


def test_without_a_norm_an_activation_in_place_leaves_the_skip_alone():
    model, x = Skip(), torch.randn(2, 4, 3, 3)
    convert(model, NormSpec("none", 1))
    y = model.conv(x)
    assert y.min() < 0
    torch.testing.assert_close(model(x), y.relu() + y)
