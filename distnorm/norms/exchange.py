"""How a layer's numbers travel: as they are in eager mode, as opaque operators under `torch.compile`.

A compiled graph may hold no call that Python makes to a process group. Two custom operators stand for the two
exchanges, so that a layer compiles with `fullgraph=True` and still fails with the names of layer and ranks.

Legend: R ranks, K numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm import collectives


def members(sync_ranks: int | None, group_ranks: tuple[int, ...] | None) -> tuple[int, ...]:
    """Name the ranks that pool with this one; see `collectives.members`.

    A compiled graph takes the answer for a constant: it is asked when the graph is made.
    """
    return collectives.members(sync_ranks, group_ranks)


# What torch.compiler.assume_constant_result would set, if it did not load the whole compiler to do so.
members._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


def gather(values: Tensor, ranks: tuple[int, ...], what: str) -> Tensor:
    """Gather K numbers from each rank; see `collectives.gather`."""
    if torch.compiler.is_compiling() and len(ranks) > 1:
        return torch.ops.distnorm.gather(values, ranks, what)  # type: ignore[no-any-return]
    return collectives.gather(values, ranks, what)


def start_sum(values: Tensor, ranks: tuple[int, ...], what: str) -> collectives.Pending:
    """Start to sum K numbers over ranks; see `collectives.start_sum`. In a compiled graph the sum is there at once."""
    if torch.compiler.is_compiling():
        if len(ranks) > 1:
            values = torch.ops.distnorm.sum(values, ranks, what)
        return collectives.Pending(values, None, ranks, what)
    return collectives.start_sum(values, ranks, what)


@torch.library.custom_op("distnorm::gather", mutates_args=())
def _gather(values: Tensor, ranks: Sequence[int], what: str) -> Tensor:
    return collectives.gather(values, tuple(ranks), what)


@_gather.register_fake
def _(values: Tensor, ranks: Sequence[int], what: str) -> Tensor:  # noqa: ARG001
    return values.new_empty(len(ranks), values.numel())


@torch.library.custom_op("distnorm::sum", mutates_args=())
def _sum(values: Tensor, ranks: Sequence[int], what: str) -> Tensor:
    return collectives.start_sum(values.clone(), tuple(ranks), what).wait()


@_sum.register_fake
def _(values: Tensor, ranks: Sequence[int], what: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(values)
