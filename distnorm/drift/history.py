"""The drift of a run as arrays, for the report: read from its record, or from wandb's offline file.

Legend: L layers, T measurements.
"""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distnorm.drift.events import Alarm, Snapshot, WatchedLayer


@dataclasses.dataclass(frozen=True)
class History:
    """What is known of a run's drift.

    Attributes:
        name: of the run.
        about: the first line of the record: what was decided and why, the settings.
        layers: L watched layers.
        world_size: ranks.
        steps: [T] of the measurements, rising; after a requeue a step measured twice has its last values.
        values: [L, T] a measure; nan where not measured. Keys as in `Measurement`.
        worst_channels: [L, T] a measure; -1 where unknown.
        scalars: steps and values of each number logged, by name, e.g. `train/loss`, `drift/model/gap`.
        alarms: in order of steps.
        snapshots: in order of steps.
        lost: one line each on what could not be read.
    """

    name: str
    about: dict[str, Any]
    layers: tuple[WatchedLayer, ...]
    world_size: int
    steps: NDArray[np.int64]
    values: dict[str, NDArray[np.float64]]
    worst_channels: dict[str, NDArray[np.int64]]
    scalars: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]
    alarms: tuple[Alarm, ...]
    snapshots: tuple[Snapshot, ...]
    lost: tuple[str, ...] = ()
