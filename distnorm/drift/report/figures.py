"""Figures of the report as PNG files, for papers.

Legend: L layers, T measurements.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distnorm.drift.catalogue import Measure
from distnorm.drift.history import History
from distnorm.drift.report.worst import TWO_SIDED, badness, measures_of
from distnorm.errors import ConfigError

# Okabe & Ito's colours, that colour-blind readers tell apart
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE: Any = {
    "figure.facecolor": "white",
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
}
_MOST_LABELS = 40
_MOST_COLUMNS = 3


def figures(histories: Sequence[History], folder: Path) -> list[Path]:
    """Draw the figures of some runs.

    Args:
        histories: the runs; each measure has one colour scale over all of them.
        folder: is made; takes `map_<measure>.png`, `lines.png` (the worst layer of each measure), `channels_<n>.png`
            (running against batch statistics of run n, counted from 1) and `gap.png`, as far as there are data.

    Returns:
        The files.

    Raises:
        ConfigError: a folder that cannot be written.
    """
    import matplotlib as mpl  # noqa: PLC0415 — a second to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(_STYLE):
            for name, figure in _all(histories, plt, mpl):
                files.append(folder / f"{name}.png")
                figure.savefig(files[-1], metadata={"Software": None})
                plt.close(figure)
    except OSError as error:
        raise ConfigError(
            f"The figures cannot be written to {str(folder)!r}: {error.strerror}.\n"
            "Give a folder that you can write, e.g. --png figures."
        ) from None
    return files


def _all(histories: Sequence[History], plt: Any, mpl: Any) -> Iterator[tuple[str, Any]]:
    known = [h for h in histories if len(h.steps) and h.layers]
    shown = [m for m in measures_of(known).values() if any(_is_measured(h, m) for h in known)]
    for measure in shown:
        yield f"map_{measure.key}", _map([h for h in known if _is_measured(h, measure)], measure, plt, mpl)
    if shown:
        yield "lines", _lines(known, shown, plt)
    for index, history in enumerate(histories):
        if _compared(history):
            yield f"channels_{index + 1}", _channels(history, plt)
    if any(_gaps(history) for history in histories):
        yield "gap", _gap(histories, plt)


def _is_measured(history: History, measure: Measure) -> bool:
    values_LT = history.values.get(measure.key)
    return values_LT is not None and bool(np.isfinite(values_LT).any())


def _map(histories: Sequence[History], measure: Measure, plt: Any, mpl: Any) -> Any:
    """Draw layers × steps of each run, on one scale from healthy to the end of the measure's span."""
    most = max(len(history.layers) for history in histories)
    rows, columns = math.ceil(len(histories) / _MOST_COLUMNS), min(len(histories), _MOST_COLUMNS)
    size = (4.6 * columns + 1.4, rows * min(2.4 + 0.17 * most, 8))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    low, high = sorted((measure.healthy, measure.span))
    is_log = measure.healthy > 0 and high / low > 5
    if measure.key in TWO_SIDED:
        low, is_log = measure.healthy**2 / high, True
    norm = (mpl.colors.LogNorm if is_log else mpl.colors.Normalize)(low, high)
    name = "PuOr" if measure.key in TWO_SIDED else "magma_r" if measure.span > measure.healthy else "magma"
    colours = mpl.cm.ScalarMappable(norm, mpl.colormaps[name].with_extremes(bad="#e8e8e8"))
    for one, history in zip(axes.flat, histories, strict=False):
        is_made = np.asarray(np.isfinite(history.values[measure.key]).any(axis=0))
        draw = _cells if is_made.sum() > 1 else _bars
        draw(one, history, measure, is_made, colours)
        one.invert_yaxis()
        every = math.ceil(len(history.layers) / _MOST_LABELS)
        names = [_plain(layer.name) for layer in history.layers]
        one.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
        one.set_title(_plain(history.name) if len(histories) > 1 else "", fontsize=9)
    for one in list(axes.flat)[len(histories) :]:
        one.set_axis_off()
    bar = figure.colorbar(colours, ax=axes.ravel().tolist(), extend="both", pad=0.02)
    bar.set_label(measure.unit)
    figure.suptitle(measure.title, fontsize=10)
    if is_log:
        _plain_numbers(bar.ax.yaxis)
    if measure.limit is not None:
        bar.ax.axhline(measure.limit.at, color="#b3261e", linewidth=1.5)
    return figure


def _cells(one: Any, history: History, measure: Measure, is_made_T: NDArray[np.bool_], colours: Any) -> None:
    """Draw the measurements that were made, each up to half way to the next."""
    values_LT = np.ma.masked_invalid(history.values[measure.key][:, is_made_T])
    layers = np.arange(len(history.layers) + 1) - 0.5
    edges = _edges(history.steps[is_made_T])
    drawn = one.pcolormesh(edges, layers, values_LT, cmap=colours.cmap, norm=colours.norm)
    drawn.set_rasterized(True)
    steps = [a.step for a in history.alarms if a.measure == measure.key and a.state == "raised"]
    if steps:
        place = [len(history.layers) - 0.5] * len(steps)
        one.plot(steps, place, "^", color="#b3261e", clip_on=False, markersize=6)
    one.set_xlabel("step")


def _bars(one: Any, history: History, measure: Measure, is_made_T: NDArray[np.bool_], colours: Any) -> None:
    """Draw the one measurement that was made: a bar a layer from healthy to its value."""
    at = int(is_made_T.argmax())
    values_L = history.values[measure.key][:, at]
    known = np.where(np.isfinite(values_L), values_L, measure.healthy)
    rows = np.arange(len(known))
    one.barh(
        rows,
        known - measure.healthy,
        left=measure.healthy,
        color=colours.to_rgba(known),
        edgecolor="#888888",
        linewidth=0.5,
    )
    if len(known) <= _MOST_LABELS:
        for row, value in zip(rows, values_L, strict=True):
            text, place = f"{value:.3g}" if np.isfinite(value) else "–", max(known[row], measure.healthy)
            one.annotate(text, (place, row), (4, 0), textcoords="offset points", va="center", fontsize=7)
    one.axvline(measure.healthy, color="#888888", linewidth=0.8)
    one.set_ylim(-0.5, len(known) - 0.5)
    ends = (colours.norm.vmin, colours.norm.vmax, known.min(), known.max())
    room = 0.1 * (max(ends) - min(ends))
    one.set_xlim(min(ends) - room, max(ends) + room)
    one.set_xlabel(f"{measure.unit or 'value'}, measured once, at step {history.steps[at]}")
    one.ticklabel_format(axis="x", useOffset=False)


def _edges(steps: NDArray[np.int64]) -> NDArray[np.float64]:
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[1.5 * steps[0] - steps[1] / 2], middle, [1.5 * steps[-1] - steps[-2] / 2]])


def _lines(histories: Sequence[History], shown: Sequence[Measure], plt: Any) -> Any:
    """Draw the worst layer of each measure over the steps, a line a run."""
    rows = math.ceil(len(shown) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(11, 1.9 * rows), squeeze=False, layout="constrained")
    for one, measure in zip(axes.flat, shown, strict=False):
        for index, history in enumerate(histories):
            if _is_measured(history, measure):
                values_LT = history.values[measure.key]
                values = np.take_along_axis(values_LT, badness(values_LT, measure).argmax(0)[None], 0)[0]
                kept = np.isfinite(values)
                colour = _COLOURS[index % len(_COLOURS)]
                marker = "." if kept.sum() == 1 else "None"
                one.plot(history.steps[kept], values[kept], marker=marker, color=colour, linewidth=1.1)
        if measure.limit is not None:
            one.axhline(measure.limit.at, color="#b3261e", linestyle=":", linewidth=1)
        one.set_xlim(min(h.steps[0] for h in histories), 1.02 * max(h.steps[-1] for h in histories))
        one.ticklabel_format(axis="y", useOffset=False)
        one.set_title(f"{measure.title}{f' ({measure.unit})' if measure.unit else ''}", fontsize=7.5, loc="left")
        one.tick_params(labelsize=7)
    for one in list(axes.flat)[len(shown) :]:
        one.set_axis_off()
    figure.supxlabel("step", fontsize=8)
    if len(histories) > 1:
        figure.legend(*_keys(histories, plt), loc="outside upper left", ncols=4)
    return figure


def _compared(history: History) -> list[Mapping[str, Any]]:
    """Give the layers of the last snapshot that keep running statistics."""
    layers = history.snapshots[-1].layers.values() if history.snapshots else ()
    return [layer for layer in layers if {"running_mean", "running_var", "batch_mean", "batch_var"} <= layer.keys()]


def _channels(history: History, plt: Any) -> Any:
    """Draw all channels' running against batch statistics at the last snapshot: means and standard deviations."""
    layers = _compared(history)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
    for one, kind in zip(axes, ("mean", "var"), strict=True):
        pairs = [(layer[f"running_{kind}"], layer[f"batch_{kind}"]) for layer in layers]
        for index, (running, batch) in enumerate(pairs):
            x, y = np.asarray(running, dtype=float), np.asarray(batch, dtype=float)
            x, y = (np.sqrt(x), np.sqrt(y)) if kind == "var" else (x, y)
            colour = plt.get_cmap("viridis")(index / max(len(pairs) - 1, 1))
            one.plot(x, y, ".", color=colour, alpha=0.6, markersize=4, markeredgewidth=0, rasterized=True)
        one.axline((1, 1), slope=1, color="#888888", linewidth=0.8, linestyle="--")
        if kind == "var":
            one.set_xscale("log")
            one.set_yscale("log")
            _plain_numbers(one.xaxis, one.yaxis)
        one.set_xlabel(f"running {'mean' if kind == 'mean' else 'standard deviation'}")
        one.set_ylabel("batch")
    figure.suptitle(f"{_plain(history.name)}, step {history.snapshots[-1].step}: first layer dark", fontsize=9)
    return figure


def _gaps(history: History) -> list[str]:
    return [name for name in ("train/loss", "val/loss", "drift/model/gap") if name in history.scalars]


def _gap(histories: Sequence[History], plt: Any) -> Any:
    """Draw losses of training and validation, and the train/eval gap."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3), layout="constrained")
    for index, history in enumerate(histories):
        colour = _COLOURS[index % len(_COLOURS)]
        for name in _gaps(history):
            steps, values = history.scalars[name]
            style = {"val/loss": "--"}.get(name, "-")
            one = axes[1] if name.startswith("drift") else axes[0]
            one.plot(steps, values, style, color=colour, linewidth=1.2)
    for one, title in zip(axes, ("loss: training, and dashed validation", "train/eval gap"), strict=True):
        one.set_xlabel("step")
        one.set_ylabel(title)
    if len(histories) > 1:
        figure.legend(*_keys(histories, plt), loc="outside upper left", ncols=3, fontsize=7)
    return figure


def _keys(histories: Sequence[History], plt: Any) -> tuple[list[Any], list[str]]:
    """Give a line and a name of each run, for a legend."""
    lines = [plt.Line2D([], [], color=_COLOURS[index % len(_COLOURS)]) for index in range(len(histories))]
    return lines, [_plain(history.name) for history in histories]


def _plain_numbers(*axes: Any) -> None:
    """Label a logarithmic axis 1, 2, 5, 10 and not in powers."""
    from matplotlib import ticker  # noqa: PLC0415

    for axis in axes:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())


def _plain(text: str) -> str:
    """Keep matplotlib from reading formulas into names."""
    return text.replace("$", r"\$")
