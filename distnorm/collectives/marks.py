"""Whose numbers travel: every exchange of a layer carries a mark, so that two layers are never pooled as one.

Ranks that reach two *different* layers of one width at the same time exchange numbers of the same length, and no
backend notices: the moments of one would be pooled with those of the other. The mark says which layer, and which of its
calls. Every rank sees all marks, or their sums; where they differ, all ranks of the group raise.

A layer is known by its name. Layers of one name (those without any; two models with the same layers; copies) are also
told apart by when they were made: after how many exchanges of all ranks, which every rank counts alike, and as which of
those made then, counted from the first and from the last one. So ranks that have made other models before, or after,
still agree in one of the two.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm import whereabouts
from distnorm.errors import ranks_in_words

_NAME_BITS, _AGE_BITS, _ORDER_BITS, _CALL_BITS = 14, 10, 9, 10  # with an order from either end: 52 bits of a float64
_INDEX_BITS = 20  # of an order; above them is its age
_SUMMED_BITS, _EXACT_BITS = 20, {torch.float64: 53, torch.float32: 24}

_made: Counter[tuple[int, str]] = Counter()  # layers, by age and name
_exchanges = _world = 0  # exchanges of all ranks, in this world of so many
_places: dict[tuple[str, int], dict[str, "Place"]] = {}


def count_layer(name: str) -> int:
    """Count one more layer that goes by a name, and return its order: how old it is, and which of those of its age."""
    age = zlib.crc32(str(_exchanges).encode()) >> (32 - _AGE_BITS)
    _made[age, name] += 1
    return age << _INDEX_BITS | _made[age, name] - 1


def order_of_checked(place: str) -> int:
    """Return the order of a layer that all ranks have compared, by a text that says where and when, alike on them."""
    return -1 - (zlib.crc32(place.encode()) >> (32 - _AGE_BITS))


def place_of(layer: str, order: int, kind: str) -> "Place":
    """Return the place of one kind of exchange of one layer; it counts the calls.

    Args:
        layer: the layer's name in messages.
        order: from `count_layer` or `order_of_checked`.
        kind: `forward` or `backward`.
    """
    kinds = _places.setdefault((layer, order), {})
    place = kinds.get(kind)
    if place is None:
        place = kinds[kind] = Place(f"{layer} {kind}")
        place.layer, place.order, place.calls, place.summed = layer, order, {}, {}
        place.bits = zlib.crc32(place.encode()) >> (32 - _NAME_BITS)
    return place


def forget_layer(layer: str, order: int) -> None:
    """Forget the places of a layer that is gone."""
    _places.pop((layer, order), None)


def forget_places(world: int) -> None:
    """Count all calls from the beginning: for a new world of so many ranks, which may have different pasts."""
    global _exchanges, _world
    _places.clear()
    _exchanges, _world = 0, world


class Place(str):
    """What an exchange of a layer is called, e.g. `layer4.0.bn1 forward`, and which layer that is."""

    layer: str
    order: int
    bits: int
    calls: dict[tuple[int, ...], int]
    summed: dict[tuple[tuple[int, ...], int, torch.dtype, torch.device], "Summed"]

    def next_mark(self, ranks: tuple[int, ...]) -> float:
        """Count a call of these ranks, and pack name, age, both orders and call into one float64."""
        _count_exchange(ranks)
        call = self.calls[ranks] = self.calls.get(ranks, 0) + 1
        bits = (self.bits << _AGE_BITS | self._age()) << _ORDER_BITS | self._from_first()
        bits = (bits << _ORDER_BITS | self._from_last()) << _CALL_BITS | call & (1 << _CALL_BITS) - 1
        return float(bits)

    def marked_sum(self, ranks: tuple[int, ...], like: Tensor) -> "Summed":
        """Give the mark of this layer's sums over these ranks, of the values' dtype and on their device."""
        _count_exchange(ranks)
        key = ranks, self._from_last(), like.dtype, like.device
        summed = self.summed.get(key)
        if summed is None:
            own = [self._number(order, _summed_bits(like.dtype, len(ranks))) for order in (self._from_first(), key[1])]
            summed = self.summed[key] = Summed(ranks, self, own, like)
        return summed

    def whose(self, ranks: tuple[int, ...]) -> whereabouts.Whose:
        """Say which layer and call this is, for the other ranks to read."""
        return whereabouts.Whose(str(self), self._from_first() + 1, self._age(), self.calls.get(ranks, 0))

    def _age(self) -> int:
        return -1 - self.order if self.order < 0 else self.order >> _INDEX_BITS

    def _from_first(self) -> int:
        return 0 if self.order < 0 else self.order & (1 << _ORDER_BITS) - 1

    def _from_last(self) -> int:
        if self.order < 0:
            return 0
        age, index = divmod(self.order, 1 << _INDEX_BITS)
        return (_made[age, self.layer] - index - 1) & (1 << _ORDER_BITS) - 1

    def _number(self, order: int, bits: int) -> int:
        return 1 + zlib.crc32(f"{self}/{self._age()}/{order}".encode()) % ((1 << bits) - 1)


def _count_exchange(ranks: tuple[int, ...]) -> None:
    """Count what all ranks exchange, and only that: other groups' exchanges are not every rank's."""
    global _exchanges  # noqa: PLW0603
    if len(ranks) == _world:
        _exchanges += 1


def _summed_bits(dtype: torch.dtype, ranks: int) -> int:
    """Choose as many bits for a number as let its squares add up exactly over the ranks."""
    return min(_SUMMED_BITS, (_EXACT_BITS[dtype] - (ranks - 1).bit_length()) // 2)


class _Mark(NamedTuple):
    name: int
    age: int
    from_first: int
    from_last: int
    call: int

    @classmethod
    def unpack(cls, packed: float) -> "_Mark":
        bits, call = divmod(int(packed), 1 << _CALL_BITS)
        bits, from_last = divmod(bits, 1 << _ORDER_BITS)
        bits, from_first = divmod(bits, 1 << _ORDER_BITS)
        return cls(*divmod(bits, 1 << _AGE_BITS), from_first, from_last, call)


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
        return same[0] and same[1] and (same[2] or same[3]) and same[4]

    def describe(self, packed: Sequence[float]) -> str:
        """Say which ranks were at which layer, as far as this rank knows the others' layers by their marks."""
        known = {place.bits: str(place) for kinds in _places.values() for place in kinds.values()}
        marks = [_Mark.unpack(number) for number in packed]
        whose = [whereabouts.Whose(known.get(m.name, "another layer"), m.from_first + 1, m.age, m.call) for m in marks]
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

    def alike(self, total: list[float]) -> bool:
        """Tell whether all ranks' marks were this rank's."""
        return total[:2] == self._expected[:2] or total[2:] == self._expected[2:]

    def describe(self, total: Sequence[float]) -> str:
        """Say what is known without asking the others: that not all of them were at this rank's layer."""
        return f"Not all of {ranks_in_words(self.ranks)} were at {self.place}.\n{whereabouts.SAME_LAYERS}"

    def take_back(self) -> None:
        """Sums count no calls."""
