"""The figure of a search: what was compared against each key, on the key's scale, and the best so far."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distnorm.figures import COLOURS, drawn
from distnorm.search.design import Design
from distnorm.search.folder import Outcome
from distnorm.search.scales import Dimension

_COLUMNS = 4
_TICKS = 5


def draw(outcomes: Sequence[Outcome], design: Design, folder: Path) -> list[Path]:
    """Draw a search.

    Args:
        outcomes: of all trials.
        design: what was searched.
        folder: takes `figure.svg` and `figure.png`.

    Returns:
        The files.
    """
    dimensions = [dimension for tier in design.ladder for dimension in tier]
    good = [outcome for outcome in outcomes if outcome.value is not None]
    panels = len(dimensions) + 1
    rows, columns = -(-panels // _COLUMNS), min(_COLUMNS, panels)
    with drawn(folder, panels, 3.4 * columns, 3 * rows, columns) as (figure, axes):
        draw_best_so_far(axes[0], good, design.mode, COLOURS[0])
        for place, dimension in zip(axes[1:], dimensions, strict=True):
            _draw_key(place, good, dimension)
        for place in axes[::columns]:
            place.set_ylabel(design.metric)
        figure.suptitle(f"{design.kind.replace('_', ' ')}, {len(outcomes)} trials; darker: later", fontsize=10)
        figure.tight_layout()
    return [folder / "figure.svg", folder / "figure.png"]


def best_so_far(values: Sequence[float], mode: str) -> list[float]:
    """Give the best of the first 1, 2, … values."""
    better = min if mode == "min" else max
    return [better(values[: count + 1]) for count in range(len(values))]


def draw_best_so_far(axes: Any, outcomes: Sequence[Outcome], mode: str, colour: str) -> None:
    """Draw all trials in their order, and the best so far as a line."""
    ordered = sorted((o.number + 1, o.value) for o in outcomes if o.value is not None)
    numbers, values = [number for number, _ in ordered], [value for _, value in ordered]
    axes.plot(numbers, values, "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
    axes.step(numbers, best_so_far(values, mode), where="post", color=colour)
    axes.set_xlabel("trials; line: the best so far")


def _draw_key(axes: Any, outcomes: Sequence[Outcome], dimension: Dimension) -> None:
    there = [outcome for outcome in outcomes if dimension.key in outcome.values]
    places = [dimension.unit(outcome.values[dimension.key]) for outcome in there]
    axes.scatter(places, [o.value for o in there], c=[o.number for o in there], cmap="Blues", vmin=-10, s=18)
    ticks = dimension.grid(_TICKS)
    axes.set_xticks([dimension.unit(tick) for tick in ticks], [_short(tick) for tick in ticks], fontsize=7)
    axes.set_xlabel(dimension.key + ("" if dimension.choices else f" ({dimension.scale.replace('_', ' ')})"))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace(" ", "")
