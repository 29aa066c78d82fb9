"""Ghost batches: each of its own, the running statistics of all together (design: contract lines 2 to 11)."""

import copy
import pickle

import pytest
import torch
from torch import nn

from distnorm import ConfigError, GhostBatchNorm, ShapeError
from tests import reference, steps

pytestmark = pytest.mark.unit


def close(found, truth):
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
@pytest.mark.parametrize("ghost_batch", [2, 3, 4, 100])
def test_each_ghost_is_a_batch_and_the_running_statistics_take_all(ghost_batch, dimensions):
    (x,), (dy,), weight, bias = steps.shards([8], steps.POSITIONS[dimensions], 3.0)
    layer = GhostBatchNorm(3, ghost_batch, dtype=torch.float64)
    layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    own = steps.channels_last(x).detach().requires_grad_()
    y = layer(own)
    y.backward(dy)
    parts = [
        reference.batch_norm(*pair, weight, bias)
        for pair in zip(x.split(ghost_batch), dy.split(ghost_batch), strict=True)
    ]
    whole = reference.batch_norm(x, dy, weight, bias)
    close(y, torch.cat([part["y"] for part in parts]))
    close(own.grad, torch.cat([part["dx"] for part in parts]))
    close(layer.weight.grad, sum(part["dweight"] for part in parts))
    close(layer.bias.grad, sum(part["dbias"] for part in parts))
    close(layer.running_mean, whole["running_mean"])
    close(layer.running_var, whole["running_var"])
    assert y.stride() == own.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype):
    (x,), (dy,), _, _ = steps.shards([8], (6, 7), 3.0, dtype)
    layer = GhostBatchNorm(3, 4)
    y = layer(x)
    truth = torch.cat(
        [reference.batch_norm(*pair, None, None)["y"] for pair in zip(x.split(4), dy.split(4), strict=True)]
    )
    unit = torch.finfo(dtype).eps
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), truth, rtol=unit, atol=unit / 8)
    whole = reference.batch_norm(x, dy, None, None)
    torch.testing.assert_close(layer.running_var.double(), whole["running_var"], rtol=1e-5, atol=1e-5)


def test_both_orders_of_gradients_compile_and_copies():
    layer = GhostBatchNorm(3, 2, dtype=torch.float64)
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    torch._dynamo.reset()
    twins = [copy.deepcopy(layer) for _ in range(2)] + [pickle.loads(pickle.dumps(layer))]
    twins[0] = torch.compile(twins[0], fullgraph=True, backend="aot_eager")
    y = layer(x)
    for twin in twins:
        close(twin(x), y)
        close(twin.running_var, layer.running_var)


def test_evaluation_is_torchs_and_moves_nothing():
    layer, x = GhostBatchNorm(3, 2), torch.randn(4, 3, 2)
    layer(x)
    whole, before = nn.BatchNorm1d(3).eval(), copy.deepcopy(layer.state_dict())
    whole.load_state_dict(before)
    torch.testing.assert_close(layer.eval()(x), whole(x))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("ghost_batch", [0, -2])
def test_ghosts_of_nobody_are_refused(ghost_batch):
    with pytest.raises(
        ConfigError,
        match=rf"got ghost_batch={ghost_batch}, which must be a whole number of at least 1\. Give the samples",
    ):
        GhostBatchNorm(3, ghost_batch)


@pytest.mark.parametrize(("samples", "ghost_batch"), [(5, 4), (3, 1), (1, 4)])
def test_a_ghost_of_one_value_is_refused_before_anything_moves(samples, ghost_batch):
    layer = GhostBatchNorm(3, ghost_batch)
    with pytest.raises(ShapeError) as caught:
        layer(torch.randn(samples, 3))
    plural, size = ("", "") if samples == 1 else ("s", f"a ghost_batch of at least 2 that divides {samples}, or ")
    assert f"{samples} sample{plural} in runs of ghost_batch={ghost_batch}; a variance needs 2" in str(caught.value)
    assert "drop_last=True on the DataLoader (data.last_batch=drop)" in str(caught.value)
    assert f"or use {size}GroupNorm (norm=group)" in str(caught.value)
    assert str(caught.value).count("\n") <= 2
    assert int(layer.num_batches_tracked) == 0
    assert layer(torch.randn(samples, 3, 2)).isfinite().all()
