"""Weight standardization: filters of mean 0 and variance 1, the partner of GroupNorm at tiny batches.

Convolutions as torch's own, that convolve with their standardized weight: parameters and `state_dict` stay as they are,
and what a norm after the convolution would take away, the filters' scale, cannot grow.

Legend: O output channels, I input channels, * positions of the filter.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distnorm.errors import ConfigError, divisors_in_words
from distnorm.norms.arguments import check_eps
from distnorm.norms.leaf import TracedAsLeaf
from distnorm.norms.quantizing import check_not_quantized


def standardized(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Standardize each output filter.

        (w - mean(w)) / sqrt(var(w) + eps)

    A filter of one weight, that of a depthwise 1×1 convolution, would be 0, and stays as it is. Half precision is
    computed in float32, and rounded once.

    Args:
        weight: of a convolution.
        eps: added to the variance.

    Shape: weight [O, I / groups, *]; result the same.

    Example:
        >>> standardized(torch.tensor([[[1.0, 3.0]]]), eps=0)
        tensor([[[-1.,  1.]]])

    Source: Qiao et al. 2019, equations 5 and 6 (there eps is added to the deviation, not to the variance).
    """
    if not eps >= 0:  # nor nan
        check_eps("standardized() got", eps)
    if weight[:1].numel() == 1:
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    var, mean = torch.var_mean(wide, list(range(1, weight.dim())), correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(var + eps)).to(weight.dtype)


def standardized_transposed(weight: Tensor, groups: int = 1, eps: float = 1e-5) -> Tensor:
    """Standardize each output filter of a transposed convolution, whose weight has its input channels first.

    An output channel belongs to one group, and sees this group's input channels.

    Args:
        weight: of a transposed convolution.
        groups: of the convolution.
        eps: added to the variance.

    Shape: weight [I, O / groups, *]; result the same.

    Example:
        >>> standardized_transposed(torch.tensor([[[1.0]], [[3.0]]]), eps=0).flatten()
        tensor([-1.,  1.])

    Source: as `standardized`.
    """
    if groups < 1 or weight.shape[0] % groups:
        raise ConfigError(
            f"standardized_transposed() got groups={groups} for {weight.shape[0]} input channels, which groups divide "
            f"evenly. Use {divisors_in_words(weight.shape[0])}."
        )
    by_group = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # [groups, O / groups, I / groups, *]
    filters = standardized(by_group.flatten(0, 1), eps)
    result: Tensor = filters.unflatten(0, by_group.shape[:2]).transpose(1, 2).flatten(0, 1)
    return result


class StandardizedConv1d(TracedAsLeaf, nn.Conv1d):
    """`nn.Conv1d` with standardized filters.

    Shape: input [N, I, L]; output [N, O, L'].

    Collective: none.

    Example:
        >>> StandardizedConv1d(2, 4, 3)(torch.randn(8, 2, 5)).shape
        torch.Size([8, 4, 3])

    Source: as `standardized`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        check_not_quantized(type(self).__name__, input)
        output: Tensor = super()._conv_forward(input, standardized(weight), bias)
        return output


class StandardizedConv2d(TracedAsLeaf, nn.Conv2d):
    """`nn.Conv2d` with standardized filters.

    Shape: input [N, I, H, W]; output [N, O, H', W'].

    Collective: none.

    Example:
        >>> StandardizedConv2d(2, 4, 3)(torch.randn(8, 2, 5, 5)).shape
        torch.Size([8, 4, 3, 3])

    Source: as `standardized`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        check_not_quantized(type(self).__name__, input)
        output: Tensor = super()._conv_forward(input, standardized(weight), bias)
        return output


class StandardizedConv3d(TracedAsLeaf, nn.Conv3d):
    """`nn.Conv3d` with standardized filters.

    Shape: input [N, I, D, H, W]; output [N, O, D', H', W'].

    Collective: none.

    Example:
        >>> StandardizedConv3d(2, 4, 3)(torch.randn(8, 2, 5, 5, 5)).shape
        torch.Size([8, 4, 3, 3, 3])

    Source: as `standardized`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        check_not_quantized(type(self).__name__, input)
        output: Tensor = super()._conv_forward(input, standardized(weight), bias)
        return output


class StandardizedConvTranspose1d(TracedAsLeaf, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with standardized filters, each an output channel's over the input channels of its group.

    Shape: input [N, I, L]; output [N, O, L'].

    Collective: none.

    Example:
        >>> StandardizedConvTranspose1d(2, 4, 3)(torch.randn(8, 2, 5)).shape
        torch.Size([8, 4, 7])

    Source: as `standardized`.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """Convolve, to a given size of the output where several fit."""
        return _convolve_transposed(self, functional.conv_transpose1d, input, output_size)


class StandardizedConvTranspose2d(TracedAsLeaf, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with standardized filters, each an output channel's over the input channels of its group.

    Shape: input [N, I, H, W]; output [N, O, H', W'].

    Collective: none.

    Example:
        >>> StandardizedConvTranspose2d(2, 4, 3)(torch.randn(8, 2, 5, 5)).shape
        torch.Size([8, 4, 7, 7])

    Source: as `standardized`.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """Convolve, to a given size of the output where several fit."""
        return _convolve_transposed(self, functional.conv_transpose2d, input, output_size)


class StandardizedConvTranspose3d(TracedAsLeaf, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with standardized filters, each an output channel's over the input channels of its group.

    Shape: input [N, I, D, H, W]; output [N, O, D', H', W'].

    Collective: none.

    Example:
        >>> StandardizedConvTranspose3d(2, 4, 3)(torch.randn(8, 2, 5, 5, 5)).shape
        torch.Size([8, 4, 7, 7, 7])

    Source: as `standardized`.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """Convolve, to a given size of the output where several fit."""
        return _convolve_transposed(self, functional.conv_transpose3d, input, output_size)


def _convolve_transposed(
    conv: Any, convolve: Callable[..., Tensor], x: Tensor, output_size: list[int] | None
) -> Tensor:
    check_not_quantized(type(conv).__name__, x)
    weight, dimensions = standardized_transposed(conv.weight, conv.groups), len(conv.kernel_size)
    sizes = conv.stride, conv.padding, conv.kernel_size, dimensions, conv.dilation
    output_padding = conv._output_padding(x, output_size, *sizes)  # noqa: SLF001
    return convolve(x, weight, conv.bias, conv.stride, conv.padding, output_padding, conv.groups, conv.dilation)


STANDARDIZED: dict[type[nn.Module], type[Any]] = {
    nn.Conv1d: StandardizedConv1d,
    nn.Conv2d: StandardizedConv2d,
    nn.Conv3d: StandardizedConv3d,
    nn.ConvTranspose1d: StandardizedConvTranspose1d,
    nn.ConvTranspose2d: StandardizedConvTranspose2d,
    nn.ConvTranspose3d: StandardizedConvTranspose3d,
}
"""What each of torch's convolutions becomes."""
