"""Ghost batch normalization: fewer samples share statistics than one device holds.

Legend: N samples, C channels, * positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distnorm.errors import ShapeError
from distnorm.moments import Moments
from distnorm.norms.arguments import check_count
from distnorm.norms.base import AbstractBatchStatisticsNorm
from distnorm.norms.inputs import WITHOUT_LAST_BATCH
from distnorm.norms.recomputation import Pass
from distnorm.norms.surgery import register_norm


class GhostBatchNorm(AbstractBatchStatisticsNorm):
    """Normalize each run of `ghost_batch` consecutive samples with its own statistics.

        y = (x - mean_ghost) / sqrt(var_ghost + eps) * weight + bias

    The running statistics take the whole device batch at once, pooled exactly, with the term between the ghosts.
    In eval mode the running statistics are used.

    Args:
        num_features: C, channels of the input.
        ghost_batch: samples that share statistics; a last run with fewer samples shares among itself.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; `None` averages all batches equally.
        affine: learn `weight` and `bias`, one each a channel.
        track_running_stats: keep running statistics; without them evaluation uses ghosts too.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        bias: `False`: learn `weight` only.

    Shape: input [N, C, *] floating, N may be 0. output: the same.

    Collective: none.

    Raises:
        ConfigError: an argument is out of its range, e.g. `ghost_batch` below 1.
        ShapeError: dimension 1 is not `num_features`; the input is not floating; or a ghost has one value a channel.

    Example:
        >>> GhostBatchNorm(3, ghost_batch=4)(torch.randn(8, 3)).shape
        torch.Size([8, 3])

    Source: Hoffer, Hubara & Soudry 2017, algorithm 1; its running average over ghosts is replaced by the pooled
        moments.
    """

    ghost_batch: int = 1
    takes_whole_samples: bool = True

    def __init__(
        self,
        num_features: int,
        ghost_batch: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        checked = check_count(self, "ghost_batch", ghost_batch, "the samples that share statistics")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.ghost_batch = checked

    def extra_repr(self) -> str:
        """Show the ghost batch beside what torch shows."""
        return f"{super().extra_repr()}, ghost_batch={self.ghost_batch}"  # type: ignore[no-untyped-call]

    def _normalize_with_batch(self, x: Tensor) -> Tensor:
        self._check_ghosts(x)
        y = torch.cat([self._normalize_ghost(ghost) for ghost in x.split(self.ghost_batch)])
        if self.training:
            self._keep_with(y, self._take_whole_batch(x.detach()))
        return y

    def _check_ghosts(self, x: Tensor) -> None:
        smallest = (x.shape[0] % self.ghost_batch or self.ghost_batch) * x.shape[2:].numel()
        if x.shape[0] and smallest == 1:
            plural = "s" if x.shape[0] > 1 else ""
            divisor = f"a ghost_batch of at least 2 that divides {x.shape[0]}, or " if plural else ""
            raise ShapeError(
                f"{self.name_in_words()} has a ghost of 1 value per channel: {x.shape[0]} sample{plural} in runs of "
                f"ghost_batch={self.ghost_batch}; a variance needs 2.\n"
                f"{WITHOUT_LAST_BATCH};\nor use {divisor}GroupNorm (norm=group).",
            )

    @torch.no_grad()
    def _take_whole_batch(self, x: Tensor) -> Pass:
        moments = Moments.of(x)
        own_K = moments.pack()
        repeated = self._repeated(own_K)
        if repeated is None:
            self._take_batch(moments.mean, moments.var, moments.count)
        return repeated or Pass(own_K, None)

    def _normalize_ghost(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:  # torch refuses an empty batch; DDP needs `weight` and `bias` in the graph all the same
            zeros, ones = x.new_zeros(self.num_features), x.new_ones(self.num_features)
            return functional.batch_norm(x, zeros, ones, self.weight, self.bias, training=False, eps=self.eps)
        return functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


register_norm(GhostBatchNorm)
