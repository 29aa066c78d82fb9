"""The worst values of measures: which they are, where, and which layers stay beyond a limit.

Legend: L layers, T measurements.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distnorm.drift.alarms import measures
from distnorm.drift.catalogue import BY_KEY, Limit, Measure
from distnorm.drift.history import History

TWO_SIDED = frozenset({"precise_ratio"})
"""Measures whose values are the worse the further off `healthy` they are, on either side."""


def measures_of(histories: Sequence[History]) -> dict[str, Measure]:
    """Give the measures by key, with the widest of the runs' limits and scales: few ranks differ much by chance."""
    worlds = [history.world_size for history in histories if history.world_size > 1]
    return measures(min(worlds, default=1))


def badness(values: NDArray[np.float64], measure: Measure) -> NDArray[np.float64]:
    """Give numbers that rise with how bad values are; -inf where nothing was measured."""
    if measure.key in TWO_SIDED:
        with np.errstate(divide="ignore", invalid="ignore"):
            bad = np.abs(np.log(values / measure.healthy))
    else:
        bad = -values if measure.span < measure.healthy else values
    return np.where(np.isnan(bad), -np.inf, bad)


def is_healthy(value: float, measure: Measure) -> bool:
    """Tell whether a value is on the good side of `healthy`, or within a hundredth of the measure's span of it."""
    if measure.healthy > 0 and value > 0:
        way = np.log(value / measure.healthy) / np.log(measure.span / measure.healthy)
    else:
        way = (value - measure.healthy) / (measure.span - measure.healthy)
    return bool((abs(way) if measure.key in TWO_SIDED else way) <= 0.01)


def constant(values_LT: NDArray[np.float64]) -> float | None:
    """Give the value that a measure has in all layers throughout, to three digits; `None` if it varies."""
    known = values_LT[~np.isnan(values_LT)]
    if not known.size or not np.isfinite(known).all() or np.ptp(known) > 5e-4 * np.abs(known).max():
        return None
    return float(known[0])


def layers_beyond(values_LT: NDArray[np.float64], limit: Limit) -> NDArray[np.bool_]:
    """Tell which layers [L] were beyond a limit as many times in a row as its alarm wants."""
    return np.array([_longest(_beyond(row[~np.isnan(row)], limit)) >= limit.times for row in values_LT], dtype=bool)


def worst(history: History, key: str) -> tuple[float, int, int] | None:
    """Find a measure's worst value, its layer and its measurement; `None` where nothing was measured."""
    values_LT = history.values.get(key)
    if values_LT is None or np.isnan(values_LT).all():
        return None
    measure = BY_KEY[key.partition(".")[0]]
    bad = badness(values_LT, measure)
    layer, at = np.unravel_index(int(bad.argmax()), bad.shape)
    return float(values_LT[layer, at]), int(layer), int(at)


def _beyond(values: NDArray[np.float64], limit: Limit) -> NDArray[np.bool_]:
    return values > limit.at if limit.side == "above" else values < limit.at


def _longest(flags: NDArray[np.bool_]) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))
