"""Running statistics against precise ones, with what chance alone makes of them.

Legend: C channels; T rows of running statistics in recurrent layers, that are then [T, C].
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.calibration import Forward, calibrated
from distnorm.convert import normalization_layers
from distnorm.drift.divergence import jeffreys
from distnorm.errors import ConfigError


@dataclass(frozen=True)
class Precise:
    """How far a layer's running statistics are from its precise ones, a channel.

    Shape: [C], or [T, C].

    Attributes:
        jeffreys: excess Jeffreys divergence, in nats: about 0 where the two differ by chance; nan where there are
            too few samples to tell.
        ratio: running / precise variance, each with the layer's eps.
        error: standard error of the ratio.
    """

    jeffreys: Tensor
    ratio: Tensor
    error: Tensor


def against_precise(
    model: nn.Module,
    batches: Iterable[Any],
    num_samples: int = 1024,
    forward: Forward | None = None,
    *,
    normalization_batch: int | Mapping[str, int] = 32,
) -> dict[str, Precise]:
    """Compare the running statistics of each layer with those that `calibrate` measures over real batches.

        ratio = running var / precise var;   error = ratio · sqrt(2 / ν_r + 2 / ν_p)

    Both have noise. n calibrated samples tell a mean to 1 / n and leave ν_p = n - 1 degrees of freedom; a running
    average over batches of b samples at momentum m counts as b (2 - m) / m samples and ν_r = (b - 1) (2 - m) / m. The
    divergence has its expectation for such noise taken off. Counted are samples, not positions: where positions tell
    more, the excess falls below 0 and the error is too large; where values have heavy tails, the error is too small.

    A running average that has not taken 1 / m batches yet is still what it began with, and shows so.

    Args:
        model: as for `calibrate`.
        batches: likewise.
        num_samples: likewise.
        forward: likewise.
        normalization_batch: b, samples that shared statistics in training, of all layers or by the layer's name; a
            layer that is not named gets 32.

    Returns:
        By the name of each layer that was given values. The running statistics are this rank's own; to judge pooled
        ones, swap them in before (`evaluation_statistics`).

    Shape: of each layer as its `running_mean`: [C], or [T, C].

    Collective: those of `calibrate`.

    Raises:
        ConfigError: as `calibrate`; or a `normalization_batch` is below 1.
        GroupError: as `calibrate`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.BatchNorm1d(1))  # its running variance is 1
        >>> found = against_precise(model, [torch.tensor([[-2.0], [0.0], [2.0], [0.0], [0.0]])])
        >>> found["0"].ratio
        tensor([0.5000], dtype=torch.float64)
    """
    _check_batch(normalization_batch)
    statistics, samples = calibrated(model, batches, num_samples, forward)
    found = {}
    for name, layer in normalization_layers(model):
        prefix = f"{name}.".lstrip(".")
        if f"{prefix}running_mean" in statistics:
            batch = (
                normalization_batch.get(name, 32) if isinstance(normalization_batch, Mapping) else normalization_batch
            )
            precise = statistics[f"{prefix}running_mean"], statistics[f"{prefix}running_var"]
            found[name] = _compare(layer, *precise, samples, batch)
    return found


def _compare(layer: _BatchNorm, mean: Tensor, var: Tensor, samples: int, batch: int) -> Precise:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean_p, var_p = layer.running_mean.double(), layer.running_var.double() + layer.eps
    mean_q, var_q = mean.double(), var.double() + layer.eps
    weight = _share_of_batch(layer)
    of_mean = weight / batch + 1 / samples
    of_var = (weight / (batch - 1) if batch > 1 else math.inf), (1 / (samples - 1) if samples > 1 else math.inf)
    ratio = var_p / var_q
    floor = expected_jeffreys(of_mean, *of_var)
    return Precise(jeffreys(mean_p, var_p, mean_q, var_q) - floor, ratio, ratio * math.sqrt(2 * sum(of_var)))


def expected_jeffreys(of_mean: float, of_var_p: float, of_var_q: float) -> float:
    """Expect the Jeffreys divergence of two estimates of one Gaussian, each with unbiased variance.

        E J = ((1 + u) (1 / (1 - 2 p) + 1 / (1 - 2 q))) / 2 - 1

    For p = 0 and n samples, u = 1 / n and q = 1 / (n - 1), it is 2 (n - 1) / (n (n - 3)). Exact for the variance of one
    set of samples; that of a running average is taken for one of as many degrees of freedom, which is within 3 % from 8
    samples a batch on (simulated), and 6 % too much for 4 at momentum 0.5.

    Args:
        of_mean: u, variance of the difference of the two means, in variances.
        of_var_p: p, 1 / degrees of freedom of the first variance.
        of_var_q: q, of the second.

    Returns:
        nats; nan where a variance has 2 degrees of freedom or less: the expectation does not exist.
    """
    if max(of_var_p, of_var_q) >= 0.5:
        return math.nan
    return (1 + of_mean) * (1 / (1 - 2 * of_var_p) + 1 / (1 - 2 * of_var_q)) / 2 - 1


def _share_of_batch(layer: _BatchNorm) -> float:
    """Tell what the noise of a batch is worth in a layer's running average: the sum of its squared weights."""
    if layer.momentum is not None:
        return layer.momentum / (2 - layer.momentum)
    return 1 / max(1.0, float(layer.num_batches_tracked.max())) if layer.num_batches_tracked is not None else 1.0


def _check_batch(normalization_batch: int | Mapping[str, int]) -> None:
    named = normalization_batch if isinstance(normalization_batch, Mapping) else {"": normalization_batch}
    for name, batch in named.items():
        if not isinstance(batch, int) or batch < 1:
            of = f" for layer {name!r}" if name else ""
            raise ConfigError(
                f"against_precise() got normalization_batch={batch!r}{of}; at least 1 sample shares statistics.\n"
                "Give the number that did in training, e.g. 32.",
            )
