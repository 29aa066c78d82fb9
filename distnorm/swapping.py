"""Statistics in a model in place of its own, and the way back, even if others swap weights and buffers meanwhile."""

from torch import Tensor, nn

from distnorm.population import Statistics, own_running_stats, swap_in


class SwappedStatistics:
    """Statistics that were put into a model; its own are kept, and come back if nobody else has changed them since.

    A callback that evaluates other weights may save and load whole states, including the statistics put in here. So its
    own can be put back until `forget`.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._own: Statistics = {}
        self._put: Statistics = {}

    def put(self, model: nn.Module, statistics: Statistics) -> None:
        """Put statistics into a model, and keep its own."""
        self._model, self._own = model, swap_in(model, statistics)
        self._put = own_running_stats(model)  # a layer that they leave out keeps its own

    def own_of(self, model: nn.Module) -> Statistics:
        """Give a model's own statistics: the kept ones, if others are in their place."""
        return self._own if self._model is model and self.is_in(model) else own_running_stats(model)

    def is_in(self, model: nn.Module) -> bool:
        """Return whether a model, or a copy of it, has the statistics that were put in."""
        now = own_running_stats(model)
        return now.keys() == self._put.keys() and all(_same(now[key], value) for key, value in self._put.items())

    def take_out(self) -> None:
        """Put the model's own back, unless somebody has put others there since."""
        if self._model is not None and self.is_in(self._model):
            swap_in(self._model, self._own)

    def forget(self) -> None:
        """Put the model's own back for the last time."""
        self.take_out()
        self._model = None


def _same(one: Tensor, other: Tensor) -> bool:
    other = other.to(one.device)
    return bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124 — nan differs from itself
