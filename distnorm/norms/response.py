"""Filter response normalization: each channel of each sample divided by its root mean square; and its activation.

Legend: N samples, C channels, * positions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distnorm.errors import ShapeError
from distnorm.moments import statistics_dtype
from distnorm.norms import arguments, sharded
from distnorm.norms.base import followed
from distnorm.norms.inputs import check_input, name_in_words
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
        ConfigError: an argument is out of its range, e.g. `eps` not above 0.
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
    initial_eps: float = 1e-4
    takes_whole_samples: bool = True

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
        remedy = "A channel may be 0 everywhere. Use 1e-6, or 1e-4 if learned"
        arguments.check_eps(self, eps, zero=False, remedy=remedy)
        arguments.check_flag(self, "learnable_eps", learnable_eps)
        num_features = _check_channels(self, num_features, dtype)
        self.num_features, self.initial_eps = num_features, float(eps)
        self.eps = nn.Parameter(torch.tensor(float(eps), device=device, dtype=dtype)) if learnable_eps else eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the weight to 1, the bias to 0, and a learned `eps` to what the constructor was given."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if isinstance(self.eps, Tensor):
            nn.init.constant_(self.eps, self.initial_eps)

    def extra_repr(self) -> str:
        """Show the channels and eps."""
        return f"{self.num_features}, eps={'learned' if isinstance(self.eps, Tensor) else self.eps}"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize.

        Shape: input [N, C, *] floating; output: the same.
        """
        if type(input) is not Tensor and sharded.is_sharded(input):
            return sharded.on_shard(self, FilterResponseNorm.forward, input)
        check_input(self, input)
        if input.dim() < 3:
            raise ShapeError(
                f"{name_in_words(self)} got an input of shape {tuple(input.shape)}, without positions to take a mean "
                "over.\nPut it before the pooling or flattening, or use nn.LayerNorm there.",
            )
        x = input.to(statistics_dtype(input.dtype))
        square = x.square().mean(list(range(2, x.dim())), keepdim=True)
        eps = self.eps.abs() if isinstance(self.eps, Tensor) else self.eps
        if not isinstance(eps, Tensor) and not eps >= 0:  # nor nan; it may have been set after construction
            arguments.check_eps(f"{name_in_words(self)} has", eps)
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
        ConfigError: an argument is out of its range.
        ShapeError: dimension 1 is not `num_features`; or the input is not floating.

    Example:
        >>> ThresholdedLinearUnit(2)(torch.tensor([[-1.0, 2.0]]))
        tensor([[0., 2.]], grad_fn=<MaximumBackward0>)

    Source: Singh & Krishnan 2020, equation 3.
    """

    layer_name: str = ""

    def __init__(self, num_features: int, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.num_features = num_features = _check_channels(self, num_features, dtype)
        self.tau = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the thresholds to 0, where ReLU has them."""
        nn.init.zeros_(self.tau)

    def extra_repr(self) -> str:
        """Show the channels."""
        return str(self.num_features)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Cut off. Shape: input [N, C, *] floating; output: the same."""
        if type(input) is not Tensor and sharded.is_sharded(input):
            return sharded.on_shard(self, ThresholdedLinearUnit.forward, input)
        check_input(self, input)
        return torch.maximum(input, wide(self.tau.to(input.dtype), input))


def _check_channels(layer: nn.Module, num_features: Any, dtype: Any) -> int:
    arguments.check_dtype(layer, dtype)
    return arguments.check_count(layer, "num_features", num_features, "the number of channels of the input")
