"""Whose numbers travel: every exchange of a layer carries a mark, so that two layers are never pooled as one.

Ranks that reach two *different* layers of one width at the same time exchange numbers of the same length, and no
backend notices: the moments of one would be pooled with those of the other. The mark says which layer, and which of its
calls. Every rank sees all marks, or their sums; where they differ, all ranks of the group raise.

A layer is known by its name. Layers of one name (those without any; two models with the same layers) are also told
apart by their order of construction among those built since an exchange, counted from the first and from the last one:
ranks that have built other models before, or after, still agree in one of the two.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm import whereabouts
from distnorm.errors import ranks_in_words

ONLY_ONE = -1
"""The order of a layer whose name no other layer of the process has."""

_NAME_BITS, _ORDER_BITS, _CALL_BITS = 16, 11, 14  # with an order from either end: 52 bits, exact in a float64
_SUMMED_BITS = {torch.float64: 20, torch.float32: 10}
_EXACT_UP_TO = {torch.float64: 2**13, torch.float32: 2**4}  # ranks over which squares of such numbers add up exactly
_INEXACT = 1e-5  # of a sum of squares over more ranks

_INDEX_BITS = 20  # of an order; above them is its generation: how often layers were built after an exchange

_built: Counter[tuple[int, str]] = Counter()  # by generation and name
_generation, _has_exchanged = 0, False
_places: dict[tuple[str, int, str], "Place"] = {}


def count_layer(name: str) -> int:
    """Count one more layer that goes by a name, and return its order of construction; `place_of` reads it."""
    global _generation, _has_exchanged
    if _has_exchanged:
        _generation, _has_exchanged = _generation + 1, False
    _built[_generation, name] += 1
    return _generation << _INDEX_BITS | _built[_generation, name] - 1


def place_of(layer: str, order: int, kind: str) -> "Place":
    """Return the place of one kind of exchange of one layer; it counts the calls.

    Args:
        layer: the layer's name in messages.
        order: what `count_layer` returned for it, or `ONLY_ONE`.
        kind: `forward` or `backward`.
    """
    key = layer, order, kind
    place = _places.get(key)
    if place is None:
        place = _places[key] = Place(f"{layer} {kind}")
        place.layer, place.order, place.calls, place.summed = layer, order, {}, {}
        place.bits = zlib.crc32(place.encode()) >> (32 - _NAME_BITS)
    return place


def forget_places() -> None:
    """Count the calls of all layers from the beginning: for a new world, whose ranks may have different pasts."""
    _places.clear()


class Place(str):
    """What an exchange of a layer is called, e.g. `layer4.0.bn1 forward`, and which layer that is."""

    layer: str
    order: int
    bits: int
    calls: dict[tuple[int, ...], int]
    summed: dict[tuple[tuple[int, ...], int, torch.dtype, torch.device], "Summed"]

    def next_mark(self, ranks: tuple[int, ...]) -> float:
        """Count a call of these ranks, and pack name, both orders and call into one float64."""
        global _has_exchanged  # noqa: PLW0603
        _has_exchanged = True
        call = self.calls[ranks] = self.calls.get(ranks, 0) + 1
        orders = (self.bits << _ORDER_BITS | self._from_first()) << _ORDER_BITS | self._from_last()
        return float(orders << _CALL_BITS | call & (1 << _CALL_BITS) - 1)

    def marked_sum(self, ranks: tuple[int, ...], like: Tensor) -> "Summed":
        """Give the mark of this layer's sums over these ranks, of the values' dtype and on their device."""
        key = ranks, self._from_last(), like.dtype, like.device
        summed = self.summed.get(key)
        if summed is None:
            own = [self._number(order, _SUMMED_BITS[like.dtype]) for order in (self._from_first(), key[1])]
            summed = self.summed[key] = Summed(ranks, self, own, like)
        return summed

    def whose(self, ranks: tuple[int, ...]) -> whereabouts.Whose:
        """Say which layer and call this is, for the other ranks to read."""
        return whereabouts.Whose(str(self), self._from_first() + 1, self.calls.get(ranks, 0))

    def _from_first(self) -> int:
        return 0 if self.order == ONLY_ONE else self.order & (1 << _ORDER_BITS) - 1

    def _from_last(self) -> int:
        if self.order == ONLY_ONE:
            return 0
        generation, index = divmod(self.order, 1 << _INDEX_BITS)
        return (_built[generation, self.layer] - index - 1) & (1 << _ORDER_BITS) - 1

    def _number(self, order: int, bits: int) -> int:
        return 1 + zlib.crc32(f"{self}/{order}".encode()) % ((1 << bits) - 1)


class _Mark(NamedTuple):
    name: int
    from_first: int
    from_last: int
    call: int

    @classmethod
    def unpack(cls, packed: float) -> "_Mark":
        bits, call = divmod(int(packed), 1 << _CALL_BITS)
        bits, from_last = divmod(bits, 1 << _ORDER_BITS)
        name, from_first = divmod(bits, 1 << _ORDER_BITS)
        return cls(name, from_first, from_last, call)


class Gathered:
    """The marks of a gather: one of each rank."""

    def __init__(self, ranks: tuple[int, ...], place: Place) -> None:
        self.ranks, self.place = ranks, place

    def alike(self, packed: Sequence[float]) -> bool:
        """Tell whether all are of the same call of the same layer."""
        if packed.count(packed[0]) == len(packed):
            return True
        marks = [_Mark.unpack(number) for number in packed]
        same = [len(set(values)) == 1 for values in zip(*marks, strict=True)]
        return same[0] and (same[1] or same[2]) and same[3]

    def describe(self, packed: Sequence[float]) -> str:
        """Say which ranks were at which layer, as far as this rank knows the others' layers by their marks."""
        known = {place.bits: str(place) for place in _places.values()}
        marks = [_Mark.unpack(number) for number in packed]
        whose = [whereabouts.Whose(known.get(m.name, "another layer"), m.from_first + 1, m.call) for m in marks]
        return whereabouts.parted(dict(zip(self.ranks, whose, strict=True)))

    def take_back(self) -> None:
        """Forget this rank's last call: all ranks raise in it, and whoever catches that may call again."""
        self.place.calls[self.ranks] -= 1


class Summed:
    """The mark of a layer's sums: a number for the layer by either order, and their squares.

    A sum of numbers and a sum of their squares are both so many times one's own only where all are equal. The call is
    not in it: the same tensor serves every call.
    """

    NUMBERS = 4

    def __init__(self, ranks: tuple[int, ...], place: Place, own: Sequence[int], like: Tensor) -> None:
        self.ranks, self.place = ranks, place
        numbers = [power for number in own for power in (number, number**2)]
        with torch.inference_mode(False):
            self.tensor = like.new_tensor(numbers)
        self._expected = [float(len(ranks) * number) for number in numbers]
        self._tolerance = 0.0 if len(ranks) <= _EXACT_UP_TO[like.dtype] else _INEXACT

    def alike(self, total: Sequence[float]) -> bool:
        """Tell whether all ranks' marks were this rank's."""
        if total == self._expected:
            return True
        fits = [abs(t - e) <= self._tolerance * e for t, e in zip(total, self._expected, strict=True)]
        return (fits[0] and fits[1]) or (fits[2] and fits[3])

    def describe(self, total: Sequence[float]) -> str:
        """Say what is known without asking the others: that not all of them were at this rank's layer."""
        return f"Not all of {ranks_in_words(self.ranks)} were at {self.place}.\n{whereabouts.SAME_LAYERS}"

    def take_back(self) -> None:
        """Sums count no calls."""
