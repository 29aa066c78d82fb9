"""A search's folder: its trials, what came of them, and all that is needed to go on after any kill."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distnorm.errors import ConfigError
from distnorm.launch.run_dir import RunFolder, code_hash, versions, write_json
from distnorm.search.design import Design
from distnorm.search.plan import Result, Trial
from distnorm.settings import Settings

_NOT_OF_THE_SEARCH = {"name", "workers", "stale_s", "keep"}
_LEFT_BY_A_RUN = (
    *("checkpoints", "ranks", "wandb", "record.jsonl", "result.json"),
    *("console.txt", "config.yaml", "rungs.json", "stop"),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        number: of the trial.
        round: it belongs to.
        values: key → value.
        state: `complete`, `pruned` (stopped early: worse than others so far) or `failed`.
        value: of what is compared; `None` where it failed.
        metrics: of the test set, and others of the run's result; nothing is chosen by them.
        seconds: of its last attempt.
        attempts: how often it was begun.
        reason: why it failed.
    """

    number: int
    round: int
    values: dict[str, Any]
    state: str
    value: float | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    attempts: int = 1
    reason: str = ""


class SearchFolder:
    """A search on disk.

    ```
    search.json  results.{csv,txt}  figure.{png,svg}  journal.log (ASHA's)
    trials/0000/{claim.0,trial.json,outcome.json,…}
    ```

    A trial's folder is the folder of its run too.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._outcomes: dict[int, Outcome] = {}

    def run(self, number: int) -> RunFolder:
        """Give the folder of a trial."""
        return RunFolder(self.path / "trials" / f"{number:04d}")

    def outcomes(self) -> dict[int, Outcome]:
        """Read what has come of the trials, whoever ran them."""
        for file in sorted((self.path / "trials").glob("*/outcome.json")):
            if int(file.parent.name) not in self._outcomes:
                self._outcomes[int(file.parent.name)] = Outcome(**json.loads(file.read_text()))
        return dict(self._outcomes)

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome: from here on the trial is done."""
        write_json(self.run(outcome.number).path / "outcome.json", dataclasses.asdict(outcome))

    def drop_checkpoints(self, number: int) -> None:
        """Delete the checkpoints of a trial that is done: before that it may still go on from one."""
        for file in self.run(number).checkpoints.glob("*.ckpt"):
            file.unlink()

    def prepare(self, trial: Trial) -> bool:
        """Make a trial's folder ready; say whether it was begun with the same values before."""
        run, about = self.run(trial.number), dataclasses.asdict(trial)
        file = run.path / "trial.json"
        begun = file.exists() and json.loads(file.read_text()) == json.loads(json.dumps(about))
        if not begun:
            self.clear(trial.number)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.ranks.mkdir(exist_ok=True)
        run.stop.unlink(missing_ok=True)
        write_json(file, about)
        return begun

    def clear(self, number: int) -> None:
        """Delete what a run has left, to begin it anew."""
        for name in _LEFT_BY_A_RUN:
            left = self.run(number).path / name
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def locate(design: Design, base: Settings) -> Path:
    """Name a search's folder."""
    digest = hashlib.sha256(json.dumps(_about(design, base), sort_keys=True).encode()).hexdigest()[:10]
    return (Path(base.runs_dir) / f"search-{design.name or digest}").resolve()


def open_search(design: Design, base: Settings, command: Sequence[str]) -> SearchFolder:
    """Make a search's folder, or find it: the same search goes on in the same.

    Raises:
        ConfigError: the folder of that name is another search's.
    """
    about, folder = _about(design, base), SearchFolder(locate(design, base))
    file = folder.path / "search.json"
    if file.exists():
        _check_same(json.loads(file.read_text()), about, design)
        return folder
    (folder.path / "trials").mkdir(parents=True, exist_ok=True)
    said = {"command": " ".join(["python", *command]), "versions": versions(), "code_hash": code_hash()}
    write_json(file, {**said, **about})
    return folder


def results(outcomes: Mapping[int, Outcome], design: Design) -> dict[int, Result]:
    """Give the results that the next round is drawn by."""
    sign = 1 if design.mode == "min" else -1
    return {n: Result(o.values, None if o.value is None else sign * o.value) for n, o in outcomes.items()}


def _about(design: Design, base: Settings) -> dict[str, Any]:
    return {
        "search": design.model_dump(exclude=_NOT_OF_THE_SEARCH),
        "settings": base.model_dump(exclude={"search", "runs_dir", "logger"}),
    }


def _check_same(there: Mapping[str, Any], asked: Mapping[str, Any], design: Design) -> None:
    before, now = (
        dict(_flat({name: about[name] for name in asked})) for about in (there, json.loads(json.dumps(asked)))
    )
    other = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if other:
        key = other[0].removeprefix("settings.")
        raise ConfigError(
            f"search.name={design.name} is the name of another search: {key} is {before.get(other[0])!r} there, and "
            f"{now.get(other[0])!r} here.\nGive this one another name, or none; or repeat that one's command."
        )


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
