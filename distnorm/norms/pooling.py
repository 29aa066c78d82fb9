"""Pool the moments of several ranks into the statistics of their joined batch.

Legend: C channels, R ranks, K = 2C + 1: mean, variance and count of one rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distnorm.moments import Moments
from distnorm.norms import exchange
from distnorm.norms.kernels import is_plain

GATHER_UP_TO = 16
"""Groups of more ranks sum float64 numbers instead: a gather's cost grows with the ranks, a sum's does not.

At 16 the two cost the same on the usual fabrics, by NCCL's own model of its trees and rings.
"""


class Pooled(NamedTuple):
    """Statistics of the joined batch.

    Shape: exact_mean, mean, var [C]: the mean in float64, and rounded to the statistics' dtype as the biased variance
        is. `count` is a number where the host knows it (eagerly, on the CPU), else [].
    """

    exact_mean: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor | float  # type: ignore[assignment]  # a tuple has a method of this name

    @classmethod
    def of(cls, mean_C: Tensor, var_C: Tensor, count: Tensor | float, dtype: torch.dtype) -> "Pooled":
        """Round what was computed in float64."""
        return cls(mean_C, mean_C.to(dtype), var_C.to(dtype), count)


def pool(
    own_K: Tensor, dtype: torch.dtype, ranks: tuple[int, ...], whose: exchange.Whose
) -> tuple[Pooled, Tensor | None]:
    """Pool this rank's moments with those of the others.

    Args:
        own_K: mean, biased variance and count, float64.
        dtype: of the statistics.
        ranks: who pools.
        whose: the layer's name and order; ranks that bring another layer's moments are an error.

    Returns:
        The pooled statistics, equal on all ranks bit for bit; and all ranks' own [R, K], `None` where they were summed
        and not gathered.

    Collective: 1 gather of K + 1 float64 numbers, of which one says whose they are; with more than 16 ranks, unless the
        statistics are float64, 1 sum of K + 4.
    """
    on_host = own_K.device.type == "cpu" and is_plain(own_K)
    if len(ranks) > GATHER_UP_TO and dtype != torch.float64:
        moments = Moments.of_sums(exchange.start_sum(unpack(own_K).sums(), ranks, whose, "forward").wait())
        total = float(moments.count) if on_host else moments.count
        return Pooled.of(moments.mean, moments.var, total, dtype), None
    rows_RK = exchange.gather(own_K, ranks, whose, "forward")
    if on_host:
        return _merge_on_host(rows_RK, dtype), rows_RK
    moments = unpack(rows_RK).merged()
    return Pooled.of(moments.mean, moments.var, moments.count, dtype), rows_RK


def unpack(rows_RK: Tensor) -> Moments:
    """Read rows of mean, biased variance and count."""
    channels = rows_RK.shape[-1] // 2
    count = rows_RK[..., -1]
    return Moments(count, rows_RK[..., :channels], rows_RK[..., channels:-1] * count.unsqueeze(-1))


def _merge_on_host(rows_RK: Tensor, dtype: torch.dtype) -> Pooled:
    """`Moments.merged`, in half as many operations: on the CPU the counts can simply be read."""
    channels = rows_RK.shape[1] // 2
    mean_RC, var_RC, count_R1 = rows_RK.split((channels, channels, 1), 1)
    counts = count_R1.flatten().tolist()
    total = sum(counts)
    if counts.count(counts[0]) == len(counts):
        mean_C = mean_RC.mean(0)
        off_RC = mean_RC - mean_C
        var_C = torch.addcmul(var_RC, off_RC, off_RC).mean(0)
    else:
        share_R1 = count_R1 * (1 / total)
        mean_C = (mean_RC * share_R1).sum(0)
        off_RC = mean_RC - mean_C
        var_C = torch.addcmul(var_RC, off_RC, off_RC).mul_(share_R1).sum(0)
    return Pooled.of(mean_C, var_C, total, dtype)
