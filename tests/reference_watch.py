"""What a watched layer's measures are, in numpy, from all that every rank's layer was given: the joined data."""

import numpy as np
import scipy.stats

from distnorm.drift import divergence
from tests import reference_drift


def measures(seen, blocks, momentum, eps=1e-5):
    """Every measure of batch statistics at the last step, [C] each.

    Args:
        seen: by rank, by step, the input [N, C, *], and the running mean and variance [C] before the step.
        blocks: lists of ranks that share statistics.
        momentum: of the running statistics; `None` for constants.
        eps: of the layer.
    """
    alpha = momentum or 0.0
    own = alpha / (2 - alpha)
    found = {}
    worth = of_ranks(seen, eps) if len(seen) > 1 else of_halves(seen[0], eps)
    by_block = [_of_block([seen[rank] for rank in block], alpha, own, eps, worth * len(block)) for block in blocks]
    for key in by_block[0]:
        found[key] = np.mean([block[key] for block in by_block], 0)
    if len(seen) > 1:
        found["between_ranks"] = two_way(in_deviations(seen, eps))
        ranks_of = {rank: block for block in blocks for rank in block}
        values = [sum(len(flat(seen[r][-1][0])) for r in ranks_of[rank]) for rank in range(len(seen))]
        each = [np.minimum(worth * len(ranks_of[rank]) / values[rank], 1) for rank in range(len(seen))]
        found |= anova([flat(steps[-1][0]) for steps in seen], each)
    if len(blocks) > 1:
        found["rank_spread"] = spread([steps[-1][1:] for steps in seen], eps)
    return found


def _of_block(ranks, alpha, own, eps, worth):
    gaps, variances = [], []
    for step in zip(*ranks, strict=True):
        joined = np.concatenate([flat(x) for x, _, _ in step])
        mean, var = step[0][1:]
        gaps.append((joined.mean(0) - mean) / np.sqrt(var + eps))
        variances.append(joined.var(0) + eps)
    samples = sum(len(x) for x, _, _ in step)
    floors = {kind: float(value) for kind, value in divergence.floors(samples, alpha).items()}
    exact = reference_drift.textbook((joined.mean(0) - mean) ** 2, variances[-1], var + eps)
    found = {kind: value - floors[kind] for kind, value in exact.items()}
    gaps, variances = np.array(gaps), np.array(variances)
    behind = np.maximum(0, gaps.mean(0) ** 2 - gaps.var(0, ddof=1) / len(gaps))
    return found | {
        "lag": (1 - alpha) * np.sqrt(behind),
        "effective_samples": worth,
        "cv_mean": 1 / np.sqrt(worth),
        "cv_var": variances.std(0, ddof=1) / variances.mean(0),
        "design_effect": len(joined) / worth,
        "estimator_sd": np.sqrt(own / worth),
    }


def in_deviations(seen, eps):
    """Every rank's batch means at every step, in standard deviations within the ranks at that step: [K, T, C]."""
    values_KT = [[flat(x) for x, _, _ in steps] for steps in seen]
    means_KTC = np.array([[values.mean(0) for values in steps] for steps in values_KT])
    squares_TC = sum(np.array([((v - v.mean(0)) ** 2).sum(0) for v in steps]) for steps in values_KT)
    counts_T1 = sum(np.array([[len(v)] for v in steps]) for steps in values_KT)
    return (means_KTC - means_KTC.mean(0)) / np.sqrt(squares_TC / counts_T1 + eps)


def residuals_of(means_KTC):
    """What a two-way analysis of variance leaves, ranks × times without replication: its mean square, per channel."""
    ranks, times, _ = means_KTC.shape
    left = means_KTC - means_KTC.mean(1, keepdims=True) - means_KTC.mean(0) + means_KTC.mean((0, 1))
    return (left**2).sum((0, 1)) / ((ranks - 1) * (times - 1))


def of_ranks(seen, eps):
    """Samples that one rank's batch is worth."""
    return 1 / residuals_of(in_deviations(seen, eps))


def of_halves(steps, eps):
    """The same of one rank alone: from the difference of the halves' means."""
    found = []
    for x, _, _ in steps:
        first = len(x) // 2
        apart = flat(x[:first]).mean(0) - flat(x[first:]).mean(0)
        found.append(apart**2 * first * (len(x) - first) / len(x) ** 2 / (flat(x).var(0) + eps))
    return 1 / np.mean(found, 0)


def two_way(means_KTC):
    """F of the ranks in a two-way analysis of variance, ranks × times without replication, over its median."""
    ranks, times, _ = means_KTC.shape
    free = (ranks - 1) * (times - 1)
    f = times * means_KTC.mean(1).var(0, ddof=1) / residuals_of(means_KTC)
    return f / scipy.stats.f.median(ranks - 1, free)


def anova(values, each):
    """F and the intraclass correlation of one step, every value counted as a part `each` of a sample."""
    units = [(len(x) * part, x.mean(0), x.var(0)) for x, part in zip(values, each, strict=True)]
    total = sum(n for n, _, _ in units)
    whole = sum(n * mean for n, mean, _ in units) / total
    between = sum(n * (mean - whole) ** 2 for n, mean, _ in units) / (len(units) - 1)
    within = sum(n * var for n, _, var in units) / (total - len(units))
    size = (total - sum(n * n for n, _, _ in units) / total) / (len(units) - 1)
    between = np.where(total > len(units), between, np.nan)  # fewer samples than ranks tell nothing
    return {"f": between / within, "icc": (between - within) / (between + (size - 1) * within)}


def spread(running, eps):
    """The furthest rank's running statistics from the mixture of all."""
    means, variances = (np.array(part) for part in zip(*running, strict=True))
    variances = variances + eps
    mean, var = means.mean(0), variances.mean(0) + means.var(0)
    return np.max(
        [reference_drift.textbook((m - mean) ** 2, v, var)["jeffreys"] for m, v in zip(means, variances, strict=True)],
        0,
    )


def flat(x):
    """[N, C, *] as [values, C]."""
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def of_layer(values_C, less_is_worse=False):
    """Median, 95th percentile towards the worst, the worst and where it is."""
    known = values_C[~np.isnan(values_C)]
    tail = 5 if less_is_worse else 95
    worst = np.nanargmin(values_C) if less_is_worse else np.nanargmax(values_C)
    return np.median(known), np.percentile(known, tail), values_C[worst], worst


def probability_of_relu(weight, bias):
    """Of a normalized Gaussian channel being above 0."""
    return scipy.stats.norm.cdf(bias / np.abs(weight))
