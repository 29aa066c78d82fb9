"""A norm that starts as the identity does not change what a network computes."""

import numpy as np
import pytest
import torch
from torch import nn

from distnorm import ConfigError, GhostBatchNorm, NormSpec, ShapeError, SyncBatchNorm, collectives, convert
from distnorm.identity import identity_init
from distnorm.norms import BatchRenorm, FrozenBatchNorm
from distnorm.norms.recurrent import RecurrentBatchNorm
from tests import ranks
from tests.nasty import FrozenBatchNorm2d, OwnForward

pytestmark = pytest.mark.unit


def norms(channels, dtype=torch.float32):
    made = {
        "1d": nn.BatchNorm1d(channels),
        "2d": nn.BatchNorm2d(channels, momentum=None, eps=0.1),
        "sync": SyncBatchNorm(channels),
        "renorm": BatchRenorm(channels),
        "one ghost": GhostBatchNorm(channels, 64),
        "frozen": FrozenBatchNorm(channels),
        "torchvision": FrozenBatchNorm2d(channels),
        "stateless": nn.BatchNorm2d(channels, track_running_stats=False),
    }
    return {name: layer.to(dtype) for name, layer in made.items()}


@pytest.mark.parametrize("name", norms(2))
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_what_comes_in_goes_out(name, dtype, rounding):
    torch.manual_seed(0)
    layer = norms(5, dtype)[name]
    x = torch.randn(16, 5, *([] if name == "1d" else [3, 3]), dtype=dtype) * 2 + 3
    assert identity_init(layer, x) is layer
    for mode in (True, False):
        error = (layer.train(mode)(x) - x).abs().max() / x.abs().max()
        assert error <= rounding, mode
        identity_init(layer, x)


def test_it_sets_the_batchs_own_numbers():
    x = torch.randn(6, 3, 4, dtype=torch.float64) * 2 + 5
    layer = identity_init(nn.BatchNorm1d(3, dtype=torch.float64), x)
    values = x.transpose(0, 1).reshape(3, -1).numpy()
    np.testing.assert_allclose(layer.weight.detach(), np.sqrt(values.var(1) + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(layer.bias.detach(), values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, values.var(1), rtol=1e-12)
    np.testing.assert_allclose(layer.running_mean, values.mean(1), rtol=1e-12)
    assert layer.num_batches_tracked == 1
    assert layer.weight.requires_grad


def test_a_pretrained_network_does_not_notice():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    x = torch.randn(8, 3, 8, 8)
    inserted = nn.Sequential(network[0], identity_init(nn.BatchNorm2d(6), network[0](x)), *network[1:])
    convert(inserted, NormSpec("sync", 8))
    torch.testing.assert_close(inserted(x), network(x), rtol=1e-5, atol=1e-6)


def init_on_ranks(parts):
    """Body: each rank gives its own part; what the layer became, and what a synchronized one gives."""
    x = parts[collectives.rank()]
    layer = identity_init(SyncBatchNorm(3), x)
    y = layer(x)
    return {k: v.clone() for k, v in layer.state_dict().items()}, float((y - x).abs().max()) if len(x) else 0.0


def test_ranks_pool_their_batches():
    torch.manual_seed(0)
    for last in (torch.randn(0, 3, 2), torch.randn(2, 3, 2) * 3):
        parts = [torch.randn(5, 3, 2) + 4, last]
        alone = identity_init(nn.BatchNorm1d(3), torch.cat(parts))
        for state, error in ranks.run(init_on_ranks, parts, world=2):
            torch.testing.assert_close(state["weight"], alone.weight.detach())
            torch.testing.assert_close(state["running_mean"], alone.running_mean)
            assert error < 1e-5


def refused_on_ranks(parts):
    """Body: the message that each rank raises."""
    with pytest.raises(ShapeError) as caught:
        identity_init(nn.BatchNorm1d(3), parts[collectives.rank()])
    return str(caught.value)


def test_one_ranks_misfit_is_raised_on_all():
    found = ranks.run(refused_on_ranks, [torch.randn(4, 3), torch.randn(4, 2)], world=2)
    assert found[0] == found[1]
    assert "shape (4, 2) for a layer of 3 channels" in found[0]
    assert "without values on every rank" in ranks.run(refused_on_ranks, [torch.randn(0, 3)] * 2, world=2)[1]


@pytest.mark.parametrize(
    ("layer", "batch", "error", "value", "remedy"),
    [
        (nn.BatchNorm2d(3), torch.randn(4, 2, 2, 2), ShapeError, "shape (4, 2, 2, 2)", "[N, 3, *]"),
        (nn.BatchNorm2d(3), torch.randn(3), ShapeError, "shape (3,)", "[N, 3, *]"),
        (nn.BatchNorm2d(3), torch.ones(4, 3, dtype=torch.int64), ShapeError, "torch.int64", "batch.float()"),
        (nn.BatchNorm2d(3), [1.0], ShapeError, "a batch of list", "tensor [N, 3, *]"),
        (nn.BatchNorm2d(3), torch.randn(0, 3, 2, 2), ShapeError, "without values", "that the layer will see"),
        (nn.GroupNorm(1, 3), torch.randn(4, 3), ConfigError, "got GroupNorm, that is no batch norm", "model.bn1"),
        (RecurrentBatchNorm(3, 2), torch.randn(4, 3), ConfigError, "from time step to time step", "nn.BatchNorm1d"),
        (
            OwnForward(3),
            torch.randn(4, 3),
            ConfigError,
            "a OwnForward, a batch norm with code",
            "register_norm(OwnF",
        ),
        (nn.BatchNorm2d, torch.randn(4, 3), ConfigError, "got the class BatchNorm2d", "nn.BatchNorm2d(64)"),
        (nn.BatchNorm2d(3, affine=False), torch.randn(4, 3), ConfigError, "without weight and bias", "affine=True"),
        (nn.BatchNorm2d(3, bias=False), torch.randn(4, 3), ConfigError, "BatchNorm2d without bias", "and a bias"),
    ],
)
def test_refusals_name_value_and_remedy(layer, batch, error, value, remedy):
    before = {k: v.clone() for k, v in layer.state_dict().items()} if isinstance(layer, nn.Module) else {}
    with pytest.raises(error) as caught:
        identity_init(layer, batch)
    assert value in str(caught.value)
    assert remedy in str(caught.value)
    assert "\\" not in str(caught.value)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())
