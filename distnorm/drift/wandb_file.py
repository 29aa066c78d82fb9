"""A reader of offline `.wandb` files, that wandb itself does not ship.

    ":W&B" 0xBEE1 0  |  blocks of 32 KiB from the start of the file, of pieces:  crc32 u32, length u16, type u8, bytes

A record is one piece of type 1, or pieces 2, 3 … 3, 4; no piece crosses a block's end. The format is LevelDB's log's,
and so is what is done about damage: the rest of its block is left out, and reading goes on with the next.

Source: LevelDB, doc/log_format.md; wandb 0.31's files.
"""

import dataclasses
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from distnorm.errors import ConfigError

_HEADER = struct.Struct("<4sHB")
_PIECE = struct.Struct("<IHB")
_MAGIC = struct.pack("<4sH", b":W&B", 0xBEE1)
_BLOCK = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclasses.dataclass
class WandbRun:
    """What a `.wandb` file holds.

    Attributes:
        id: of the run; a requeued one has several files of one id.
        name: shown.
        config: as it was last; wandb's own entries left out.
        rows: logged, in order; nested keys are joined by dots.
        step_metrics: which metric is the x-axis of which, by name or glob.
        hidden: metrics that get no chart.
        has_ended: whether wandb finished the run; it was not killed, and does not go on.
        lost: one line on what could not be read; else empty.
    """

    id: str = ""
    name: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    step_metrics: dict[str, str] = dataclasses.field(default_factory=dict)
    hidden: set[str] = dataclasses.field(default_factory=set)
    has_ended: bool = False
    lost: tuple[str, ...] = ()


def read(path: Path) -> WandbRun:
    """Read an offline run, whatever a kill or a bad disk left of it.

    Raises:
        ConfigError: the file is something else.
    """
    data = path.read_bytes()
    if not data or data[: len(_MAGIC)] != _MAGIC[: len(data)]:
        raise ConfigError(
            f"{path} is not an offline file of wandb: it starts with {data[:6]!r}, and that with {_MAGIC!r}.\n"
            "Give the file run-….wandb in a folder wandb/offline-run-…"
        )
    run, pieces = WandbRun(), _Pieces(data)
    for message in pieces.records():
        _take(run, message)
    run.lost = pieces.lost(path.name)
    return run


def _take(run: WandbRun, message: Any) -> None:
    kind = message.WhichOneof("record_type")
    if kind == "run":
        run.id, run.name = message.run.run_id, message.run.display_name
    if kind in {"run", "config"}:
        changed = message.run.config if kind == "run" else message.config
        run.config |= {k: v for k, v in _values(changed.update).items() if not k.startswith("_")}
    elif kind == "history":
        run.rows.append(_values(message.history.item))
    elif kind == "metric":
        name = message.metric.name or message.metric.glob_name
        run.step_metrics[name] = message.metric.step_metric
        run.hidden |= {name} if message.metric.options.hidden else set()
    elif kind == "exit":
        run.has_ended = True


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


class _Pieces:
    """The way through a file's pieces, and what was left out on it."""

    def __init__(self, data: bytes) -> None:
        self._data, self._parts = data, list[bytes]()
        self._bytes, self._first = 0, 0

    def records(self) -> Iterator[Any]:
        """Yield all whole records."""
        position = min(_HEADER.size, len(self._data))
        while position < len(self._data):
            end = min(position - position % _BLOCK + _BLOCK, len(self._data))
            if position // _BLOCK < len(self._data) // _BLOCK and end - position < _PIECE.size:  # zeros
                position = end
                continue
            kind, piece = self._piece(position, end)
            if piece is None:
                self._lose(position, end - position)
                position = end
                continue
            yield from self._join(position, kind, piece)
            position += _PIECE.size + len(piece)
        self._lose(len(self._data), 0)

    def lost(self, name: str) -> tuple[str, ...]:
        """Say in one line what was left out."""
        if not self._bytes:
            return ()
        return (f"{name}: {self._bytes} of {len(self._data)} bytes cannot be read, from byte {self._first} on.",)

    def _piece(self, position: int, end: int) -> tuple[int, bytes | None]:
        if end - position < _PIECE.size:
            return 0, None
        checksum, length, kind = _PIECE.unpack_from(self._data, position)
        piece = self._data[position + _PIECE.size : position + _PIECE.size + length]
        whole = position + _PIECE.size + length <= end and zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum
        return kind, piece if whole else None

    def _join(self, position: int, kind: int, piece: bytes) -> Iterator[Any]:
        if kind in {_FULL, _FIRST}:
            self._lose(position, 0)
        elif not self._parts:  # the rest of a record whose start is lost
            self._lose(position, _PIECE.size + len(piece))
            return
        self._parts.append(piece)
        if kind in {_FULL, _LAST}:
            message = Record.FromString(b"".join(self._parts))
            self._parts = []
            yield message

    def _lose(self, position: int, count: int) -> None:
        """Leave out bytes from here, and the record that they cut short."""
        count += sum(map(len, self._parts))
        self._parts = []
        self._first = self._first if self._bytes else position
        self._bytes += count
