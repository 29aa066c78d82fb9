"""How a layer's numbers travel: as they are in eager mode, as opaque operators under `torch.compile`.

A compiled graph may hold no call that Python makes to a process group. Two custom operators stand for the two
exchanges, so that a layer compiles with `fullgraph=True` and still fails with the names of layer and ranks.

Legend: R ranks, K numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm import collectives


def members(sync_ranks: int | None, group_ranks: tuple[int, ...] | None, of_user: bool = False) -> tuple[int, ...]:
    """Name the ranks that pool with this one; see `collectives.members`.

    A compiled graph takes the answer for a constant: it is asked when the graph is made.
    """
    return collectives.members(sync_ranks, group_ranks, of_user=of_user)


# What torch.compiler.assume_constant_result would set, if it did not load the whole compiler to do so.
members._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


Whose = tuple[str, int]
"""Whose numbers travel: the layer's name in messages, and its order among the layers of that name."""


def gather(values: Tensor, ranks: tuple[int, ...], whose: Whose, kind: str) -> Tensor:
    """Gather K float64 numbers from each rank, in a layer's forward or backward; see `collectives.gather`."""
    if torch.compiler.is_compiling() and len(ranks) > 1:
        return torch.ops.distnorm.gather(values, ranks, *whose, kind)  # type: ignore[no-any-return]
    if torch.compiler.is_compiling():
        return values.unsqueeze(0)
    return collectives.gather(values, ranks, collectives.place_of(*whose, kind))


def start_sum(values: Tensor, ranks: tuple[int, ...], whose: Whose, kind: str) -> collectives.Pending:
    """Start to sum K numbers over ranks; see `collectives.start_sum`. In a compiled graph the sum is there at once."""
    if torch.compiler.is_compiling():
        if len(ranks) > 1:
            values = torch.ops.distnorm.sum(values, ranks, *whose, kind)
        return collectives.Pending(values, None, ranks, "")
    return collectives.start_sum(values, ranks, collectives.place_of(*whose, kind))


@torch.library.custom_op("distnorm::gather", mutates_args=())
def _gather(values: Tensor, ranks: Sequence[int], layer: str, order: int, kind: str) -> Tensor:
    # a custom operator's result may not share memory with anything: the rows are a view without their marks
    return collectives.gather(values, tuple(ranks), collectives.place_of(layer, order, kind)).contiguous()


@_gather.register_fake
def _(values: Tensor, ranks: Sequence[int], layer: str, order: int, kind: str) -> Tensor:  # noqa: ARG001
    return values.new_empty(len(ranks), values.numel())


@torch.library.custom_op("distnorm::sum", mutates_args=())
def _sum(values: Tensor, ranks: Sequence[int], layer: str, order: int, kind: str) -> Tensor:
    place = collectives.place_of(layer, order, kind)
    return collectives.start_sum(values, tuple(ranks), place).wait().clone()


@_sum.register_fake
def _(values: Tensor, ranks: Sequence[int], layer: str, order: int, kind: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(values)
