"""What a search has found: a table, sorted, in files and on the console."""

import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from distnorm.conversion import aligned
from distnorm.search.design import Design
from distnorm.search.folder import Outcome

_SHOWN = 10


def ranking(outcomes: Iterable[Outcome], mode: str) -> list[Outcome]:
    """Sort: the best first, equal ones by number, the failed last."""
    sign = 1 if mode == "min" else -1
    found = list(outcomes)
    good = sorted((sign * o.value, o.number) for o in found if o.value is not None)
    by_number = {outcome.number: outcome for outcome in found}
    failed = sorted(outcome.number for outcome in found if outcome.value is None)
    return [by_number[number] for number in [*(number for _, number in good), *failed]]


def to_csv(outcomes: Sequence[Outcome], design: Design) -> str:
    """Write all trials, in the order given: number, state, the value, the keys, other metrics, seconds, the reason."""
    metrics = _metrics(outcomes)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", "round", "state", design.metric, *design.keys, *metrics, "seconds", "attempts", "reason"])
    for o in outcomes:
        values = [o.values.get(key, "") for key in design.keys]
        others = [o.metrics.get(name, "") for name in metrics]
        number = "" if o.value is None else o.value
        writer.writerow([o.number, o.round, o.state, number, *values, *others, o.seconds, o.attempts, o.reason])
    return file.getvalue()


def to_text(outcomes: Sequence[Outcome], design: Design) -> str:
    """Draw the table in plain text, in the order given."""
    return aligned([tuple(_headings(outcomes, design)), *(tuple(row) for row in _rows(outcomes, design))])


def show(outcomes: Sequence[Outcome], design: Design) -> None:
    """Print the first of the table."""
    better = "less" if design.mode == "min" else "more"
    title = f"The best of {len(outcomes)} trials by {design.metric}, {better} is better"
    drawn = Table(title=title, title_justify="left")
    for heading in _headings(outcomes, design):
        drawn.add_column(heading)
    for row in _rows(outcomes[:_SHOWN], design):
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(drawn)


def in_words(values: Mapping[str, Any]) -> str:
    """Write values as one would type them, to four figures: `optimizer.lr=0.03 model.widths=[8,16]`."""
    return " ".join(f"{key}={_short(value)}" for key, value in values.items())


def typed(key: str, value: Any) -> str:
    """Write a value as one types it, to all its digits."""
    return f"{key}={str(value).replace(' ', '')}"


def _headings(outcomes: Sequence[Outcome], design: Design) -> list[str]:
    return ["trial", design.metric, *design.keys, *_metrics(outcomes), "state"]


def _rows(outcomes: Sequence[Outcome], design: Design) -> Iterable[list[str]]:
    metrics = _metrics(outcomes)
    for o in outcomes:
        numbers = [_short(o.values.get(key, "–")) for key in design.keys]
        others = [_short(o.metrics.get(name, "–")) for name in metrics]
        state = f"failed: {o.reason[:80]}" if o.reason else o.state
        yield [str(o.number), "–" if o.value is None else f"{o.value:.4f}", *numbers, *others, state]


def _metrics(outcomes: Sequence[Outcome]) -> list[str]:
    return sorted({name for outcome in outcomes for name in outcome.metrics if name.startswith("test/")})


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace(" ", "")
