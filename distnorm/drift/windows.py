"""Means and variances over the last measurements, element by element, in constant memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distnorm.moments import Moments


@dataclass
class _Half:
    times: int
    count: Tensor
    mean: Tensor
    m2: Tensor


class Window:
    """The last `length` to `2 * length` values of a tensor: of each element the count, mean and squared deviation.

    Two halves take turns: when the younger is full, the older is dropped. An element that is nan or infinite is left
    out of its value.

    Args:
        length: values in a half.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._before: _Half | None = None
        self._now: _Half | None = None

    def add(self, values: Tensor) -> None:
        """Take in one more value."""
        if self._now is None or self._now.times == self._length:
            self._before, self._now = self._now, _Half(0, *(torch.zeros_like(values) for _ in range(3)))
        now, known = self._now, values.isfinite()
        now.times += 1
        now.count = now.count + known
        gap = (values - now.mean).where(known, 0)
        now.mean = now.mean + gap / now.count.clamp(min=1)
        now.m2 = now.m2 + gap * (values - now.mean).where(known, 0)

    def state(self) -> list[dict[str, Any] | None]:
        """Give what a checkpoint keeps."""
        return [None if half is None else dict(vars(half)) for half in (self._before, self._now)]

    def load(self, state: list[dict[str, Any] | None]) -> None:
        """Go on from what `state` gave."""
        self._before, self._now = (None if half is None else _Half(**half) for half in state)

    @property
    def moments(self) -> Moments | None:
        """Moments over time of every element, each with a count of its own; `None` before the first value.

        Shape: count, mean and m2 like the values.
        """
        if self._now is None or self._before is None:
            return None if self._now is None else Moments(self._now.count, self._now.mean, self._now.m2)
        old, new = self._before, self._now
        total = old.count + new.count
        gap, share = new.mean - old.mean, new.count / total.clamp(min=1)
        return Moments(total, old.mean + gap * share, old.m2 + new.m2 + gap.square() * old.count * share)
