"""Norms of one sample at a time: filter response, its threshold, torch's groups, and local response normalization."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distnorm import ConfigError, ShapeError
from distnorm.norms import FilterResponseNorm, ThresholdedLinearUnit
from tests import reference_norms, steps

pytestmark = pytest.mark.unit


def close(found, truth):
    torch.testing.assert_close(found, torch.as_tensor(truth), rtol=1e-9, atol=1e-9)


def layer_with(weight, bias, **options):
    layer = FilterResponseNorm(len(weight), dtype=weight.dtype, **options)
    layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    return layer


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("dimensions", [3, 4, 5])
def test_it_is_the_papers_with_its_gradients(dimensions, learnable):
    (x,), (dy,), weight, bias = steps.shards([4], steps.POSITIONS[dimensions], 1.0)
    layer = layer_with(weight, bias, learnable_eps=learnable, eps=1e-2)
    own = steps.channels_last(x).detach().requires_grad_()
    y = layer(own)
    y.backward(dy)
    truth = reference_norms.filter_response_norm(x.numpy(), dy.numpy(), weight.numpy(), bias.numpy(), 1e-2)
    found = {"y": y, "dx": own.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    for key, value in found.items():
        close(value, truth[key])
    assert list(layer.state_dict()) == ["eps"] * learnable + ["weight", "bias"]
    if learnable:
        close(layer.eps.grad, truth["deps"])
    assert y.stride() == own.stride()


def test_a_learned_eps_that_went_below_zero_still_keeps_from_dividing_by_zero():
    layer = FilterResponseNorm(2, learnable_eps=True)
    with torch.no_grad():
        layer.eps.neg_()
    assert layer(torch.zeros(1, 2, 1)).isfinite().all()
    assert "eps=learned" in repr(layer)


@pytest.mark.parametrize("mode", ["module", "input", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_beyond_half_precision_do_not_overflow(dtype, mode):
    x = torch.randn(2, 3, 8).mul(1000).to(dtype)  # whose squares float16 cannot hold
    layer = FilterResponseNorm(3)
    if mode == "module":
        layer.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=mode == "autocast"):
        y = layer(x)
    ones, zeros = np.ones(3), np.zeros(3)
    truth = reference_norms.filter_response_norm(x.double().numpy(), x.double().numpy(), ones, zeros)["y"]
    unit = torch.finfo(dtype).eps
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), torch.from_numpy(truth), rtol=unit, atol=unit / 8)


@pytest.mark.parametrize("learnable", [False, True])
def test_both_orders_of_gradients_compile_and_checkpoints(learnable):
    layer, x = FilterResponseNorm(3, learnable_eps=learnable, dtype=torch.float64), torch.randn(2, 3, 4).double()
    x.requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    twins = [compiled, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for twin in [*twins, lambda x: checkpoint(layer, x, use_reentrant=False)]:
        close(twin(x), layer(x))
    assert layer(x[:0]).shape == (0, 3, 4)


def test_parameters_may_be_missing():
    layer, x = FilterResponseNorm(3), torch.randn(2, 3, 4, dtype=torch.float64)
    layer.weight = layer.bias = None
    close(layer(x), reference_norms.filter_response_norm(x.numpy(), x.numpy(), np.ones(3), np.zeros(3))["y"])


def test_the_threshold_cuts_and_learns():
    x = torch.tensor([[[-1.0, 0.5], [2.0, -3.0]]], requires_grad=True)
    unit = ThresholdedLinearUnit(2)
    assert torch.equal(unit(x), x.relu())
    with torch.no_grad():
        unit.tau.copy_(torch.tensor([-0.5, 1.0]))
    y = unit(x)
    assert y.tolist() == [[[-0.5, 0.5], [2.0, 1.0]]]
    y.backward(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    assert x.grad.tolist() == [[[0.0, 2.0], [3.0, 0.0]]]
    assert unit.tau.grad.tolist() == [1.0, 4.0]
    assert unit(x.half()).dtype == torch.float16
    assert repr(unit) == "ThresholdedLinearUnit(2)"


@pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan")])
def test_an_eps_that_is_none_is_refused(eps):
    with pytest.raises(
        ConfigError, match=rf"eps={eps}, which must be a finite number above 0.*Use 1e-6, or 1e-4 if learned"
    ):
        FilterResponseNorm(3, eps)


@pytest.mark.parametrize("layer", [FilterResponseNorm(3), ThresholdedLinearUnit(3)], ids=repr)
def test_an_input_that_does_not_fit_is_refused(layer):
    with pytest.raises(ShapeError, match=r"\(3\) got an input of shape \(2, 4, 5\).*\n.*3 channels in the second"):
        layer(torch.randn(2, 4, 5))
    with pytest.raises(ShapeError, match=r"an input of torch.int64; .* Give it input.float\(\)"):
        layer(torch.zeros(2, 3, 5, dtype=torch.long))


def test_an_input_without_positions_is_refused():
    with pytest.raises(ShapeError) as caught:
        FilterResponseNorm(3)(torch.randn(4, 3))
    assert "got an input of shape (4, 3), without positions" in str(caught.value)
    assert "Put it before the pooling or flattening, or use nn.LayerNorm there" in str(caught.value)


def by_groups(x, groups, eps=1e-5):
    rows = x.numpy().reshape(len(x), groups, -1)
    return ((rows - rows.mean(2, keepdims=True)) / np.sqrt(rows.var(2, keepdims=True) + eps)).reshape(x.shape)


@pytest.mark.parametrize("dimensions", [3, 4, 5])
def test_one_group_is_the_layer_norm_of_a_convolutional_net_and_a_group_a_channel_the_instance_norm(dimensions):
    (x,), _, _, _ = steps.shards([4], steps.POSITIONS[dimensions], 1.0, channels=6)
    instance = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[dimensions](6)
    truths = {1: nn.functional.layer_norm(x, x.shape[1:]), 6: instance(x)}
    for groups in (1, 2, 6):
        y = nn.GroupNorm(groups, 6, dtype=torch.float64)(x)
        close(y, by_groups(x, groups))
        close(y, truths.get(groups, y))


def test_torchs_instance_norm_takes_samples_and_channels_for_one_unbatched_sample():
    x = torch.randn(5, 6, dtype=torch.float64)  # [N, C], read as [C, L]: each row a channel over positions
    with pytest.warns(UserWarning, match="does not match num_features"):
        y = nn.InstanceNorm1d(6)(x)
    close(y, by_groups(x, 1))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_torchs_local_response_norm_is_krizhevskys(size):
    (x,), _, _, _ = steps.shards([2], (3, 4), channels=7)
    layer = nn.LocalResponseNorm(size, alpha=0.3, beta=0.75, k=2.0)
    close(layer(x), reference_norms.local_response_norm(x.numpy(), size, 0.3, 0.75, 2.0))
    assert torch.autograd.gradcheck(layer, x[:1, :, :2, :2].clone().requires_grad_())
