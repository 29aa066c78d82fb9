"""What is known about who shares statistics, as data: sources with their numbers, and the penalty of few samples.

The marks say how each is known: `V` read in the named source, `P` measured in a pilot of this project (few seeds:
indicative), `D` derived. Users who measured their own curve pass it to `penalty`.
"""

import dataclasses
import math
from collections.abc import Mapping

from distnorm.errors import ConfigError, did_you_mean

MARKS = {"V": "read in the source", "P": "measured in a pilot", "D": "derived"}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One finding.

    Attributes:
        source: who found it, and where it stands.
        number: what was found.
        mark: how it is known: one of `MARKS`.
    """

    source: str
    number: str
    mark: str

    def __str__(self) -> str:
        """Give `source: number`."""
        return f"{self.source}: {self.number}"


_WU_HE = "Wu & He 2018, tables 1-2 (ResNet-50, ImageNet)"
_WU_JOHNSON = "Wu & Johnson 2021 (ResNet-50, ImageNet)"

TABLE: Mapping[str, Evidence] = {
    "batch-size": Evidence(_WU_HE, "batch norm over 32, 16, 8, 4, 2 images errs 23.6, 23.7, 24.8, 27.3, 34.7 %", "V"),
    "group": Evidence(_WU_HE, "GroupNorm errs 24.1, 24.2, 24.0, 24.2, 24.1 % at 32, 16, 8, 4, 2 images a GPU", "V"),
    "curve": Evidence(_WU_JOHNSON, "64, 32, 16, 8, 4, 2 images err 23.2, 23.4, 23.5, 24.3, 26.4, 32.5 %", "V"),
    "frozen-late": Evidence(_WU_JOHNSON, "statistics frozen for the last 20 epochs: 25.2 % at 2 images, not 32.5", "V"),
    "precise": Evidence(_WU_JOHNSON, "precise statistics need 1000 to 10000 samples and gain up to 3.5 points", "V"),
    "evaluation": Evidence(
        "Singh & Shrivastava 2019, abstract", "repairing evaluation alone gains 6.18 points at 2 images", "V"
    ),
    "kinds": Evidence("Wu & He 2018 (32 images)", "LayerNorm errs 25.3 %, InstanceNorm 28.4 %, batch norm 23.6 %", "V"),
    "text": Evidence(
        "Shen et al. 2020, abstract", "batch statistics of text fluctuate; mending them gains 0.4 and 0.6 BLEU", "V"
    ),
    "recurrent": Evidence(
        "Cooijmans et al. 2017", "batch norm in an RNN needs statistics a time step and weights from 0.1", "V"
    ),
    "alone": Evidence(
        "by construction", "a sample's output under GroupNorm varies by 0 with the other samples of its batch", "D"
    ),
    "contrast": Evidence(
        "SwAV, issue 22 (64 GPUs)", "sync over 8 ranks (512 samples) loses nothing; over all 64 is twice as slow", "V"
    ),
    "leak": Evidence("SimCLR, issue 114", "local batches below the global one let the model cheat through them", "V"),
    "sorted": Evidence(
        "pilot, digits, 8 ranks × 4 sorted by label", "local batch norm errs 75.2 %, synchronized 15.2 %", "P"
    ),
    "unfrozen": Evidence("Wu & He 2018, COCO", "batch norm not frozen, at 2 images a GPU, costs about 6 AP", "V"),
    "head": Evidence("Wu & He 2018, COCO", "GroupNorm in the box head alone gains 0.9 box AP over frozen (38.6)", "V"),
    "fine-tune": Evidence("Yao et al. 2021, Faster R-CNN on COCO", "frozen 36.8 AP, synchronized 37.5, GN 37.7", "V"),
    "scratch": Evidence(
        "Yan et al. 2020, COCO from scratch", "2 images: 32.38 AP; 2 × 8 ranks synchronized: 36.80", "V"
    ),
    "mlperf-local": Evidence("MLPerf v0.7, ResNet-50 on 1536 A100", "29 images a GPU, local batch norm", "V"),
    "mlperf-sync": Evidence("MLPerf, ResNet-50 on 2048 A100", "16 images × BN_GROUP=2: 32 share statistics", "V"),
    "cost": Evidence(
        "NCCL's own latency model", "53 layers synchronized over 8 GPUs of a node take 1.4 to 1.6 ms a step", "D"
    ),
    "cost-nodes": Evidence(
        "NCCL's own latency model",
        "53 layers synchronized over 2, 4, 8 nodes of 8 GPUs at 5 µs a hop take 2.9, 3.8, 4.8 ms",
        "D",
    ),
    "folding": Evidence("Yan et al. 2020, inference", "folded batch norm runs 237.9 it/s, GroupNorm 99.4", "V"),
    "renorm": Evidence(
        "Yan et al. 2020; Wu & He 2018", "batch renormalization errs 30.29 % at 2 images, 26.3 at 4", "V"
    ),
    "standardized": Evidence(
        "Qiao et al. 2019 (ResNet-50, 1 image a GPU)", "GroupNorm errs 24.81 %, standardized weights 23.72", "V"
    ),
    "group-cost": Evidence("Detectron, projects/GN", "GroupNorm costs 22 % memory, 13 % time over frozen norms", "V"),
    "ghost": Evidence("Composer, ghost batch norm", "ghosts of 16 to 64: -0.3 to +0.3 points, 5 % slower", "V"),
    "response": Evidence("FRN on a common ImageNet baseline", "filter response norm errs 24.0 %, batch norm 23.6", "V"),
    "window": Evidence("derived", "a running average at momentum a holds NBS × (2 - a) / a samples: 19 × at 0.1", "D"),
}
"""Findings by id."""

ERRORS: Mapping[str, Mapping[int, float]] = {
    "Wu & Johnson 2021": {
        1024: 23.7, 512: 23.7, 256: 23.6, 128: 23.4, 64: 23.2, 32: 23.4, 16: 23.5, 8: 24.3, 4: 26.4, 2: 32.5,
    },
    "Wu & He 2018": {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7},
}  # fmt: skip
"""ImageNet top-1 error in % by the samples that share statistics, evaluated with running or population statistics."""

ERRORS_FROZEN_LATE: Mapping[int, float] = {
    1024: 24.5, 512: 24.4, 256: 24.4, 128: 24.4, 64: 24.2, 32: 24.3, 16: 23.9, 8: 24.2, 4: 24.3, 2: 25.2,
}  # fmt: skip
"""The same, with statistics frozen for the last 20 epochs (Wu & Johnson 2021)."""

BEST = 23.2
"""Wu & Johnson's lowest error in %, at 64."""


def _mean_penalty() -> dict[int, float]:
    """Average, at each size, the points that each source lost against its own best."""
    lost = [{nbs: error - min(errors.values()) for nbs, error in errors.items()} for errors in ERRORS.values()]
    sizes = {nbs for source in lost for nbs in source}
    there = {nbs: [source[nbs] for source in lost if nbs in source] for nbs in sizes}
    return {nbs: round(sum(points) / len(points), 3) for nbs, points in there.items()}


CURVE: Mapping[int, float] = _mean_penalty()
"""Points of top-1 accuracy lost against the best, by normalization batch."""

FROZEN_LATE_CURVE: Mapping[int, float] = {nbs: round(error - BEST, 3) for nbs, error in ERRORS_FROZEN_LATE.items()}
"""The same, with statistics frozen for the last fifth of training."""


def penalty(normalization_batch: int, curve: Mapping[int, float] = CURVE) -> float | None:
    """Expect so many points of top-1 accuracy lost against the best; linear in the logarithm between measured sizes.

    Args:
        normalization_batch: samples that share statistics.
        curve: points by size, e.g. measured by yourself.

    Returns:
        Points; the largest size's beyond it, and `None` below the smallest, where nothing was measured.

    Example:
        >>> penalty(32), penalty(2), penalty(1)
        (0.1, 10.2, None)
    """
    sizes = sorted(curve)
    if normalization_batch < sizes[0]:
        return None
    below = max(size for size in sizes if size <= normalization_batch)
    above = min((size for size in sizes if size > normalization_batch), default=below)
    if above == below:
        return curve[below]
    share = math.log2(normalization_batch / below) / math.log2(above / below)
    return round(curve[below] + share * (curve[above] - curve[below]), 2)


def cite(*ids: str) -> tuple[str, ...]:
    """Give `source: number` of each finding.

    Raises:
        ConfigError: there is no such finding.
    """
    for unknown in (name for name in ids if name not in TABLE):
        raise ConfigError(
            f"evidence {unknown!r} is not one of {', '.join(TABLE)}.{did_you_mean(unknown, TABLE)} "
            "See distnorm.evidence.TABLE."
        )
    return tuple(str(TABLE[name]) for name in ids)
