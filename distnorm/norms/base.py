"""What every layer of the batch-statistics family shares: torch's parameters and buffers, and how they take a batch.

Legend: N samples, C channels, * positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.errors import ShapeError
from distnorm.moments import Moments


class AbstractBatchStatisticsNorm(_BatchNorm):
    """A batch norm whose statistics come from more, or fewer, samples than one device's batch.

    Subclasses torch's own base class, so that FSDP, SWA and `update_bn` treat it as a batch norm, and keeps its
    `state_dict` keys, so that checkpoints load before and after a conversion. Every attribute has a class-level
    default: `convert` swaps the class of a living layer and never runs `__init__`.

    Attributes:
        layer_name: how the model calls this layer; errors carry it.
    """

    layer_name: str = ""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize with batch statistics in training, with running statistics in evaluation.

        Shape: input [N, C, *] floating; output: the same.
        """
        self._check_input_dim(input)
        if self.training or self.running_mean is None:
            return self._normalize_with_batch(input)
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def _normalize_with_batch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ShapeError(
                f"{self.name_in_words()} got an input of shape {tuple(input.shape)}; "
                f"it normalizes [N, {self.num_features}, *].\n"
                f"Give it {self.num_features} channels in dimension 1, or build it with the num_features of its input.",
            )

    def name_in_words(self) -> str:
        """Name the layer in a message: its place in the model, or its class where it has none."""
        return self.layer_name or f"{type(self).__name__}({self.num_features})"

    @torch.no_grad()
    def _take_batch(self, moments: Moments) -> None:
        """Move the running statistics towards a batch; one without values leaves them where they are."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        has_values = moments.count > 0
        factor = has_values.to(self.running_mean.dtype)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += has_values
        if self.momentum is not None:
            factor = factor * self.momentum
        elif self.num_batches_tracked is not None:
            factor = factor / self.num_batches_tracked.clamp(min=1)
        self.running_mean += factor * (moments.mean - self.running_mean)
        self.running_var += factor * (moments.unbiased_var - self.running_var)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one step."""
        return {key: value for key, value in self.__dict__.items() if key != "rank_moments"}
