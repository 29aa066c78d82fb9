"""What `distnorm report` does: read runs, and write their page and figures."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from distnorm.drift.history import History
from distnorm.drift.report.figures import figures
from distnorm.drift.report.render import render
from distnorm.drift.report.verdict import verdict
from distnorm.errors import ConfigError


def report(
    runs: Sequence[str], read: Callable[[Path], History], out: str | None = None, png: str | None = None
) -> list[str]:
    """Write the report of some runs.

    Args:
        runs: their folders, records or `.wandb` files.
        read: gives a run's history: `distnorm.drift.history.read`.
        out: the page; `report.html` in the folder of a single run, else in the current one, if left out.
        png: a folder that takes figures too.

    Returns:
        Lines for the console: where the page is, one on the figures, each run's verdict and what of it was lost.

    Raises:
        ConfigError: a run given twice, or a place that cannot be written; what `read` raises.
    """
    paths = [Path(run).resolve() for run in runs]
    files = [path / "record.jsonl" if (path / "record.jsonl").exists() else path for path in paths]
    files = [file.resolve() for file in files]
    twice = next((run for run, file in zip(runs, files, strict=True) if files.count(file) > 1), None)
    if twice is not None:
        raise ConfigError(f"distnorm report got the run {twice!r} twice. It compares different runs. Give each once.")
    histories = [read(path) for path in paths]
    names = [history.name for history in histories]
    histories = [
        dataclasses.replace(history, name=run) if names.count(history.name) > 1 else history
        for run, history in zip(runs, histories, strict=True)
    ]
    folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else Path()
    page = render(histories, Path(out) if out is not None else folder / "report.html")
    drawn = [f"{len(figures(histories, Path(png)))} figures in {png}"] if png is not None else []
    said = [
        f"{history.name}: {line}" for history in histories for line in (f"{verdict(history).sentence}.", *history.lost)
    ]
    return [str(page), *drawn, *said]
