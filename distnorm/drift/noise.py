"""Noise of batch statistics: over time, and between ranks. All functions are elementwise over channels.

Legend: C channels, K ranks, T measurements in time.
"""

import math

import torch
from torch import Tensor

from distnorm.drift.divergence import running_noise
from distnorm.moments import Moments

FEWEST_TIMES = 10
"""Measurements before ranks are compared over time, and noise is told from them."""
_Z = 3.090  # of the standard normal distribution, exceeded with probability 0.001


def effective_samples(gaps: Moments, momentum: Tensor | float | None = None) -> Tensor:
    """How many independent samples a batch's mean is worth.

        n_eff = (1 + α / (2 - α)) / Var_t(gap),   gap = (batch mean - running mean before it) / σ_run

    The gap has the noise of both means. Its slow part, a lag, has no effect: the variance is about its own mean. Known
    to ± √(2 / (T - 1)). inf for a channel that never changes.

    Args:
        gaps: moments over T ≥ 2 measurements of the gap.
        momentum: α of the running mean.

    Shape: gaps.count broadcasts with [C]; result [C].

    Source: the variance of a mean of n samples is σ² / n; Luo et al. 2019 for what it does.
    """
    variance = gaps.m2 / (gaps.count - 1).clamp(min=1)
    return torch.where(gaps.count < 2, torch.nan, (1 + running_noise(momentum).to(variance)) / variance)


def effective_samples_of_ranks(residuals: Moments) -> Tensor:
    """How many independent samples one rank's batch is worth, told by the ranks themselves.

        n_eff = 1 / MS,   MS = Σ_kt (r_kt - mean_t r_k)² / ((K - 1) (T - 1)),   r_kt = (m_kt - mean_k m_kt) / σ_t

    Unlike `effective_samples` it knows nothing of weights that move from step to step: all ranks have the same ones.
    Neither do ranks that differ for good count. Several ranks that share statistics are worth as many times more.

    Args:
        residuals: moments over T ≥ 2 measurements of each of K ≥ 2 ranks' batch mean, less their common mean, in
            standard deviations.

    Shape: residuals.count broadcasts with [K, C], mean and m2 are [K, C]; result [C].

    Source: the residual mean square of a two-way analysis of variance.
    """
    times_KC = residuals.count.double().expand(residuals.mean.shape)
    there_KC = times_KC >= 2
    ranks_C = there_KC.sum(0)
    freedom_C = (times_KC - 1).where(there_KC, 0).sum(0) * (ranks_C - 1) / ranks_C.clamp(min=1)
    return torch.where(ranks_C < 2, torch.nan, freedom_C / residuals.m2.where(there_KC, 0).sum(0))


def cv_mean(effective: Tensor) -> Tensor:
    """Noise of the batch mean in standard deviations: 1 / √n_eff."""
    return effective.rsqrt()


def cv_var(variances: Moments) -> Tensor:
    """Noise of the batch variance: std_t(var) / mean_t(var), about √(2 / n) for n Gaussian samples.

    Args:
        variances: moments over T ≥ 2 measurements of the batch variance.

    Shape: variances.count broadcasts with [C]; result [C].
    """
    std = (variances.m2 / (variances.count - 1).clamp(min=1)).sqrt()
    return torch.where(variances.count < 2, torch.nan, std / variances.mean)


def design_effect(values: Tensor | float, effective: Tensor) -> Tensor:
    """How many values count as one independent sample: values in a normalization batch, positions too, / n_eff.

    Source: Kish 1965.
    """
    return values / effective


def between_rank_ratio(over_time: Moments, *, common_removed: bool = False) -> Tensor:
    """How much further apart the ranks' means lie than by chance: about 1 for shuffled shards, more for sorted ones.

        R_p = Var_k(mean_t m_kt) / mean_k(Var_t(m_kt) / T),  divided by the median it has when all ranks draw alike

    While weights move all ranks' means move together, which passes for noise and hides what stays apart. Given m_kt
    less the mean over the ranks at time t, that is out of it, and the variances over time are multiplied by
    K / (K - 1), what their common mean has taken.

    Args:
        over_time: moments over T ≥ 2 measurements of each of K ≥ 2 ranks' batch mean. A rank with less does not count.
        common_removed: whether it is of batch means less their mean over the ranks.

    Shape: over_time.count broadcasts with [K, C], mean and m2 are [K, C]; result [C].

    Source: analysis of variance, one-way, or two-way without replication. If ranks draw alike R_p is F-distributed with
        (K - 1, K (T - 1)) degrees of freedom, or (K - 1, (K - 1) (T - 1)).
    """
    times_KC = over_time.count.double().expand(over_time.mean.shape)
    there_KC = times_KC >= 2
    ranks_C = there_KC.sum(0)
    mean_C = over_time.mean.where(there_KC, 0).sum(0) / ranks_C
    between_C = (over_time.mean - mean_C).where(there_KC, 0).square().sum(0) / (ranks_C - 1)
    within_C = (over_time.m2 / (times_KC * (times_KC - 1)).clamp(min=1)).where(there_KC, 0).sum(0) / ranks_C
    freedom_C = (times_KC - 1).where(there_KC, 0).sum(0)
    if common_removed:
        within_C, freedom_C = within_C * ranks_C / (ranks_C - 1), freedom_C * (ranks_C - 1) / ranks_C
    ratio_C = between_C / within_C.clamp(min=torch.finfo(within_C.dtype).tiny) / f_median(ranks_C - 1, freedom_C)
    return torch.where(ranks_C < 2, torch.nan, ratio_C)


def f_median(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Approximate the median of the F distribution, within 5 % for 1 degree of freedom and 1 % from 3 on.

    Source: Wilson & Hilferty 1931, the cube-root approximation at probability one half.
    """
    above, below = 1 - 2 / (9 * numerator), 1 - 2 / (9 * denominator)
    return (above / below) ** 3


def ratio_by_chance(num_ranks: int, times: int) -> float:
    """What `between_rank_ratio`, common movement removed, exceeds by chance with probability 0.001.

    Channels of a layer may move as one, so that their median is no better known than one channel: with two ranks a
    ratio of 9 is nothing. The tail of F comes from the cube-root approximation, within 20 %.

    Args:
        num_ranks: K, at least 2.
        times: T measurements, at least 10.

    Source: Paulson 1942.
    """
    numerator, denominator = num_ranks - 1.0, (num_ranks - 1.0) * (times - 1)
    a, b = 2 / (9 * numerator), 2 / (9 * denominator)
    tail = _Z * math.sqrt((1 - b) ** 2 * a + (1 - a) ** 2 * b - a * b * _Z**2)
    root = ((1 - a) * (1 - b) + tail) / ((1 - b) ** 2 - b * _Z**2)
    median = f_median(torch.tensor(numerator), torch.tensor(denominator))
    return root**3 / float(median)


def f_statistic(ranks: Moments) -> Tensor:
    """F of one step: variance between the ranks over variance inside them; about 1 where ranks draw alike.

        F = MSB / MSW,   MSB = Σ n_k (m_k - m)² / (K - 1),   MSW = Σ m2_k / (N - K)

    Args:
        ranks: moments of each rank's units. Units are what `count` counts, and should be samples: the positions of an
            image are alike, and as units of their own they make F large without any drift.

    Shape: ranks.count broadcasts with [K, C], mean and m2 are [K, C]; result [C]. nan with units on fewer than 2 ranks
        or at most one a rank.

    Source: Fisher 1925, one-way analysis of variance.
    """
    between_C, within_C, _ = _mean_squares(ranks)
    return between_C / within_C


def intraclass_correlation(ranks: Moments) -> Tensor:
    """Share of the variance that is between ranks: 0 where they draw alike, 1 where each holds one value.

        ICC = (MSB - MSW) / (MSB + (b - 1) MSW),   b = (N - Σ n_k² / N) / (K - 1): the units a rank, if equal

    Args:
        ranks: as in `f_statistic`.

    Shape: as in `f_statistic`; result [C] in [-1 / (b - 1), 1].

    Source: Shrout & Fleiss 1979, ICC(1); Donner 1986 for uneven ranks.
    """
    between_C, within_C, size_C = _mean_squares(ranks)
    return (between_C - within_C) / (between_C + (size_C - 1) * within_C)


def _mean_squares(ranks: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squares between and within ranks, and the units a rank; nan where there are too few."""
    count_KC = ranks.count.double().expand(ranks.mean.shape)
    total_C, num_ranks_C = count_KC.sum(0), (count_KC > 0).sum(0)
    mean_C = (count_KC * ranks.mean).sum(0) / total_C
    between_C = (count_KC * (ranks.mean - mean_C).square()).sum(0) / (num_ranks_C - 1)
    within_C = ranks.m2.sum(0) / (total_C - num_ranks_C)
    size_C = (total_C - count_KC.square().sum(0) / total_C) / (num_ranks_C - 1)
    few_C = (num_ranks_C < 2) | (total_C <= num_ranks_C)
    return between_C.masked_fill(few_C, torch.nan), within_C, size_C
