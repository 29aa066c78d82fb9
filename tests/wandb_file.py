"""A reader of offline `.wandb` files, that wandb itself does not ship.

    ":W&B" 0xBEE1 0  |  blocks of 32 KiB from the start of the file, of pieces:  crc32 u32, length u16, type u8, bytes

A record is one piece of type 1, or pieces 2, 3 … 3, 4; no piece crosses a block's end. The format is LevelDB's log's.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_HEADER = struct.Struct("<4sHB")
_PIECE = struct.Struct("<IHB")
_BLOCK = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows, in order; nested keys are joined by dots."""
    rows = [record.history.item for record in _records(path) if record.WhichOneof("record_type") == "history"]
    return [_values(row) for row in rows]


def config(path: Path) -> dict[str, Any]:
    """The run's configuration, as the run started with it."""
    runs = [record.run.config.update for record in _records(path) if record.WhichOneof("record_type") == "run"]
    return _values(runs[0])


def step_metrics(path: Path) -> dict[str, str]:
    """Which metric is the x-axis of which, by name or glob."""
    metrics = [record.metric for record in _records(path) if record.WhichOneof("record_type") == "metric"]
    return {metric.name or metric.glob_name: metric.step_metric for metric in metrics}


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(path: Path) -> Iterator[Record]:
    """All whole records; where a kill tore the file, they end."""
    data = path.read_bytes()
    if data and _HEADER.unpack_from(data.ljust(_HEADER.size))[:2] != (b":W&B", 0xBEE1):
        raise ValueError(f"{path} is not a .wandb file")
    position, parts = _HEADER.size, []
    while position + _PIECE.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _PIECE.size:  # zeros
            position += left
            continue
        checksum, length, kind = _PIECE.unpack_from(data, position)
        piece = data[position + _PIECE.size : position + _PIECE.size + length]
        if len(piece) < length or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += _PIECE.size + length
        parts = [*parts, piece] if kind in (_MIDDLE, _LAST) else [piece]
        if kind in (_FULL, _LAST):
            yield Record.FromString(b"".join(parts))
