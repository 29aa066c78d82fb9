"""What the jobs of a sweep came to: a CSV and a text table, the best first, and a figure."""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distnorm.conversion import aligned
from distnorm.drift import record
from distnorm.errors import DistNormError
from distnorm.figures import COLOURS, MARKERS, drawn
from distnorm.launch.run_dir import RunFolder, write_whole
from distnorm.spec import NormSpec
from distnorm.sweep.jobs import Job, in_words

Row = dict[str, Any]
BY = "val/loss"
"""The column that orders the table: the test set is for telling, not for choosing."""
_FIRST = ("job", "state")
_LAST = ("normalization", "samples_per_s", "alarms", "run", "reason")


def collect(jobs: Sequence[Job]) -> list[Row]:
    """Read what all jobs have come to so far, whoever ran them.

    Returns:
        A row a job: its number and state, its changes, the lowest validation loss, the metrics of the test, the
        normalization. The best first, then what is not done.
    """
    rows = [_row(job) for job in jobs]
    return sorted(rows, key=lambda row: (row["state"] != "done", _or_inf(row.get(BY)), row["job"]))


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write `results.csv` and `results.txt`, and draw `figure.svg` and `figure.png` where a job is done."""
    columns = _columns(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: value for key, value in row.items() if key in columns} for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.csv", text.getvalue())
    write_whole(folder / "results.txt", _table(rows) + "\n")
    if any(row["state"] == "done" for row in rows):
        _draw(rows, folder)


def show(rows: Sequence[Row], folder: Path) -> None:
    """Print the table, why jobs failed, and where it is all kept."""
    failed = [f"{in_words(row['changes'])}: {row['reason'].splitlines()[-1]}" for row in rows if row["reason"]]
    print("\n".join(["", _table(rows), "", *(f"failed  {one}" for one in failed), str(folder)]), flush=True)


def _row(job: Job) -> Row:
    row: Row = {"job": job.number, "state": job.state, "changes": job.changes, **job.changes, "reason": ""}
    row["run"] = str(job.run.path)
    if row["state"] == "done":
        result = json.loads(job.run.result.read_text())
        row |= {BY: _best_loss(job.run), **result["metrics"], "samples_per_s": result["samples_per_s"]}
        row |= {"normalization": NormSpec.from_dict(result["decision"]).in_words(), "alarms": len(result["alarms"])}
    elif row["state"] == "failed":
        row["reason"] = job.failure or ""
    return row


def _best_loss(run: RunFolder) -> float | None:
    try:
        rows = record.read(run.record)
    except (OSError, DistNormError):
        return None
    return min((row[BY] for row in rows if isinstance(row.get(BY), int | float)), default=None)


def _columns(rows: Sequence[Row]) -> list[str]:
    """Order the columns: the changes, the validation, the test, the rest."""
    changes = dict.fromkeys(key for row in rows for key in row["changes"])
    numbers = sorted({key for row in rows for key in row if key.startswith(("val/", "test/"))}, key=_val_first)
    return [*_FIRST, *changes, *numbers, *_LAST]


def _val_first(column: str) -> tuple[bool, str]:
    return not column.startswith("val/"), column


def _table(rows: Sequence[Row]) -> str:
    columns = [column for column in _columns(rows) if column not in ("run", "reason", "alarms")]
    return aligned([tuple(columns), *(tuple(_cell(row.get(column)) for column in columns) for row in rows)])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _or_inf(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _draw(rows: Sequence[Row], folder: Path) -> None:
    """Draw validation loss and test accuracy, where there are such: over the key of most numbers, or a bar each."""
    done = [row for row in rows if row["state"] == "done"]
    panels = [column for column in (BY, "test/accuracy") if any(row.get(column) is not None for row in done)]
    if not panels:
        return
    x = _numeric_key(done)
    height = 3.6 if x else max(2.4, 0.9 + 0.28 * len(done))
    with drawn(folder, len(panels), 1 + 4.2 * len(panels), height) as (figure, axes):
        for place, (one, column) in enumerate(zip(axes, panels, strict=True)):
            if x:
                _curves(one, done, x, column)
            else:
                _bars(one, done, column, named=place == 0)
        if x and len(axes[0].get_lines()) > 1:
            axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
        figure.tight_layout()


def _numeric_key(rows: Sequence[Row]) -> str | None:
    """Find the key whose values are numbers, most of them; a seed is averaged over instead."""
    found: dict[str, set[float]] = {}
    for key in dict.fromkeys(key for row in rows for key in row["changes"] if key != "seed"):
        values = [_number(row["changes"].get(key)) for row in rows]
        if None not in values:
            found[key] = {value for value in values if value is not None}
    best = max(found, key=lambda key: len(found[key]), default=None)
    return best if best is not None and len(found[best]) > 1 else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _curves(axes: Any, rows: Sequence[Row], x: str, column: str) -> None:
    series: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        name = in_words({key: value for key, value in row["changes"].items() if key not in (x, "seed")})
        at = _number(row["changes"][x])
        if row.get(column) is not None and at is not None:
            series.setdefault(name, {}).setdefault(at, []).append(row[column])
    for index, (name, points) in enumerate(sorted(series.items())):
        places = sorted(points)
        means = [statistics.fmean(points[at]) for at in places]
        axes.plot(places, means, color=COLOURS[index % 7], marker=MARKERS[index % 7], label=name)
    places = sorted({at for points in series.values() for at in points})
    if places and places[0] > 0 and places[-1] >= 4 * places[0]:
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{at:g}" for at in places])
        axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(column)


def _bars(axes: Any, rows: Sequence[Row], column: str, *, named: bool) -> None:
    """Draw a bar a job, in the table's order."""
    values = [row.get(column) for row in rows]
    places = range(len(rows))
    axes.barh(places, [math.nan if value is None else value for value in values], color=COLOURS[0], height=0.6)
    for place, value in zip(places, values, strict=True):
        if value is not None:
            axes.annotate(f" {value:.4g}", (value, place), va="center", size=7)
    axes.set_yticks(places, [in_words(row["changes"]) for row in rows] if named else [""] * len(rows))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(visible=False)
    axes.set_xlabel(column)
