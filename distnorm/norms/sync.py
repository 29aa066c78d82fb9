"""Synchronized batch normalization: several ranks normalize as if their samples were one batch.

Legend: N samples, C channels, R ranks, K = 2C + 1: mean, variance and count of one rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distnorm import collectives
from distnorm.errors import ConfigError, ShapeError
from distnorm.moments import statistics_dtype
from distnorm.norms import exchange, kernels
from distnorm.norms.base import AbstractBatchStatisticsNorm
from distnorm.norms.pooling import Pooled, pool, unpack
from distnorm.norms.recomputation import Pass
from distnorm.norms.surgery import SOURCES, become, find_norms
from distnorm.norms.synchronized import normalize


class SyncBatchNorm(AbstractBatchStatisticsNorm):
    """Normalize over the samples of several ranks as if they were one batch.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Statistics are pooled over N, every position, and `sync_ranks` ranks. In eval mode the running statistics are used.
    Works on CPU (gloo) and CUDA (nccl); without a process group, or alone in its group, it is `nn.BatchNorm`. Takes the
    arguments of `torch.nn.SyncBatchNorm`, and has its `convert_sync_batchnorm`.

    Gradient accumulation makes bigger steps, not bigger normalization batches: each forward has statistics of its own.

    Args:
        num_features: C, channels of the input.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; `None` averages all batches equally.
        affine: learn `weight` and `bias`, one each a channel.
        track_running_stats: keep running statistics; without them evaluation uses the batch's own, unsynchronized.
        process_group: the ranks that pool together, as torch's layer takes them; its ranks are kept, not the group.
            A rank outside it normalizes alone.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        bias: `False`: learn `weight` only.
        sync_ranks: ranks that pool together, in blocks of consecutive ranks; `None` means all. Must divide the world
            size.
        group_ranks: an arbitrary subset of ranks instead of blocks; the ranks outside it normalize alone.

    Shape: input [N, C, *] floating; N may differ from rank to rank and be 0 on some. output: the same.

    Collective: train: 1 gather of 2C + 1 doubles forward (with more than 16 ranks in a group: 1 sum of as many), 1 sum
        of 2C floats backward, over the group; nothing when activation checkpointing repeats a forward; 2 sums of
        2C more where the gradient is itself differentiated. eval: none. Every rank of the group must reach this layer
        in every training step, and run backward through it.

    Raises:
        ShapeError: dimension 1 is not `num_features`; the input is not floating; or the mask does not fit: on the rank
            where it is so. The whole group has one value a channel: on every rank alike.
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
    _rank_rows: Tensor | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        sync_ranks: int | None = None,
        group_ranks: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        given = {"process_group": process_group, "sync_ranks": sync_ranks, "group_ranks": group_ranks}
        chosen = [f"{name}={value}" for name, value in given.items() if value is not None]
        if len(chosen) > 1:
            raise ConfigError(f"SyncBatchNorm got {' and '.join(chosen)}, that each name its ranks. Give one of them.")
        if sync_ranks is not None and (not isinstance(sync_ranks, int) or sync_ranks < 1):
            raise ConfigError(f"sync_ranks={sync_ranks!r} must be at least 1. Give a number of ranks, or None for all.")
        self.sync_ranks, self.group_ranks = sync_ranks, None if group_ranks is None else tuple(group_ranks)
        if process_group is not None:
            self.group_ranks = collectives.adopt(process_group)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Make every batch norm of a model a synchronized one, as torch's method of this name does, but in place.

        The same module objects get another class: aliases, hooks, parameters and an optimizer built before stay valid.
        `distnorm.convert` does the same with a decision, a table of what changed, and a way back.

        Args:
            module: any module that holds `nn.BatchNorm1d/2d/3d`, or is one.
            process_group: the ranks that pool together; `None` means all.

        Returns:
            The module.

        Raises:
            ConfigError: the model is wrapped in DDP, scripted, or has a lazy norm or a subclass with its own forward.
        """
        group_ranks = None if process_group is None else collectives.adopt(process_group)
        for name, norm in find_norms(module).items():
            if group_ranks is not None or not isinstance(norm, SyncBatchNorm):
                become(norm, cls, sync_ranks=None, group_ranks=group_ranks, layer_name="" if norm is module else name)
        return module

    def members(self) -> tuple[int, ...]:
        """Name the ranks whose samples this rank's are normalized with; in eval mode that is this rank alone."""
        if not self.training:
            return (collectives.rank(),)
        return exchange.members(self.sync_ranks, self.group_ranks)

    @property
    def rank_moments(self) -> Tensor | None:
        """[R, K] packed moments of each rank of the group in the last training forward, for the drift monitor.

        `None` if alone, or if the group is so large that its ranks were summed.
        """
        return None if self._rank_rows is None else unpack(self._rank_rows).pack()

    def extra_repr(self) -> str:
        """Show the group beside what torch shows."""
        blocks = f"sync_ranks={'all' if self.sync_ranks is None else self.sync_ranks}"
        group = blocks if self.group_ranks is None else f"group_ranks={self.group_ranks}"
        return f"{super().extra_repr()}, {group}"  # type: ignore[no-untyped-call]

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize with the group's statistics in training, with running statistics in evaluation.

        Args:
            input: the activation.
            mask: `True` where a value counts; all do, if `None`. Masked values have no part in any statistic, whatever
                they are, come out as 0, and have gradient 0. The other values come out as without the padding.

        Shape: input [N, C, *] floating; mask boolean [N, *], or its first dimensions, e.g. [N, T] for input
            [N, C, T, H]; output like input.
        """
        self._check_input_dim(input)
        if mask is not None:
            mask = self._fit(mask, input)
            input = torch.where(mask.unsqueeze(1), input, 0)  # noqa: A001 — unlike masked_fill keeps channels-last
        if self.training or self.running_mean is None:
            y = self._normalize_with_batch(input, mask)
        else:
            y = self._normalize_with_running(input)
        return y if mask is None else torch.where(mask.unsqueeze(1), y, 0)

    def _normalize_with_batch(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        ranks = self.members()
        alone = len(ranks) == 1 and mask is None and self.momentum is not None and x.numel() > self.num_features
        if alone and (
            x.device.type != "cpu" or torch.compiler.is_compiling()
        ):  # on the CPU ours is faster, and errs less
            return self._normalize_alone(x)
        return self._normalize_with_ranks(ranks, x, mask)

    def _normalize_alone(self, x: Tensor) -> Tensor:
        """Use torch's kernel, that keeps the running statistics itself."""
        self._rank_rows = None
        repeated = self._repeated()
        tracks = self.training and self.track_running_stats and repeated is None
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = (self.running_mean, self.running_var) if tracks else (None, None)
        y = functional.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
        self._keep_with(y, repeated or Pass(None, None))
        return y

    def _normalize_with_ranks(self, ranks: tuple[int, ...], x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = kernels.dense(x)
        with torch.no_grad():
            own_K, scratch = kernels.measure(x, mask)
            passed = self._repeated(own_K)
            pooled = passed.pooled if passed is not None else self._pool(own_K, ranks, x, mask)
            assert pooled is not None
            if passed is None and not torch.compiler.is_compiling():
                passed = Pass(own_K, pooled)
        y = normalize(x, self.weight, self.bias, pooled, self.eps, ranks, self.name_in_words(), scratch, passed)
        if passed is not None:
            self._keep(passed, y)
        return y

    def _pool(self, own_K: Tensor, ranks: tuple[int, ...], x: Tensor, mask: Tensor | None) -> Pooled:
        """Pool the moments of the group, and move the running statistics."""
        pooled, rows_RK = pool(own_K, statistics_dtype(x.dtype), ranks, f"{self.name_in_words()} forward")
        self._check_count(pooled.count, own_K, ranks, x, mask)
        if self.training:
            self._take_batch(pooled.mean, pooled.var, pooled.count)
            self._rank_rows = rows_RK if len(ranks) > 1 else None
        return pooled

    def _check_count(
        self, count: Tensor | float, own_K: Tensor, ranks: tuple[int, ...], x: Tensor, mask: Tensor | None
    ) -> None:
        """Refuse a group with one value a channel, on every rank alike.

        Only a rank with at most one value can be in such a group: the others need not read the count.
        """
        if torch.compiler.is_compiling() or (x.numel() > x.shape[1] and (mask is None or own_K[-1] > 1)):
            return
        if 0 < float(count) <= 1:
            raise ShapeError(
                f"{self.name_in_words()} has 1 value a channel over its whole group of {len(ranks)} ranks; "
                "a variance needs 2.\n"
                "Give the group more samples or ranks (data.device_batch, sync_ranks), or use GroupNorm (norm=group).",
            )

    def _fit(self, mask: Tensor, x: Tensor) -> Tensor:
        """Bring a mask to [N, *]."""
        shape = (x.shape[0], *x.shape[2:])
        fits = 0 < mask.dim() <= len(shape) and mask.shape == shape[: mask.dim()]
        if mask.dtype == torch.bool and fits:
            return mask.reshape(*mask.shape, *[1] * (len(shape) - mask.dim())).expand(shape)
        if fits and mask.dim() > 1:
            remedy = "Give it mask.bool()."
        elif mask.dim() == x.dim():
            remedy = "Give it mask[:, 0].bool(), if its channels are alike."
        else:
            remedy = "Of lengths, make one: torch.arange(T) < lengths[:, None]."
        raise ShapeError(
            f"{self.name_in_words()} got a mask of {mask.dtype} {tuple(mask.shape)} for an input of {tuple(x.shape)}; "
            f"it must be torch.bool {shape}, or its first dimensions.\n{remedy}",
        )


SOURCES.add(SyncBatchNorm)
