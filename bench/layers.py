"""The layers that are compared, each made from its number of channels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distnorm import SyncBatchNorm, collectives


class LocalWithCollectives(nn.BatchNorm2d):
    """The limit: torch's local layer, and beside it the bare exchanges of a synchronized one, over all ranks.

    The exchanged values are zeros and nobody reads them. What is left out is all that pooling computes.

    Collective: train: 1 gather of 2C + 1 doubles forward, 1 sum of 2C floats before its own backward.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.ranks = collectives.members(None)
        self.gathered = torch.zeros(2 * num_features + 1, dtype=torch.float64)
        self.summed = torch.zeros(2 * num_features)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        collectives.gather(self.gathered, self.ranks, "limit forward")
        y.register_hook(self._sum)
        return y

    def _sum(self, _: Tensor) -> None:
        collectives.start_sum(self.summed, self.ranks, "limit backward").wait()


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """The widespread synchronization in plain tensor operations: mean and E[x²] in one differentiable sum over ranks.

    What detectron2's NaiveSyncBatchNorm and its many descendants do; the running variance is torch's unbiased one
    here. All ranks must have equally many samples. Its variance cancels where the mean is large against the deviation.

    Collective: train: 1 sum of 2C floats forward, 1 backward, over all ranks.
    """

    def forward(self, x: Tensor) -> Tensor:
        ranks = collectives.members(None)
        own_2C = torch.cat((x.mean((0, 2, 3)), (x * x).mean((0, 2, 3))))
        sum_2C: Tensor = _SumOverRanks.apply(own_2C, ranks)  # type: ignore[no-untyped-call]
        mean_C, square_C = (sum_2C / len(ranks)).chunk(2)
        var_C = square_C - mean_C * mean_C
        scale_C = self.weight * torch.rsqrt(var_C + self.eps)
        shift_C = self.bias - mean_C * scale_C
        self._take_batch(mean_C.detach(), var_C.detach(), len(ranks) * x.numel() // x.shape[1])
        return x * scale_C.view(1, -1, 1, 1) + shift_C.view(1, -1, 1, 1)

    @torch.no_grad()
    def _take_batch(self, mean_C: Tensor, var_C: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        momentum = 0.1 if self.momentum is None else self.momentum
        self.num_batches_tracked += 1
        self.running_mean += momentum * (mean_C - self.running_mean)
        self.running_var += momentum * (var_C * (count / (count - 1)) - self.running_var)


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: tuple[int, ...]) -> Tensor:
        ctx.ranks = ranks
        return collectives.start_sum(values.clone(), ranks, "naive forward").wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return collectives.start_sum(gradient.clone(), ctx.ranks, "naive backward").wait(), None


VARIANTS: dict[str, Callable[[int], nn.BatchNorm2d | SyncBatchNorm]] = {
    "local": nn.BatchNorm2d,
    "limit": LocalWithCollectives,
    "ours": SyncBatchNorm,
    "naive": NaiveSyncBatchNorm,
}
"""What a row times side by side. Ratios: ours / limit should be 1, naive / ours large."""


def with_norms(network: nn.Module, variant: str) -> nn.Module:
    """Put a variant in the place of every `nn.BatchNorm2d` of a network, in place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, VARIANTS[variant](child.num_features))
    return network
