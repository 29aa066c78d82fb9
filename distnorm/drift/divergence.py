"""Divergences of Gaussians, and what each is on average where nothing drifts: the noise floor of few samples.

All are elementwise, so one call serves the channels of all layers.

Legend: n samples; v, the biased variance of n samples over the true one; w, the running variance over the true one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

FEWEST_SAMPLES = 4
"""Under so many samples the expected Jeffreys divergence does not exist: there is no floor, for any divergence."""

Kind = Literal["jeffreys", "kl", "wasserstein", "bhattacharyya"]
KINDS: tuple[Kind, ...] = ("jeffreys", "kl", "wasserstein", "bhattacharyya")
"""The divergences, the default first."""


def jeffreys(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Tensor:
    """Jeffreys divergence, KL(p‖q) + KL(q‖p), of Gaussians, in nats; 0 where they are equal.

        (var_p + d²) / (2 var_q) + (var_q + d²) / (2 var_p) - 1,   d = mean_p - mean_q

    Shape: all broadcast to the result.

    Source: Jeffreys 1946.
    """
    # (a - b)² / (2ab) for a / (2b) + b / (2a) - 1: no digits cancel where the variances are close.
    return ((var_p - var_q).square() / (var_p * var_q) + (mean_p - mean_q).square() * (1 / var_p + 1 / var_q)) / 2


def kl(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p‖q) of Gaussians, in nats; 0 where they are equal.

        ½ (ln(var_q / var_p) + (var_p + d²) / var_q - 1),   d = mean_p - mean_q

    Shape: all broadcast to the result.

    Source: Kullback & Leibler 1951.
    """
    ratio = var_p / var_q
    return (ratio - ratio.log() - 1 + (mean_p - mean_q).square() / var_q) / 2


def wasserstein(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of Gaussians in units of var_q; finite where p is constant.

        (d² + (√var_p - √var_q)²) / var_q,   d = mean_p - mean_q

    Shape: all broadcast to the result.

    Source: Dowson & Landau 1982.
    """
    return ((mean_p - mean_q).square() + (var_p.sqrt() - var_q.sqrt()).square()) / var_q


def bhattacharyya(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Tensor:
    """Bhattacharyya distance of Gaussians, in nats: -ln of the overlap ∫ √(p q); it grows slowest of the four.

        d² / (4 (var_p + var_q)) + ½ ln((var_p + var_q) / (2 √(var_p var_q))),   d = mean_p - mean_q

    Shape: all broadcast to the result.

    Source: Bhattacharyya 1943.
    """
    total, apart = var_p + var_q, (var_p.sqrt() - var_q.sqrt()).square()
    return (mean_p - mean_q).square() / (4 * total) + torch.log1p(apart / (2 * (var_p * var_q).sqrt())) / 2


def running_noise(momentum: Tensor | float | None) -> Tensor:
    """Variance of a running mean, relative to the variance of one batch's mean: α / (2 - α); 0 for `None`.

    Args:
        momentum: α, weight of the new value; `None` or 0 stands for a cumulative average, whose noise dies out.
    """
    alpha = torch.as_tensor(0.0 if momentum is None else momentum, dtype=torch.float64)
    return alpha / (2 - alpha)


def floors(
    samples: Tensor | float, momentum: Tensor | float | None = None, kinds: Sequence[Kind] = KINDS
) -> dict[Kind, Tensor]:
    """What divergences of a batch from its running statistics are on average where nothing drifts.

    The batch is n independent samples of a Gaussian, with biased variance. Against the truth (momentum `None`):

        kl             -½ (ψ((n - 1) / 2) + ln(2 / n))                   about 1 / n
        jeffreys       2 / (n - 3)                                       about 2 / n
        wasserstein    2 - 2 √(2 / n) Γ(n / 2) / Γ((n - 1) / 2)          about 3 / (2n)
        bhattacharyya  the expectation over v, integrated numerically    about 1 / (4n)

    The running average is noisy itself, with a = α / (2 - α): its mean by a/n of the variance; its variance, an average
    of unbiased ones, as a Gamma variable of mean 1 and relative variance 2a / (n - 1): so it is for α = 1, and has that
    mean and variance below. To first order in 1/n that multiplies all four by 1 + a; here is the expectation itself.

    Args:
        samples: n, independent samples in the batch, positions not counted, or the measured `effective_samples`.
        momentum: α of the running statistics; `None` or 0 for a reference without noise.
        kinds: which.

    Returns:
        The floors, in float64; nan under `FEWEST_SAMPLES`. Compute them once a layer and keep them: the last one sums
        512 terms.

    Shape: samples and momentum broadcast to the results.

    Source: moments of the χ² distribution; E ln x and E 1/x of a sum of Gamma variables by their Laplace transform.
    """
    n = torch.as_tensor(samples, dtype=torch.float64)
    n, noise = torch.broadcast_tensors(n, running_noise(momentum).to(n.device))
    few, possible = n < FEWEST_SAMPLES, n.clamp(min=FEWEST_SAMPLES)
    return {kind: _FLOORS[kind](possible, noise).masked_fill(few, torch.nan) for kind in kinds}


def excess(
    batch: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    samples: Tensor | float,
    momentum: Tensor | float | None = None,
    kinds: Sequence[Kind] = KINDS,
) -> dict[Kind, Tensor]:
    """Divergences of a batch from a reference beyond their `floors`: 0 on average while nothing drifts.

    Below 0 by chance, and where an image's positions tell more than one sample does; nan under `FEWEST_SAMPLES`.

    Args:
        batch: mean and biased variance, with the layer's eps: a channel that never varies diverges from nothing.
        reference: likewise; as they were *before* they took this batch.
        samples: of `floors`.
        momentum: of `floors`.
        kinds: which.

    Shape: all broadcast to the results.
    """
    chance = floors(samples, momentum, kinds)
    return {kind: _DIVERGENCES[kind](*batch, *reference) - chance[kind].to(batch[0].device) for kind in kinds}


def _kl_floor(n: Tensor, noise: Tensor) -> Tensor:
    spread = 2 * noise / (n - 1)
    log_v = torch.log1p(-1 / n) + _mean_log(2 / (n - 1))
    return (_mean_log(spread) - log_v + (1 + noise / n) / (1 - spread) - 1) / 2


def _jeffreys_floor(n: Tensor, noise: Tensor) -> Tensor:
    spread = 2 * noise / (n - 1)
    # Twice the result is (1 + a/n) E 1/w - 1 + (n + 1 + a) / (n - 3) - 1, with E 1/w = 1 / (1 - spread).
    return ((noise / n + spread) / (1 - spread) + (4 + noise) / (n - 3)) / 2


def _wasserstein_floor(n: Tensor, noise: Tensor) -> Tensor:
    spread = 2 * noise / (n - 1)
    root_v = torch.sqrt((n - 1) / n) * _mean_root(2 / (n - 1))
    # E w^-½ for shape k is √k Γ(k - ½) / Γ(k): a ratio of Gamma functions half apart, as E √w is.
    inverse_root_w = 1 / (torch.sqrt(1 - spread / 2) * _mean_root(spread / (1 - spread / 2)))
    return (1 + noise / n) / (1 - spread) + 1 - 2 * root_v * inverse_root_w


def _bhattacharyya_floor(n: Tensor, noise: Tensor) -> Tensor:
    spread = 2 * noise / (n - 1)
    log_v = torch.log1p(-1 / n) + _mean_log(2 / (n - 1))
    log_sum, inverse_sum = _of_sum(n, spread)
    return (1 + noise) / n / 4 * inverse_sum + (log_sum - (log_v + _mean_log(spread)) / 2 - math.log(2)) / 2


def _of_sum(n: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """E ln(v + w) and E 1/(v + w), by M(s) = E e^(-s (v + w)): ∫ (e^-s - M) / s ds and ∫ M ds.

    With s = e^u both integrands fall off exponentially on either side, where the trapezoidal rule converges faster than
    any power of its step: at ⅛ the error is under 1e-9.
    """
    u = torch.arange(-36.0, 28.0, 0.125, dtype=n.dtype, device=n.device)
    s, v, w = u.exp(), n.unsqueeze(-1), spread.unsqueeze(-1)
    log_w = torch.where(w * s > 1e-8, torch.log1p(w * s) / w.clamp(min=1e-300), s)  # s where w is constant
    transform = torch.exp(-(v - 1) / 2 * torch.log1p(2 * s / v) - log_w)
    return ((-s).exp() - transform).sum(-1) * 0.125, (transform * s).sum(-1) * 0.125


def _mean_log(spread: Tensor) -> Tensor:
    """E ln x of a Gamma variable of mean 1 and variance t: ψ(1/t) + ln t."""
    t = spread.clamp(min=0.01)
    series = -spread / 2 - spread.square() / 12 + spread**4 / 120
    return torch.where(spread < 0.01, series, torch.digamma(1 / t) + t.log())


def _mean_root(spread: Tensor) -> Tensor:
    """E √x of a Gamma variable of mean 1 and variance t: √t Γ(1/t + ½) / Γ(1/t)."""
    t = spread.clamp(min=0.01)
    series = 1 - spread / 8 + spread.square() / 128 + 5 * spread**3 / 1024 - 21 * spread**4 / 32768
    return torch.where(spread < 0.01, series, t.sqrt() * torch.exp(torch.lgamma(1 / t + 0.5) - torch.lgamma(1 / t)))


_DIVERGENCES: dict[Kind, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "jeffreys": jeffreys,
    "kl": kl,
    "wasserstein": wasserstein,
    "bhattacharyya": bhattacharyya,
}
_FLOORS: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
    "jeffreys": _jeffreys_floor,
    "kl": _kl_floor,
    "wasserstein": _wasserstein_floor,
    "bhattacharyya": _bhattacharyya_floor,
}
