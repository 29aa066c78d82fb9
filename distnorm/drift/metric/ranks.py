"""Ranks against each other.

Legend: N samples, C channels, K ranks.
"""

from typing import Any

from torch import Tensor

from distnorm.drift import noise
from distnorm.drift.metric.base import AbstractMomentMetric
from distnorm.drift.metric.samples import position_means
from distnorm.moments import Moments


class BetweenRanks(AbstractMomentMetric):
    """How different the ranks' data are: over time, and sample by sample.

    Args:
        num_features: C.
        options: of `torchmetrics.Metric`.

    Shape: `update(batch, mask=None)`: this rank's own batch [N, C, *], where N may be 0; mask [N, *].
        `compute()`: `between_ranks`, persistent ratio of the ranks' batch means; `f` and `icc` of all samples since the
        last reset, each by the mean of its positions; [C] each. nan with fewer than 2 ranks that have data.

    Collective: `update` none; `compute` 1 gather of 4C + 2 numbers over all ranks, or over `process_group`.

    Raises:
        ShapeError: a batch has other channels than `num_features`.

    Example:
        >>> import torch
        >>> metric = BetweenRanks(1)
        >>> metric.update(torch.randn(8, 1))
        >>> float(metric.compute()["between_ranks"])  # one rank is compared with none
        nan

    Source: see `distnorm.drift.noise`.
    """

    ranks_times: Tensor
    ranks_samples: Tensor

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, {"ranks_times": num_features, "ranks_samples": num_features}, **options)

    def update(self, batch: Tensor, mask: Tensor | None = None) -> None:
        """Take this rank's batch."""
        measured = self._measure(batch, mask)
        self._add_one("ranks_times", measured.mean, measured.count > 0)
        self._add("ranks_samples", Moments.of(*position_means(batch.detach(), mask)))

    def compute(self) -> dict[str, Tensor]:
        """Compare the ranks."""
        times, samples = (_by_rank(getattr(self, name)) for name in ("ranks_times", "ranks_samples"))
        return {
            "between_ranks": noise.between_rank_ratio(times),
            "f": noise.f_statistic(samples),
            "icc": noise.intraclass_correlation(samples),
        }

    def _join_ranks(self, packed: Tensor) -> Tensor:
        return packed  # the ranks are what is compared


def _by_rank(packed: Tensor) -> Moments:
    """Read one row a rank, with a count that broadcasts over channels."""
    ranks = Moments.unpack(packed if packed.dim() == 2 else packed.unsqueeze(0))
    return Moments(ranks.count.unsqueeze(-1), ranks.mean, ranks.m2)
