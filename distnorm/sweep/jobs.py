"""The jobs of a sweep: what each changes, where it runs, how far it is. All are composed before the first one starts.

```
runs/sweep-<hash>/  jobs/<changes>/ (a run folder each)  results.{csv,txt}  figure.{svg,png}
```

The hash is of all jobs' settings, so the same command finds its folder again, wherever and whenever it is typed.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from distnorm.errors import DistNormError
from distnorm.launch import failures
from distnorm.launch.run_dir import RunFolder, write_whole
from distnorm.settings import Settings

_LONGEST_NAME = 120
_TRIES, _PAUSE_S = 20, 0.1  # who looks holds the lock for a moment
_log = logging.getLogger(__name__)
State = Literal["done", "failed", "running", "interrupted", "waiting"]


@dataclasses.dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        number: its place in the sweep, from 0: its task in a SLURM array.
        changes: the keys in which the jobs differ, each with this job's value as typed.
        settings: what it runs with, or the mistake in them.
        run: its folder.
    """

    number: int
    changes: dict[str, str]
    settings: Settings | DistNormError
    run: RunFolder

    @property
    def name(self) -> str:
        """The changes in one word: `norm=sync,data.device_batch=2`."""
        return in_words(self.changes)

    @property
    def failure(self) -> str | None:
        """What it failed with, the last time it ran; a rank that srun started may be the only one to know."""
        with contextlib.suppress(FileNotFoundError):
            return self._failure.read_text().strip()
        return failures.reason(self.run)

    @property
    def state(self) -> State:
        """How far it is; `running` is another process's."""
        if self.run.result.is_file():
            return "done"
        if self.failure is not None:
            return "failed"
        if self._is_running():
            return "running"
        return "interrupted" if any(self.run.checkpoints.glob("*.ckpt")) else "waiting"

    @contextlib.contextmanager
    def claimed(self) -> Iterator[bool]:
        """Keep other processes from this job while the block runs; the lock ends with the process, however that ends.

        One process of a job claims it, whatever ranks it has. On a disk without locks the job is not kept from others.

        Yields:
            Whether it is ours; another process has it otherwise.
        """
        with (self.run.path / ".lock").open("a") as file:
            for _ in range(_TRIES):
                if _lock(file, fcntl.LOCK_EX):
                    yield True
                    return
                time.sleep(_PAUSE_S)
            yield False

    def _is_running(self) -> bool:
        """Look, for a moment and beside others that look, whether a process has claimed it."""
        try:
            with (self.run.path / ".lock").open() as file:
                return not _lock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def fail(self, error: BaseException) -> None:
        """Keep what ended it."""
        self.run.path.mkdir(parents=True, exist_ok=True)
        write_whole(self._failure, f"{error}\n")

    def begin(self) -> None:
        """Forget an earlier failure."""
        self._failure.unlink(missing_ok=True)
        failures.forget(self.run)

    @property
    def _failure(self) -> Path:
        return self.run.path / "failure.txt"


def _lock(file: Any, kind: int) -> bool:
    """Take a lock if that is free, or if this disk has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _log.warning("%s cannot be locked (%s): do not start a sweep twice at once here.", file.name, error.strerror)
    return True


def plan(composed: Sequence[tuple[Settings | DistNormError, Sequence[str]]], runs_dir: Path) -> list[Job]:
    """Name the jobs of a sweep and find their folders.

    Args:
        composed: of each job, its settings or what is wrong with them, and its overrides as Hydra gives them.
        runs_dir: where the sweep's folder is, or will be.
    """
    typed = [dict(_parted(override) for override in overrides) for _, overrides in composed]
    keys = dict.fromkeys(key for one in typed for key in one)
    differ = [key for key in keys if len({one.get(key) for one in typed}) > 1]
    digest = hashlib.sha256()
    for (settings, _), one in zip(composed, typed, strict=True):
        text = str(sorted(one.items())) if isinstance(settings, DistNormError) else _identity(settings)
        digest.update(text.encode() + b"\0")
    folder = (runs_dir / f"sweep-{digest.hexdigest()[:8]}").resolve()
    jobs = []
    for number, ((settings, _), one) in enumerate(zip(composed, typed, strict=True)):
        changes = {key: one[key] for key in differ if key in one}
        jobs.append(Job(number, changes, settings, RunFolder(folder / "jobs" / _file_name(in_words(changes)))))
    return jobs


def in_words(changes: dict[str, str]) -> str:
    """Write changes as one would type them, with commas between."""
    return ",".join(f"{key}={value}" for key, value in changes.items()) or "only"


def _parted(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _identity(settings: Settings) -> str:
    """Write what decides the result of a run, and not where it is kept."""
    return settings.model_copy(update={"runs_dir": ""}).to_yaml()


def _file_name(name: str) -> str:
    """Make a folder's name of it: readable, and of its own where it had to be changed."""
    plain = re.sub(r"[^\w=.,+-]", "_", name)[:_LONGEST_NAME]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
