"""One run among many, its console in a file of its own: in this process, or on ranks that it starts."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from distnorm.launch import local, ranks
from distnorm.launch.run_dir import RunFolder
from distnorm.settings import Settings

Train = Callable[[Settings, ranks.Ranks, RunFolder], dict[str, Any]]
"""Trains one run; `train` of train.py."""


def train_here(train: Train, settings: Settings, run: RunFolder) -> None:
    """Train in this process."""
    with (run.path / "console.txt").open("a") as file, contextlib.redirect_stdout(file):
        train(settings, ranks.find(settings.trainer), run)


def train_on_ranks(script: str, run: RunFolder, num_ranks: int) -> None:
    """Train on ranks of its own, that read their settings from the folder."""
    with (run.path / "console.txt").open("a") as file, _console_is(file.fileno()):
        local.start_ranks(script, run, num_ranks)


@contextlib.contextmanager
def _console_is(descriptor: int) -> Iterator[None]:
    """Let this process, and what it starts, write their output to a file."""
    sys.stdout.flush()
    before = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)
