"""What a checkpoint holds besides weights, and how a converted model is rebuilt from it with torch alone.

A checkpoint of a run is Lightning's, plus one entry `distnorm`: the decision (`spec`), and each rank's own running
statistics (`rank_statistics`), that training goes on with. Its `state_dict` holds the pooled statistics: what was
evaluated.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.convert import convert
from distnorm.errors import ConfigError
from distnorm.policy import NormSpec
from distnorm.population import Statistics

ENTRY = "distnorm"
_PREFIX = "model."


def entry(spec: NormSpec, rank_statistics: list[Statistics]) -> dict[str, Any]:
    """Write the `distnorm` entry: plain dictionaries and tensors, that `torch.load(weights_only=True)` reads."""
    return {"spec": spec.to_dict(), "rank_statistics": rank_statistics}


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
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if ENTRY not in stored:
        raise ConfigError(
            f"{str(path)!r} has no {ENTRY!r} entry: no distnorm run wrote it.\n"
            "Load it with torch.load and model.load_state_dict.",
        )
    convert(model, NormSpec.from_dict(stored[ENTRY]["spec"]))
    weights: dict[str, Tensor] = {
        key.removeprefix(_PREFIX): tensor for key, tensor in stored["state_dict"].items() if key.startswith(_PREFIX)
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        difference = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{str(path)!r} holds the weights of another model than {type(model).__name__}: {difference}\n"
            "Build the model with the settings in the run folder's config.yaml.",
        ) from error
    return model.eval()
