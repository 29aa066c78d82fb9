"""The figure of a study: curves over a quantity, or groups of bars; means with standard errors over the seeds."""

import math
from pathlib import Path
from typing import Any

from distnorm.figures import COLOURS, MARKERS, drawn
from distnorm.study.design import Design, Panel
from distnorm.study.table import Table


def draw(design: Design, table: Table, folder: Path) -> list[Path]:
    """Draw a study's figure.

    Args:
        design: what to draw.
        table: the numbers.
        folder: takes `figure.svg` and `figure.png`.

    Returns:
        The files.
    """
    panels = design.figure.panels
    with drawn(folder, len(panels), max(7.4, 1 + 4.4 * len(panels)), 4.2) as (figure, axes):
        for panel, one in zip(panels, axes, strict=True):
            if panel.bars:
                _bars(one, panel, design, table)
            else:
                _curves(one, panel, design, table)
            one.set_ylabel(panel.y)
            one.set_xlabel(design.figure.x)
            if panel.log:
                one.set_yscale("log")
        rows = _legend(figure, axes, columns=3 if len(panels) == 1 else 5)
        figure.suptitle(design.figure.title, fontsize=10)
        figure.tight_layout(rect=(0, 0.02 + 0.055 * rows, 1, 1))
    return [folder / "figure.svg", folder / "figure.png"]


def _curves(axes: Any, panel: Panel, design: Design, table: Table) -> None:
    """Draw a line a series over its rows' places; a series without places is level, its error a band."""
    column = str(panel.column)
    series = design.figure.series or list(dict.fromkeys(map(design.series, design.rows)))
    for index, name in enumerate(series):
        colour, marker = COLOURS[index % 7], MARKERS[index % 7]
        rows = [row for row in design.rows if design.series(row) == name and table.of(row, column).runs]
        placed = sorted((float(design.rows[row].at or 0), row) for row in rows if design.rows[row].at is not None)
        if placed:
            numbers = [table.of(row, column) for _, row in placed]
            errors = [0 if math.isnan(n.error) else n.error for n in numbers]
            places, values = [at for at, _ in placed], [n.value for n in numbers]
            axes.errorbar(places, values, errors, color=colour, marker=marker, capsize=3, label=name)
        elif rows:
            number = table.of(rows[0], column)
            axes.axhline(number.value, color=colour, linestyle=(0, (4 + index, 2)), label=name)
            if not math.isnan(number.error):
                axes.axhspan(number.value - number.error, number.value + number.error, color=colour, alpha=0.12, lw=0)
    places = sorted({row.at for row in design.rows.values() if row.at is not None})
    if places:
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{at:g}" for at in places])
        axes.minorticks_off()


def _bars(axes: Any, panel: Panel, design: Design, table: Table) -> None:
    """Draw groups of bars; one name has one colour in all panels."""
    names = list(dict.fromkeys(name for one in design.figure.panels for bars in one.bars.values() for name in bars))
    width = 0.8 / max(len(bars) for bars in panel.bars.values())
    for place, bars in enumerate(panel.bars.values()):
        for index, (name, reference) in enumerate(bars.items()):
            number = table.at(reference)
            left = place + (index - (len(bars) - 1) / 2) * width
            error = None if math.isnan(number.error) else number.error
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axes.bar(left, number.value, width, yerr=error, capsize=2, color=colour, label=name)
            if not math.isnan(number.value):
                top = (left, number.value + (error or 0))
                axes.annotate(_short(number.value), top, (0, 2), textcoords="offset points", ha="center", size=7)
    axes.set_xticks(range(len(panel.bars)), list(panel.bars))


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def _legend(figure: Any, axes: Any, columns: int) -> int:
    """Draw one legend below all panels, none for a single name; returns its rows."""
    found: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len(found) < 2:
        return 0
    figure.legend(found.values(), found.keys(), loc="lower center", ncols=min(len(found), columns), fontsize=8.5)
    return math.ceil(len(found) / columns)
