"""`torch.compile(fullgraph=True)` gives what eager mode gives (design: contract line 10)."""

import copy
import shutil

import pytest
import torch
from torch import nn

from distnorm import SyncBatchNorm, collectives
from tests import ranks

pytestmark = pytest.mark.unit


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 1), SyncBatchNorm(4)

    def forward(self, x):
        return self.norm(self.conv(x), mask=x[:, 0] > -0.5).sin()


def plain_model():
    return nn.Sequential(
        nn.Conv1d(3, 4, 1), SyncBatchNorm(4), nn.ReLU(), nn.Conv1d(4, 4, 1), SyncBatchNorm(4, bias=False)
    )


def compare(backend, kind, dtype, sizes, dynamic):
    """Body: a compiled model and its eager twin, step by step, in training and evaluation."""
    rank = collectives.rank()
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = (Masked() if kind == "masked" else plain_model()).to(dtype)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend=backend, dynamic=dynamic)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.manual_seed(rank + 1)
    for step, size in enumerate(sizes):
        training = kind != "eval" or step == 0
        eager.train(training), twin.train(training)
        x = torch.randn(size + rank, 3, 6, dtype=dtype) + rank
        inputs, outputs = [x.clone().requires_grad_() for _ in range(2)], []
        for model, own in zip((eager, compiled), inputs, strict=True):
            outputs.append(model(own))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0], **tolerance)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **tolerance)
        for (name, value), found in zip(eager.state_dict().items(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(found, value, **tolerance, msg=lambda m: f"{name}: {m}")
    if dtype == torch.float32:
        tolerance["atol"] = 1e-3  # weights before a norm: their gradients cancel to what rounding left
    for one, found in zip(eager.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, one.grad, **tolerance)
    return True


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("kind", "dtype", "sizes", "dynamic"),
    [
        ("plain", torch.float64, (4, 4, 7, 5), None),
        ("plain", torch.float32, (4, 4), False),
        ("masked", torch.float64, (4, 4), None),
        ("eval", torch.float64, (4, 4), None),
    ],
)
def test_a_compiled_model_trains_as_in_eager_mode(kind, dtype, sizes, dynamic, world):
    assert ranks.run(compare, "aot_eager", kind, dtype, sizes, dynamic, world=world) == [True] * world


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_trains_as_eager_mode():
    assert ranks.run(compare, "inductor", "plain", torch.float32, (4, 4), False, world=2, timeout_s=200) == [True] * 2
