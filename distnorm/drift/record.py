"""The record of a run: what was logged, and what the drift monitor told, a JSON object a line, readable after any kill.

Schema 2. The first line is `{"schema": 2, "time": …, …}`, with what was decided and the settings. Every other line has
`step` (optimizer steps done, an integer), `time` (seconds since the epoch), and either

    "<name>": number, …      numbers that were logged
    "watched": {…}           the layers, their order, ranks, interval      (`events.Watched`)
    "drift": {…}             one measurement: per measure one number a layer  (`events.Measurement`)
    "snapshot": {…}          whole layers                                  (`events.Snapshot`)
    "alarm": {…}             a limit crossed, or kept again                (`events.Alarm`)

A number that JSON has no word for is the string "nan", "inf" or "-inf". After a requeue the same file goes on where
the checkpoint was saved (`Record.rewind`). Where steps come twice all the same, the later row holds. Schema 1 had
numbers only, and is read too.

Bounded. Each kind of row has a limit; when a kind is twice as many, the file is written anew with at most so many,
evenly over the steps (`thinning.kept`): the first and the most recent ones stay, and all alarms, all rows of validation
and test. The new file takes the old one's place in one piece. At 100 layers x 60 measures a measurement is 50 KB: the
record of a run of 1,000,000 steps, measured every 10, stays under 100 MB; writing it anew takes 0.1 s, at most once in
1000 measurements.
"""

import collections
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distnorm.drift import events
from distnorm.drift.thinning import kept
from distnorm.errors import ConfigError

SCHEMA = 2
_FEWEST_ROWS = 10
_SNAPSHOTS = 8
_ROWS_PER_MEASUREMENT = 10
_EVENTS = ("watched", "drift", "snapshot", "alarm")
_log = logging.getLogger(__name__)


class Record:
    """Appends rows to a record file; each row is with the operating system when `append` or `take` returns.

    Args:
        path: the file; rows are appended to one that exists.
        about: named values for the first line, where the file is new.
        max_rows: measurements that stay when there are twice as many; ten times as many rows of training numbers.

    Raises:
        ConfigError: `max_rows` is under 10, or the file that exists has a newer schema.
    """

    def __init__(self, path: Path, about: Mapping[str, Any] | None = None, *, max_rows: int = 1000) -> None:
        if max_rows < _FEWEST_ROWS:
            raise ConfigError(f"Record got max_rows={max_rows}, and 10 is the least that it keeps. Give e.g. 1000.")
        self._path, self._max_rows, self._times = path, max_rows, 2
        self._partial = path.with_name(f".{path.name}.partial")
        self._partial.unlink(missing_ok=True)  # a kill while the file was thinned
        self._lines = _lines_of(path)
        self._counts = collections.Counter(kind for kind, _ in self._lines)
        self._file = path.open("ab")
        if _ends_torn(path):  # a kill cut the last line short: the next is not to share its fate
            self._file.write(b"\n")
        if not self._lines:
            self._write(json.dumps({"schema": SCHEMA, "time": time.time(), **(about or {})}, default=str), None, 0)

    def rewind(self, step: int, time_s: float) -> None:
        """Take away what was written after a checkpoint: rows of later steps, and later rows; what follows repeats it.

        Args:
            step: optimizer steps done in the checkpoint.
            time_s: when it was saved, in seconds since the epoch, by the clock of whoever wrote the rows.
        """
        with self._path.open("rb") as file:
            rows = [_parsed(line.rstrip(b"\n")) for line in file]
        stay = {
            index
            for index, row in enumerate(rows)
            if row is None or "schema" in row or (row["step"] <= step and row.get("time", 0) <= round(time_s, 3))
        }
        if len(stay) < len(rows):
            self._rewrite(stay)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add one row of numbers."""
        numbers = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        row = {"step": step, "time": round(time.time(), 3), **numbers}
        self._write(json.dumps(row), _kind(row), step)

    def take(self, event: events.Event) -> None:
        """Add what the drift monitor tells."""
        kind: Hashable = "snapshot" if isinstance(event, events.Snapshot) else None
        if isinstance(event, events.Measurement):
            kind = ("drift", frozenset(event.values))
        self._write(f'{events.to_text(event)[:-1]}, "time": {time.time():.3f}}}', kind, event.step)

    def close(self) -> None:
        """Close the file; appending ends here."""
        self._file.close()

    def _write(self, text: str, kind: Hashable, step: int) -> None:
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        self._lines.append((kind, step))
        self._counts[kind] += 1
        if kind is not None and self._counts[kind] >= self._times * self._limit(kind):
            try:
                self._thin()
            except OSError as error:  # e.g. no room for the second file: the record is whole, and goes on
                self._times *= 2
                self._partial.unlink(missing_ok=True)
                _log.warning("%s could not be thinned, and keeps all its rows for now: %s", self._path, error)

    def _limit(self, kind: Hashable) -> int:
        if kind == "snapshot":
            return _SNAPSHOTS
        assert isinstance(kind, tuple)
        return self._max_rows * (1 if "drift" in kind else _ROWS_PER_MEASUREMENT)

    def _thin(self) -> None:
        """Leave rows out, evenly."""
        rows = collections.defaultdict(list)
        for index, (kind, _) in enumerate(self._lines):
            rows[kind].append(index)
        stay = set(rows.pop(None, ()))
        for kind, indices in rows.items():
            stay |= {indices[i] for i in kept([self._lines[i][1] for i in indices], self._limit(kind))}
        self._rewrite(stay)

    def _rewrite(self, stay: set[int]) -> None:
        """Write the file anew with these lines; whoever reads, and a kill, find the old one or the new one."""
        with self._path.open("rb") as old, self._partial.open("wb") as new:
            new.writelines(line for index, line in enumerate(old) if index in stay)
            new.flush()
            os.fsync(new.fileno())
        self._partial.replace(self._path)
        self._file.close()
        self._file = self._path.open("ab")
        self._lines = [line for index, line in enumerate(self._lines) if index in stay]
        self._counts = collections.Counter(kind for kind, _ in self._lines)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a record holds.

    Attributes:
        about: the first line, without its schema and time.
        rows: all others, in the order of the file, as they are there.
        lost: one line on what could not be read; else empty.
    """

    about: dict[str, Any]
    rows: list[dict[str, Any]]
    lost: tuple[str, ...] = ()


def load(path: Path) -> Contents:
    """Read a record, whatever a kill left of it.

    Raises:
        ConfigError: a newer distnorm wrote it.
    """
    parsed = [_parsed(line) for line in _split(path.read_bytes())]
    first = next((row for row in parsed if row is not None and "schema" in row), {})
    _check_schema(path, first)
    about = {key: value for key, value in first.items() if key not in {"schema", "time"}}
    rows = [row for row in parsed if row is not None and "schema" not in row]
    lost = [number for number, row in enumerate(parsed) if row is None]
    if not lost:
        return Contents(about, rows)
    where = "the last one, cut short" if lost == [len(parsed) - 1] else f"the first of them line {lost[0] + 1}"
    return Contents(about, rows, (f"{path.name}: {len(lost)} of {len(parsed)} lines cannot be read, {where}.",))


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows of numbers; the first line is left out, and what a kill cut short.

    Raises:
        ConfigError: a newer distnorm wrote it.
    """
    rows = (row for row in load(path).rows if not is_event(row))
    return [{k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()} for row in rows]


def is_event(row: Mapping[str, Any]) -> bool:
    """Tell a row of the drift monitor from one of numbers."""
    return any(isinstance(row.get(name), dict) for name in _EVENTS)


def _kind(row: Mapping[str, Any]) -> Hashable:
    """Say what a row is thinned with: rows alike; `None` for one that always stays."""
    if "schema" in row:  # the settings there have a group `drift`
        return None
    if isinstance(row.get("drift"), dict):
        return ("drift", frozenset(row["drift"].get("values", ())))
    if isinstance(row.get("snapshot"), dict):
        return "snapshot"
    groups = frozenset(name.partition("/")[0] for name in row if name not in {"step", "time", "epoch"})
    if is_event(row) or groups & {"val", "test"}:
        return None
    return ("numbers", *sorted(groups))


def _lines_of(path: Path) -> list[tuple[Hashable, int]]:
    """List the kind and the step of each line that is there."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        rows: Iterable[dict[str, Any] | None] = (_parsed(line.rstrip(b"\n")) for line in file)
        found = []
        for row in rows:
            if row is not None and "schema" in row:
                _check_schema(path, row)
            found.append((None, 0) if row is None else (_kind(row), row.get("step", 0)))
    return found


def _ends_torn(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1))
        return file.read() not in {b"", b"\n"}


def _split(data: bytes) -> list[bytes]:
    lines = data.split(b"\n")
    return lines[:-1] if not lines[-1] else lines


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and ("schema" in row or isinstance(row.get("step"), int)) else None


def _check_schema(path: Path, first: Mapping[str, Any]) -> None:
    schema = first.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ConfigError(
            f"{path} is a record of schema {schema!r}, and this distnorm reads 1 to {SCHEMA}: a newer one wrote it.\n"
            "Upgrade distnorm, or read the file with the version that wrote it."
        )
