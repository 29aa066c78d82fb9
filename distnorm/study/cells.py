"""The runs of a study: which there are, in which order, and which are done already."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from distnorm.errors import ConfigError
from distnorm.launch import ranks
from distnorm.launch.compose import completed
from distnorm.launch.run_dir import RunFolder
from distnorm.settings import Settings
from distnorm.study.design import Design, Row

Compose = Callable[[Sequence[str]], Settings]
"""Composes and checks the experiment with some changes, as one would type them."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        row: the line of the table.
        seed: of this run.
        rate: the tuned value; `None` where nothing is tuned.
        settings: all of them.
        num_ranks: processes it trains on.
    """

    row: str
    seed: int
    rate: float | None
    settings: Settings
    num_ranks: int

    @property
    def name(self) -> str:
        """A folder's name: `bn-2_lr0.03_seed1`."""
        plain = re.sub(r"[^\w.+-]+", "-", self.row)
        return "_".join([plain, *([] if self.rate is None else [f"lr{self.rate:g}"]), f"seed{self.seed}"])

    @property
    def cost(self) -> int:
        """Forward passes, to start the longest runs first."""
        trainer = self.settings.trainer
        return int(trainer.max_steps) * trainer.accumulate_grad_batches

    def folder(self, study: Path) -> RunFolder:
        """Find its folder in the study's."""
        return RunFolder(study / "cells" / self.name)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        row: the line of the table.
        seed: of the run.
        rate: the tuned value.
        values: numbers by column; empty where it failed.
        error: why it failed, in words; empty where it did not.
        seconds: from its start to its last evaluation.
    """

    row: str
    seed: int
    rate: float | None
    values: dict[str, float]
    error: str = ""
    seconds: float = 0.0


class Plan:
    """Composes the cells of a study.

    Args:
        design: what the study asks.
        compose: composes the settings of a row.

    Raises:
        ConfigError: a row's changes do not compose, or are not good.
    """

    def __init__(self, design: Design, compose: Compose) -> None:
        self._design = design
        self._rows = {name: _composed(name, row, compose) for name, row in design.rows.items()}

    def tuning(self) -> list[Cell]:
        """List the runs that the learning rates are chosen by."""
        tune = self._design.tune
        rows = [row for tried in tune.rows.values() for row in tried] if tune else []
        return [self._cell(row, self._design.seeds[0], rate) for row in rows for rate in (tune.grid if tune else [])]

    def choose(self, outcomes: Iterable[Outcome]) -> dict[str, float]:
        """Choose each series' learning rate: the lowest validation loss, summed over the rows that were tried.

        A rate with which a run failed, or lost itself (a loss that is no number), is not chosen.

        Returns:
            Row → rate; rows whose series was not tuned are left out.
        """
        tune = self._design.tune
        if tune is None:
            return {}
        losses = {(o.row, o.rate): o.values.get("val_loss", float("inf")) for o in outcomes}
        best: dict[str, float] = {}
        for series, tried in tune.rows.items():
            sums = {rate: sum(_or_inf(losses.get((row, rate))) for row in tried) for rate in tune.grid}
            best[series] = min(sums, key=lambda rate: sums[rate])
        return {row: best[self._design.series(row)] for row in self._design.rows if self._design.series(row) in best}

    def final(self, rates: dict[str, float]) -> list[Cell]:
        """List the runs of the table, the longest first."""
        cells = [
            self._cell(name, seed, rates.get(name))
            for name, row in self._design.rows.items()
            for seed in row.seeds or self._design.seeds
        ]
        return sorted(cells, key=lambda cell: -cell.cost)

    def _cell(self, row: str, seed: int, rate: float | None) -> Cell:
        settings = self._rows[row]
        changes: dict[str, Any] = {"seed": seed}
        if "seed" in settings.data:
            changes["data"] = {**settings.data, "seed": seed}
        if rate is not None and self._design.tune is not None:
            group, _, key = self._design.tune.key.partition(".")
            changes[group] = {**getattr(settings, group), key: rate}
        found = ranks.find(settings.trainer)
        return Cell(row, seed, rate, settings.model_copy(update=changes), found.world_size)


class Outcomes:
    """The outcomes of a study, appended to `cells.jsonl` as they come in: readable after any kill.

    Args:
        study: the study's folder; what a run with the very same settings has left there is taken over.
    """

    def __init__(self, study: Path) -> None:
        self._study, self._file = study, study / "cells.jsonl"
        self._known: dict[str, Outcome] = {}
        for line in self._file.read_text().splitlines() if self._file.exists() else []:
            try:
                written = json.loads(line)
            except json.JSONDecodeError:  # a kill cut it short
                continue
            name = written.pop("cell")
            self._known[name] = Outcome(**written)

    def find(self, cell: Cell) -> Outcome | None:
        """Give the outcome of a run that was done before, with the same settings and without failure."""
        known = self._known.get(cell.name)
        config = cell.folder(self._study).path / "config.yaml"
        same = known is not None and not known.error and config.exists()
        return known if same and config.read_text() == cell.settings.to_yaml() else None

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Keep an outcome."""
        self._known[cell.name] = outcome
        with self._file.open("a") as file:
            file.write(json.dumps({"cell": cell.name, **dataclasses.asdict(outcome)}) + "\n")


def _composed(name: str, row: Row, compose: Compose) -> Settings:
    try:
        complete = completed(compose(row.set))
    except ConfigError as error:
        raise ConfigError(f"study.rows.{name}: {error}") from None
    return complete


def _or_inf(loss: float | None) -> float:
    return float("inf") if loss is None or loss != loss else loss  # noqa: PLR0124 — nan differs from itself
