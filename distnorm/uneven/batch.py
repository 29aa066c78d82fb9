"""Batches of any structure: how many samples they have, and what they look like with none."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from distnorm.errors import ConfigError


def empty_like(batch: Any) -> Any:
    """Make a batch of the same structure with no samples.

    Args:
        batch: tensors (or arrays) with the samples in dimension 0, in tuples, lists and mappings of any depth. A list
            or tuple without any of them, e.g. of strings, is one value a sample. Other values stay.

    Raises:
        ConfigError: something in it is none of these.
    """
    if isinstance(batch, Tensor):
        return batch.new_empty((0, *batch.shape[1:])) if batch.dim() else batch
    if hasattr(batch, "shape"):
        return batch[:0].copy() if batch.shape else batch
    if isinstance(batch, Mapping):
        emptied = copy.copy(batch)
        emptied.update({key: empty_like(value) for key, value in batch.items()})  # type: ignore[attr-defined]
        return emptied
    if isinstance(batch, tuple | list):
        parts = [empty_like(value) for value in batch] if _has_parts(batch) else []
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if batch is None or isinstance(batch, str | bytes | int | float):
        return batch
    raise ConfigError(
        f"A batch holds a {type(batch).__name__}, of which no empty one can be made. "
        "Give EvenLoader one with N = 0: empty=…",
    )


def _has_parts(batch: tuple[Any, ...] | list[Any]) -> bool:
    return any(hasattr(value, "shape") or isinstance(value, Mapping | tuple | list) for value in batch)


def count_samples(batch: Any) -> int:
    """Count the samples of a batch: dimension 0 of its first tensor.

    Raises:
        ConfigError: it holds none.
    """
    sizes = (leaf.shape[0] for leaf in _arrays(batch) if leaf.shape)
    found = next(sizes, None)
    if found is None:
        raise ConfigError(
            f"A batch of type {type(batch).__name__} holds no tensor with samples to count. "
            "Tell EvenLoader how many it has: count=…",
        )
    return int(found)


def _arrays(batch: Any) -> Iterator[Any]:
    if hasattr(batch, "shape"):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _arrays(value)
