"""Filter response normalization: each channel of each sample divided by its root mean square; and its activation.

Legend: N samples, C channels, * positions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distnorm.errors import ConfigError, ShapeError
from distnorm.moments import statistics_dtype
from distnorm.norms.base import check_input, followed, name_in_words
from distnorm.norms.kernels import wide
from distnorm.norms.leaf import TracedAsLeaf


class FilterResponseNorm(TracedAsLeaf, nn.Module):
    """Divide each channel of each sample by its root mean square over the positions.

        y = x / sqrt(mean(x²) + |eps|) * weight + bias

    No mean is taken away, so that no batch is needed; `ThresholdedLinearUnit`, that learns where to cut, makes up for
    it in place of ReLU. Squares are summed in float32 or better.

    Args:
        num_features: C, channels of the input.
        eps: added to the mean square.
        learnable_eps: make `eps` a parameter, one for all channels: for layers with few positions, whose mean square
            may be near 0.
        device: where parameters live.
        dtype: of parameters.

    Shape: input [N, C, *] floating, at least one position; N may be 0. output: the same.

    Collective: none.

    Raises:
        ConfigError: `eps` is not above 0.
        ShapeError: dimension 1 is not `num_features`; the input is not floating; or it has no positions: of one value
            nothing but the sign would be left.

    Example:
        >>> layer = torch.nn.Sequential(FilterResponseNorm(3), ThresholdedLinearUnit(3))
        >>> layer(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])

    Source: Singh & Krishnan 2020, equations 1 and 2, and section 3.2 for `learnable_eps`. An input [N, C], to which the
        paper would have it fit too, is refused.
    """

    layer_name: str = ""
    after: tuple[str, ...] = ()
    eps: float | Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        *,
        learnable_eps: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not eps > 0:
            raise ConfigError(
                f"eps={eps} must be above 0: a channel may be 0 everywhere. Use 1e-6, or 1e-4 if learned."
            )
        self.num_features = num_features
        self.eps = nn.Parameter(torch.tensor(eps, device=device, dtype=dtype)) if learnable_eps else eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        """Show the channels and eps."""
        return f"{self.num_features}, eps={'learned' if isinstance(self.eps, Tensor) else self.eps}"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize.

        Shape: input [N, C, *] floating; output: the same.
        """
        check_input(self, input)
        if input.dim() < 3:
            raise ShapeError(
                f"{name_in_words(self)} got an input of shape {tuple(input.shape)}, without positions to take a mean "
                "over.\nPut it before the pooling or flattening, or use nn.LayerNorm there.",
            )
        x = input.to(statistics_dtype(input.dtype))
        square = x.square().mean(list(range(2, x.dim())), keepdim=True)
        eps = self.eps.abs() if isinstance(self.eps, Tensor) else self.eps
        y = x * torch.rsqrt(square + eps)
        if self.weight is not None:
            y = y * wide(self.weight, y)
        if self.bias is not None:
            y = y + wide(self.bias, y)
        return followed(self, y.to(input.dtype))


class ThresholdedLinearUnit(TracedAsLeaf, nn.Module):
    """Cut each channel off below a threshold that it learns.

        z = max(y, tau)

    ReLU with a learned kink: filter response normalization leaves means where they are, and zero need not be among the
    values.

    Args:
        num_features: C, channels of the input.
        device: where the parameter lives.
        dtype: of the parameter.

    Shape: input [N, C, *] floating. output: the same. `tau` [C], 0 in the beginning.

    Collective: none.

    Raises:
        ShapeError: dimension 1 is not `num_features`; or the input is not floating.

    Example:
        >>> ThresholdedLinearUnit(2)(torch.tensor([[-1.0, 2.0]]))
        tensor([[0., 2.]], grad_fn=<MaximumBackward0>)

    Source: Singh & Krishnan 2020, equation 3.
    """

    layer_name: str = ""

    def __init__(self, num_features: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.tau = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        """Show the channels."""
        return str(self.num_features)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Cut off. Shape: input [N, C, *] floating; output: the same."""
        check_input(self, input)
        return torch.maximum(input, wide(self.tau.to(input.dtype), input))
