"""Norms of one sample at a time, through torch's own: GroupNorm, LayerNorm and InstanceNorm are groups of channels.

    groups = 1: the LayerNorm of a convolutional net: over channels and positions, with an affine part a channel
        (`nn.LayerNorm` over [C, *] would have one a position too, and fit one size of input).
    groups = C: InstanceNorm: over positions. One value a channel, as in [N, C], leaves nothing; nor does torch's own
        layer help there: `nn.InstanceNorm1d` takes [N, C] for one unbatched sample [C, L], and normalizes each sample
        over its channels (torch warns only where N is not num_features; measured with torch 2.13).

Local response normalization is `nn.LocalResponseNorm`, whose `alpha` is divided by the channels of its window; in
Krizhevsky et al. 2012, section 3.3, it is not.

Legend: N samples, C channels, * positions.
"""

from torch import Tensor, nn

from distnorm.norms.base import followed
from distnorm.norms.leaf import TracedAsLeaf


class GroupNorm(TracedAsLeaf, nn.GroupNorm):
    """`nn.GroupNorm`, and the activation of a batch norm that had one built in.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    with mean and variance of each sample, over the channels of a group and all positions.

    Shape: input [N, C, *] floating. output: the same.

    Collective: none.

    Example:
        >>> import torch
        >>> GroupNorm(2, 4)(torch.randn(8, 4, 5)).shape
        torch.Size([8, 4, 5])

    Source: Wu & He 2018, equations 1 and 7.
    """

    after: tuple[str, ...] = ()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize, then apply what follows.

        Shape: input [N, C, *]; output: the same.
        """
        return followed(self, super().forward(input))


class Identity(TracedAsLeaf, nn.Module):
    """No normalization; what followed it stays.

    The output is a copy, as a norm's is: `nn.ReLU(inplace=True)` after it may not reach what a residual keeps.

    Shape: input any. output: the same, unless what follows changes it.

    Collective: none.

    Example:
        >>> import torch
        >>> Identity()(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])

    Source: `nn.Identity`.
    """

    after: tuple[str, ...] = ()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Apply what follows, if anything.

        Shape: any.
        """
        return followed(self, input.clone())
