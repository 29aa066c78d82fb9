"""What a checkpoint holds besides weights, and how a converted model is rebuilt from it with torch alone.

A checkpoint of a run is Lightning's, plus one entry `distnorm`: the decision (`spec`), each rank's own running
statistics (`rank_statistics`), that training goes on with, and whether they had become constants (`frozen`). Its
`state_dict` holds what was evaluated: running, pooled or precise statistics.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.convert import rebuild
from distnorm.errors import ConfigError
from distnorm.population import Statistics
from distnorm.spec import BATCH_KINDS, NormSpec

ENTRY = "distnorm"
_PREFIX = "model."


def entry(spec: NormSpec, rank_statistics: list[Statistics], *, frozen: bool = False) -> dict[str, Any]:
    """Write the `distnorm` entry: plain dictionaries and tensors, that `torch.load(weights_only=True)` reads."""
    return {"spec": spec.to_dict(), "rank_statistics": rank_statistics, "frozen": frozen}


def find(path: str | Path) -> Path:
    """Find the checkpoint that a run folder or a file stands for.

    Args:
        path: a checkpoint, or a run folder, whose last checkpoint is meant.

    Raises:
        ConfigError: there is none.
    """
    given = Path(path)
    found = given / "checkpoints" / "last.ckpt" if given.is_dir() else given
    if not found.is_file():
        missing = "does not exist" if not given.exists() else "holds no checkpoints/last.ckpt"
        raise ConfigError(
            f"ckpt_path={str(path)!r} {missing}. Give a run folder or a checkpoint file, e.g. ckpt_path=runs/<run>.",
        )
    return found


def load(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    """Rebuild a trained model: convert it as the run did, load its weights and evaluation statistics.

    Needs neither Lightning nor Hydra, and no process group.

    Args:
        model: the model as it was before conversion, on any device; converted in place.
        checkpoint: a checkpoint file of a distnorm run, or a run folder (its last checkpoint).

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: there is no such checkpoint, it is not one of ours, or it is of another model.
    """
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
