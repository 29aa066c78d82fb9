"""Conduct a search, or take part in one: claim trials, run them, keep what comes of them, until all are done."""

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from distnorm.errors import ConfigError, DistNormError
from distnorm.launch import overrides, signals
from distnorm.launch.compose import completed
from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.run_dir import RunFolder, write_whole
from distnorm.search import design, figure, results, rungs
from distnorm.search.claims import Claim, Claims
from distnorm.search.design import Design
from distnorm.search.folder import Outcome, SearchFolder, open_search
from distnorm.search.folder import results as results_of
from distnorm.search.plan import Plan, Round, Trial
from distnorm.search.trials import Stopped, Task, checkpoint_of, failed, outcome_of, run_trial
from distnorm.settings import Settings
from distnorm.study.cells import Compose
from distnorm.study.training import Train
from distnorm.study.workers import CellError, Workers

_LOOK_S = 1.0


class SearchError(DistNormError):
    """No trial of a search came to a value."""

    exit_code = 1


def conduct(train: Train, base: Settings, compose: Compose, command: Sequence[str]) -> Path:
    """Search, and leave one folder; or go on with a search that was cut short, or that other processes are at.

    Args:
        train: trains one run; `train` of train.py.
        base: the experiment, with its `search`.
        compose: composes it with some changes.
        command: the command line; its first word is the script.

    Returns:
        The folder.

    Raises:
        ConfigError: the search, or the ends of a range, are not good; nothing was run.
        SearchError: all trials failed.
        RunInterruptedError: it was told to stop, or some trials were; the same command goes on.

    Collective: none in this process; trials of several ranks start them.
    """
    torch.set_num_threads(1)
    asked, changes = design.read(base.search or {}), list(command[1:])
    design.check_free(asked, changes)
    plan = Plan(asked)
    _check(asked, base, compose)
    folder = open_search(asked, base, command)
    print(f"search    {folder.path}\n          {plan.total} trials, {asked.kind}: {', '.join(asked.keys)}", flush=True)
    workers = Workers[Task](run_trial, asked.workers)
    conductor = Conductor(asked, plan, folder, compose, workers, train, command[0])
    try:
        with conductor.told_by(signal.SIGTERM, signal.SIGUSR1):
            conductor.run()
    except RunInterruptedError as error:
        wants_requeue = base.trainer.requeue and conductor.is_told
        raise RunInterruptedError(str(error), wants_requeue=wants_requeue) from None
    finally:
        workers.stop()
    return _conclude(asked, folder, [change for change in changes if not overrides.is_of("search", change)])


class Conductor:
    """Runs what is missing of a search, as far as nobody else has it.

    Args:
        asked: the search.
        plan: its rounds.
        folder: its folder.
        compose: composes the settings of a trial.
        workers: run the trials.
        train: trains one run.
        script: what the ranks of a trial execute.

    Attributes:
        is_told: whether a signal, or the end of a job, has told it to stop.
    """

    def __init__(
        self,
        asked: Design,
        plan: Plan,
        folder: SearchFolder,
        compose: Compose,
        workers: Workers[Task],
        train: Train,
        script: str,
    ) -> None:
        self._asked, self._plan, self._folder, self._compose = asked, plan, folder, compose
        self._workers, self._train, self._script = workers, train, script
        self._claims = Claims(asked.stale_s)
        self._running: dict[int, Claim] = {}
        self._stopped: dict[int, str] = {}
        self.is_told = False
        self._started = time.monotonic()

    @contextlib.contextmanager
    def told_by(self, *numbers: signal.Signals) -> Iterator[None]:
        """Stop at these signals: ask the trials that run to save and end, and begin no other."""
        before = {number: signal.signal(number, self._tell) for number in numbers}
        try:
            self.is_told |= signals.heard() is not None  # one that came earlier, as in a job while all is loaded
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell(self, *_: Any) -> None:
        self.is_told = True
        for number in self._running:
            self._folder.run(number).stop.touch()

    def run(self) -> None:
        """Run round after round; wait for those who run the rest of one.

        Raises:
            RunInterruptedError: what is left was told to stop.
        """
        for of in self._plan.rounds:
            trials = self._plan.trials(of, results_of(self._folder.outcomes(), self._asked))
            while missing := self._missing(of):
                if not self._running and (self.is_told or set(missing) <= self._stopped.keys()):
                    self._interrupt()
                self._start([trials[n - of.numbers.start] for n in missing])
                self._collect()
            if all(outcome.value is None for outcome in self._folder.outcomes().values()):
                return

    def _interrupt(self) -> NoReturn:
        done, number = len(self._folder.outcomes()), len(self._stopped)
        first = f", the first with: {next(iter(self._stopped.values()))}" if number else ""
        raise RunInterruptedError(
            f"The search stopped after {done} of {self._plan.total} trials; {number} were cut short{first}\n"
            f"The same command goes on. See {self._folder.path}."
        )

    def _missing(self, of: Round) -> list[int]:
        done = self._folder.outcomes()
        return [number for number in of.numbers if number not in done]

    def _start(self, trials: list[Trial]) -> None:
        """Start as many trials as workers are free, of those that nobody has."""
        for trial in trials:
            if not self._workers.free or self.is_told:
                return
            if trial.number in self._running or trial.number in self._stopped:
                continue
            run = self._folder.run(trial.number)
            run.path.mkdir(parents=True, exist_ok=True)
            claim = self._claims.take(run.path)
            if claim is not None and trial.number not in self._folder.outcomes():  # done since we looked
                self._begin(trial, run, claim)

    def _begin(self, trial: Trial, run: RunFolder, claim: Claim) -> None:
        try:
            changes = [results.typed(key, value) for key, value in trial.values.items()]
            settings = completed(self._compose(changes))
            group = settings.logger.model_copy(update={"group": settings.logger.group or self._folder.path.name})
            begun = self._folder.prepare(trial)
            if begun and self._asked.kind == "asha" and rungs.has_ended(run):
                self._keep(outcome_of(trial, run, claim, self._asked), claim)
                return
            resumed = checkpoint_of(run) if begun else None
            if resumed is None:
                self._forget(run)
                self._folder.clear(trial.number)
                self._folder.prepare(trial)
            settings = settings.model_copy(update={"search": None, "logger": group, "ckpt_path": resumed})
            run.write_settings(settings)
            if self._asked.kind == "asha":
                rules = {k: getattr(self._asked, k) for k in ("metric", "mode", "min_resource", "reduction_factor")}
                rungs.begin(run, self._folder.path / "journal.log", trial.values, rules)
        except DistNormError as error:
            self._keep(failed(trial, claim, str(error)), claim)
            return
        self._running[trial.number] = claim  # from here on a signal tells it
        if self.is_told:  # while it was made ready
            del self._running[trial.number]
            return
        self._workers.start(Task(self._train, self._script, trial, settings, run, claim, self._asked))

    def _forget(self, run: RunFolder) -> None:
        """Let ASHA's journal know that nothing came of an attempt."""
        if self._asked.kind == "asha":
            with contextlib.suppress(FileNotFoundError):  # the journal does not know of it
                rungs.end(run, None)

    def _collect(self) -> None:
        """Take what has ended, and show that this process is alive."""
        if not self._running:
            time.sleep(_LOOK_S)  # others run what is left of the round
            return
        for task, result in self._workers.ended(_LOOK_S):
            claim = self._running.pop(task.trial.number)
            if isinstance(result, Stopped):
                self._stopped[task.trial.number] = result.message
                self.is_told |= result.wants_requeue
            elif isinstance(result, CellError) and self.is_told:  # the signal may have ended its process too
                self._stopped[task.trial.number] = str(result)
            elif isinstance(result, CellError):
                self._keep(failed(task.trial, claim, str(result)), claim)
            else:
                self._keep(result, claim)
        for claim in self._running.values():
            claim.move()

    def _keep(self, outcome: Outcome, claim: Claim) -> None:
        if not claim.holds:
            print(f"trial {outcome.number} was taken over by another process: its result there counts.", flush=True)
            return
        if outcome.value is None:
            self._forget(self._folder.run(outcome.number))
        self._folder.add(outcome)
        if not self._asked.keep:
            self._folder.drop_checkpoints(outcome.number)
        done = self._folder.outcomes()
        write_tables(self._asked, self._folder)
        said = outcome.reason or f"{self._asked.metric} {outcome.value:.4f}"
        said += " (stopped early)" if outcome.state == "pruned" else ""
        spent, total = time.monotonic() - self._started, self._plan.total
        words = results.in_words(outcome.values)
        print(f"{len(done)}/{total}  {spent:.0f} s  trial {outcome.number}  {said}  {words}", flush=True)


def write_tables(asked: Design, folder: SearchFolder) -> list[Outcome]:
    """Write `results.csv` and `results.txt` of what is there; give it, the best first."""
    ranked = results.ranking(folder.outcomes().values(), asked.mode)
    write_whole(folder.path / "results.csv", results.to_csv(ranked, asked))
    write_whole(folder.path / "results.txt", results.to_text(ranked, asked) + "\n")
    return ranked


def _conclude(asked: Design, folder: SearchFolder, changes: Sequence[str]) -> Path:
    """Write and print what came out.

    Raises:
        SearchError: nothing did.
    """
    ranked = write_tables(asked, folder)
    if ranked[0].value is None:
        raise SearchError(
            f"All {len(ranked)} trials failed, first: {ranked[0].reason}\n"
            f"See {folder.path / 'trials'}; delete a trial's folder to run it again."
        )
    figure.draw(ranked, asked, folder.path)
    results.show(ranked, asked)
    best = [results.typed(key, value) for key, value in ranked[0].values.items()]
    print(f"best      python train.py {' '.join([*changes, *best])}\n{folder.path}", flush=True)
    return folder.path


def _check(asked: Design, base: Settings, compose: Compose) -> None:
    """Refuse what would fail in each trial: the least and the greatest of all ranges are composed.

    Raises:
        ConfigError: they do not compose, or are not good.
    """
    if base.ckpt_path is not None:
        raise ConfigError(
            f"ckpt_path={base.ckpt_path!r} would be where each trial of a search begins. Leave it out; a search that "
            "was cut short goes on by itself."
        )
    if asked.kind == "asha":
        rungs.check_installed()
    dimensions = [dimension for tier in asked.ladder for dimension in tier]
    for place in (0.0, 1.0):
        values = [results.typed(dimension.key, dimension.value(place)) for dimension in dimensions]
        try:
            completed(compose(values))
        except ConfigError as error:
            words = " ".join(str(error).split("\n"))
            raise ConfigError(f"search.space: {' '.join(values)} is not good.\n{words}") from None
