"""The other normalizers, straight from their papers: float64 numpy, gradients by hand. Nothing here knows torch.

Legend: N samples, C channels, * positions, V = N · * values of a channel.
"""

import numpy as np


def by_channel(x: np.ndarray) -> np.ndarray:
    """[N, C, *] as [C, V]."""
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def like(values_CV: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[C, V] as [N, C, *] again."""
    return np.moveaxis(values_CV.reshape(x.shape[1], x.shape[0], *x.shape[2:]), 0, 1)


def batch_renorm(x, dy, weight, bias, running_mean, running_var, r_limit, d_limit, eps=1e-5, momentum=0.1):
    """One training step: Ioffe 2017, algorithm 1 and the derivatives after it, over running variances."""
    values, grads = by_channel(x), by_channel(dy)
    count, mean, var = values.shape[1], values.mean(1), values.var(1)
    std, running_std = np.sqrt(var + eps), np.sqrt(running_var + eps)
    r = np.clip(std / running_std, 1 / r_limit, r_limit)
    d = np.clip((mean - running_mean) / running_std, -d_limit, d_limit)
    xhat = (values - mean[:, None]) / std[:, None] * r[:, None] + d[:, None]
    dxhat = grads * weight[:, None]
    centred = values - mean[:, None]
    dstd = (dxhat * centred).sum(1) * -r / std**2
    dmean = dxhat.sum(1) * -r / std
    dx = dxhat * (r / std)[:, None] + (dstd / (count * std))[:, None] * centred + (dmean / count)[:, None]
    return {
        "y": like(xhat * weight[:, None] + bias[:, None], x),
        "dx": like(dx, x),
        "dweight": (grads * xhat).sum(1),
        "dbias": grads.sum(1),
        "running_mean": running_mean + momentum * (mean - running_mean),
        "running_var": running_var + momentum * (var * count / (count - 1) - running_var),
    }


def frozen_batch_norm(x, dy, weight, bias, mean, var, eps=1e-5):
    """Constants a channel."""
    scale = (weight / np.sqrt(var + eps))[:, None]
    return {
        "y": like((by_channel(x) - mean[:, None]) * scale + bias[:, None], x),
        "dx": like(by_channel(dy) * scale, x),
    }


def batch_norm_step(x, weight, bias, eps=1e-5):
    """Batch norm of [N, C], and the batch's mean and unbiased variance."""
    mean, var = x.mean(0), x.var(0)
    return (x - mean) / np.sqrt(var + eps) * weight + bias, mean, x.var(0, ddof=1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(xs, h, c, weights, statistics=None):
    """Batch normalized LSTM over time, Cooijmans et al. 2017, equations 6 to 8; gates in the order i, f, g, o.

    Args:
        xs: [T, N, I].
        h: [N, H].
        c: [N, H].
        weights: ih [4H, I], hh [4H, H], bias [4H], gains of the norms of both [4H], gain and shift [H] of the cell's.
        statistics: of each time step, mean and variance of the three norms; the batch's own, if `None`.

    Returns:
        h and c after each step; and mean and unbiased variance of the three norms at each.
    """
    w_ih, w_hh, bias, gain_ih, gain_hh, gain_c, shift_c = weights
    found, measured = [], []

    def norm(x, gain, shift, t, place):
        if statistics is not None:
            mean, var = statistics[t][place]
            return (x - mean) / np.sqrt(var + 1e-5) * gain + shift
        y, mean, var = batch_norm_step(x, gain, shift)
        measured[-1].append((mean, var))
        return y

    for t, x in enumerate(xs):
        measured.append([])
        gates = norm(x @ w_ih.T, gain_ih, 0, t, 0) + norm(h @ w_hh.T, gain_hh, 0, t, 1) + bias
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(norm(c, gain_c, shift_c, t, 2))
        found.append((h, c))
    return found, measured


def filter_response_norm(x, dy, weight, bias, eps=1e-6):
    """Singh & Krishnan 2020, equations 1 and 2, and the derivatives of their appendix."""
    over, wide = tuple(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    invrms = 1 / np.sqrt((x**2).mean(over, keepdims=True) + eps)
    xhat, dxhat = x * invrms, dy * weight.reshape(wide)
    deps = (-0.5 * dxhat * x * invrms**3).sum()
    return {
        "y": xhat * weight.reshape(wide) + bias.reshape(wide),
        "dx": invrms * (dxhat - xhat * (dxhat * xhat).mean(over, keepdims=True)),
        "dweight": (dy * xhat).sum((0, *over)),
        "dbias": dy.sum((0, *over)),
        "deps": deps,
    }


def standardized_filters(weight, eps=1e-5):
    """Qiao et al. 2019: each row of [O, fan-in] less its mean, over its deviation."""
    return (weight - weight.mean(1, keepdims=True)) / np.sqrt(weight.var(1, keepdims=True) + eps)


def local_response_norm(x, size, alpha, beta, k):
    """Krizhevsky et al. 2012, section 3.3, channel by channel; torch's alpha is divided by the channels in a window."""
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        window = slice(max(0, c - size // 2), min(x.shape[1], c + size // 2 + 1))
        y[:, c] = x[:, c] / (k + alpha / size * (x[:, window] ** 2).sum(1)) ** beta
    return y
