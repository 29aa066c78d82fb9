"""How a batch norm becomes each kind of layer that a `NormSpec` can name, in place."""

from collections.abc import Callable

from torch import nn

from distnorm.norms.frozen import FrozenBatchNorm
from distnorm.norms.ghost import GhostBatchNorm
from distnorm.norms.renorm import BatchRenorm
from distnorm.norms.response import FilterResponseNorm
from distnorm.norms.sample import GroupNorm, Identity
from distnorm.norms.surgery import SOURCES, become
from distnorm.norms.sync import SyncBatchNorm
from distnorm.norms.weight import STANDARDIZED
from distnorm.spec import NormSpec, group_count

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_SETTINGS = ("momentum", "track_running_stats", "sync_ranks", "group_ranks", "ghost_batch")
_DIMENSIONS = {nn.BatchNorm1d: "1d", nn.BatchNorm2d: "2d", nn.BatchNorm3d: "3d"}


def channels_of(module: nn.Module) -> int:
    """Read the channels that a norm or a convolution gives out."""
    for attribute in ("num_features", "num_channels", "out_channels"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    raise AssertionError(f"{type(module).__name__} has no channels")


def dimension_of(norm: nn.Module) -> str:
    """Tell the dimension that a norm's class names; empty where it takes any."""
    return next((name for cls, name in _DIMENSIONS.items() if isinstance(norm, cls)), "")


def to_standardized(conv: nn.Module, _: NormSpec) -> str:
    """Make a convolution one that standardizes its weights."""
    become(conv, STANDARDIZED[type(conv)])
    return "its norm takes the weights' scale out"


def _to_batch(norm: nn.Module, spec: NormSpec) -> str:
    if type(norm) in (nn.SyncBatchNorm, SyncBatchNorm, GhostBatchNorm, BatchRenorm):
        # Which dimension the layer had is not known any more: a group of one rank is local batch norm of any dimension.
        become(norm, SyncBatchNorm, sync_ranks=1, group_ranks=None)
    _set_momentum(norm, spec)
    return spec.in_words()


def _to_sync(norm: nn.Module, spec: NormSpec) -> str:
    become(norm, SyncBatchNorm, sync_ranks=spec.sync_ranks, group_ranks=None, **_after(norm))
    _set_momentum(norm, spec)
    return spec.in_words()


def _to_ghost(norm: nn.Module, spec: NormSpec) -> str:
    become(norm, GhostBatchNorm, ghost_batch=spec.ghost_batch, **_after(norm))
    _set_momentum(norm, spec)
    return spec.in_words()


def _to_renorm(norm: nn.Module, spec: NormSpec) -> str:
    become(norm, BatchRenorm, sync_ranks=spec.sync_ranks, group_ranks=None, **_after(norm))
    _set_momentum(norm, spec)
    return spec.in_words()


def _to_frozen(norm: nn.Module, spec: NormSpec) -> str:
    _forget(norm, "momentum", "track_running_stats", "sync_ranks", "group_ranks", "ghost_batch")
    become(norm, FrozenBatchNorm, **_after(norm))
    for parameter in norm.parameters(recurse=False):
        parameter.requires_grad_(False)
    return spec.in_words()


def _to_group(norm: nn.Module, spec: NormSpec) -> str:
    channels = channels_of(norm)
    groups = {"layer": 1, "instance": channels}.get(spec.kind) or group_count(channels, spec.groups)
    after = _after(norm)
    _drop_statistics(norm)
    norm.__dict__.pop("num_features", None)
    become(norm, GroupNorm if after else nn.GroupNorm, num_groups=groups, num_channels=channels, **after)
    return (
        f"{groups} group{'s' if groups > 1 else ''} of {channels // groups} channel{'s' if groups < channels else ''}"
    )


def _to_response(norm: nn.Module, spec: NormSpec) -> str:
    after = _after(norm)
    _drop_statistics(norm)
    become(norm, FilterResponseNorm, **after)
    return spec.in_words()


def _to_none(norm: nn.Module, spec: NormSpec) -> str:
    after = _after(norm)
    _drop_statistics(norm)
    for name in ("weight", "bias"):
        norm._parameters.pop(name, None)  # noqa: SLF001
    become(norm, Identity, **after)
    return spec.in_words()


CHANGES: dict[str, Callable[[nn.Module, NormSpec], str]] = {
    "batch": _to_batch,
    "sync": _to_sync,
    "ghost": _to_ghost,
    "renorm": _to_renorm,
    "frozen": _to_frozen,
    "group": _to_group,
    "group_ws": _to_group,
    "layer": _to_group,
    "instance": _to_group,
    "response": _to_response,
    "none": _to_none,
}


def _after(norm: nn.Module) -> dict[str, tuple[str, ...]]:
    """Carry over what a layer applies after its normalization."""
    names = getattr(norm, "after", ()) or SOURCES.get(type(norm), ())
    return {"after": names} if names else {}


def _drop_statistics(norm: nn.Module) -> None:
    _forget(norm, *_SETTINGS)
    for buffer in _BUFFERS:
        norm._buffers.pop(buffer, None)  # noqa: SLF001


def _forget(norm: nn.Module, *attributes: str) -> None:
    for attribute in attributes:
        norm.__dict__.pop(attribute, None)


def _set_momentum(norm: nn.Module, spec: NormSpec) -> None:
    if spec.momentum is not None:
        norm.momentum = spec.momentum  # type: ignore[assignment]
