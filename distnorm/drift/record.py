"""The record of a run: what was logged, one JSON object a line, readable after any kill.

Schema 1: the first line is `{"schema": 1, ...}`; every other line has `step` (optimizer steps done, an integer), `time`
(seconds since the epoch) and one or more named numbers. A number that JSON has no word for is the string "nan", "inf"
or "-inf".
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1


class Record:
    """Appends rows to a record file; each row is with the operating system when `append` returns.

    Args:
        path: the file; rows are appended to one that exists.
        about: named values for the first line, where the file is new.
    """

    def __init__(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        before = path.read_bytes() if path.exists() else b""
        self._file = path.open("a", buffering=1, encoding="utf-8")
        if before and not before.endswith(b"\n"):  # a kill cut the last line short: the next is not to share its fate
            self._file.write("\n")
        if not before:
            self._write({"schema": SCHEMA, "time": time.time(), **(about or {})})

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add one row."""
        numbers = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        self._write({"step": step, "time": round(time.time(), 3), **numbers})

    def close(self) -> None:
        """Close the file; appending ends here."""
        self._file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Read a record's rows, the first line left out; a last line that a kill cut short is left out too."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "schema" not in row:
            rows.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()})
    return rows
