"""What a model's norms see in one step, caught by hooks: each layer's own moments, and what it compares them with.

Three families are watched. Layers with *running* statistics are compared with those as they were before the step; one
with *constants* (`FrozenBatchNorm`) with the constants; a norm of single *samples* (GroupNorm, LayerNorm, …), or a
batch norm without running statistics, has nothing to be compared with but its own past.

Legend: N samples, C channels, L positions, R ranks.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from distnorm import collectives
from distnorm.moments import Moments, statistics_dtype
from distnorm.norms import pooling
from distnorm.norms.frozen import FrozenBatchNorm
from distnorm.norms.ghost import GhostBatchNorm
from distnorm.norms.over_ranks import AbstractNormOverRanks
from distnorm.norms.recurrent import RecurrentBatchNorm
from distnorm.norms.response import FilterResponseNorm

Family = Literal["running", "constant", "sample"]
_OF_SAMPLES = (nn.GroupNorm, nn.LayerNorm, _InstanceNorm, FilterResponseNorm)


class WatchedNorm:
    """One norm, and what its first forward left in a step that is measured.

    A layer that runs several times in a step is measured at the first; of ghosts the first is measured, and of a
    recurrent layer the first time step. Masked values are left out.

    Attributes:
        name: in the model.
        layer: the norm.
        family: what it is compared with.
        channels: C.
        reference: running mean and variance as they were before the step; `None` until it was reached.
        own: this rank's moments, packed; `None` for a layer that gathers them itself, and until it was reached.
        samples: N.
        apart: how far apart the means of the batch's halves are, so scaled that its square is expected to be the
            variance of the batch's mean; `None` with several ranks, that are compared instead.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.layer = name, layer
        self.family: Family = _family_of(layer)
        self.channels = _channels_of(layer)
        self.forget()

    def forget(self) -> None:
        """Forget the step."""
        self.reached = False
        self.reference: Tensor | None = None
        self.own: Tensor | None = None
        self.apart: Tensor | None = None
        self.samples = 0

    @property
    def gathers_itself(self) -> bool:
        """Whether the layer's forward brings all ranks' moments together."""
        return self._gathers and self._block_size == collectives.world_size()

    @property
    def _gathers(self) -> bool:
        """Whether the layer's forward brings some ranks' moments together, and keeps them."""
        if not isinstance(self.layer, AbstractNormOverRanks) or isinstance(self.layer, RecurrentBatchNorm):
            return False
        return 1 < self._block_size <= pooling.GATHER_UP_TO

    @property
    def _block_size(self) -> int:
        """How many ranks share statistics in training, whatever mode the layer is in."""
        layer = self.layer
        if isinstance(layer, nn.SyncBatchNorm) and layer.process_group is None:
            return collectives.world_size()
        if not isinstance(layer, AbstractNormOverRanks):
            return 1
        return len(collectives.members(layer.sync_ranks, layer.group_ranks, of_user=layer.has_users_group))

    def blocks(self, num_ranks: int) -> tuple[tuple[int, ...], ...]:
        """Part the ranks into those that share statistics; rank 0 is in the first. Norms of samples have one part."""
        if self.family == "sample":
            return (tuple(range(num_ranks)),)
        if isinstance(self.layer, AbstractNormOverRanks) and self.layer.group_ranks is not None:
            group = self.layer.group_ranks
            return tuple(sorted([group, *((rank,) for rank in range(num_ranks) if rank not in group)]))
        size = self._block_size
        return tuple(tuple(range(first, first + size)) for first in range(0, num_ranks, size))

    def rank_moments(self) -> Tensor:
        """All ranks' packed moments [R, 2C + 1], of a layer that gathers them itself; zeros if it was not reached."""
        found = self._kept()
        empty = (collectives.world_size(), 2 * self.channels + 1)
        return torch.zeros(empty, dtype=torch.float64, device=self.device) if found is None else found

    def own_moments(self) -> Tensor:
        """This rank's packed moments [2C + 1]; zeros if it was not reached."""
        if self.own is not None:
            return self.own
        kept = self._kept()
        if kept is not None and isinstance(self.layer, AbstractNormOverRanks):
            return kept[self.layer.members().index(collectives.rank())]
        return torch.zeros(2 * self.channels + 1, dtype=torch.float64, device=self.device)

    def _kept(self) -> Tensor | None:
        """Give the moments of its ranks that the layer's forward of this step left."""
        if not (self._gathers and self.reached and self.layer.training):
            return None
        return self.layer.rank_moments if isinstance(self.layer, AbstractNormOverRanks) else None

    def running(self) -> Tensor:
        """Running mean and variance as they are now [2C]; those of the first time step of a recurrent layer."""
        mean, var = self.layer.running_mean, self.layer.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        return torch.cat((mean.view(-1, self.channels)[0], var.view(-1, self.channels)[0])).double()

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        tensors = (*self.layer.parameters(recurse=False), *self.layer.buffers(recurse=False))
        return tensors[0].device if tensors else torch.device("cpu")

    @torch.no_grad()
    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in what the layer is given, before it takes it in itself."""
        given = [*args, *kwargs.values()]
        x: Tensor = kwargs.get("input", given[0])
        if self.reached or x.dim() < 2 or not x.is_floating_point() or _time_of(self.layer, given) > 0:
            return
        self.reached, self.samples = True, x.shape[0]
        if self.family != "sample":
            self.reference = self.running()
        if not (self._gathers and self.layer.training):
            x, mask = _batch_of(self.layer, x, given)
            if x.shape[1] != self.channels:  # a sample without a batch
                self.forget()
                return
            self.own, self.samples = Moments.of(x, mask).pack(), len(x)
            if mask is None and self.family == "running" and collectives.world_size() == 1:
                self.apart = _halves_apart(x)


class Hooks:
    """Forward hooks on the norms of a model that look only while `active`."""

    def __init__(self, norms: Iterable[WatchedNorm], is_wanted: Callable[[WatchedNorm], bool]) -> None:
        self._handles = [
            norm.layer.register_forward_pre_hook(_hook(norm, is_wanted), with_kwargs=True) for norm in norms
        ]

    def remove(self) -> None:
        """Let go of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def watched_norms(model: nn.Module) -> Iterator[WatchedNorm]:
    """Walk the norms of a model that can be watched, in the model's order."""
    kinds = (_BatchNorm, FrozenBatchNorm, *_OF_SAMPLES)
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, kinds) and _channels_of(module)
    }
    in_model = all(name.startswith("model.") for name in norms)  # a Lightning module's
    for name, module in norms.items():
        yield WatchedNorm((name.removeprefix("model.") if in_model else name) or type(module).__name__, module)


def _hook(norm: WatchedNorm, is_wanted: Callable[[WatchedNorm], bool]) -> Any:
    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_wanted(norm):
            norm.look(args, kwargs)

    return look


def _batch_of(layer: nn.Module, x: Tensor, given: list[Any]) -> tuple[Tensor, Tensor | None]:
    """Find one normalization batch, as far as this rank has it, channels in dimension 1, and its mask."""
    if isinstance(layer, nn.LayerNorm):  # its channels are the last dimension
        x = x.movedim(-1, 1)
    if isinstance(layer, GhostBatchNorm) and layer.training:
        x = x[: layer.ghost_batch]
    mask = next((value for value in given if isinstance(value, Tensor) and value.dtype == torch.bool), None)
    if mask is not None:
        mask = mask.reshape(*mask.shape, *[1] * (x.dim() - 1 - mask.dim()))
    return x, mask


def _halves_apart(x: Tensor) -> Tensor | None:
    """Compare two halves of a batch: √(n₁ n₂) / n · (mean₁ - mean₂); `None` if there are none."""
    first, over = len(x) // 2, [0, *range(2, x.dim())]
    if not first:
        return None
    means = [half.mean(over, dtype=statistics_dtype(x.dtype)) for half in (x[:first], x[first:])]
    return (means[0] - means[1]).double() * (math.sqrt(first * (len(x) - first)) / len(x))


def _time_of(layer: nn.Module, given: list[Any]) -> int:
    """Find the time step that a recurrent layer is at; 0 for any other."""
    if not isinstance(layer, RecurrentBatchNorm):
        return 0
    return next((operator.index(value) for value in given if isinstance(value, int)), 0)


def _family_of(layer: nn.Module) -> Family:
    if isinstance(layer, FrozenBatchNorm):
        return "constant"
    return "running" if isinstance(layer, _BatchNorm) and layer.running_mean is not None else "sample"


def _channels_of(layer: nn.Module) -> int:
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    return int(layer.normalized_shape[-1] if isinstance(layer, nn.LayerNorm) else getattr(layer, "num_features", 0))
