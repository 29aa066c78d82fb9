"""What the layers must equal: float64 formulas straight from the papers, in numpy, and torch's own layer on the joined
batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def moments(x: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean and summed squared deviation per channel of [N, C, *]."""
    values = np.moveaxis(x.astype(np.float64), 1, 0).reshape(x.shape[1], -1)
    mean = values.mean(1)
    return values.shape[1], mean, ((values - mean[:, None]) ** 2).sum(1)


def pooled(means: np.ndarray, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of an equal mixture: law of total variance. [R, C] each."""
    return means.mean(0), variances.mean(0) + means.var(0)


def jeffreys(mean_p: float, var_p: float, mean_q: float, var_q: float) -> float:
    """KL(p‖q) + KL(q‖p) of Gaussians, each from its own textbook formula."""

    def kl(m1: float, v1: float, m2: float, v2: float) -> float:
        return 0.5 * (np.log(v2 / v1) + (v1 + (m1 - m2) ** 2) / v2 - 1)

    return kl(mean_p, var_p, mean_q, var_q) + kl(mean_q, var_q, mean_p, var_p)


def excess_jeffreys(
    shards: Sequence[np.ndarray], running_mean: np.ndarray, running_var: np.ndarray, momentum: float, eps: float = 1e-5
) -> np.ndarray:
    """Divergence of the joined [N, C, *] batch from its running statistics, less what chance alone gives. [C]."""
    joined = np.concatenate(shards)
    count, mean, m2 = moments(joined)
    n, noise = len(joined), momentum / (2 - momentum)
    inverse = 1 / (1 - 2 * noise / (n - 1))  # mean of 1 / running variance, a Gamma variable
    floor = ((1 + noise / n) * inverse + (n + 1 + noise) / (n - 3)) / 2 - 1
    return jeffreys(mean, m2 / count + eps, running_mean, running_var + eps) - floor


def batch_norm_on_joined(
    shards: Sequence[Tensor], grads: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float = 1e-5
):
    """Torch's own layer on the concatenated batch: outputs and input gradients a shard, weight gradients, running
    statistics.
    """
    layer = BATCH_NORMS[shards[0].dim()](weight.numel(), eps=eps, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    x = torch.cat(list(shards)).clone().requires_grad_()
    y = layer(x)
    y.backward(torch.cat(list(grads)))
    sizes = [len(shard) for shard in shards]
    return {
        "y": y.detach().split(sizes),
        "dx": x.grad.split(sizes),
        "dweight": layer.weight.grad,
        "dbias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }


def batch_norm(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> dict[str, Tensor]:
    """One training step by the paper's formulas (Ioffe & Szegedy 2015, section 3), in numpy and float64.

    Args:
        x: [N, C, *], of any dtype, taken as it is rounded.
        dy: gradient of the output.
        weight: [C], or `None` for ones.
        bias: [C], or `None` for zeros.
        mask: [N, *], `True` where a value counts; all do, if `None`.
        eps: added to the variance.
        momentum: of running statistics that start at 0 and 1.
    """
    shape, channels = x.shape, x.shape[1]

    def by_channel(t: Tensor) -> np.ndarray:
        return np.moveaxis(t.double().numpy(), 1, 0).reshape(channels, -1)

    def back(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.moveaxis(values.reshape(channels, shape[0], *shape[2:]), 0, 1).copy())

    keep = np.ones(x[:, 0].numel(), bool) if mask is None else mask.expand(x[:, 0].shape).numpy().reshape(-1)
    gain = np.ones(channels) if weight is None else weight.double().numpy()
    shift = np.zeros(channels) if bias is None else bias.double().numpy()
    values, grads = by_channel(x)[:, keep], by_channel(dy)[:, keep]
    count, mean = values.shape[1], values.mean(1)
    var = ((values - mean[:, None]) ** 2).mean(1)
    invstd = 1 / np.sqrt(var + eps)
    xhat = (values - mean[:, None]) * invstd[:, None]
    y, dx = np.zeros_like(by_channel(x)), np.zeros_like(by_channel(x))
    y[:, keep] = xhat * gain[:, None] + shift[:, None]
    centred = grads - grads.mean(1)[:, None] - xhat * (grads * xhat).mean(1)[:, None]
    dx[:, keep] = (gain * invstd)[:, None] * centred
    return {
        "y": back(y),
        "dx": back(dx),
        "dweight": torch.from_numpy((grads * xhat).sum(1)),
        "dbias": torch.from_numpy(grads.sum(1)),
        "running_mean": torch.from_numpy(momentum * mean),
        "running_var": torch.from_numpy(1 - momentum + momentum * var * count / (count - 1)),
    }


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Largest error, relative to the largest value."""
    return float((found.double() - truth).abs().max() / truth.abs().max())
