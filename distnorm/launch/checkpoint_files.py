"""How a checkpoint gets onto the disk: whole or not at all, the one before it kept, and a full disk survived."""

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from distnorm.checkpoint import LAST, PREVIOUS, damage_of

_log = logging.getLogger(__name__)
_MIB = 2**20


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, flush it to the disk, and rename it: old or new, never half.

    The `last.ckpt` that was there becomes `previous.ckpt`, unless it is damaged. Where the disk is full or refuses, all
    files stay as they were, training goes on, and a warning names file and space.

    Lightning's own writes in the system's temporary folder and moves, which copies where that is another disk.

    Attributes:
        failure: why the last save failed, on the rank that writes; `None` where it did not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None
        self._trusted: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write one checkpoint; Lightning calls this on rank 0."""
        place = Path(path)
        partial = place.with_name(f".{place.name}.{os.getpid()}")
        self.failure = None
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_through(checkpoint, partial)
            if place.name == LAST:
                self._keep(place)
            partial.replace(place)
            _flush_folder(place.parent)
            self._trusted.add(place)
        except (OSError, RuntimeError) as error:  # torch words a write that failed as a RuntimeError
            reason = _os_error(error)
            if reason is None:
                raise
            partial.unlink(missing_ok=True)
            self.failure = _in_words(place, reason)
            _log.warning("%s", self.failure)
        finally:
            partial.unlink(missing_ok=True)

    def _keep(self, place: Path) -> None:
        """Make the last checkpoint the previous one; there is a good one under either name at any moment."""
        if not place.exists() or (place not in self._trusted and damage_of(place) is not None):
            return
        before = place.with_name(PREVIOUS)
        beside = place.with_name(f".{PREVIOUS}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        try:
            os.link(place, beside)
        except OSError:  # a file system without links: for a moment there is the previous one alone
            place.replace(before)
        else:
            beside.replace(before)


def write_through(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, and wait until the disk has it."""
    with path.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names too, where the file system lets one ask."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _in_words(place: Path, reason: OSError) -> str:
    words = f"{place} could not be saved: {reason.strerror or reason}"
    with contextlib.suppress(OSError):
        words += f", {shutil.disk_usage(place.parent).free / _MIB:.1f} MiB free in {place.parent}"
    kept = "The one before it stays" if place.exists() else "There is none yet"
    return f"{words}. {kept}; training goes on. Make room there."
