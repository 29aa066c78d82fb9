"""What a checkpoint holds besides weights, which file is a good one, and how torch alone rebuilds the model from it.

A checkpoint of a run is Lightning's, plus one entry `distnorm`: the decision (`spec`), each rank's own running
statistics (`rank_statistics`), that training goes on with, whether they had become constants (`frozen`) and whether the
`state_dict` has those of an evaluation (`evaluated`); and what `distnorm.resume` adds: where in the data the training
was (`place`), and of each rank what it goes on with (`ranks`). The `state_dict` holds running, pooled or precise
statistics. Where weights are averaged, it holds the average, with statistics of its own; the trained weights are in
`current_model_state`, and the entry has each rank's own statistics of the average too (`average_statistics`).

A run keeps two, `last.ckpt` and the one before it, `previous.ckpt`: a disk may damage the newest.
"""

import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.convert import rebuild
from distnorm.errors import ConfigError
from distnorm.norms.surgery import check_module
from distnorm.population import Statistics
from distnorm.spec import BATCH_KINDS, NormSpec

ENTRY = "distnorm"
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_log = logging.getLogger(__name__)
_PREFIX = "model."


def entry(
    spec: NormSpec, rank_statistics: list[Statistics], *, frozen: bool = False, evaluated: bool = True
) -> dict[str, Any]:
    """Write the `distnorm` entry: plain dictionaries and tensors, that `torch.load(weights_only=True)` reads."""
    return {
        "spec": spec.to_dict(),
        "rank_statistics": rank_statistics,
        "frozen": frozen,
        "evaluated": evaluated,
    }


def find(path: str | Path, *, warn: bool = True) -> Path:
    """Find the newest good checkpoint that a run folder or a file stands for.

    Args:
        path: a checkpoint, or a run folder, whose last checkpoint is meant. Where `last.ckpt` is damaged, the one
            before it takes its place.
        warn: say so where it does; one rank of several is enough.

    Raises:
        ConfigError: there is none, or all that there are are damaged.
    """
    given = Path(path)
    last = given / "checkpoints" / LAST if given.is_dir() else given
    files = [last, last.with_name(PREVIOUS)] if last.name == LAST else [last]
    there = [file for file in files if file.is_file()]
    if not there:
        missing = "does not exist" if not given.exists() else f"holds no checkpoints/{LAST}"
        raise ConfigError(
            f"ckpt_path={str(path)!r} {missing}. Give a run folder or a checkpoint file, e.g. ckpt_path=runs/<run>.",
        )
    damages: list[str] = []
    for file in there:
        # A file that somebody names may be no checkpoint of ours at all: who reads it says so.
        damage = damage_of(file) if len(files) > 1 else _torn(file) if _is_zip(file) else None
        if damage is None:
            if file != last and warn:
                why = damages[0] if damages else f"{last} is missing"
                _log.warning("%s. Going on from the checkpoint before it, %s.", why, file)
            return file
        damages.append(f"{file} is damaged ({damage})")
    raise ConfigError(f"{'; '.join(damages)}. Give another checkpoint, e.g. ckpt_path={last.with_name('best.ckpt')}.")


def entry_of(path: Path) -> dict[str, Any]:
    """Read the entry `distnorm` of a checkpoint.

    Raises:
        ConfigError: the checkpoint is not one of ours.
    """
    entry: dict[str, Any] = _read(path)[ENTRY]
    return entry


def damage_of(path: Path) -> str | None:
    """Say what is wrong with a checkpoint's file, or `None` where every byte that matters is as it was written.

    Each of its records has a checksum; all are read.
    """
    if torn := _torn(path):
        return torn
    try:
        _read(path)
    except ConfigError as error:
        return str(error).splitlines()[0].removeprefix(f"{str(path)!r} ").rstrip(".")
    return None


def _torn(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # noqa: BLE001 — damaged bytes make a reader raise whatever they like
        size = path.stat().st_size if path.exists() else 0
        return f"{size} bytes, {(str(error).splitlines() or [type(error).__name__])[0][:80]}"
    return None if bad is None else f"the checksum of {bad} is wrong"


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def load(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    """Rebuild a trained model: convert it as the run did, load its weights and evaluation statistics.

    Needs neither Lightning nor Hydra, and no process group. A checkpoint that was saved quickly, when its run was told
    to stop, may have pooled statistics where precise ones were decided: a warning says so, and how to measure them.

    Args:
        model: the model as it was before conversion, on any device; converted in place.
        checkpoint: a checkpoint file of a distnorm run, or a run folder (its last checkpoint).

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: there is no such checkpoint, it is not one of ours, or it is of another model.
    """
    check_module(model, "load")
    path = find(checkpoint)
    stored = _read(path)
    weights: dict[str, Tensor] = {
        key.removeprefix(_PREFIX): tensor for key, tensor in stored["state_dict"].items() if key.startswith(_PREFIX)
    }
    conversion = rebuild(model, NormSpec.from_dict(stored[ENTRY]["spec"]), weights)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        conversion.revert()
        difference = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{str(path)!r} holds the weights of another model than {type(model).__name__}: {difference}\n"
            "Build the model with the settings in the run folder's config.yaml.",
        ) from error
    if not stored[ENTRY].get("evaluated", True):
        _log.warning(
            "%s was saved quickly, to go on from: its batch norms have pooled statistics where precise ones were "
            "decided. Measure them: distnorm.population.swap_in(model, distnorm.calibrate(model, batches)).",
            path,
        )
    return model.eval()


def check_resume(path: Path, spec: NormSpec) -> None:
    """Refuse to go on from a checkpoint whose layers compute something else than `spec`'s would with its weights.

    Batch, sync and ghost share weights and statistics; GroupNorm, with standardized weights or without, has others.

    Raises:
        ConfigError: the checkpoint is not one of ours, or of another family of norms.
    """
    before = NormSpec.from_dict(_read(path)[ENTRY]["spec"])
    if _family(before) != _family(spec):
        raise ConfigError(
            f"ckpt_path={str(path)!r} was trained with {before.in_words()}, and this run has {spec.in_words()}.\n"
            f"Its weights mean something else there. Use norm={before.kind} to go on.",
        )


def _family(spec: NormSpec) -> str:
    return "batch statistics" if spec.kind in (*BATCH_KINDS, "frozen") else spec.kind


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours; tensors stay on the disk until they are used."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception:  # noqa: BLE001 — the unpickler raises whatever the bytes of another file make it do
        stored = {}
    if not isinstance(stored, dict) or ENTRY not in stored:
        raise ConfigError(
            f"{str(path)!r} has no {ENTRY!r} entry: no distnorm run wrote it.\n"
            "Give a run folder or a checkpoint in one; load others with torch.load and model.load_state_dict.",
        )
    return stored
