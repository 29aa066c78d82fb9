"""Norms of one sample at a time, through torch's own: GroupNorm, LayerNorm and InstanceNorm are groups of channels."""

from torch import Tensor, nn

from distnorm.norms.base import followed


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, and the activation of a batch norm that had one built in."""

    after: tuple[str, ...] = ()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize, then apply what follows. Shape: input [N, C, *]; output the same."""
        return followed(self, super().forward(input))


class Identity(nn.Module):
    """No normalization; what followed it stays."""

    after: tuple[str, ...] = ()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Apply what follows, if anything. Shape: any."""
        works_in_place = any(getattr(module, "inplace", False) for module in self.modules())
        return followed(self, input.clone() if works_in_place else input)  # a norm's output was nobody else's
