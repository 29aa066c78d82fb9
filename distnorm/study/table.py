"""The outcomes of a study as a table: mean and standard error over the seeds; text, CSV and markdown."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable

from distnorm.conversion import aligned
from distnorm.study.cells import Outcome
from distnorm.study.design import Design

_HEADINGS = {
    "train_loss": "training loss",
    "test_error": "test error %",
    "between_ranks": "between ranks",
    "largest_difference": "largest difference",
}
_HIDDEN = ("val_loss",)


@dataclasses.dataclass(frozen=True)
class Mean:
    """A number over the seeds: its mean, its standard error (nan for one seed), and how many there are."""

    value: float
    error: float
    runs: int

    def __str__(self) -> str:
        """Write `0.493 ± 0.012`; a single number without its error."""
        return f"{self.value:.3g}" if math.isnan(self.error) else f"{_round(self.value)} ± {_round(self.error)}"


class Table:
    """All rows of a study.

    Args:
        design: the rows' names, order and places.
        outcomes: the runs of the table; those that failed count as missing.
    """

    def __init__(self, design: Design, outcomes: Iterable[Outcome]) -> None:
        self._design = design
        self._outcomes = list(outcomes)
        present = [column for outcome in self._outcomes for column in outcome.values]
        wanted = ["train_loss", "test_error", *design.probes, *dict.fromkeys(present)]
        self.columns = [c for c in dict.fromkeys(wanted) if c in present and c not in _HIDDEN]

    def of(self, row: str, column: str) -> Mean:
        """Give one number; nan where no run has it."""
        values = [o.values[column] for o in self._outcomes if o.row == row and column in o.values]
        if not values:
            return Mean(math.nan, math.nan, 0)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return Mean(statistics.fmean(values), error, len(values))

    def at(self, reference: str) -> Mean:
        """Give the number that a reference names: `row/column`."""
        row, _, column = reference.rpartition("/")
        return self.of(row, column)

    def failures(self) -> list[str]:
        """Name the runs that failed, and why."""
        return [f"{o.row}, seed {o.seed}: {o.error}" for o in self._outcomes if o.error]

    def text(self) -> str:
        """Draw the table in plain text."""
        return aligned([tuple(self._headings()), *(tuple(row) for row in self._cells())])

    def markdown(self) -> str:
        """Draw the table in markdown."""
        headings = self._headings()
        lines = [headings, ["---"] + ["--:"] * (len(headings) - 1), *self._cells()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def csv(self) -> str:
        """Write all numbers: a column's mean, and its standard error in the column named `…_se`."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "series", "at", "rate", "runs", *(c for n in self.columns for c in (n, f"{n}_se"))])
        for name, row in self._design.rows.items():
            numbers = [self.of(name, column) for column in self.columns]
            both = [text for n in numbers for text in (_plain(n.value), _plain(n.error))]
            writer.writerow([name, row.series or "", _plain(row.at), _plain(self.rate(name)), self._runs(name), *both])
        return file.getvalue()

    def rate(self, row: str) -> float | None:
        """Give the learning rate of a row, where it was tuned."""
        return next((o.rate for o in self._outcomes if o.row == row), None)

    def _runs(self, row: str) -> int:
        return sum(o.row == row and not o.error for o in self._outcomes)

    def _headings(self) -> list[str]:
        labels = {name: probe.label or f"{name.replace('_', ' ')} %" for name, probe in self._design.probes.items()}
        rate = ["learning rate"] if self._design.tune else []
        return ["", *rate, "runs", *(labels.get(c) or _HEADINGS.get(c, c) for c in self.columns)]

    def _cells(self) -> Iterable[list[str]]:
        for name in self._design.rows:
            rate = [_plain(self.rate(name)) or "–"] if self._design.tune else []
            numbers = [self.of(name, column) for column in self.columns]
            yield [name, *rate, str(self._runs(name)), *(str(n) if n.runs else "–" for n in numbers)]


def _plain(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def _round(value: float) -> str:
    """Keep three figures of a number, no more than three decimals."""
    decimals = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    return f"{value:.{decimals}f}"
