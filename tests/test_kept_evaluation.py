"""An evaluation's output that is kept: its backward may come after training steps, and is of the statistics it used."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distnorm import GhostBatchNorm, SyncBatchNorm, evaluation_statistics
from distnorm.norms import BatchNormLSTMCell, BatchRenorm, RecurrentBatchNorm

pytestmark = pytest.mark.unit

DOUBLE = {"dtype": torch.float64}
LAYERS = {
    "sync": lambda: SyncBatchNorm(3, **DOUBLE),
    "no momentum": lambda: SyncBatchNorm(3, momentum=None, **DOUBLE),
    "without bias": lambda: SyncBatchNorm(3, bias=False, **DOUBLE),
    "without affine": lambda: SyncBatchNorm(3, affine=False, **DOUBLE),
    "ghost": lambda: GhostBatchNorm(3, 4, **DOUBLE),
    "renorm": lambda: BatchRenorm(3, warmup=0, ramp=0, **DOUBLE),
    "recurrent": lambda: RecurrentBatchNorm(3, 2, **DOUBLE),
}


def running(layer):
    return layer.running_mean.clone(), layer.running_var.clone()


def reference(layer, x, mean, var):
    """Evaluation by its formula, on leaves of its own: output, and gradients of input, weight and bias."""
    x, mean, var = x.detach().clone().requires_grad_(), *(v[0] if v.dim() > 1 else v for v in (mean, var))
    leaves = [None if p is None else p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)]
    y = (x - mean[:, None]) / (var[:, None] + layer.eps).sqrt()
    for leaf, apply in zip(leaves, (torch.mul, torch.add), strict=True):
        y = y if leaf is None else apply(y, leaf[:, None])
    y.square().sum().backward()
    return [y.detach(), x.grad, *(leaf.grad for leaf in leaves if leaf is not None)]


def swap(layer):
    model = nn.Sequential(layer)
    with evaluation_statistics(model, {name: value + 1 for name, value in model.named_buffers() if "running" in name}):
        pass
    layer.reset_running_stats()


def batch():
    return torch.randn(8, 3, 5, **DOUBLE) * 2 - 4


MOVES = {
    "a training step": lambda layer, time: layer(batch().requires_grad_(), *time).sum().backward(),
    "a masked one": lambda layer, time: layer(batch(), *time, mask=torch.rand(8, 5) > 0.3),
    "a reset": lambda layer, _: layer.reset_running_stats(),
    "a swap": lambda layer, _: swap(layer),
    "a broadcast": lambda layer, _: layer.running_mean.copy_(torch.full_like(layer.running_mean, 9.0)),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_backward_after_the_statistics_moved_is_of_those_before(kind, move):
    if (kind, move) in {("ghost", "a masked one"), ("recurrent", "a swap")}:
        pytest.skip("there is none")
    torch.manual_seed(0)
    layer, time = LAYERS[kind](), (0,) if kind == "recurrent" else ()
    layer(torch.randn(8, 3, 5, **DOUBLE) * 3 + 1, *time)
    kept, x = running(layer), torch.randn(4, 3, 5, **DOUBLE, requires_grad=True)
    y = layer.eval()(x, *time)
    MOVES[move](layer.train(), time)
    layer.zero_grad()
    assert not torch.equal(running(layer)[0], kept[0])
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    for own, truth in zip(found, reference(layer, x, *kept), strict=True):
        torch.testing.assert_close(own, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
def test_evaluation_differentiates_twice_after_a_training_step(kind):
    layer, time = LAYERS[kind](), (0,) if kind == "recurrent" else ()

    def after_a_step(x):
        y = layer.eval()(x, *time)
        layer.train()(batch(), *time)
        return y

    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, **DOUBLE, requires_grad=True)
    (dx,) = torch.autograd.grad(after_a_step(x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), x)[0].isfinite().all()


def test_a_cell_that_evaluates_and_then_trains_keeps_its_gradient():
    torch.manual_seed(0)
    cell = BatchNormLSTMCell(3, 4, 2, **DOUBLE)
    x = torch.randn(5, 3, **DOUBLE, requires_grad=True)
    grads = []
    for trained in (False, True):
        h, _ = cell.eval()(x, None, 0)
        if trained:
            cell.train()(batch()[:, :, 0], None, 0)
        grads.append(torch.autograd.grad(h.square().sum(), x)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["sync", "ghost", "renorm"])
def test_a_compiled_evaluation_keeps_its_statistics_too(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    layer(batch())
    kept, x = running(layer), torch.randn(4, 3, 5, **DOUBLE, requires_grad=True)
    compiled = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")
    y = compiled(x)
    layer.train()(batch() + 9)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    for own, truth in zip(found, reference(layer, x, *kept), strict=True):
        torch.testing.assert_close(own, truth, rtol=1e-10, atol=1e-10)


def test_an_exported_evaluation_has_torchs_operations_alone():
    program = torch.export.export(SyncBatchNorm(3).eval(), (torch.randn(4, 3, 5),))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "distnorm" in name or "clone" in name]


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["sync", "ghost", "renorm"])
def test_an_evaluation_without_gradients_makes_what_torchs_makes(kind):
    x, found = torch.zeros(4, 3, 5, **DOUBLE), []
    for layer in (nn.BatchNorm1d(3, **DOUBLE).eval(), LAYERS[kind]().eval()):
        for with_gradients in (False, True):
            with Operations() as operations, torch.set_grad_enabled(with_gradients):
                layer(x)
            found.append(sorted(operations.names))
    assert found[2] == found[0]
    assert found[3] == sorted([*found[1], "aten::clone", "aten::clone"])


def test_the_layer_still_owns_its_buffers():
    layer = SyncBatchNorm(3)
    before = {key: value.data_ptr() for key, value in layer.state_dict().items()}
    layer.eval()(torch.randn(4, 3, requires_grad=True)).sum().backward()
    layer.train()(torch.randn(4, 3))
    assert {key: value.data_ptr() for key, value in layer.state_dict().items()} == before
