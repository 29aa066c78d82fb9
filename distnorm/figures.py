"""How figures of runs look: colours for colour-blind readers too, quiet axes; loads matplotlib when drawing."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Okabe & Ito's colours
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
_STYLE: Any = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "distnorm",
}


@contextlib.contextmanager
def drawn(
    folder: Path, panels: int, width: float, height: float, columns: int | None = None
) -> Iterator[tuple[Any, list[Any]]]:
    """Open a figure of some panels, and write it as `figure.svg` and `figure.png` when the block ends.

    Args:
        folder: takes the two files.
        panels: how many axes.
        width: of the figure, inches.
        height: of the figure, inches.
        columns: panels in a row; `None`: all in one.

    Yields:
        The figure, and its axes, row by row.
    """
    import matplotlib as mpl  # noqa: PLC0415 — a second to import, at the very end of a run

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        across = min(columns or panels, panels)
        figure, axes = plt.subplots(-(-panels // across), across, figsize=(width, height), squeeze=False)
        for unused in list(axes.flat)[panels:]:
            unused.set_visible(False)
        yield figure, list(axes.flat)[:panels]
        formats: dict[str, dict[str, Any]] = {"svg": {"metadata": {"Date": None}}, "png": {"dpi": 96}}
        for kind, options in formats.items():
            partial = folder / f".figure.{os.getpid()}.{kind}"  # several processes may draw the same sweep
            figure.savefig(partial, **options)
            partial.replace(folder / f"figure.{kind}")
        plt.close(figure)
