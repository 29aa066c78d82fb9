"""What a person sees: progress, tables, and errors without noise."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from distnorm.errors import DistNormError

_EXPECTED = (
    r".*does not have many workers.*",
    r".*`srun` command is available on your system but is not used.*",
    r".*GPU available but not used.*",
    r".*Experiment logs directory .* exists and is not empty.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*You called `self.log.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*could not find the monitored key.*",
    r".*barrier\(\): using the device under current context.*",
    r".*resuming from a checkpoint that ended before the epoch ended.*",  # distnorm.resume says what is right
    r".*The number of training batches .* is smaller than the logging interval.*",
)


def quiet_libraries() -> None:
    """Keep libraries' advice off the console; their warnings about this run come through."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "torch", "wandb", "matplotlib", "hydra"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the launcher words its failures itself
    for pattern in _EXPECTED:
        warnings.filterwarnings("ignore", pattern)


def fail(error: DistNormError) -> NoReturn:
    """Print a mistake in its own words, unless another rank does, and end with its exit code."""
    sys.stdout.flush()
    if error.aloud:
        print(error, file=sys.stderr)
    raise SystemExit(error.exit_code)


def leave_to(file: Path) -> None:
    """Let all that this process prints go to a file from here on, at its end; what it starts inherits that."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)


def table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a two-column table."""
    drawn = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows:
        drawn.add_row(name, value)
    Console(width=None if sys.stdout.isatty() else 110).print(drawn)
