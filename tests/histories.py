"""Runs that never ran: plausible histories of drift, for the report's tests.

Legend: L layers, T measurements, C channels, K ranks.
"""

import numpy as np

from distnorm.drift.alarms import measures
from distnorm.drift.catalogue import BY_KEY, MEASURES
from distnorm.drift.events import Alarm, Snapshot, WatchedLayer
from distnorm.drift.history import History
from distnorm.policy import decide

_START = {"jeffreys": 0.35, "lag": 0.3, "kl": 0.2, "wasserstein": 0.3, "bhattacharyya": 0.06, "rank_spread": 0.04}
_END = {"effective_samples": 40.0, "design_effect": 14.0, "estimator_samples": 610.0, "f": 1.0, "between_ranks": 0.85}
_END |= {"cv_mean": 0.18, "cv_var": 0.25, "estimator_sd": 0.04, "icc": 0.01, "precise_ratio": 1.02}


def layer_names(count):
    """Names as a residual network has them, the deep ones last."""
    return tuple(f"layers.{index // 3}.bn{index % 3 + 1}" for index in range(count))


def history(
    *, name="shuffled", layers=9, steps=3000, every=20, sorted_shards=False, world=8, seed=0, keys=None, names=None
):
    """A run whose drift falls with the learning rate; with sorted shards the deep layers' ranks come apart."""
    random = np.random.default_rng(seed)
    names = layer_names(layers) if names is None else names
    watched = tuple(WatchedLayer(n, "BatchNorm2d", 16 * 2 ** min(i // 3, 5), 32) for i, n in enumerate(names))
    at = np.arange(every, steps + 1, every)
    keys = [m.key for m in MEASURES if m.tier != "probe"] if keys is None else keys
    values, worst = {}, {}
    for key in keys:
        values |= _values(key, at / steps, watched, random, sorted_shards)
        if BY_KEY[key].over_channels:
            worst[key] = np.stack([_channels(random, layer.channels, len(at)) for layer in watched])
    snapshots = tuple(_snapshot(int(at[-1] * part), watched, world, random, sorted_shards) for part in (0.5, 1))
    decision = decide(device_batch=4, world_size=world, iid=not sorted_shards).to_dict()
    settings = {"data": {"name": "digits", "device_batch": 4}, "optimizer": {"lr": 0.1}, "seed": seed}
    about = {**settings, "decision": decision}
    alarms = _alarms(values, at, watched, world) if sorted_shards else ()
    scalars = _scalars(at, random, sorted_shards)
    return History(name, about, watched, world, at, values, worst, scalars, alarms, snapshots)


def _values(key, time, watched, random, sorted_shards):
    """The median over channels [L, T], and p95 and max, where the measure has them."""
    measure, depth = BY_KEY[key], np.linspace(0, 1, len(watched))[:, None]
    start = _START.get(key, _END.get(key, 0.0) * 0.8)
    level = start * np.exp(-5 * time) * (1.2 - 0.4 * depth) + _END.get(key, 0.0) * (1 - np.exp(-12 * time))
    noise = random.normal(size=(len(watched), len(time)))
    noise = 0.7 * noise + 0.7 * np.repeat(noise[:, ::8], 8, axis=1)[:, : len(time)]
    value = level * np.exp(0.12 * noise) + 0.004 * noise * (measure.healthy == 0)
    if sorted_shards and key in {"between_ranks", "f", "icc", "rank_spread", "jeffreys"}:
        rise = np.clip((depth - 0.3) / 0.7, 0, 1) ** 1.5 * (1 - np.exp(-6 * np.clip(time - 0.04, 0, 1)))
        value = value + rise * {"between_ranks": 24, "f": 8, "icc": 0.6, "rank_spread": 0.4, "jeffreys": 0.3}[key]
    if key == "non_finite" or key.startswith("dead"):
        value = np.zeros_like(value)
    if key.startswith("precise") or key == "shift":  # at evaluations alone
        value[:, np.arange(len(time)) % 10 != 9] = np.nan
    if key == "between_ranks":  # from the 5th measurement on
        value[:, :4] = np.nan
    if not measure.over_channels:
        return {key: value}
    spread = np.exp(0.5 + 0.15 * random.normal(size=value.shape))
    below = measure.span < measure.healthy
    near, far = (value / spread, value / spread**2) if below else (value * spread, value * spread**2)
    return {key: value, f"{key}.p95": near, f"{key}.max": far}


def _channels(random, channels, count):
    """The worst channel keeps for a while."""
    return np.repeat(random.integers(channels, size=count // 12 + 1), 12)[:count]


def _snapshot(step, watched, world, random, sorted_shards):
    layers = {}
    for index, layer in enumerate(watched):
        mean, var = random.normal(size=layer.channels), np.exp(random.normal(size=layer.channels))
        apart = 0.08 + (0.9 * index / len(watched) if sorted_shards else 0)
        ranks = mean + np.sqrt(var) * apart * random.normal(size=(world, layer.channels))
        factors = np.exp(0.1 * random.normal(size=(3, layer.channels)))
        arrays = {
            "channel": np.arange(layer.channels),
            "running_mean": mean + 0.1 * np.sqrt(var) * random.normal(size=layer.channels),
            "running_var": var * factors[0],
            "batch_mean": ranks.mean(0),
            "batch_var": var * factors[1],
            "rank_means": ranks,
            "rank_vars": np.tile(var * factors[2], (world, 1)),
        }
        layers[layer.name] = {key: array.tolist() for key, array in arrays.items()}
    return Snapshot(step, layers)


def _alarms(values, at, watched, world):
    """What the monitor would say: raised at the third measurement beyond the limit, for the worst layer."""
    found = []
    for key in ("jeffreys", "between_ranks", "rank_spread", "lag"):
        limit = measures(world)[key].limit
        if limit is None or key not in values:
            continue
        worst = np.nan_to_num(values[key]).max(0)
        beyond = np.convolve(worst > limit.at, np.ones(limit.times), "full")[: len(at)] >= limit.times
        for index in np.flatnonzero(np.diff(beyond.astype(int), prepend=0)):
            row = int(np.nan_to_num(values[key])[:, index].argmax())
            value, name = float(values[key][row, index]), watched[row].name
            state = "raised" if beyond[index] else "cleared"
            text = f"{BY_KEY[key].title} {value:.2g} in {name} (limit {limit.at:g}): {limit.meaning}. {limit.remedy}"
            text = text if beyond[index] else f"{BY_KEY[key].title} {value:.2g} in {name}: within its limit again."
            found.append(Alarm(int(at[index]), key, name, value, limit.at, state, text))
    return tuple(sorted(found, key=lambda alarm: alarm.step))


def _scalars(at, random, sorted_shards):
    loss = 2.3 * np.exp(-4 * at / at[-1]) + 0.35 + 0.05 * random.normal(size=len(at))
    gap = (1.6 * (1 - np.exp(-5 * at / at[-1])) if sorted_shards else 0.05) + 0.03 * random.normal(size=len(at))
    sparse = slice(9, None, 10)
    return {
        "train/loss": (at, loss),
        "val/loss": (at[sparse], (loss + gap)[sparse]),
        "drift/model/gap": (at[sparse], gap[sparse]),
        "drift/model/gap_relative": (at[sparse], (gap / loss)[sparse]),
        "drift/model/flip_rate": (at[sparse], np.clip(gap / 4, 0, 1)[sparse]),
    }
