"""Statistics in a model in place of its own, and the way back, even if others swap weights and buffers meanwhile."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distnorm.population import Statistics, own_running_stats, swap_in


class SwappedStatistics:
    """Statistics that were put into a model; its own are kept, and come back where nobody else has put others since.

    A callback that evaluates other weights may save and load whole states, including the statistics put in here. So its
    own can be put back until `forget`. Each tensor is decided for itself: an evaluation may change some layers'.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._own: Statistics = {}
        self._put: Statistics = {}
        self._left: Statistics = {}

    def put(self, model: nn.Module, statistics: Statistics) -> None:
        """Put statistics into a model, and keep its own."""
        self._model, self._own, self._left = model, swap_in(model, statistics), {}
        self._put = own_running_stats(model)  # a layer that they leave out keeps its own

    def note_end(self, evaluated: nn.Module | None = None) -> None:
        """Note what the evaluation has left in the model, or in the copy of it that was evaluated.

        A layer in training mode has changed what was put in; that is no reason to keep it.
        """
        evaluated = self._model if evaluated is None else evaluated
        if evaluated is not None and self._model is not None:
            self._left = own_running_stats(evaluated)

    def own_of(self, model: nn.Module) -> Statistics:
        """Give a model's own statistics: the kept ones, where others are in their place."""
        return own_running_stats(model) | (self._replaced() if self._model is model else {})

    def is_in(self, model: nn.Module) -> bool:
        """Return whether a model, or a copy of it, has the statistics that were put in."""
        now = own_running_stats(model)
        return now.keys() == self._put.keys() == _same(now, self._put)

    def take_out(self) -> None:
        """Put the model's own back, except where somebody has put others since."""
        if self._model is not None and (own := self._replaced()):
            swap_in(self._model, own)
        self._left = {}

    def forget(self) -> None:
        """Put the model's own back for the last time."""
        self.take_out()
        self._model = None

    def _replaced(self) -> Statistics:
        assert self._model is not None
        now = own_running_stats(self._model)
        return {key: self._own[key] for key in (_same(now, self._put) | _same(now, self._left)) & self._own.keys()}


def _same(ones: Statistics, others: Mapping[str, Tensor]) -> set[str]:
    """Give the keys whose values are alike, nan too; a device is waited for once, not once a tensor."""
    by_device = defaultdict[torch.device, dict[str, Tensor]](dict)
    for key in ones.keys() & others.keys():
        one, other = ones[key], others[key].to(ones[key].device)
        by_device[one.device][key] = ((one == other) | ((one != one) & (other != other))).all()  # noqa: PLR0124
    alike = ((found, torch.stack(list(found.values())).tolist()) for found in by_device.values())
    return {key for found, flags in alike for key, flag in zip(found, flags, strict=True) if flag}
