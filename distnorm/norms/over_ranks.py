"""What the layers that pool over ranks share: whose samples count, the mask, and one exchange a pass.

Legend: N samples, C channels, T time steps, H rows, R ranks, K = 2C + 1: mean, variance and count of one rank.
"""

from typing import Any

import torch
from torch import Tensor

from distnorm import collectives
from distnorm.errors import ConfigError, ShapeError
from distnorm.moments import Moments, statistics_dtype
from distnorm.norms import arguments, exchange, kernels, sharded, transforms
from distnorm.norms.base import AbstractBatchStatisticsNorm, followed, name_layer
from distnorm.norms.inputs import WITHOUT_LAST_BATCH
from distnorm.norms.pooling import Pooled, pool, unpack
from distnorm.norms.recomputation import Correction, Pass
from distnorm.norms.synchronized import normalize


class AbstractNormOverRanks(AbstractBatchStatisticsNorm):
    """A batch norm whose statistics are pooled over a group of ranks.

    Attributes:
        sync_ranks: ranks that pool together, in blocks of consecutive ranks; `None` means all.
        group_ranks: an arbitrary subset of ranks instead of blocks; the ranks outside it normalize alone.
        has_users_group: `group_ranks` are those of a process group that the user made.
    """

    sync_ranks: int | None = None
    group_ranks: tuple[int, ...] | None = None
    has_users_group: bool = False
    _rank_rows: Tensor | None = None

    def _choose_ranks(
        self, sync_ranks: int | None, group_ranks: tuple[int, ...] | None, process_group: Any = None
    ) -> None:
        """Take the ranks that a constructor was given, in one of three ways."""
        sync_ranks, group_ranks = arguments.check_ranks(self, sync_ranks, group_ranks)
        given = {"process_group": process_group, "sync_ranks": sync_ranks, "group_ranks": group_ranks}
        chosen = [f"{name}={value}" for name, value in given.items() if value is not None]
        if len(chosen) > 1:
            raise ConfigError(
                f"{type(self).__name__} got {' and '.join(chosen)}, that each name its ranks. Give one of them."
            )
        self.sync_ranks, self.group_ranks = sync_ranks, group_ranks
        if process_group is not None:
            self.group_ranks, self.has_users_group = collectives.adopt(process_group), True
        name_layer(self, "")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickled layer's or a copied one's state, and count it: it is another layer than that one."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        name_layer(self, self.layer_name)

    def whose(self) -> exchange.Whose:
        """Say whose numbers this layer exchanges: its name in messages, and its order among layers of that name."""
        return self.name_in_words(), self.layer_order

    def members(self) -> tuple[int, ...]:
        """Name the ranks whose samples this rank's are normalized with; in eval mode that is this rank alone."""
        if not self.training:
            return (collectives.rank(),)
        return exchange.members(self.sync_ranks, self.group_ranks, self.has_users_group)

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
        if type(input) is not Tensor and sharded.is_sharded(input):
            return sharded.on_shard(self, AbstractNormOverRanks.forward, input, mask)
        self._check_input_dim(input)
        self._keep_statistics_apart()
        if mask is not None:
            mask = self._fit(mask, input)
            input = torch.where(mask.unsqueeze(1), input, 0)  # noqa: A001 — unlike masked_fill keeps channels-last
        if self.training or self.running_mean is None:
            y = self._normalize_with_batch(input, mask)
        else:
            y = self._normalize_with_running(input)
        y = followed(self, y)
        return y if mask is None else torch.where(mask.unsqueeze(1), y, 0)

    def _normalize_with_batch(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._normalize_with_ranks(self.members(), x, mask)

    def _normalize_with_ranks(self, ranks: tuple[int, ...], x: Tensor, mask: Tensor | None = None) -> Tensor:
        if transforms.active():
            return self._normalize_in_transform(ranks, x, mask)
        x = kernels.dense(x)
        with torch.no_grad():
            own_K, scratch = kernels.measure(x, mask)
            passed = self._repeated(own_K)
            if passed is None:
                passed = self._pool(own_K, ranks, x, mask)
        assert passed.pooled is not None
        weight, bias = self._gain_and_shift(passed)
        kept = None if torch.compiler.is_compiling() else passed
        y = normalize(x, weight, bias, passed.pooled, self.eps, ranks, self.whose(), scratch, kept)
        if kept is not None:
            self._keep(kept, y)
        return y

    def _normalize_in_transform(self, ranks: tuple[int, ...], x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalize with operations that every `torch.func` transform can take apart."""
        transforms.check_ranks(ranks, self.name_in_words())
        moments = transforms.measure(x, mask, ranks, self.whose(), self.weight, self.bias)
        found = Moments(moments.count, moments.mean.detach(), moments.m2.detach())  # forward mode ignores no_grad
        pooled = Pooled.of(found.mean, found.var, found.count, statistics_dtype(x.dtype))
        with torch.no_grad():
            if mask is None or not transforms.inside_vmap():
                self._check_count(pooled.count, moments.count.view(1), ranks, x, mask)
            correction = self._correction(pooled)
            if self.training:
                self._take_batch(pooled.mean, pooled.var, pooled.count)
                self._rank_rows = None
        weight, bias = self._gain_and_shift(Pass(None, pooled, correction))
        return transforms.normalize(x, moments, self.eps, weight, bias)

    def _pool(self, own_K: Tensor, ranks: tuple[int, ...], x: Tensor, mask: Tensor | None) -> Pass:
        """Pool the moments of the group, and move the running statistics."""
        pooled, rows_RK = pool(own_K, statistics_dtype(x.dtype), ranks, self.whose())
        self._check_count(pooled.count, own_K, ranks, x, mask)
        correction = self._correction(pooled)
        if self.training:
            self._take_batch(pooled.mean, pooled.var, pooled.count)
            self._rank_rows = rows_RK if len(ranks) > 1 else None
        return Pass(own_K, pooled, correction)

    def _correction(self, pooled: Pooled) -> Correction | None:
        """Find what depends on the running statistics as they were before this batch; a repeated pass keeps it."""
        return None

    def _gain_and_shift(self, passed: Pass) -> tuple[Tensor | None, Tensor | None]:
        """Give the affine part of this pass."""
        return self.weight, self.bias

    def _check_count(
        self, count: Tensor | float, own_K: Tensor, ranks: tuple[int, ...], x: Tensor, mask: Tensor | None
    ) -> None:
        """Refuse a group with one value a channel, on every rank alike.

        Only a rank with at most one value can be in such a group: the others need not read the count.
        """
        if torch.compiler.is_compiling() or (x.numel() > x.shape[1] and (mask is None or own_K[-1] > 1)):
            return
        if 0 < float(count) <= 1:
            group = "and pools over no other rank" if len(ranks) == 1 else f"over its whole group of {len(ranks)} ranks"
            raise ShapeError(
                f"{self.name_in_words()} has 1 value per channel {group}; a variance needs 2.\n"
                f"{WITHOUT_LAST_BATCH}; or give the group more samples or ranks (data.device_batch, sync_ranks),\n"
                "or use GroupNorm (norm=group).",
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
