"""Activation checkpointing runs a forward twice; the second pass must move nothing and exchange nothing.

Each training forward leaves a `Pass` behind: what it found, in O(C). A forward that runs inside a backward looks for
the pass that it repeats. Under non-reentrant checkpointing (and outside any) a pass lives as long as the graph it
belongs to; under reentrant checkpointing the first forward has no graph, so the last few passes without one are kept.
"""

import collections
import weakref

import torch
from torch import Tensor

from distnorm.norms.pooling import Pooled

_KEPT = 64


Correction = tuple[Tensor, Tensor]
"""A factor and a summand a channel, by which a batch's own normalization is corrected."""


class Pass:
    """What one training forward of a layer found: this rank's own moments, where pooled, everyone's, and more."""

    __slots__ = ("__weakref__", "correction", "own", "pooled", "used")

    def __init__(self, own: Tensor | None, pooled: Pooled | None, correction: Correction | None = None) -> None:
        self.own, self.pooled, self.correction, self.used = own, pooled, correction, 0


class Passes:
    """The passes of one layer that a recomputation may still repeat."""

    def __init__(self) -> None:
        self._living: list[weakref.ref[Pass]] = []
        self._without_graph: collections.deque[Pass] = collections.deque(maxlen=_KEPT)

    def keep(self, passed: Pass, *, has_graph: bool) -> None:
        """Remember a pass; whoever holds its graph must hold it, unless there is no graph."""
        self._living = [ref for ref in self._living if ref() is not None]
        if not passed.used:  # one that repeats another is in the list, in its place
            self._living.append(weakref.ref(passed))
        if not has_graph:
            unused = [old for old in self._without_graph if not old.used]
            self._without_graph = collections.deque([*unused, passed], maxlen=_KEPT)

    def repeated_by(self, own: Tensor | None) -> Pass | None:
        """Find the pass that a forward inside a backward repeats.

        Of passes that look alike, on this rank, the one least used, and of those the last: a backward goes backwards.

        Args:
            own: this forward's own moments. One pass that was not repeated yet needs no comparison on an accelerator,
                where that would wait for the device; else equal moments, bit for bit, are what tells passes apart.
        """
        alive = [passed for ref in reversed(self._living) if (passed := ref()) is not None]
        fresh = [passed for passed in alive if not passed.used]
        if own is None or (len(fresh) == 1 and own.device.type != "cpu"):
            candidates = fresh or alive
        else:
            candidates = [passed for passed in alive if passed.own is not None and torch.equal(passed.own, own)]
        if not candidates:
            return None
        repeated = min(candidates, key=lambda passed: passed.used)
        repeated.used += 1
        return repeated


def inside_backward() -> bool:
    """Tell whether autograd is running a backward in this thread; torch has no public word for it."""
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001
