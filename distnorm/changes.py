"""How a batch norm becomes each kind of layer that a `NormSpec` can name, in place."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.errors import ConfigError
from distnorm.norms.arguments import check_eps, check_momentum
from distnorm.norms.constants import eps_of
from distnorm.norms.frozen import FrozenBatchNorm
from distnorm.norms.ghost import GhostBatchNorm
from distnorm.norms.quantizing import refuse_fusing
from distnorm.norms.renorm import BatchRenorm
from distnorm.norms.response import FilterResponseNorm
from distnorm.norms.sample import GroupNorm, Identity
from distnorm.norms.surgery import after_of, become, register_norm, source_of
from distnorm.norms.sync import SyncBatchNorm
from distnorm.norms.weight import STANDARDIZED
from distnorm.spec import BATCH_KINDS, NormSpec, group_count

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_SETTINGS = ("momentum", "track_running_stats")
_DIMENSIONS = {"BatchNorm1d": "1d", "BatchNorm2d": "2d", "BatchNorm3d": "3d"}

OF_POSITIONS = frozenset({"group", "group_ws", "instance", "response"})
"""Kinds that need more than one value a channel."""

register_norm(FrozenBatchNorm, frozen=True)
for _cls in (SyncBatchNorm, GhostBatchNorm, BatchRenorm, FrozenBatchNorm, FilterResponseNorm, GroupNorm, Identity):
    refuse_fusing(_cls)
refuse_fusing(nn.GroupNorm, STANDARDIZED.values())


def channels_of(module: nn.Module) -> int:
    """Read the channels that a norm or a convolution gives out."""
    for attribute in ("num_features", "num_channels", "out_channels", "out_features"):
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    held = (getattr(module, name, None) for name in ("running_mean", "weight"))  # torchvision's constants
    return next((len(tensor) for tensor in held if isinstance(tensor, torch.Tensor) and tensor.dim()), 0)


def dimension_of(norm: nn.Module) -> str:
    """Tell the dimension that a norm's class names; empty where it takes any."""
    names = (name for cls in type(norm).__mro__ for name in _DIMENSIONS if cls.__name__.endswith(name))
    return _DIMENSIONS[found] if (found := next(names, None)) else ""


def check_change(name: str, norm: nn.Module, spec: NormSpec) -> None:
    """Refuse what a layer cannot become, before anything changes.

    Raises:
        ConfigError: there are no statistics to freeze, or no group to make; or its `eps` or `momentum` is one that no
            layer could have been built with.
    """
    if spec.kind == "frozen" and getattr(norm, "running_mean", None) is None:
        raise ConfigError(
            f"layer {name!r} has no running statistics (track_running_stats=False), and kind='frozen' needs some.\n"
            f"Leave it as it is: exclude=[{name!r}], or give it a kind of its own: "
            f"layers={{{name!r}: {{'kind': 'group'}}}}."
        )
    settings = {"eps": check_eps} | ({"momentum": check_momentum} if spec.kind in BATCH_KINDS else {})
    for setting, check in settings.items():
        if hasattr(norm, setting):
            check(f"layer {name!r} has", getattr(norm, setting))
    if spec.groups < 1:
        raise ConfigError(f"layer {name!r} would get groups={spec.groups}, at least 1. Give e.g. groups=32.")


def to_standardized(conv: nn.Module, _: NormSpec) -> str:
    """Make a convolution one that standardizes its weights."""
    become(conv, STANDARDIZED[type(conv)])
    return "its norm takes the weights' scale out"


def _to_batch(norm: nn.Module, spec: NormSpec) -> str:
    was_constant = _is_constant(norm)
    thaw(norm)
    if was_constant or isinstance(norm, nn.SyncBatchNorm | SyncBatchNorm | GhostBatchNorm | BatchRenorm):
        # Which dimension the layer had is not known any more: a group of one rank is local batch norm of any dimension.
        become(norm, SyncBatchNorm, sync_ranks=1, group_ranks=None)
    return _with_momentum(norm, spec)


def _to_sync(norm: nn.Module, spec: NormSpec) -> str:
    thaw(norm)
    become(norm, SyncBatchNorm, sync_ranks=spec.sync_ranks, group_ranks=None)
    return _with_momentum(norm, spec)


def _to_ghost(norm: nn.Module, spec: NormSpec) -> str:
    thaw(norm)
    become(norm, GhostBatchNorm, ghost_batch=spec.ghost_batch)
    return _with_momentum(norm, spec)


def _to_renorm(norm: nn.Module, spec: NormSpec) -> str:
    thaw(norm)
    become(norm, BatchRenorm, sync_ranks=spec.sync_ranks, group_ranks=None, **spec.renorm)
    return _with_momentum(norm, spec)


def _to_frozen(norm: nn.Module, spec: NormSpec) -> str:
    thaw(norm)
    _forget(norm, *_SETTINGS)
    become(norm, FrozenBatchNorm)
    for parameter in norm.parameters(recurse=False):
        parameter.requires_grad_(False)
    return spec.in_words()


def _to_group(norm: nn.Module, spec: NormSpec) -> str:
    channels = channels_of(norm)
    groups = {"layer": 1, "instance": channels}.get(spec.kind) or group_count(channels, spec.groups)
    thaw(norm)
    _drop_statistics(norm)
    _forget(norm, "num_features")
    become(norm, GroupNorm if after_of(norm) else nn.GroupNorm, num_groups=groups, num_channels=channels)
    return (
        f"{groups} group{'s' if groups > 1 else ''} of {channels // groups} channel{'s' if groups < channels else ''}"
    )


def _to_response(norm: nn.Module, spec: NormSpec) -> str:
    thaw(norm)
    _drop_statistics(norm)
    become(norm, FilterResponseNorm)
    return spec.in_words()


def _to_none(norm: nn.Module, spec: NormSpec) -> str:
    to_identity(norm)
    return spec.in_words()


_CHANGES: dict[str, Callable[[nn.Module, NormSpec], str]] = {
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


def suited(spec: NormSpec, dimension: str) -> NormSpec:
    """Give the decision that a layer of this dimension can follow.

    A vector has one value a channel: in groups of few values little is left of them (of 2 values their order; of one,
    0; of filter response normalization, their signs). All channels are one group then.
    """
    if dimension == "vector" and spec.kind in OF_POSITIONS:
        return dataclasses.replace(spec, kind="layer")
    return spec


def change(norm: nn.Module, spec: NormSpec, dimension: str) -> str:
    """Make a batch norm what a decision says, in place.

    Args:
        norm: changes its class.
        spec: what holds for it.
        dimension: what it is fed, as `NormSpec.of` takes it.

    Returns:
        Why it is what it is now, in words.
    """
    own = suited(spec, dimension)
    chosen = _choose_settings(norm, own)
    why = _CHANGES[own.kind](norm, own) + chosen
    return why if own is spec else f"{why}: fed vectors, of which {spec.kind!r} would leave too little"


def _choose_settings(norm: nn.Module, spec: NormSpec) -> str:
    """Complete a norm whose class is not torch's, and say what it did not have."""
    why = ""
    if not hasattr(norm, "momentum") and not _is_constant(norm) and spec.momentum is None and spec.kind in BATCH_KINDS:
        why += "; momentum 0.1, since it named none"
    if not isinstance(norm, _BatchNorm):
        complete(norm)
        if norm.eps == 0 and spec.kind != "frozen":
            norm.__dict__["eps"] = 1e-5
            why += "; eps 1e-5, since it had 0, which training refuses"
    return why


def to_identity(norm: nn.Module) -> None:
    """Take a norm away, in place; what it applied afterwards stays."""
    _drop_statistics(norm)
    for name in ("weight", "bias"):
        norm._parameters.pop(name, None)  # noqa: SLF001
        norm._buffers.pop(name, None)  # noqa: SLF001
    become(norm, Identity)


def thaw(norm: nn.Module) -> None:
    """Let a layer of constants learn again: weight and bias as parameters, batch norm's settings; others stay alone."""
    if not _is_constant(norm):
        return
    complete(norm)
    for name in ("weight", "bias"):
        constant = norm._buffers.pop(name, None)  # noqa: SLF001
        if constant is not None:
            norm.register_parameter(name, nn.Parameter(constant.detach()))
        elif norm._parameters.get(name) is not None:  # noqa: SLF001
            norm._parameters[name].requires_grad_()  # type: ignore[union-attr]  # noqa: SLF001


def complete(norm: nn.Module) -> None:
    """Give a norm whose class is not torch's the settings that it lacks; `eps` is what it computes with."""
    for name in ("weight", "bias"):
        if not hasattr(norm, name):
            norm.register_parameter(name, None)
    if "num_batches_tracked" not in norm._buffers and getattr(norm, "running_mean", None) is not None:  # noqa: SLF001
        mean: torch.Tensor = norm.running_mean  # type: ignore[assignment]
        norm.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=mean.device))
    if not hasattr(norm, "eps"):
        norm.__dict__["eps"] = eps_of(norm)
    settings = {"momentum": 0.1, "track_running_stats": True, "affine": norm.weight is not None}
    for name, value in ({"num_features": channels_of(norm)} | settings).items():
        if not hasattr(norm, name):
            norm.__dict__[name] = value


def _is_constant(norm: nn.Module) -> bool:
    source = source_of(norm)
    return source is not None and source.frozen


def _drop_statistics(norm: nn.Module) -> None:
    _forget(norm, *_SETTINGS)
    for buffer in _BUFFERS:
        norm._buffers.pop(buffer, None)  # noqa: SLF001


def _forget(norm: nn.Module, *attributes: str) -> None:
    for attribute in attributes:
        norm.__dict__.pop(attribute, None)


def _with_momentum(norm: nn.Module, spec: NormSpec) -> str:
    if spec.momentum is not None:
        norm.momentum = spec.momentum  # type: ignore[assignment]
    return spec.in_words()
