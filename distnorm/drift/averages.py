"""Quality of running averages: how far behind, how noisy, how far from the precise statistics and from other ranks'.

All functions are elementwise over channels.

Legend: C channels, K ranks, T measurements in time.
"""

import torch
from torch import Tensor

from distnorm.drift.divergence import jeffreys, running_noise
from distnorm.moments import Moments


def lag(gaps: Moments, momentum: Tensor | float | None = None) -> Tensor:
    """How far a running mean is behind, in standard deviations, once it has taken its batch.

        (1 - α) √max(0, mean_t(gap)² - Var_t(gap) / T),   gap = (batch mean - running mean before it) / σ_run

    A mean that moves by s a step leaves its running average s (1 - α) / α behind. The noise of the time mean is taken
    off; it is that of independent gaps, so of steps at least 1/α apart: those of consecutive steps have less, as a gap
    is made good by the next, and of them a lag under √(Var_t(gap) / T) is not seen.

    Args:
        gaps: moments over T ≥ 2 measurements of the gap.
        momentum: α of the running mean; `None` or 0 for a cumulative average.

    Shape: gaps.count broadcasts with [C]; result [C].

    Source: the step response of an exponential moving average.
    """
    alpha = torch.as_tensor(0.0 if momentum is None else momentum, dtype=torch.float64, device=gaps.mean.device)
    noise = gaps.m2 / (gaps.count * (gaps.count - 1)).clamp(min=1)
    behind = (1 - alpha) * (gaps.mean.square() - noise).clamp(min=0).sqrt()
    return torch.where(gaps.count < 2, torch.nan, behind)


def estimator_sd(effective: Tensor, momentum: Tensor | float | None = None) -> Tensor:
    """Noise of a running mean in standard deviations: √(α / (2 - α) / n_eff)."""
    return (running_noise(momentum).to(effective) / effective).sqrt()


def estimator_samples(samples: Tensor, momentum: Tensor | float) -> Tensor:
    """How many samples a running average holds: n (2 - α) / α; inf for a cumulative average (momentum 0).

    Args:
        samples: n, that a batch has or is worth.
        momentum: α.
    """
    return samples / running_noise(momentum).to(samples)


def variance_ratio(running_var: Tensor, precise_var: Tensor) -> Tensor:
    """Running over precise variance: 1 where the average is right; it is biased either way where it is not.

    An average over batches lacks the variance between their means, and remembers the variance under older weights.
    """
    return running_var / precise_var


def variance_ratio_sd(running_samples: Tensor, precise_samples: Tensor) -> Tensor:
    """Sampling error of `variance_ratio`: √(2 / n_running + 2 / n_precise), of Gaussian samples.

    Args:
        running_samples: that the running average holds: `estimator_samples`.
        precise_samples: that the precise statistics were measured on.
    """
    return (2 / running_samples + 2 / precise_samples).sqrt()


def rank_spread(means: Tensor, variances: Tensor) -> Tensor:
    """How far apart the ranks' running statistics are: the Jeffreys divergence of the furthest from all together, nats.

    All together is the equal mixture: mean_k μ_k and mean_k(σ²_k) + Var_k(μ_k). A checkpoint that keeps rank 0's
    statistics discards this.

    Args:
        means: each rank's running mean.
        variances: each rank's running variance, with the layer's eps.

    Shape: means and variances [K, C]; result [C].

    Source: the law of total variance.
    """
    mean_C, var_C = means.mean(0), variances.mean(0) + means.var(0, correction=0)
    return jeffreys(means, variances, mean_C, var_C).amax(0)
