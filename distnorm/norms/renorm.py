"""Batch renormalization: batch statistics, corrected towards the running ones.

Legend: N samples, C channels, R ranks, * positions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from distnorm.errors import ConfigError
from distnorm.norms.arguments import is_number
from distnorm.norms.over_ranks import AbstractNormOverRanks
from distnorm.norms.pooling import Pooled
from distnorm.norms.recomputation import Correction, Pass
from distnorm.norms.snapshots import snapshot
from distnorm.norms.surgery import register_norm


class BatchRenorm(AbstractNormOverRanks):
    """Normalize with the batch's statistics, and correct them towards the running ones.

        y = ((x - mean) / std * r + d) * weight + bias
        r = clip(std / running_std, 1 / r_limit, r_limit)
        d = clip((mean - running_mean) / running_std, -d_limit, d_limit)

    with std = sqrt(var + eps), of the batch or running. `r` and `d` are constants for the gradient. Where neither is
    clipped, a training batch comes out as it will in evaluation; where both limits are closed (1 and 0) this is
    batch norm. The limits open with the steps t that `num_batches_tracked` has counted before this one:

        open = clip((t - warmup + 1) / (ramp + 1), 0, 1)
        r_limit = 1 + open * (r_max - 1)        d_limit = open * d_max

    A count that is loaded counts: a pretrained layer starts with open limits, one whose running statistics were reset
    with a warmup. The running statistics have forgotten where they started after a few times 1 / momentum steps: with a
    smaller momentum than 0.1 give a warmup of at least about 1 / momentum, or r and d lean on their initial values.

    Batch and running statistics are those of `sync_ranks` ranks together. In eval mode the running statistics are used.
    On an accelerator nothing of this waits for the device.

    Args:
        num_features: C, channels of the input.
        eps: added to the variances.
        momentum: weight of the new batch in the running statistics; `None` averages all batches equally.
        affine: learn `weight` and `bias`, one each a channel.
        track_running_stats: keep running statistics; without them this is batch norm.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        bias: `False`: learn `weight` only.
        sync_ranks: ranks that pool together, in blocks of consecutive ranks; `None` means all. Must divide the world
            size.
        group_ranks: an arbitrary subset of ranks instead of blocks; the ranks outside it normalize alone.
        r_max: how far the scale may be corrected in the end, as a factor; at least 1.
        d_max: how far the mean may be corrected in the end, in running standard deviations; at least 0.
        warmup: steps of batch norm in the beginning, until the running statistics mean something.
        ramp: steps over which the limits then open.

    Shape: input [N, C, *] floating; N may differ from rank to rank and be 0 on some. output: the same.

    Collective: as `SyncBatchNorm`: train: 1 gather of 2C + 1 doubles forward (with more than 16 ranks in a group: 1 sum
        of as many), 1 sum of 2C floats backward, over the group; nothing when activation checkpointing repeats a
        forward. eval: none. Every rank of the group must reach this layer in every training step, and run backward
        through it. r and d need no exchange: the running statistics are alike on all ranks of a group.

    Raises:
        ConfigError: `r_max` is below 1, or `d_max`, `warmup` or `ramp` below 0; another argument is out of its range;
            or the ranks are named twice.
        ShapeError: dimension 1 is not `num_features`; the input is not floating; the mask does not fit; or the whole
            group has one value a channel.
        GroupError: as `SyncBatchNorm`.

    Example:
        >>> layer = BatchRenorm(3, r_max=1.5, d_max=0.5, warmup=5000, ramp=35000)
        >>> layer(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])

    Source: Ioffe 2017, algorithm 1. The schedule is ours: both limits open together, and the defaults suit a run of a
        few thousand steps, where the paper opens them one by one over a long training (public implementations of it
        have a warmup of 5000 steps, r_max reaching 3 at step 40,000 and d_max 5 at step 25,000). There the running
        average is of deviations, here of variances, as batch norm's checkpoints have them.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 200
    ramp: int = 800

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        sync_ranks: int | None = None,
        group_ranks: tuple[int, ...] | None = None,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 200,
        ramp: int = 800,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self._choose_ranks(sync_ranks, group_ranks)
        for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0), ("warmup", warmup, 0), ("ramp", ramp, 0)):
            if not is_number(value) or not least <= value < math.inf:  # nor nan
                raise ConfigError(
                    f"{name}={value!r:.60} must be at least {least}, and finite. Give such a number; "
                    "r_max=1 and d_max=0 correct nothing, warmup=0 and ramp=0 correct from the first step.",
                )
        self.r_max, self.d_max, self.warmup, self.ramp = r_max, d_max, warmup, ramp

    def extra_repr(self) -> str:
        """Show the limits and their schedule beside what torch shows."""
        schedule = f"r_max={self.r_max}, d_max={self.d_max}, warmup={self.warmup}, ramp={self.ramp}"
        return f"{super().extra_repr()}, {schedule}"

    def _correction(self, pooled: Pooled) -> Correction | None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return None
        steps = self.num_batches_tracked.to(pooled.var.dtype)  # a tensor: the count stays on its device
        opened = ((steps - self.warmup + 1) / (self.ramp + 1)).clamp(0, 1)
        r_limit, d_limit = 1 + opened * (self.r_max - 1), opened * self.d_max
        running_std_C = (self.running_var.to(pooled.var.dtype) + self.eps).sqrt()
        r_C = ((pooled.var + self.eps).sqrt() / running_std_C).clamp(1 / r_limit, r_limit)
        d_C = ((pooled.exact_mean - self.running_mean).to(r_C.dtype) / running_std_C).clamp(-d_limit, d_limit)
        if torch.compiler.is_compiling():
            r_C, d_C = snapshot(r_C, d_C)
        return r_C, d_C

    def _gain_and_shift(self, passed: Pass) -> tuple[Tensor | None, Tensor | None]:
        if passed.correction is None:
            return self.weight, self.bias
        r_C, d_C = passed.correction
        if self.weight is None:
            return r_C, d_C
        shift_C = self.weight * d_C
        return self.weight * r_C, shift_C if self.bias is None else self.bias + shift_C


register_norm(BatchRenorm)
