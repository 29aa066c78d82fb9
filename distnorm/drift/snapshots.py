"""Whole layers at one step: each channel's running and batch statistics, and the ranks' own.

Legend: R ranks, C channels of one layer, S channels of all layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distnorm.drift.capture import WatchedNorm
from distnorm.drift.events import Snapshot
from distnorm.drift.gathering import Caught
from distnorm.moments import Moments

MOST_CHANNELS, MOST_RANKS = 128, 8
"""A snapshot holds at most so many, evenly spaced channels of a layer, and the first ranks: it goes into a file."""


def snapshot(step: int, norms: Sequence[WatchedNorm], caught: Caught) -> Snapshot:
    """Take the layers that were reached out of what was caught.

    Each has `channel`, the numbers of its channels; `batch_mean` and `batch_var` of the block that rank 0 is in;
    `running_mean` and `running_var` of rank 0 before the step, where it keeps any; with several ranks `rank_means` and
    `rank_vars`, a row a rank.
    """
    layers: dict[str, Mapping[str, list[Any]]] = {}
    first = 0
    for index, norm in enumerate(norms):
        block = list(norm.blocks(len(caught.mean))[0])
        if bool(caught.count[block, index].sum() > 0):
            layers[norm.name] = _layer(index, first, norm, block, caught)
        first += norm.channels
    return Snapshot(step, layers)


def _layer(index: int, first: int, norm: WatchedNorm, block: list[int], caught: Caught) -> dict[str, list[Any]]:
    every = -(-norm.channels // MOST_CHANNELS)
    columns = torch.arange(first, first + norm.channels, every)
    count_R, mean_RC, m2_RC = caught.count[:, index], caught.mean[:, columns], caught.m2[:, columns]
    batch = Moments(count_R[block], mean_RC[block], m2_RC[block]).merged()
    found: dict[str, list[Any]] = {
        "channel": (columns - first).tolist(),
        "batch_mean": batch.mean.tolist(),
        "batch_var": batch.var.tolist(),
    }
    if norm.family != "sample":
        found["running_mean"] = caught.running_mean[0, columns].tolist()
        found["running_var"] = caught.running_var[0, columns].tolist()
    if len(count_R) > 1:
        found["rank_means"] = mean_RC[:MOST_RANKS].tolist()
        found["rank_vars"] = (m2_RC / count_R.clamp(min=1).unsqueeze(1))[:MOST_RANKS].tolist()
    return found
