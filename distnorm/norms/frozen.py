"""Frozen batch normalization: constants that no training step moves.

Legend: N samples, C channels, * positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distnorm.norms import arguments, sharded
from distnorm.norms.base import followed, reset_batch_norm
from distnorm.norms.inputs import check_input, name_in_words
from distnorm.norms.leaf import TracedAsLeaf


class FrozenBatchNorm(TracedAsLeaf, nn.Module):
    """Scale and shift each channel by constants: a batch norm whose statistics and affine part stay as they are.

        y = (x - running_mean) / sqrt(running_var + eps) * weight + bias

    `train()` changes nothing, and neither does an optimizer: `weight` and `bias` are cut out of the graph, so that
    `model.requires_grad_(True)` does not make them learn (DDP would then miss their gradients: freeze them again before
    wrapping). It is no `_BatchNorm`: what looks for batch norms to update does not find it. Parameters and buffers have
    `nn.BatchNorm`'s names, and a checkpoint of batch norm loads, or one of torchvision's `FrozenBatchNorm2d`, that has
    no `num_batches_tracked`.

    Args:
        num_features: C, channels of the input.
        eps: added to the variance.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        bias: `False`: scale only.

    Shape: input [N, C, *] floating, N may be 0. output: the same.

    Collective: none.

    Raises:
        ConfigError: an argument is out of its range.
        ShapeError: dimension 1 is not `num_features`; or the input is not floating.

    Example:
        >>> layer = FrozenBatchNorm(3)
        >>> _ = layer.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        >>> layer(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])

    Source: He et al. 2016, appendix A: batch norm as constants while a pretrained network is fine-tuned.
    """

    layer_name: str = ""
    after: tuple[str, ...] = ()
    running_mean: Tensor
    running_var: Tensor
    _version = 2  # of batch norm, since when it counts its batches

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        arguments.check_eps(self, eps)
        arguments.check_dtype(self, dtype)
        arguments.check_flag(self, "bias", bias)
        meaning = "the number of channels of the input"
        num_features = arguments.check_count(self, "num_features", num_features, meaning)
        self.num_features, self.eps = num_features, eps
        self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype), False)
        zeros = torch.zeros(num_features, device=device, dtype=dtype)
        self.bias: nn.Parameter | None = nn.Parameter(zeros, False) if bias else None
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))

    def reset_parameters(self) -> None:
        """Set the constants to those of a new layer, which scale and shift nothing."""
        reset_batch_norm(self)

    def extra_repr(self) -> str:
        """Show the channels and eps."""
        return f"{self.num_features}, eps={self.eps}"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Scale and shift.

        Shape: input [N, C, *] floating; output: the same.
        """
        if type(input) is not Tensor and sharded.is_sharded(input):
            return sharded.on_shard(self, FrozenBatchNorm.forward, input)
        check_input(self, input)
        if not self.eps >= 0:  # nor nan; it may have been set after construction
            arguments.check_eps(f"{name_in_words(self)} has", self.eps)
        weight, bias = (None if p is None else p.detach() for p in (self.weight, self.bias))
        y = functional.batch_norm(
            input, self.running_mean, self.running_var, weight, bias, training=False, eps=self.eps
        )
        return followed(self, y)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        tracked = self._buffers.get("num_batches_tracked")
        if tracked is not None:
            state_dict.setdefault(f"{prefix}num_batches_tracked", tracked)
        super()._load_from_state_dict(state_dict, prefix, *rest)
