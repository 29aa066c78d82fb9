"""Conduct a study from its design to its folder: tune, run every row with every seed, measure, draw, check."""

import dataclasses
import datetime as dt
import itertools
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from distnorm.errors import ConfigError, DistNormError
from distnorm.launch.run_dir import RunFolder, code_hash, versions, write_json, write_whole
from distnorm.settings import Settings
from distnorm.study import claims, design, figure
from distnorm.study.cells import Cell, Compose, Outcome, Outcomes, Plan
from distnorm.study.measure import largest_difference, measure
from distnorm.study.table import Table
from distnorm.study.training import Train, train_here, train_on_ranks
from distnorm.study.workers import CellError, Workers, in_words


def conduct(train: Train, base: Settings, compose: Compose, command: Sequence[str]) -> Path:
    """Conduct a study, and leave one folder.

    ```
    cells.jsonl  table.txt  table.csv  table.md  figure.{svg,png}  study.json  cells/<run>/
    ```

    Args:
        train: trains one run; `train` of train.py.
        base: the experiment, with its `study`.
        compose: composes it with some changes.
        command: the command line, to be repeated by whoever reads the folder; its first word is the script.

    Returns:
        The folder.

    Raises:
        ConfigError: the design, or a row of it, is not good; nothing was run.
        ClaimError: an asserted claim does not hold, or a run failed; the folder has all the rest.

    Collective: none in this process; runs of several ranks start them, one run after the other.
    """
    torch.set_num_threads(1)  # as the runs do: threads that share cores with other processes wait for one another
    asked = design.read(base.study or {})
    plan = Plan(asked, compose)
    study = _open(asked, base)
    print(f"study     {study}\n          {len(asked.rows)} rows, seeds {asked.seeds}", flush=True)
    started = time.monotonic()
    with _Runner(train, asked, study, command[0]) as runner:
        rates = plan.choose(runner.run(plan.tuning()))
        outcomes = runner.run(plan.final(rates))
    outcomes = _compared(asked, outcomes, study, {cell.name: cell for cell in plan.final(rates)})
    return _conclude(asked, Table(asked, outcomes), study, command, time.monotonic() - started)


@dataclasses.dataclass(frozen=True)
class _Task:
    """What a worker needs for one run."""

    train: Train
    cell: Cell
    run: RunFolder
    asked: design.Design


class _Runner:
    """Runs cells: those of one rank in warm workers, the others one at a time."""

    def __init__(self, train: Train, asked: design.Design, study: Path, script: str) -> None:
        self._train, self._asked, self._study, self._script = train, asked, study, script
        self._outcomes = Outcomes(study)
        self._workers = Workers[_Task](_run_here, asked.workers)

    def __enter__(self) -> "_Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.stop()

    def run(self, cells: list[Cell]) -> list[Outcome]:
        """Run what has not been run yet, in the order given, and collect all outcomes."""
        unique = list({cell.name: cell for cell in cells}.values())
        found = {cell.name: self._outcomes.find(cell) for cell in unique}
        missing = [cell for cell in unique if found[cell.name] is None]
        tasks = [_Task(self._train, cell, self._make_folder(cell), self._asked) for cell in missing]
        alone = self._workers.run([task for task in tasks if task.cell.num_ranks == 1])
        started = time.monotonic()
        for number, (task, result) in enumerate(itertools.chain(alone, self._together(tasks)), 1):
            outcome = _outcome(task.cell, result)
            found[task.cell.name] = outcome
            self._outcomes.add(task.cell, outcome)
            said = outcome.error or "  ".join(f"{k} {v:.4g}" for k, v in outcome.values.items())
            spent = time.monotonic() - started
            print(f"{number}/{len(tasks)}  {spent:.0f} s  {task.cell.name}  {said}", flush=True)
        return [outcome for outcome in found.values() if outcome is not None]

    def _together(self, tasks: Iterable[_Task]) -> Iterator[tuple[_Task, Any]]:
        for task in tasks:
            if task.cell.num_ranks > 1:
                try:
                    yield task, _run_with_ranks(task, self._script)
                except (DistNormError, OSError, RuntimeError) as error:
                    yield task, CellError(in_words(error))

    def _make_folder(self, cell: Cell) -> RunFolder:
        run = cell.folder(self._study)
        shutil.rmtree(run.path, ignore_errors=True)  # of a run that was cut short
        run.checkpoints.mkdir(parents=True)
        run.ranks.mkdir()
        run.write_settings(cell.settings)
        return run


def _run_here(task: _Task) -> dict[str, float]:
    """Train and measure one run in this process."""
    started = time.monotonic()
    train_here(task.train, task.cell.settings, task.run)
    return _measured(task, started)


def _run_with_ranks(task: _Task, script: str) -> dict[str, float]:
    """Train one run on ranks of its own, and measure it here."""
    started = time.monotonic()
    train_on_ranks(script, task.run, task.cell.num_ranks)
    return _measured(task, started)


def _measured(task: _Task, started: float) -> dict[str, float]:
    values = measure(task.cell.settings, task.run, task.asked.probes)
    if not task.asked.keep:
        shutil.rmtree(task.run.checkpoints)
    return {**values, "seconds": time.monotonic() - started}


def _outcome(cell: Cell, result: Any) -> Outcome:
    if isinstance(result, CellError):
        return Outcome(cell.row, cell.seed, cell.rate, {}, error=str(result))
    seconds = result.pop("seconds")
    return Outcome(cell.row, cell.seed, cell.rate, result, seconds=round(seconds, 1))


def _compared(asked: design.Design, outcomes: list[Outcome], study: Path, cells: dict[str, Cell]) -> list[Outcome]:
    """Add the largest difference between the training losses of a row and of the one it is compared with."""
    folders = {(cell.row, cell.seed): cell.folder(study) for cell in cells.values()}
    result = []
    for outcome in outcomes:
        other = folders.get((asked.rows[outcome.row].against or "", outcome.seed))
        values = dict(outcome.values)
        if other is not None and values and other.record.exists():
            values["largest_difference"] = largest_difference(folders[outcome.row, outcome.seed], other)
        result.append(dataclasses.replace(outcome, values=values))
    return result


def _open(asked: design.Design, base: Settings) -> Path:
    """Make the study's folder, or go on in the one given."""
    if asked.continues is not None:
        study = Path(asked.continues).resolve()
        if not (study / "cells.jsonl").is_file():
            raise ConfigError(
                f"study.continues={asked.continues!r} holds no cells.jsonl: no run of a study ended there.\n"
                "Give a study's folder, or leave study.continues out to begin anew."
            )
        return study
    study = (Path(base.runs_dir) / f"study_{dt.datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(3)}").resolve()
    study.mkdir(parents=True)
    return study


def _conclude(asked: design.Design, table: Table, study: Path, command: Sequence[str], seconds: float) -> Path:
    """Write and print what came out.

    Raises:
        ClaimError: an asserted claim does not hold, or a run failed.
    """
    verdicts = [claims.check(claim, table) for claim in asked.claims]
    failures = table.failures()
    said = [*map(str, verdicts), *(f"failed  {failure}" for failure in failures)]
    write_whole(study / "table.csv", table.csv())
    write_whole(study / "table.md", table.markdown() + "\n\n" + "".join(f"- {line}\n" for line in said))
    write_whole(study / "table.txt", "\n".join([table.text(), "", *said, ""]))
    about = {
        "command": " ".join(["python", *command]),
        "seconds": round(seconds, 1),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "code_hash": code_hash(),
        "claims": [{"says": v.claim.says, "holds": v.holds, "values": v.values} for v in verdicts],
        "failures": failures,
    }
    write_json(study / "study.json", about)
    figure.draw(asked, table, study)
    print("\n".join(["", table.text(), "", *said, "", f"{seconds:.0f} s", str(study)]), flush=True)
    wrong = [v for v in verdicts if v.claim.asserted and not v.holds]
    if wrong or failures:
        first = str(wrong[0]) if wrong else failures[0]
        raise claims.ClaimError(
            f"{len(wrong)} asserted claims do not hold and {len(failures)} runs failed, first: {first}\n"
            f"See {study / 'table.txt'}; a run's output is in {study / 'cells'}."
        )
    return study
