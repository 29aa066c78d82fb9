"""Synchronized batch normalization: several ranks normalize as if their samples were one batch.

Legend: N samples, C channels, R ranks, K = 2C + 1: mean, variance and count of one rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distnorm import collectives
from distnorm.norms.base import name_layer
from distnorm.norms.over_ranks import AbstractNormOverRanks
from distnorm.norms.recomputation import Pass
from distnorm.norms.surgery import become, find_norms, register_norm


class SyncBatchNorm(AbstractNormOverRanks):
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

    Shape: input [N, C, *] floating; N may differ from rank to rank and be 0 on some; or a DTensor that is cut along its
        samples or positions, whose mesh is the group. output: the same.

    Collective: train: 1 gather of 2C + 1 doubles forward (with more than 16 ranks in a group: 1 sum of as many), 1 sum
        of 2C floats backward, over the group, each with a mark that says whose numbers they are; nothing when
        activation checkpointing repeats a forward; 2 sums of 2C more where the gradient is itself differentiated.
        Inside `torch.func.grad` or `vjp` 1 gather, and 1 sum of as many numbers from each rank. eval: none. Every rank
        of the group must reach this layer in every training step, and run backward through it.

    Raises:
        ConfigError: an argument is out of its range; `eps` is 0 in training, as in torch; or ranks normalize together
            inside a `torch.func` transform other than `grad` and `vjp`.
        ShapeError: dimension 1 is not `num_features`; the input is not dense and floating, or a DTensor of other
            placements; or the mask does not fit: on the rank where it is so. The whole group has one value per channel:
            on every rank alike.
        GroupError: a rank of the group failed, or did not come within the process group's timeout; or another rank of
            the group brought numbers of another layer or call: on every rank of the group alike.

    Example:
        >>> layer = SyncBatchNorm(3)
        >>> layer(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])

    Source: Ioffe & Szegedy 2015, algorithm 1; ranks merged by Chan, Golub & LeVeque 1983. `running_var` is the unbiased
        variance of the pooled batch, as in torch. Unlike torch's layer, a step in which every rank is empty moves
        nothing.
    """

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
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self._choose_ranks(sync_ranks, group_ranks, process_group)

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
                become(norm, cls, sync_ranks=None, group_ranks=group_ranks, has_users_group=group_ranks is not None)
                name_layer(norm, "" if norm is module else name)
        return module

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


register_norm(SyncBatchNorm)
