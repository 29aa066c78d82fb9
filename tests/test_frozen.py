"""Frozen batch normalization: constants against the formula, and nothing that could move them does."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm import ShapeError
from distnorm.norms import FrozenBatchNorm
from distnorm.norms.surgery import become
from tests import reference_norms, steps

pytestmark = pytest.mark.unit


def frozen(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = FrozenBatchNorm(3, dtype=dtype)
    for value in layer.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return layer


def numbers_of(layer):
    return [t.detach().double().numpy() for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
def test_it_is_the_formula_in_both_modes(dimensions, training):
    (x,), (dy,), _, _ = steps.shards([4], steps.POSITIONS[dimensions], 1.0)
    layer = frozen().train(training)
    own = steps.channels_last(x).detach().requires_grad_()
    y = layer(own)
    y.backward(dy)
    truth = reference_norms.frozen_batch_norm(x.numpy(), dy.numpy(), *numbers_of(layer))
    for key, value in {"y": y, "dx": own.grad}.items():
        torch.testing.assert_close(value, torch.from_numpy(truth[key]), rtol=1e-10, atol=1e-10)
    assert y.stride() == own.stride()


def test_no_training_step_moves_it():
    model = nn.Sequential(nn.Conv1d(3, 3, 1), frozen(torch.float32)).requires_grad_(True).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5)).square().sum().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("1."), name


def test_it_starts_frozen_and_is_no_batch_norm_to_update():
    layer = FrozenBatchNorm(3)
    assert not any(p.requires_grad for p in layer.parameters())
    assert not isinstance(layer, _BatchNorm)
    before = copy.deepcopy(layer.state_dict())
    torch.optim.swa_utils.update_bn([torch.randn(4, 3) + 5], nn.Sequential(layer))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("without", [(), ("num_batches_tracked",)], ids=["batch_norm", "torchvision"])
def test_checkpoints_of_both_kinds_load(without):
    source = nn.BatchNorm2d(3)
    source(torch.randn(4, 3, 2, 2) + 1)
    state = {f"0.{name}": value for name, value in source.state_dict().items() if name not in without}
    model = nn.Sequential(FrozenBatchNorm(3))
    model.load_state_dict(state)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), source.eval()(x))
    assert int(model[0].num_batches_tracked) == (0 if without else 1)
    nn.Sequential(nn.BatchNorm2d(3)).load_state_dict(model.state_dict())  # and back


def test_a_checkpoint_without_statistics_is_refused():
    with pytest.raises(RuntimeError, match="running_var"):
        FrozenBatchNorm(3).load_state_dict({"weight": torch.ones(3), "bias": torch.ones(3)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("module_too", [False, True])
def test_half_precision_comes_out_rounded(dtype, module_too):
    layer, x = frozen(torch.float32), (torch.randn(4, 3, 6) + 1).to(dtype)
    if module_too:
        layer.to(dtype)
    truth = reference_norms.frozen_batch_norm(x.double().numpy(), x.double().numpy(), *numbers_of(layer))["y"]
    y, unit = layer(x), torch.finfo(dtype).eps
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), torch.from_numpy(truth), rtol=unit, atol=unit)


def test_gradcheck_compile_copies_and_empty_batches():
    layer, x = frozen(), torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    torch._dynamo.reset()
    twins = (torch.compile(layer, fullgraph=True, backend="aot_eager"), copy.deepcopy(layer))
    for twin in (*twins, pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), layer(x))
    assert layer(x[:0]).shape == (0, 3, 2)
    assert repr(layer) == "FrozenBatchNorm(3, eps=1e-05)"


def test_parameters_may_be_missing():
    layer, x = frozen(), torch.randn(4, 3, 2, dtype=torch.float64)
    _, _, mean, var = numbers_of(layer)
    layer.weight = layer.bias = None
    truth = reference_norms.frozen_batch_norm(x.numpy(), x.numpy(), np.ones(3), np.zeros(3), mean, var)["y"]
    torch.testing.assert_close(layer(x), torch.from_numpy(truth), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("x", "message", "remedy"),
    [
        (torch.randn(4, 5), "FrozenBatchNorm(3) got an input of shape (4, 5)", "3 channels in the second"),
        (torch.zeros(4, 3, dtype=torch.long), "FrozenBatchNorm(3) got an input of torch.int64", "input.float()"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(x, message, remedy):
    with pytest.raises(ShapeError) as caught:
        FrozenBatchNorm(3)(x)
    assert message in str(caught.value)
    assert remedy in str(caught.value)


def test_a_batch_norm_that_becomes_one_keeps_what_it_is_in_evaluation():
    source, x = nn.BatchNorm1d(3), torch.randn(6, 3, 4) * 2 + 1
    source(x)
    expected = copy.deepcopy(source).eval()(x)
    become(source, FrozenBatchNorm)
    torch.testing.assert_close(source.train()(x), expected)
    assert not source(x).requires_grad
