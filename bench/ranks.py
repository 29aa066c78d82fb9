"""Processes that measure: each result is on disk before a process ends, so that a bad end loses nothing."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from distnorm import collectives


class Outcome(NamedTuple):
    """Result of some processes: the value that they kept last, if any, and how they ended, if badly."""

    found: Any
    failure: str | None


def run(body: Callable[..., None], *arguments: Any, world: int, kept: Path) -> Outcome:
    """Run `body(rank, *arguments)` in `world` processes, and read the value that they kept in the file `kept`."""
    failure = None
    try:
        multiprocessing.spawn(_be_rank, (body, arguments), nprocs=world)
    except (ProcessExitedException, ProcessRaisedException) as error:
        failure = str(error).strip()
    return Outcome(pickle.loads(kept.read_bytes()) if kept.exists() else None, failure)


def keep(path: Path, found: Any) -> None:
    """Write a result in one piece: it is whole, whatever ends this process next."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(found))
    part.replace(path)


def _be_rank(rank: int, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    body(rank, *arguments)
    collectives.end_process()
