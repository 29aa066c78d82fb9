"""Run a model's forward for what is to be learned of it, and leave no trace of it in the model."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


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
