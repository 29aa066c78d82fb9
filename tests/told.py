"""What a drift monitor might tell: events for tests of what keeps them."""

import numpy as np

from distnorm.drift.events import Alarm, Measurement, Snapshot, Watched, WatchedLayer


def watched(*names, step=0):
    """These layers."""
    return Watched(step, tuple(WatchedLayer(name, "BatchNorm2d", 8, 32) for name in names), 2, 10)


def measured(step, layers=2, keys=("jeffreys", "between_ranks"), seed=0):
    """Numbers a measure and layer, of all magnitudes."""
    draw = np.random.default_rng([seed, step])
    values = {key: draw.lognormal(0, 3, layers).tolist() for key in keys}
    return Measurement(step, values, {keys[0]: draw.integers(-1, 8, layers).tolist()})


def alarm(step, layer="bn1", state="raised"):
    """A limit crossed, or kept again."""
    return Alarm(step, "lag", layer, 0.7, 0.5, state, f"lag 0.7 in {layer} (limit 0.5). Raise norm.momentum.")


def snapshot(step, channels=8):
    """One whole layer."""
    values = np.random.default_rng(step).normal(size=channels).tolist()
    return Snapshot(step, {"bn1": {"running_mean": values, "rank_means": [values, values]}})
