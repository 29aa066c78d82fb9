"""Which trials a search makes: rounds of them, each drawn from a box that the rounds before have set.

A trial's values depend on the search's seed, the trial's number and the results of the rounds before its own, and on
nothing else: any number of processes makes the same trials.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distnorm.errors import ConfigError
from distnorm.search.design import Design
from distnorm.search.scales import Dimension

Box = tuple[float, float]
"""A part of the unit interval."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a search.

    Attributes:
        number: its place, from 0 on.
        round: the round it belongs to.
        values: key → value.
    """

    number: int
    round: int
    values: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a trial came to.

    Attributes:
        values: key → value.
        score: what is compared, less is better; `None` where it failed.
    """

    values: Mapping[str, Any]
    score: float | None


@dataclasses.dataclass(frozen=True)
class Round:
    """Trials that know of the same results.

    Attributes:
        index: its place, from 0 on.
        numbers: of its trials.
        zooms: rounds of its tier before it.
        new: the keys that join with its tier.
        free: all keys that are searched in it.
    """

    index: int
    numbers: range
    zooms: int
    new: tuple[Dimension, ...]
    free: tuple[Dimension, ...]


class Plan:
    """The rounds of a search, and the values of their trials.

    The trials are shared out evenly over the tiers, and in a tier over its rounds; the earlier ones take what does not
    divide. In a tier the earlier tiers' keys go on in a box round the best so far; a grid fixes them there.

    Args:
        design: what the search asks.

    Raises:
        ConfigError: there are too few trials for the rounds, or for the grid.
    """

    def __init__(self, design: Design) -> None:
        self._design = design
        tiers = design.ladder
        rounds = design.rounds if design.kind == "coarse_to_fine" else 1
        if design.trials < rounds * len(tiers):
            raise ConfigError(
                f"search.trials={design.trials} is less than one a round: {len(tiers)} tiers of {rounds} rounds. "
                f"Use at least {rounds * len(tiers)}, or fewer tiers."
            )
        self._grids = [
            self._grid(tier, share) for tier, share in zip(tiers, shares(design.trials, len(tiers)), strict=True)
        ]
        self.rounds = list(self._rounds(tiers, rounds))

    @property
    def total(self) -> int:
        """Number of trials."""
        return sum(len(one.numbers) for one in self.rounds)

    def trials(self, of: Round, results: Mapping[int, Result]) -> list[Trial]:
        """Give the trials of a round.

        Args:
            of: the round.
            results: of all rounds before it, by number; others are not looked at.
        """
        known = {number: result for number, result in results.items() if number < of.numbers.start}
        best = best_of(known)
        if self._design.kind == "grid":
            fixed = {d.key: best.values[d.key] for d in of.free if best and d not in of.new and d.key in best.values}
            return [
                Trial(n, of.index, {**fixed, **point})
                for n, point in zip(of.numbers, self._grids[of.index], strict=True)
            ]
        boxes = self.boxes(of, known)
        return [Trial(n, of.index, self._draw(n, of, boxes)) for n in of.numbers]

    def boxes(self, of: Round, results: Mapping[int, Result]) -> dict[str, Box]:
        """Give what a round draws from: key → part of its range.

        A tier's first round draws its own keys from their whole ranges, and those of earlier tiers from `shrink` of
        theirs; each further round's boxes are `shrink` times as wide as the one's before. Widths are on the key's
        scale, with the best trial so far in the middle, and nothing goes beyond the range.
        """
        best = best_of({number: result for number, result in results.items() if number < of.numbers.start})
        boxes: dict[str, Box] = {}
        for dimension in of.free:
            width = self._design.shrink ** (of.zooms + (dimension not in of.new))
            boxes[dimension.key] = 0.0, 1.0
            if width < 1 and best is not None and dimension.key in best.values:
                place = dimension.unit(best.values[dimension.key])
                boxes[dimension.key] = max(0.0, place - width / 2), min(1.0, place + width / 2)
        return boxes

    def _draw(self, number: int, of: Round, boxes: dict[str, Box]) -> dict[str, Any]:
        return {d.key: d.value(_inside(boxes[d.key], self._place(number, of, d.key))) for d in of.free}

    def _place(self, number: int, of: Round, key: str) -> float:
        """Draw a place in the box; coarse to fine draws one in each of as many slices as the round has trials."""
        seed, name = self._design.seed, zlib.crc32(key.encode())
        place = float(np.random.default_rng([seed, number, name]).random())
        if self._design.kind != "coarse_to_fine":
            return place
        slices = np.random.default_rng([seed, of.index, name, 1]).permutation(len(of.numbers))
        return (int(slices[number - of.numbers.start]) + place) / len(of.numbers)

    def _grid(self, tier: Sequence[Dimension], share: int) -> list[dict[str, Any]]:
        """Give a tier's grid, in an order drawn by the seed: what has been tried is spread at any time."""
        if self._design.kind != "grid":
            return []
        points = self._design.points or _most_points(tier, share)
        lists = [dimension.grid(points) for dimension in tier]
        number = math.prod(map(len, lists))
        if number > share or points < 2:
            least = math.prod(len(dimension.grid(max(2, self._design.points or 2))) for dimension in tier)
            raise ConfigError(
                f"A grid of {max(2, points)} points a key over {', '.join(d.key for d in tier)} has {least} trials, "
                f"and search.trials={self._design.trials} leaves {share} for it. Use more trials, or fewer keys a tier."
            )
        values = [dict(zip([d.key for d in tier], point, strict=True)) for point in itertools.product(*lists)]
        return [values[i] for i in np.random.default_rng([self._design.seed, len(values)]).permutation(len(values))]

    def _rounds(self, tiers: list[list[Dimension]], rounds: int) -> Iterator[Round]:
        first, index = 0, 0
        for tier, share in enumerate(shares(self._design.trials, len(tiers))):
            free = tuple(itertools.chain(*tiers[: tier + 1]))
            counts = [len(self._grids[tier])] if self._design.kind == "grid" else shares(share, rounds)
            for zooms, count in enumerate(counts):
                yield Round(index, range(first, first + count), zooms, tuple(tiers[tier]), free)
                first, index = first + count, index + 1


def best_of(results: Mapping[int, Result]) -> Result | None:
    """Find the best result; of equal ones the first."""
    good = [(result.score, number) for number, result in results.items() if result.score is not None]
    return results[min(good)[1]] if good else None


def shares(total: int, parts: int) -> list[int]:
    """Share out evenly; the first parts take what does not divide."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def _most_points(tier: Sequence[Dimension], share: int) -> int:
    points = 1
    while points < share and math.prod(len(dimension.grid(points + 1)) for dimension in tier) <= share:
        points += 1
    return points


def _inside(box: Box, place: float) -> float:
    return box[0] + place * (box[1] - box[0])
