"""Frozen batch normalization: constants that no training step moves.

Legend: N samples, C channels, * positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distnorm.norms.base import followed


class FrozenBatchNorm(nn.Module):
    """Scale and shift each channel by constants: a batch norm whose statistics and affine part stay as they are.

        y = (x - running_mean) / sqrt(running_var + eps) * weight + bias

    `train()` changes nothing. Not a `_BatchNorm`: nothing that looks for batch norms to update finds it.
    """

    layer_name: str = ""
    after: tuple[str, ...] = ()
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype), False)
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype), False)
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Scale and shift. Shape: input [N, C, *] floating; output the same."""
        weight, bias = (None if p is None else p.detach() for p in (self.weight, self.bias))
        y = functional.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            weight,
            bias,
            training=False,
            eps=self.eps,
        )
        return followed(self, y)
