"""Weight standardization: filters of mean 0 and variance 1, the partner of GroupNorm at tiny batches."""

from typing import Any

import torch
from torch import Tensor, nn


def standardized(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Standardize each output filter.

        (w - mean(w)) / sqrt(var(w) + eps)

    Shape: weight [C_out, C_in / groups, *]; result the same.

    Source: Qiao et al. 2019, equation 3 (there the deviation, not the variance, is offset by eps).
    """
    var, mean = torch.var_mean(weight, list(range(1, weight.dim())), correction=0, keepdim=True)
    return (weight - mean) * torch.rsqrt(var + eps)


class StandardizedConv1d(nn.Conv1d):
    """`nn.Conv1d` that convolves with its standardized weight; the parameter, and `state_dict`, stay as they are."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        output: Tensor = super()._conv_forward(input, standardized(weight), bias)
        return output


class StandardizedConv2d(nn.Conv2d):
    """`nn.Conv2d` that convolves with its standardized weight; the parameter, and `state_dict`, stay as they are."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        output: Tensor = super()._conv_forward(input, standardized(weight), bias)
        return output


class StandardizedConv3d(nn.Conv3d):
    """`nn.Conv3d` that convolves with its standardized weight; the parameter, and `state_dict`, stay as they are."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        output: Tensor = super()._conv_forward(input, standardized(weight), bias)
        return output


STANDARDIZED: dict[type[nn.Module], type[Any]] = {
    nn.Conv1d: StandardizedConv1d,
    nn.Conv2d: StandardizedConv2d,
    nn.Conv3d: StandardizedConv3d,
}
