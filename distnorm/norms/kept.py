"""Run a model's forward for what is to be learned of it, and leave no trace of it in the model."""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run forwards in eval mode, without gradients, and leave the model, and every random stream, as they were.

    What is compiled runs eagerly, for compiled code knows no hook that came later; and autocast keeps no copies of
    parameters, that a probe may move.

    Collective: none.
    """
    caches = torch.is_autocast_cache_enabled()
    with streams_kept(model), _without_compiled_code(), torch.inference_mode(False), torch.no_grad(), kept(model):
        torch.set_autocast_cache_enabled(False)
        try:
            for module in model.modules():  # not `eval()`, that some modules do more in
                module.training = False
            yield
        finally:
            torch.set_autocast_cache_enabled(caches)


@contextlib.contextmanager
def streams_kept(model: nn.Module) -> Iterator[None]:
    """Leave the random streams of torch, Python and numpy where they are: loaders draw from all three.

    Collective: none.
    """
    devices = {tensor.device.index for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpys = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numpys)


@contextlib.contextmanager
def _without_compiled_code() -> Iterator[None]:
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Bring back, on leaving, what a forward may change: buffers (the objects and their values), modes and attributes.

    An attribute that was bound to something else, or is new, is what it was. What forward changes inside an attribute's
    value, e.g. a list that it appends to, stays changed.

    Collective: none.
    """
    modules = list(model.modules())
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]  # noqa: SLF001
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, before, buffers in attributes:
            _restore(vars(module), before)
            _restore(module._buffers, buffers)  # noqa: SLF001
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):  # a graph may wait for its backward: writing would end it
                    buffer.copy_(value)


def _restore(entries: dict[str, Any], before: dict[str, Any]) -> None:
    for key in entries.keys() - before.keys():
        del entries[key]
    entries.update(before)
