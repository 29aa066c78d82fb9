"""One trial of a search: run in a worker, and read for what it came to."""

import contextlib
import dataclasses
import json
import math
import time

from distnorm import checkpoint
from distnorm.drift import record
from distnorm.errors import ConfigError
from distnorm.launch import ranks
from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.run_dir import RunFolder
from distnorm.search import rungs
from distnorm.search.claims import Claim
from distnorm.search.design import Design
from distnorm.search.folder import Outcome
from distnorm.search.plan import Trial
from distnorm.settings import Settings
from distnorm.study.training import Train, train_here, train_on_ranks


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker needs for a trial.

    Attributes:
        train: trains one run.
        script: what each rank of a trial of several executes.
        trial: its number and values.
        settings: all of them.
        run: its folder.
        claim: on it.
        asked: the search.
    """

    train: Train
    script: str
    trial: Trial
    settings: Settings
    run: RunFolder
    claim: Claim
    asked: Design


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A trial was told to stop, and has saved; by a job that ends, and should be requeued, or by its file."""

    message: str
    wants_requeue: bool = False


def run_trial(task: Task) -> Outcome | Stopped:
    """Run one trial, in a worker, and read what it came to."""
    started = time.monotonic()
    num_ranks = ranks.find(task.settings.trainer).world_size
    try:
        if num_ranks == 1:
            train_here(task.train, task.settings, task.run)
        else:
            train_on_ranks(task.script, task.run, num_ranks)
    except RunInterruptedError as error:
        return Stopped(str(error), error.wants_requeue)
    seconds = round(time.monotonic() - started, 1)
    return outcome_of(task.trial, task.run, task.claim, task.asked, seconds)


def outcome_of(trial: Trial, run: RunFolder, claim: Claim, asked: Design, seconds: float = 0.0) -> Outcome:
    """Read what a run that has ended came to; of ASHA, let the journal know."""
    value = read_value(run, asked)
    pruned = asked.kind == "asha" and rungs.end(run, value)
    result = json.loads(run.result.read_text()) if run.result.exists() else {}
    numbers = {k: v for k, v in result.get("metrics", {}).items() if isinstance(v, int | float)}
    if value is None:
        return failed(trial, claim, f"{asked.metric} was never a finite number")
    state, attempts = "pruned" if pruned else "complete", claim.attempt + 1
    return Outcome(trial.number, trial.round, trial.values, state, value, numbers, seconds, attempts)


def read_value(run: RunFolder, asked: Design) -> float | None:
    """Read what a trial is compared by from its record; of a step that was made twice the later row holds."""
    rows = [row for row in record.read(run.record) if asked.metric in row] if run.record.exists() else []
    values = list({row["step"]: float(row[asked.metric]) for row in rows}.values())
    if asked.validation == "last":
        values = values[-1:]
    finite = [value for value in values if math.isfinite(value)]
    return (min if asked.mode == "min" else max)(finite) if finite else None


def checkpoint_of(run: RunFolder) -> str | None:
    """Find where a run that was cut short goes on; `None` where it begins anew."""
    with contextlib.suppress(ConfigError):
        return str(checkpoint.find(run.path))
    return None


def failed(trial: Trial, claim: Claim, reason: str) -> Outcome:
    """Make the outcome of a trial that came to nothing, its reason in a line or two."""
    lines = [line for line in reason.splitlines() if line.strip()]
    said = " ".join(lines) if len(lines) <= 3 else lines[-1]  # a rank's traceback ends in what went wrong
    return Outcome(trial.number, trial.round, trial.values, "failed", attempts=claim.attempt + 1, reason=said)
