"""The drift of a run as arrays, for the report: read from its record, or from wandb's offline file.

Legend: L layers, T measurements.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distnorm.drift import record
from distnorm.drift.events import Alarm, Snapshot, Watched, WatchedLayer, from_row
from distnorm.errors import ConfigError

EVENT = "distnorm/event"
"""Key in wandb's history that has an event as the text of its row."""

_STEP = "trainer/global_step"
_GIVE = "Give a run folder, its record.jsonl, a run-….wandb file, or a folder wandb/offline-run-…"


@dataclasses.dataclass(frozen=True)
class History:
    """What is known of a run's drift.

    Attributes:
        name: of the run.
        about: the first line of the record: what was decided and why, the settings.
        layers: L watched layers.
        world_size: ranks.
        steps: [T] of the measurements, rising; after a requeue a step measured twice has its last values.
        values: [L, T] a measure; nan where not measured. Keys as in `Measurement`.
        worst_channels: [L, T] a measure; -1 where unknown.
        scalars: steps and values of each number logged, by name, e.g. `train/loss`, `drift/model/gap`.
        alarms: in order of steps.
        snapshots: in order of steps.
        lost: one line each on what could not be read.
        ended: those of the alarms that are older than the last requeue: it began without any.
    """

    name: str
    about: dict[str, Any]
    layers: tuple[WatchedLayer, ...]
    world_size: int
    steps: NDArray[np.int64]
    values: dict[str, NDArray[np.float64]]
    worst_channels: dict[str, NDArray[np.int64]]
    scalars: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]
    alarms: tuple[Alarm, ...]
    snapshots: tuple[Snapshot, ...]
    lost: tuple[str, ...] = ()
    ended: tuple[Alarm, ...] = ()


def read(path: Path) -> History:
    """Read a run's drift, whatever a kill left of it.

    Where a requeue went over steps again, the later values hold, and alarms of those steps are dropped. Layers
    are told apart by name, so a requeue may watch other ones: the last ones come first, then those that went.

    Args:
        path: a run folder, its `record.jsonl`, an offline `.wandb` file, or wandb's folder `offline-run-…`, that is
            read together with its siblings of the same run id, as a requeue leaves them.

    Raises:
        ConfigError: there is nothing of this kind, or a newer distnorm wrote it.
    """
    path = Path(path).expanduser().resolve()
    file = _file_of(path)
    if file.suffix == ".wandb":
        return _of_wandb([file] if file == path else _requeues(file))
    contents = record.load(file)
    name = str(contents.about.get("run", file.parent.name))
    return _Merged(contents.rows).history(name, contents.about, contents.lost)


def _file_of(path: Path) -> Path:
    if not path.exists():
        raise ConfigError(f"{path} does not exist, so it has no drift to read. {_GIVE}")
    if path.is_dir():
        found = [path / "record.jsonl"] if (path / "record.jsonl").exists() else []
        found = found or sorted(path.glob("run-*.wandb")) or sorted(path.glob("wandb/*run-*/run-*.wandb"), key=_time)
        if not found:
            raise ConfigError(f"{path} has no record.jsonl and no run-….wandb in it. {_GIVE}")
        path = found[-1]
    if path.suffix != ".wandb":
        _check_start(path)
    return path


def _check_start(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(_FIRST_LINE))
    if not start or start != _FIRST_LINE[: len(start)]:
        is_what = f"starts with {start!r}, and a record with {_FIRST_LINE!r}" if start else "is empty"
        raise ConfigError(f"{path} is not a record: it {is_what}.\n{_GIVE}")


_FIRST_LINE = b'{"schema"'


def _requeues(file: Path) -> list[Path]:
    """List the files of one run id, in the order in which they were begun."""
    return sorted(file.parent.parent.glob(f"*run-*/{file.name}"), key=_time) or [file]


def _time(file: Path) -> str:
    return file.parent.name.partition("run-")[2]


def _of_wandb(files: list[Path]) -> History:
    from distnorm.drift import wandb_file  # noqa: PLC0415 — a second to import, that a record does without

    runs = [wandb_file.read(file) for file in files]
    name = next((run.name or run.id for run in reversed(runs) if run.name or run.id), files[-1].stem)
    config: dict[str, Any] = next((run.config for run in runs if run.config), {})
    rows = [row for run in runs for logged in run.rows for row in _rows_of(logged)]
    return _Merged(rows).history(name, {"run": name, **config}, tuple(line for run in runs for line in run.lost))


def _rows_of(logged: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Turn one row of wandb's into rows as a record has them."""
    if isinstance(logged.get(EVENT), str):
        yield json.loads(logged[EVENT])
    if isinstance(logged.get(_STEP), int | float):
        media = tuple(key.removesuffix("_type") for key in logged if key.endswith("._type"))
        left_out = ("_", EVENT, _STEP, *media)
        yield {k: v for k, v in logged.items() if not k.startswith(left_out)} | {"step": int(logged[_STEP])}


@dataclasses.dataclass
class _Stretch:
    """What was measured between one list of layers and the next."""

    layers: tuple[WatchedLayer, ...]
    rows: dict[int, dict[str, dict[str, list[Any]]]] = dataclasses.field(default_factory=dict)

    def add(self, step: int, told: Mapping[str, dict[str, list[Any]]]) -> bool:
        """Keep a measurement, if it is of as many layers."""
        if any(len(column) != len(self.layers) for measured in told.values() for column in measured.values()):
            return False
        row = self.rows.setdefault(step, {"values": {}, "worst_channels": {}})
        for name, measured in row.items():
            measured.update(told.get(name, {}))
        return True


class _Merged:
    """Rows of a record, in order, put together by step and by layer."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._stretches: list[_Stretch] = []
        self._world_size, self._unread = 1, 0
        self._scalars: dict[str, dict[int, float]] = {}
        self._alarms: dict[tuple[Any, ...], Alarm] = {}
        self._ended: tuple[Alarm, ...] = ()
        self._snapshots: dict[int, Snapshot] = {}
        for row in rows:
            if record.is_event(row):
                self._take(row)
            else:
                self._add_numbers(row)

    def history(self, name: str, about: dict[str, Any], lost: tuple[str, ...]) -> History:
        """Make the arrays."""
        if self._unread:
            lost += (f"{self._unread} events could not be read, or the list of their layers is lost.",)
        steps = np.array(sorted({step for stretch in self._stretches for step in stretch.rows}), np.int64)
        layers = {layer.name: layer for stretch in reversed(self._stretches) for layer in stretch.layers}
        for stretch in self._stretches:  # what the last said of a layer
            layers |= {layer.name: layer for layer in stretch.layers}
        return History(
            name=name,
            about=about,
            layers=tuple(layers.values()),
            world_size=self._world_size,
            steps=steps,
            values=self._arrays("values", steps, list(layers), np.float64, np.nan),
            worst_channels=self._arrays("worst_channels", steps, list(layers), np.int64, -1),
            scalars={
                key: (np.array(sorted(by_step), np.int64), np.array([by_step[step] for step in sorted(by_step)]))
                for key, by_step in sorted(self._scalars.items())
            },
            alarms=tuple(sorted(self._alarms.values(), key=lambda alarm: alarm.step)),
            snapshots=tuple(snapshot for _, snapshot in sorted(self._snapshots.items())),
            lost=lost,
            ended=self._ended,
        )

    def _take(self, row: Mapping[str, Any]) -> None:
        try:
            if "drift" in row:
                if not self._stretches or not self._stretches[-1].add(row["step"], row["drift"]):
                    self._unread += 1
                return
            event = from_row(row)
        except (AttributeError, KeyError, TypeError, ValueError):
            self._unread += 1
            return
        if isinstance(event, Watched):
            if self._stretches:
                self._alarms = {key: alarm for key, alarm in self._alarms.items() if alarm.step <= event.step}
                self._ended = tuple(self._alarms.values())
            self._stretches.append(_Stretch(event.layers))
            self._world_size = event.world_size
        elif isinstance(event, Alarm):
            self._alarms[event.step, event.measure, event.layer, event.state] = event
        elif isinstance(event, Snapshot):
            self._snapshots[event.step] = event

    def _add_numbers(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name not in {"step", "time"} and (is_number or value in ("nan", "inf", "-inf")):
                self._scalars.setdefault(name, {})[row["step"]] = float(value)

    def _arrays(
        self, name: str, steps: NDArray[np.int64], layers: list[str], dtype: type[Any], unknown: float
    ) -> dict[str, NDArray[Any]]:
        keys = dict.fromkeys(k for stretch in self._stretches for row in stretch.rows.values() for k in row[name])
        arrays = {key: np.full((len(layers), len(steps)), unknown, dtype) for key in keys}
        for stretch in self._stretches:
            places = np.array([layers.index(layer.name) for layer in stretch.layers], np.int64)
            for key, array in arrays.items():
                there = {step: row[name][key] for step, row in stretch.rows.items() if key in row[name]}
                if there:
                    columns = np.searchsorted(steps, list(there))
                    array[np.ix_(places, columns)] = np.array(list(there.values()), dtype).T
        return arrays
