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
