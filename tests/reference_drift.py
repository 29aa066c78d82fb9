"""What the drift measures must equal: numpy and scipy, by integration, simulation or the textbook's table."""

from collections.abc import Sequence

import numpy as np
import scipy.integrate
import scipy.stats

_GRID = 4001


def integrated(mean_p: float, var_p: float, mean_q: float, var_q: float) -> dict[str, float]:
    """All four divergences of two Gaussians, from their densities and quantiles."""
    p, q = scipy.stats.norm(mean_p, var_p**0.5), scipy.stats.norm(mean_q, var_q**0.5)

    def directed(first, second) -> float:
        x = np.linspace(first.mean() - 12 * first.std(), first.mean() + 12 * first.std(), _GRID)
        return np.trapezoid(first.pdf(x) * (first.logpdf(x) - second.logpdf(x)), x)

    # √(p q) is a Gaussian too, around the mean of the precisions.
    weight = var_q / (var_p + var_q)
    middle, width = weight * mean_p + (1 - weight) * mean_q, 12 * (2 * var_p * var_q / (var_p + var_q)) ** 0.5
    x = np.linspace(middle - width, middle + width, _GRID)
    log_overlap = (p.logpdf(x) + q.logpdf(x)) / 2
    largest = log_overlap.max()
    z = np.linspace(-12, 12, _GRID)
    quantiles = ((mean_p + var_p**0.5 * z) - (mean_q + var_q**0.5 * z)) ** 2
    return {
        "kl": directed(p, q),
        "jeffreys": directed(p, q) + directed(q, p),
        "wasserstein": np.trapezoid(scipy.stats.norm.pdf(z) * quantiles, z) / var_q,
        "bhattacharyya": -largest - np.log(np.trapezoid(np.exp(log_overlap - largest), x)),
    }


def textbook(gap_squared, var_p, var_q) -> dict[str, np.ndarray]:
    """All four divergences from the textbook's formulas; linear in the squared gap between the means."""

    def kl(v1, v2):
        return 0.5 * (np.log(v2 / v1) + (v1 + gap_squared) / v2 - 1)

    return {
        "kl": kl(var_p, var_q),
        "jeffreys": kl(var_p, var_q) + kl(var_q, var_p),
        "wasserstein": (gap_squared + (np.sqrt(var_p) - np.sqrt(var_q)) ** 2) / var_q,
        "bhattacharyya": gap_squared / (4 * (var_p + var_q))
        + 0.5 * np.log((var_p + var_q) / (2 * np.sqrt(var_p * var_q))),
    }


def expected(kind: str, samples: int) -> float:
    """Expectation of a divergence of n samples from the truth: over the χ² of their variance."""
    chi2 = scipy.stats.chi2(samples - 1)

    def integrand(u: float) -> float:  # over ln χ²: smooth for any number of samples
        x = np.exp(u)
        return textbook(1 / samples, x / samples, 1.0)[kind] * chi2.pdf(x) * x

    middle, reach = np.log(samples), max(12 * (2 / (samples - 1)) ** 0.5, 80 / (samples - 3))
    low, high = middle - reach, middle + min(5, reach)
    return scipy.integrate.quad(integrand, low, high, epsabs=1e-13, epsrel=1e-11, limit=400, points=[middle])[0]


def running(generator, samples: int, momentum: float, chains: int) -> tuple[np.ndarray, np.ndarray]:
    """Running mean and variance of chains of batches of n standard normal samples, long after the start."""
    mean, var = np.zeros(chains), np.ones(chains)
    for _ in range(int(np.ceil(np.log(1e-3) / np.log1p(-momentum))) if momentum < 1 else 1):
        mean += momentum * (generator.standard_normal(chains) / samples**0.5 - mean)
        var += momentum * (generator.chisquare(samples - 1, chains) / (samples - 1) - var)
    return mean, var


def between_rank_ratio(means_KT: Sequence[np.ndarray]) -> np.ndarray:
    """R_p of ranks' batch means [T_k, C] over the median of F. [C]."""
    within = np.mean([m.var(0, ddof=1) / len(m) for m in means_KT], 0)
    between = np.var([m.mean(0) for m in means_KT], 0, ddof=1)
    return between / within / scipy.stats.f.median(len(means_KT) - 1, sum(len(m) - 1 for m in means_KT))


def intraclass_correlation(groups: Sequence[np.ndarray]) -> float:
    """ICC(1) of groups of numbers, from the table of the analysis of variance."""
    groups = [group for group in groups if len(group)]
    everything, sizes = np.concatenate(groups), np.array([len(group) for group in groups])
    ss_within = sum(((group - group.mean()) ** 2).sum() for group in groups)
    ss_between = ((everything - everything.mean()) ** 2).sum() - ss_within
    ms_between, ms_within = ss_between / (len(groups) - 1), ss_within / (len(everything) - len(groups))
    size = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / (len(groups) - 1)
    return (ms_between - ms_within) / (ms_between + (size - 1) * ms_within)
