"""What the page's script draws from: histories as JSON, their numbers packed, the whole below a page's size.

Legend: L layers, T measurements, k measurements a column.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distnorm.drift.catalogue import BY_KEY, OF_THE_MODEL, Limit, Measure
from distnorm.drift.history import History
from distnorm.drift.report.pack import pack, pack_whole, packed_bytes
from distnorm.drift.report.worst import TWO_SIDED, badness, measures_of

MOST_BYTES = 5_500_000
"""Of packed numbers a page."""

_ESTIMATE = 0.94  # deflated, noise takes a little more than its entropy
_SNAPSHOT_BYTES = 700_000
_SHOWN = ("running_mean", "running_var", "batch_mean", "batch_var", "rank_means")
_MOST_POINTS = 1500
_MOST_RANKS = 16
_THINNER = (
    (1, 1),
    (1, 2),
    (1, 3),
    (1, 4),
    (1, 5),
    (1, 6),
    (1, 8),
    (2, 8),
    (4, 8),
    (4, 16),
    (8, 32),
    (16, 64),
    (64, 256),
)


def payload(histories: Sequence[History]) -> dict[str, Any]:
    """Give all that the script draws from, as plain data that `safe_json` can write.

    Numbers keep three significant digits. Where all measurements together would make the page too large, several
    measurements share a column, p95 and max first; the worst of them is kept, and `thinned` says how many.
    """
    snapshots = [_snapshots(history, _SNAPSHOT_BYTES // len(histories)) for history in histories]
    taken = sum(len(one["packed"]["data"]) for several in snapshots for one in several)
    thin = _thinning(histories, MOST_BYTES - taken)
    keys = {key for history in histories for key in history.values}
    return {
        "measures": [_measure(measure) for measure in measures_of(histories).values() if measure.key in keys],
        "model": [{**dataclasses.asdict(measure), "limit": _limit(measure.limit)} for measure in OF_THE_MODEL],
        "thinned": thin,
        "runs": [
            {**_run(history, thin), "snapshots": several} for history, several in zip(histories, snapshots, strict=True)
        ],
    }


def safe_json(values: Any) -> str:
    """Write JSON that may stand in a script element: no `<`, `>`, `&` or line separator is left in it."""
    text = json.dumps(_finite(values), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def thinned(
    values_LT: NDArray[np.float64], bad_LT: NDArray[np.float64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Keep the worst of each k measurements, and say which one it was.

    Returns:
        Values [L, ⌈T/k⌉], and the measurement of each.
    """
    layers, times = values_LT.shape
    columns = math.ceil(times / k)
    padded = np.full((layers, columns * k), -np.inf)
    padded[:, :times] = bad_LT
    picked = np.minimum(padded.reshape(layers, columns, k).argmax(-1) + np.arange(columns) * k, max(times - 1, 0))
    return np.take_along_axis(values_LT, picked, 1), picked


def _thinning(histories: Sequence[History], room: int) -> tuple[int, int]:
    """Choose the measurements a column of medians, and of p95, max and worst channels, so that all fit."""
    medians = others = 0.0
    for history in histories:
        for key, values in history.values.items():
            medians, others = (
                (medians, others + packed_bytes(values)) if "." in key else (medians + packed_bytes(values), others)
            )
        others += sum(packed_bytes(channels, is_whole=True) for channels in history.worst_channels.values())
    fits = (pair for pair in _THINNER if medians / pair[0] + others / pair[1] < _ESTIMATE * room)
    return next(fits, _THINNER[-1])


def _measure(measure: Measure) -> dict[str, Any]:
    """Add how the colour scale runs: by the logarithm where it spans most of a decade."""
    is_log = measure.healthy > 0 and abs(math.log10(measure.span / measure.healthy)) > 0.7
    plain = dataclasses.asdict(measure)
    return {**plain, "limit": _limit(measure.limit), "log": is_log, "two_sided": measure.key in TWO_SIDED}


def _limit(limit: Limit | None) -> dict[str, Any] | None:
    return None if limit is None else {"at": limit.at, "side": limit.side, "meaning": limit.meaning}


def _run(history: History, thin: tuple[int, int]) -> dict[str, Any]:
    planes, worst = {}, {}
    for key, values_LT in history.values.items():
        k = thin["." in key]
        measure = BY_KEY.get(key.partition(".")[0])
        kept, picked = thinned(values_LT, values_LT if measure is None else badness(values_LT, measure), k)
        planes[key] = {"k": k, **pack(kept)}
        channels_LT = history.worst_channels.get(key.removesuffix(".max"))
        if channels_LT is not None and (key.endswith(".max") or f"{key}.max" not in history.values):
            channels = np.take_along_axis(channels_LT, picked, 1)
            worst[key.removesuffix(".max")] = {"k": k, **pack_whole(channels)}
    return {
        "name": history.name,
        "world": history.world_size,
        "layers": [dataclasses.asdict(layer) for layer in history.layers],
        "steps": history.steps.tolist(),
        "planes": planes,
        "worst": worst,
        "alarms": [dataclasses.asdict(alarm) for alarm in history.alarms],
        "scalars": {name: _points(*points) for name, points in history.scalars.items() if _is_shown(name)},
    }


def _is_shown(name: str) -> bool:
    return name.startswith("drift/model/") or name.endswith("/loss")


def _points(steps: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[list[int], list[float]]:
    """Give at most so many points that a chart can show, ends included."""
    keep = np.unique(np.linspace(0, max(len(steps) - 1, 0), min(len(steps), _MOST_POINTS)).astype(np.int64))
    return steps[keep].tolist(), [float(f"{value:.4g}") for value in values[keep]]


def _snapshots(history: History, room: int) -> list[dict[str, Any]]:
    """Pack the last snapshot, the first, and those between as far as there is room."""
    count = len(history.snapshots)
    wanted = dict.fromkeys([count - 1, 0, *(count // 2, count // 4, 3 * count // 4), *range(count)] if count else [])
    found: dict[int, dict[str, Any]] = {}
    for index in wanted:
        packed = _snapshot(history, index)
        room -= len(packed["packed"]["data"])
        if found and room < 0:
            break
        found[index] = packed
    return [found[index] for index in sorted(found)]


def _snapshot(history: History, index: int) -> dict[str, Any]:
    """Join the arrays that are shown; `parts` says where each begins, and its shape."""
    parts: dict[str, dict[str, list[int]]] = {}
    joined: list[NDArray[np.float64]] = []
    begin = 0
    for name, arrays in history.snapshots[index].layers.items():
        for key in (key for key in _SHOWN if key in arrays):
            array = np.asarray(arrays[key], dtype=np.float64)
            if key == "rank_means":
                array = array[np.unique(np.linspace(0, len(array) - 1, _MOST_RANKS).astype(np.int64))]
            parts.setdefault(name, {})[key] = [begin, *array.shape]
            joined.append(array.reshape(-1))
            begin += array.size
        channels = list(arrays.get("channel", ()))  # of a wide layer a choice is kept
        if channels and channels != list(range(len(channels))):
            parts[name]["channel"] = channels
    packed = pack(np.concatenate(joined) if joined else np.zeros(0))
    return {"step": history.snapshots[index].step, "parts": parts, "packed": packed}


def _finite(value: Any) -> Any:
    """Leave out what JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
