"""Drift measures of one layer, as functions of moments: batch against running statistics, rank against rank.

Legend: C channels, B blocks of ranks that share statistics, K ranks, T measurements in time.
"""

import torch
from torch import Tensor

from distnorm.moments import Moments

FEWEST_SAMPLES = 4
"""Under so many samples the expected divergence does not exist: nothing can be compared with it."""


def jeffreys(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Tensor:
    """Jeffreys divergence, KL(p‖q) + KL(q‖p), of Gaussians, in nats; 0 where they are equal.

        (var_p + d²) / (2 var_q) + (var_q + d²) / (2 var_p) - 1,   d = mean_p - mean_q

    Shape: all of one shape; so is the result.

    Source: Jeffreys 1946.
    """
    gap = (mean_p - mean_q).square()
    return (var_p + gap) / (2 * var_q) + (var_q + gap) / (2 * var_p) - 1


def jeffreys_floor(num_samples: float, momentum: float | None) -> float:
    """What `jeffreys` of a batch against its own running statistics is on average when nothing drifts.

        2 / (n - 3) · (1 + m / (2 - m))

    The first factor is the expectation for n independent samples with biased variance against the truth; the second
    adds the noise of the running average itself, whose last batches weigh `momentum`.

    Args:
        num_samples: n, independent samples in the batch, positions not counted; at least `FEWEST_SAMPLES`.
        momentum: of the running statistics; `None` (a cumulative average) adds nothing.
    """
    own = 0.0 if momentum is None else momentum / (2 - momentum)
    return 2 / (num_samples - 3) * (1 + own)


def excess_jeffreys(batch: Moments, running_mean: Tensor, running_var: Tensor, floor: Tensor, eps: float) -> Tensor:
    """Divergence of a batch from the running statistics beyond `floor`, in nats, averaged over blocks.

    About 0 in expectation while nothing drifts, and below 0 where an image's positions tell more than one sample does.

    Args:
        batch: what was measured, one row a block.
        running_mean: what it is compared with, as it was *before* it took this batch.
        running_var: likewise.
        floor: the floor of each block.
        eps: the layer's own, added to both variances: a channel that never varies diverges from nothing.

    Shape: batch, running_mean and running_var [B, C], floor [B]; result [C].
    """
    excess_BC = jeffreys(batch.mean, batch.var + eps, running_mean, running_var + eps) - floor[:, None]
    return excess_BC.mean(0)


def between_rank_ratio(over_time: Moments) -> Tensor:
    """How much further apart the ranks' means lie than by chance: about 1 for shuffled shards, more for sorted ones.

        R_p = Var_k(mean_t m_kt) / (mean_k Var_t(m_kt) / T),  divided by the median it has when all ranks draw alike

    Args:
        over_time: moments over T ≥ 2 measurements of each rank's batch mean.

    Shape: over_time.count [], mean and m2 [K, C]; result [C].

    Source: one-way analysis of variance; R_p is F-distributed with (K - 1, K (T - 1)) degrees of freedom if ranks draw
        alike.
    """
    num_ranks, times = over_time.mean.shape[0], float(over_time.count)
    between_C = over_time.mean.var(0, correction=1)
    within_C = over_time.unbiased_var.mean(0) / times
    tiny = torch.finfo(within_C.dtype).tiny
    return between_C / within_C.clamp(min=tiny) / f_median(num_ranks - 1, num_ranks * (times - 1))


def f_median(numerator: float, denominator: float) -> float:
    """Approximate the median of the F distribution, within 5 % for 1 degree of freedom and 1 % from 3 on.

    Source: Wilson & Hilferty 1931, the cube-root approximation at probability one half.
    """
    above, below = 1 - 2 / (9 * numerator), 1 - 2 / (9 * denominator)
    return float((above / below) ** 3)
