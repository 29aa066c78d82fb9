"""What wandb shows of the drift besides curves: layers x time as a picture a headline measure, and a table of layers.

Legend: L layers, T measurements.
"""

import dataclasses
import io
import math
from typing import Any

import numpy as np

from distnorm.drift import catalogue
from distnorm.drift.events import Alarm, Event, Measurement, Watched, WatchedLayer

HEADLINE = ("jeffreys", "between_ranks")
"""Measures that get a picture; the table has all that are measured at every interval."""

COLUMNS = tuple(measure.key for measure in catalogue.MEASURES if measure.tier == "light")

_MOST_COLUMNS = 512
_FIRST_LOOK, _FACTOR, _LOOKS = 100, 3, 8
_COLORS = 64


class Media:
    """Remembers what it takes to draw: of the headline measures a few hundred columns, of the others the last value."""

    def __init__(self) -> None:
        self._layers: tuple[WatchedLayer, ...] = ()
        self._columns: list[tuple[int, dict[str, list[float]]]] = []
        self._every, self._measured, self._drawn = 1, 0, 0
        self._last: dict[str, list[float]] = {}
        self._alarms: dict[str, Alarm] = {}
        self.step = 0

    @property
    def is_due(self) -> bool:
        """Whether to draw now: after 100, 300, 900, … measurements."""
        return self._measured in {_FIRST_LOOK * _FACTOR**look for look in range(_LOOKS)} and self.has_news

    @property
    def has_news(self) -> bool:
        """Whether something was measured since the last drawing."""
        return self._measured > self._drawn

    def take(self, event: Event) -> None:
        """Remember what the drift monitor tells."""
        if isinstance(event, Watched):
            if [layer.name for layer in event.layers] != [layer.name for layer in self._layers]:
                self._columns, self._last = [], {}
            self._layers = event.layers
        elif isinstance(event, Measurement):
            self._add(event)
        elif isinstance(event, Alarm):
            self._alarms.pop(event.measure, None)
            self._alarms |= {event.measure: event} if event.state == "raised" else {}

    def draw(self) -> dict[str, Any]:
        """Draw the pictures, PIL's, by the key they are logged under."""
        self._drawn = self._measured
        drawn = {}
        for key in HEADLINE:
            columns = [(step, values[key]) for step, values in self._columns if key in values]
            if columns:
                measure = catalogue.BY_KEY[key]
                drawn[f"drift/heatmap/{key}"] = _heatmap([layer.name for layer in self._layers], columns, measure)
        return drawn

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """List the layers: what they are, the last value of each measure, and the alarms that are raised there."""
        measured = [key for key in COLUMNS if key in self._last]
        rows = []
        for index, layer in enumerate(self._layers):
            values = [self._last[key][index] for key in measured]
            alarms = ", ".join(alarm.measure for alarm in self._alarms.values() if alarm.layer == layer.name)
            rows.append([*dataclasses.astuple(layer), *(v if math.isfinite(v) else None for v in values), alarms])
        return ["layer", "kind", "channels", "samples", *measured, "alarm"], rows

    def _add(self, event: Measurement) -> None:
        self._measured += 1
        self.step = event.step
        self._last |= {key: event.values[key] for key in COLUMNS if key in event.values}
        if self._measured % self._every:
            return
        self._columns.append((event.step, {key: event.values[key] for key in HEADLINE if key in event.values}))
        if len(self._columns) == _MOST_COLUMNS:
            del self._columns[::2]
            self._every *= 2


def _heatmap(names: list[str], columns: list[tuple[int, list[float]]], measure: catalogue.Measure) -> Any:
    """Draw L x T values on the measure's own scale, healthy to alarming, the same in all runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 — a second to import; few runs get here
    from matplotlib.figure import Figure  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    figure = Figure(figsize=(8, min(1.2 + 0.16 * len(names), 16)), dpi=90)
    FigureCanvasAgg(figure)
    margin = 0.45 / figure.get_figheight()  # a constrained layout takes three times as long to draw
    axes = figure.subplots(gridspec_kw={"left": 0.24, "right": 0.98, "bottom": margin, "top": 1 - margin})
    steps = np.array([step for step, _ in columns])
    edges = np.concatenate([steps, [2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1]])
    values_LT = np.array([values for _, values in columns], np.float64).T
    low, high = sorted((measure.healthy, measure.span))
    colors = "magma" if measure.healthy < measure.span else "magma_r"
    image = axes.pcolormesh(edges, np.arange(len(names) + 1), values_LT, vmin=low, vmax=high, cmap=colors)
    every = math.ceil(len(names) / 90)
    axes.set_yticks(np.arange(len(names))[::every] + 0.5, names[::every], fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel="step", title=measure.title, facecolor="0.85")
    beyond = "max" if measure.healthy < measure.span else "min"
    slim = figure.get_figheight() / 0.2
    figure.colorbar(image, label=measure.unit, extend=beyond, extendfrac=0.02, fraction=0.06, pad=0.02, aspect=slim)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB").quantize(_COLORS)
