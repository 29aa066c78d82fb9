"""Synchronized batch normalization: several ranks normalize as if their samples were one batch.

Legend: N samples, C channels, R ranks, K = 2C + 1 packed moments.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from distnorm import collectives
from distnorm.errors import ShapeError
from distnorm.moments import Moments, statistics_dtype
from distnorm.norms.base import AbstractBatchStatisticsNorm


class SyncBatchNorm(AbstractBatchStatisticsNorm):
    """Normalize over the samples of several ranks as if they were one batch.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Statistics are pooled over N, every position, and `sync_ranks` ranks. In eval mode the running statistics are used.
    Works on CPU (gloo) and CUDA (nccl); without a process group, or alone in its group, it is `nn.BatchNorm`.

    Args:
        num_features: C, channels of the input.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; `None` averages all batches equally.
        affine: learn `weight` and `bias`, one each a channel.
        track_running_stats: keep running statistics; without them evaluation uses the batch's own, unsynchronized.
        sync_ranks: ranks that pool together, in blocks of consecutive ranks; `None` means all. Must divide the world
            size.
        group_ranks: an arbitrary subset of ranks instead of blocks; the ranks outside it normalize alone.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.

    Shape: input [N, C, *] floating; N may differ from rank to rank and be 0 on some. output: the same.

    Collective: train: 1 gather of 2C + 1 floats forward, 1 sum of 2C floats backward, over the group. eval: none.
        Every rank of the group must reach this layer in every training step, and run backward through it.

    Raises:
        ShapeError: dimension 1 is not `num_features`; or the whole group has one value a channel (on every rank alike).
        GroupError: a rank of the group failed, or did not come within the process group's timeout.

    Example:
        >>> layer = SyncBatchNorm(3)
        >>> layer(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])

    Source: Ioffe & Szegedy 2015, algorithm 1; ranks merged by Chan, Golub & LeVeque 1983. `running_var` is the unbiased
        variance of the pooled batch, as in torch. Unlike torch's layer, a step in which every rank is empty moves
        nothing.
    """

    sync_ranks: int | None = None
    group_ranks: tuple[int, ...] | None = None
    rank_moments: Tensor | None = None
    """[R, K] moments of each rank of the group in the last training forward, for the drift monitor; `None` if alone."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        sync_ranks: int | None = None,
        group_ranks: tuple[int, ...] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.sync_ranks, self.group_ranks = sync_ranks, group_ranks

    def members(self) -> tuple[int, ...]:
        """Name the ranks whose samples this rank's are normalized with; in eval mode that is this rank alone."""
        if not self.training:
            return (collectives.rank(),)
        return collectives.members(self.sync_ranks, self.group_ranks)

    def extra_repr(self) -> str:
        """Show the group beside what torch shows."""
        group = f"group_ranks={self.group_ranks}" if self.group_ranks else f"sync_ranks={self.sync_ranks or 'all'}"
        return f"{super().extra_repr()}, {group}"  # type: ignore[no-untyped-call]

    def _normalize_with_batch(self, x: Tensor) -> Tensor:
        ranks = self.members()
        self.rank_moments = None
        if len(ranks) == 1 and x.numel() > self.num_features:
            return self._normalize_alone(x)
        name = self.name_in_words()
        y, rows_RK = _Synchronized.apply(x, self.weight, self.bias, self.eps, ranks, name)  # type: ignore[no-untyped-call]
        if self.training:
            self._take_batch(Moments.unpack(rows_RK).merged())
            self.rank_moments = rows_RK if len(ranks) > 1 else None
        return y  # type: ignore[no-any-return]

    def _normalize_alone(self, x: Tensor) -> Tensor:
        """Use torch's native kernel, that keeps the running statistics itself."""
        tracks = self.training and self.track_running_stats
        factor = 0.0 if self.momentum is None else self.momentum
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        mean, var = (self.running_mean, self.running_var) if tracks else (None, None)
        return functional.batch_norm(x, mean, var, self.weight, self.bias, True, factor, self.eps)


class _Synchronized(torch.autograd.Function):
    """The pooled normalization and its gradient.

    Backward, with xhat = (x - mean) · invstd and sums over the pooled batch of n values a channel:
        dx = weight · invstd · (dy - sum(dy) / n - xhat · sum(dy · xhat) / n)
    `weight` and `bias` get this rank's own sums: DDP adds the ranks up. Saved for backward: the input and O(C).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: tuple[int, ...], name: str
    ) -> tuple[Tensor, Tensor]:
        own = Moments.of(x)
        rows_RK = collectives.gather(own.pack(), ranks, f"{name} forward")
        pooled = Moments.unpack(rows_RK).merged()
        # Only a rank with at most one value a channel can be in a group with at most one: the others need not look.
        if x.numel() <= x.shape[1] and 0 < float(pooled.count) <= 1:
            raise ShapeError(
                f"{name} has 1 value a channel over its whole group of {len(ranks)} ranks; a variance needs 2.\n"
                "Give the group more samples (data.device_batch, norm.sync_ranks), or use norm=group.",
            )
        invstd_C = torch.rsqrt(pooled.var + eps)
        scale_C = invstd_C if weight is None else invstd_C * weight
        y = (x - _wide(pooled.mean, x)) * _wide(scale_C, x)
        if bias is not None:
            y = y + _wide(bias, x)
        ctx.save_for_backward(x, weight, pooled.mean, invstd_C, pooled.count)
        ctx.has_bias, ctx.ranks, ctx.name = bias is not None, ranks, name
        ctx.mark_non_differentiable(rows_RK)
        return y.to(x.dtype), rows_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean_C, invstd_C, count = ctx.saved_tensors
        over = [d for d in range(x.dim()) if d != 1]
        centred, dy = x - _wide(mean_C, x), dy.to(statistics_dtype(x.dtype))
        own_2C = torch.cat((dy.sum(over), (dy * centred).sum(over) * invstd_C))
        # The sum runs on every rank, needed there or not: ranks that disagree about it would hang.
        pending = collectives.start_sum(own_2C.clone(), ctx.ranks, f"{ctx.name} backward")
        sum_dy_C, sum_dy_xhat_C = own_2C.chunk(2)
        dweight = sum_dy_xhat_C.to(weight.dtype) if ctx.needs_input_grad[1] else None
        dbias = sum_dy_C if ctx.has_bias and ctx.needs_input_grad[2] else None
        mean_dy_C, mean_dy_xhat_C = (pending.wait() / count.clamp(min=1)).chunk(2)
        dx = None
        if ctx.needs_input_grad[0]:
            scale_C = invstd_C if weight is None else invstd_C * weight
            dx = (dy - _wide(mean_dy_C, x) - centred * _wide(invstd_C * mean_dy_xhat_C, x)) * _wide(scale_C, x)
            dx = dx.to(x.dtype)
        return dx, dweight, dbias, None, None, None


def _wide(values_C: Tensor, x: Tensor) -> Tensor:
    """Shape [C] so that it broadcasts over [N, C, *]."""
    return values_C.view(-1, *[1] * (x.dim() - 2))
