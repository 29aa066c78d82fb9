"""Several sets of evaluation statistics of one model, by the name of the domain that they were measured on.

The weights are learned once; each domain (source, sketch, another hospital's scanner) gets statistics of its own from
unlabelled data:

    statistics = {"source": calibrate(model, source), "sketch": calibrate(model, sketch)}
    save_statistics("statistics.pt", statistics)
    with evaluation_statistics(model, load_statistics("statistics.pt")["sketch"]):
        ...

Source: Li et al. 2018, adaptive batch normalization.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distnorm.errors import ConfigError, did_you_mean
from distnorm.population import Statistics

_ENTRY = "distnorm_statistics"


class DomainStatistics(dict[str, Statistics]):
    """Statistics by the name of their domain.

    Raises:
        ConfigError: (when asked for, by [] or by `get` without a default) there is none of that name.
    """

    def get(self, name: str, *default: Any) -> Any:
        """Give the statistics of a domain, or the default: never `None` unasked, that means pooled statistics."""
        return super().get(name, *default) if default else self[name]

    def __missing__(self, name: str) -> Statistics:
        raise ConfigError(
            f"There are no statistics named {name!r}, only {', '.join(map(repr, self)) or 'none at all'}."
            f"{did_you_mean(name, self)}\nMeasure them with calibrate(), and save them beside the others.",
        )


def save_statistics(path: str | Path, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write sets of statistics into one file, that `torch.load(weights_only=True)` reads.

    Written beside its place and renamed: a kill leaves the old file or the new one, never half.

    Args:
        path: the file; an older one is replaced. Its folder must exist.
        statistics: what `calibrate` or `pool_running_stats` gave, by the name of the domain. They are alike on all
            ranks: let one of them write.

    Collective: none.

    Raises:
        ConfigError: it is one set without a name, or there is none; a value is no tensor; or there is no such folder.
    """
    named = {name: {k: v.detach().cpu() for k, v in found.items()} for name, found in _named(statistics).items()}
    place = _place(path)
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        torch.save({_ENTRY: named}, partial)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def load_statistics(path: str | Path) -> DomainStatistics:
    """Read what `save_statistics` wrote.

    Args:
        path: the file.

    Returns:
        Statistics by name, on the CPU, for `evaluation_statistics`, that holds them against the model.

    Collective: none.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise ConfigError(f"There is no file {str(path)!r}. Give the path that save_statistics() got.")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # noqa: BLE001 — the unpickler raises whatever the bytes of another file make it do
        stored = None
    if not isinstance(stored, dict) or _ENTRY not in stored:
        raise ConfigError(
            f"{str(path)!r} holds no statistics by name. Give a file of save_statistics(); "
            "a run's checkpoint is for distnorm.load().",
        )
    return DomainStatistics(stored[_ENTRY])


def _place(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(
            f"save_statistics() got a {type(path).__name__} for the path. Give it the file first, then the statistics.",
        )
    place = Path(path)
    if not place.parent.is_dir():
        raise ConfigError(f"There is no folder {str(place.parent)!r} to save statistics in. Make it before.")
    return place


def _named(statistics: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Mapping[str, Tensor]]:
    if not isinstance(statistics, Mapping):
        raise ConfigError(
            f"save_statistics() got a {type(statistics).__name__} for the statistics. Give it the file first, then "
            '{"source": statistics}.',
        )
    if not statistics or not all(isinstance(found, Mapping) for found in statistics.values()):
        what = "statistics without a name" if statistics else "no statistics"
        raise ConfigError(f'save_statistics() got {what}. Name them: {{"source": statistics}}.')
    for name, found in statistics.items():
        for key, value in found.items():
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"save_statistics() got a {type(value).__name__} for {key!r} of {name!r}. Give it the tensors of "
                    "calibrate() or pool_running_stats().",
                )
    return statistics
