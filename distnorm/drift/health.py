"""Health of channels, seen from parameters and statistics alone: no activation is looked at.

Legend: L layers, C channels of a layer, S channels of all layers one after the other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm.drift.summary import total


def dead_channels(weight: Tensor, running_var: Tensor, eps: Tensor | float, median: Tensor) -> Tensor:
    """Tell which channels carry nothing: |γ| < 0.001 · median |γ|, or σ²_run < 10 eps.

    Args:
        weight: γ; ones for a layer without.
        running_var: σ²_run.
        eps: the layer's own.
        median: of |γ| over the layer's channels, as `summarize(weight.abs(), channels).median` gives it.

    Shape: all broadcast to the result, a boolean mask.
    """
    return (weight.abs() < 1e-3 * median) | (running_var < 10 * eps)


def dead_relus(weight: Tensor, bias: Tensor) -> Tensor:
    """Tell behind which channels a ReLU gives 0 for every input, whatever it is: β + 3 |γ| < 0.

    A normalized channel is above 0 with probability Φ(β / |γ|): here less than 0.14 %.

    Shape: weight and bias broadcast to the result, a boolean mask.

    Source: the normal distribution's 3σ.
    """
    return bias + 3 * weight.abs() < 0


def affine_drift(
    now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], channels: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """How far each layer's weights and biases have moved.

        weights: ‖γ - γ₀‖ / ‖γ₀‖        biases, in standard deviations of the output: ‖β - β₀‖ / ‖γ₀‖

    Args:
        now: γ and β.
        before: γ₀ and β₀, e.g. of the last epoch.
        channels: how many each layer has.

    Shape: now and before [S] each; results [L].
    """
    (weight, bias), (weight_before, bias_before) = now, before
    squares = torch.stack(
        ((weight - weight_before).square(), (bias - bias_before).square(), weight_before.square())
    ).double()
    weights_L, biases_L, norm_L = total(squares, channels).sqrt()
    return weights_L / norm_L, biases_L / norm_L


def non_finite(mean: Tensor, var: Tensor) -> Tensor:
    """Tell which channels' statistics overflowed: a mean or variance that is nan or inf, or a variance below 0.

    Shape: mean and var broadcast to the result, a boolean mask.
    """
    return ~(mean.isfinite() & var.isfinite() & (var >= 0))
