"""Filter response normalization: each channel of each sample divided by its root mean square.

Legend: N samples, C channels, * positions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distnorm.norms.base import followed


class FilterResponseNorm(nn.Module):
    """Divide each channel of each sample by its root mean square over the positions.

    y = x / sqrt(mean(x²) + |eps|) * weight + bias
    """

    layer_name: str = ""
    after: tuple[str, ...] = ()

    def __init__(
        self, num_features: int, eps: float = 1e-6, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize. Shape: input [N, C, *] floating, at least one position dimension; output the same."""
        shape = (-1, *[1] * (input.dim() - 2))
        square = input.float().square().mean(list(range(2, input.dim())), keepdim=True)
        y = (input * torch.rsqrt(square + abs(self.eps))).to(input.dtype)
        if self.weight is not None:
            y = y * self.weight.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return followed(self, y)
