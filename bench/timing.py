"""Interleaved timing on all ranks at once, and the spread of what it found.

Other work on the machine makes every variant slower for a while: so the variants of a row take turns within every
repetition, each starting a different one, and ratios are formed within a repetition before their quartiles are taken.
"""

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.layers import VARIANTS
from bench.rows import Row, Step
from distnorm import collectives

SAMPLE_MS = 3.0
MAX_STEPS = 10
RATIOS = {"ours_to_limit": ("ours", "limit"), "naive_to_ours": ("naive", "ours")}


@dataclass(frozen=True)
class Spread:
    """Lower quartile, median and upper quartile."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Tensor) -> "Spread":
        """Take the quartiles of a flat tensor."""
        quartiles = torch.quantile(values.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        return cls(*(float(q) for q in quartiles))


@dataclass(frozen=True)
class Measurement:
    """What a row took: `ms` a step by variant, and the paired ratios.

    A sample is the mean of `steps_a_sample` steps, of the slowest rank.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    memory_format: str
    repetitions: int
    steps_a_sample: int
    ms: dict[str, Spread]
    ratios: dict[str, Spread]


def measure(row: Row, repetitions: int, warmup: int) -> Measurement:
    """Time all variants of a row; see `measure_steps`."""
    torch.manual_seed(collectives.rank())
    return measure_steps(row, {variant: row.build(variant) for variant in VARIANTS}, RATIOS, repetitions, warmup)


def measure_steps(
    row: Row, steps: Mapping[str, Step], ratios: Mapping[str, tuple[str, str]], repetitions: int, warmup: int
) -> Measurement:
    """Time some steps of a row in turn.

    Args:
        row: what they are steps of.
        steps: by name.
        ratios: by name, the names of two steps.
        repetitions: samples of each.
        warmup: steps before them.

    Collective: every rank calls this with the same arguments; 1 gather per sample, and those of the steps.
    """
    for _ in range(warmup):
        took_ms = {variant: _sample_ms(step, 1) for variant, step in steps.items()}
    fastest_ms = float(_slowest(torch.tensor([min(took_ms.values())])))
    count = min(MAX_STEPS, max(1, math.ceil(SAMPLE_MS / fastest_ms)))
    samples: dict[str, list[float]] = {variant: [] for variant in steps}
    gc.collect()
    gc.disable()
    try:
        for repetition in range(repetitions):
            first = repetition % len(steps)
            for variant in [*steps, *steps][first : first + len(steps)]:
                samples[variant].append(_sample_ms(steps[variant], count))
    finally:
        gc.enable()
    ms = {variant: _slowest(torch.tensor(values)) for variant, values in samples.items()}
    return Measurement(
        name=row.name,
        kind=row.kind,
        shape=row.shape,
        memory_format=row.memory_format,
        repetitions=repetitions,
        steps_a_sample=count,
        ms={variant: Spread.of(values) for variant, values in ms.items()},
        ratios={ratio: Spread.of(ms[above] / ms[below]) for ratio, (above, below) in ratios.items()},
    )


def _sample_ms(step: Step, count: int) -> float:
    """Take the mean time of a step, once all ranks are here."""
    _slowest(torch.zeros(1))
    started_s = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started_s) * 1e3 / count


def _slowest(values: Tensor) -> Tensor:
    """Take the greatest of the ranks' values, one by one; no rank goes on before all have come."""
    return collectives.gather(values, collectives.members(None), "bench").amax(0)
