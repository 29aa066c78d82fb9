"""Which modules are batch norms that another class can take over, and how a module changes its class in place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.errors import ConfigError
from distnorm.norms.base import OF_ONE_STEP
from distnorm.norms.constants import eps_of, looks_like_constants
from distnorm.norms.leaf import AS_TORCHS, TracedAsLeaf


@dataclass(frozen=True)
class Source:
    """What is known of a class that another can take over.

    Attributes:
        after: names of the submodules that its forward applies after the normalization.
        frozen: its statistics and affine part are constants: `convert` leaves it, unless it is named.
    """

    after: tuple[str, ...] = ()
    frozen: bool = False


SOURCES: dict[type[nn.Module] | str, Source] = {
    "timm.layers.norm_act.BatchNormAct2d": Source(("drop", "act")),
    "timm.layers.norm_act.SyncBatchNormAct": Source(("drop", "act")),
    "timm.layers.norm_act.FrozenBatchNormAct2d": Source(("drop", "act"), frozen=True),
    "torchvision.ops.misc.FrozenBatchNorm2d": Source(frozen=True),
}
"""Classes that can be taken over; those of packages that may not be installed by their qualified names."""

_NEEDED = ("weight", "bias", "running_mean", "running_var")
_HARMLESS = {"__init__", "__repr__", "extra_repr", "__new__", "__init_subclass__"}
_WRAPPERS = {
    "DistributedDataParallel": "Convert before wrapping, or pass model.module",
    "DataParallel": "Convert before wrapping, or pass model.module",
    "FullyShardedDataParallel": "Convert before wrapping: its parameters are views now",
    "FSDPModule": "Convert before fully_shard",
    "OptimizedModule": "Convert before torch.compile, or pass model._orig_mod",
}


def register_norm(cls: type[nn.Module], after: tuple[str, ...] = (), *, frozen: bool = False) -> None:
    """Tell `convert` and `fold` that a class is a batch norm, though its forward is its own.

    Args:
        cls: has `nn.BatchNorm`'s parameters and buffers, and eps, under their names. Its other settings may be missing:
            momentum is 0.1 then.
        after: names of the submodules that its forward applies to what was normalized, in their order, e.g. `("act",)`;
            the converted layer applies them too.
        frozen: its statistics and affine part are constants, as parameters or buffers: `convert` leaves such a layer
            as it is, unless `spec.layers` names it.

    Raises:
        ConfigError: `cls` is no class of modules, or `after` is no tuple of names.

    Example:
        >>> class ActiveNorm(nn.BatchNorm2d):
        ...     def __init__(self, channels):
        ...         super().__init__(channels)
        ...         self.act = nn.SiLU()
        ...
        ...     def forward(self, x):
        ...         return self.act(super().forward(x))
        >>> register_norm(ActiveNorm, after=("act",))
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(
            f"register_norm() got {cls!r}, that is no class of modules. Give it the class itself, e.g. type(model.bn1)."
        )
    if isinstance(after, str):
        raise ConfigError(
            f"register_norm() got after={after!r}, that must be a tuple of names. Give after=({after!r},)."
        )
    if not isinstance(after, tuple | list) or not all(isinstance(name, str) for name in after):
        raise ConfigError(
            f"register_norm() got after={after!r}, that must name submodules of a {cls.__name__}, not be them.\n"
            "Give the names of the attributes, e.g. after=('act',)."
        )
    SOURCES[cls] = Source(tuple(after), frozen)


for _cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    register_norm(_cls)


def source_of(module: nn.Module) -> Source | None:
    """Look up what is known of a module's class.

    A class that inherits from a known one and defines nothing but how it is built and shown counts as that one. A class
    that is not known counts as constants if it holds what these do.
    """
    return _of_class(module) or (Source(frozen=True) if looks_like_constants(module) else None)


def _of_class(module: nn.Module) -> Source | None:
    for cls in type(module).__mro__:
        found = SOURCES.get(cls) or SOURCES.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found
        if any(callable(value) or isinstance(value, property) for k, value in vars(cls).items() if k not in _HARMLESS):
            return None
    return None


def after_of(norm: nn.Module) -> tuple[str, ...]:
    """Name the submodules that a norm applies to its output: as it was converted, or as its class does."""
    source = source_of(norm)
    names: tuple[str, ...] = getattr(norm, "after", ()) or (source.after if source else ())
    return names


def check_module(model: object, verb: str) -> None:
    """Refuse what is not a module.

    Args:
        model: what the user gave.
        verb: what the user called, e.g. `convert`.

    Raises:
        ConfigError: it is not one.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"{type(model).__name__!r}"
        remedy = "Give it the model, an nn.Module" + (f": {model.__name__}(…)." if isinstance(model, type) else ".")
        raise ConfigError(f"{verb}() got {kind}, that is no module. {remedy}")


def check_model(model: object, verb: str) -> None:
    """Refuse what is no model, or one whose layers cannot be changed any more.

    Args:
        model: what the user gave.
        verb: what the user called, e.g. `convert`.

    Raises:
        ConfigError: it is no module; or it is, or holds, a module wrapped in DDP or FSDP or compiled; or is scripted.
    """
    check_module(model, verb)
    assert isinstance(model, nn.Module)
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            f"{verb}() got a scripted model, whose layers are fixed. {verb.capitalize()} the module it was made from."
        )
    for name, module in model.named_modules():
        classes = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
        for wrapper in _WRAPPERS.keys() & classes:
            place = f"got a {wrapper} model" if not name else f"found a {wrapper}, {name!r}, inside the model"
            raise ConfigError(f"{verb}() {place}. {_WRAPPERS[wrapper].replace('Convert', verb.capitalize())}.")


def find_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Collect whatever is a batch norm, known or not, by its first name, in the model's order."""
    norms = ((name or "(the model)", module) for name, module in model.named_modules())
    return {name: module for name, module in norms if source_of(module) or looks_like_batch_norm(module)}


def check_known(name: str, norm: nn.Module) -> Source:
    """Give what is known of a batch norm.

    Raises:
        ConfigError: it is lazy or scripted, of a subclass with code of its own, or lacks what its class promised.
    """
    cls, source = type(norm).__name__, source_of(norm)
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin) and isinstance(norm, _BatchNorm):
        raise ConfigError(
            f"layer {name!r} is a {cls}, that does not know its channels yet.\n"
            "Run one batch through the model first, then convert.",
        )
    if isinstance(norm, torch.jit.ScriptModule):
        raise ConfigError(
            f"layer {name!r} is a scripted {getattr(norm, 'original_name', cls)}, whose class is fixed.\n"
            f"Convert before scripting, or leave it as it is: exclude=[{name!r}].",
        )
    if source is None:
        raise ConfigError(
            f"layer {name!r} is a {cls}, a batch norm with code of its own, that convert() would drop.\n"
            "Replace it with nn.BatchNorm1d/2d/3d and what it does besides; or name what it applies afterwards: "
            f"distnorm.register_norm({cls}, after=(…));\nor leave it as it is: exclude=[{name!r}].",
        )
    if computes_otherwise(norm):
        raise ConfigError(
            f"layer {name!r} is a {cls}, which holds what a frozen batch norm does and computes something else.\n"
            f"Name what it applies afterwards: distnorm.register_norm({cls}, after=(…), frozen=True); "
            f"or leave it as it is: exclude=[{name!r}].",
        )
    needed = (*_NEEDED, *source.after)
    missing = [attribute for attribute in needed if not hasattr(norm, attribute)]
    if not missing and not hasattr(norm, "eps") and eps_of(norm) is None:
        missing = ["eps"]
    if missing:
        raise ConfigError(
            f"layer {name!r} is a {cls} without {', '.join(missing)}, that convert() needs.\n"
            f"Give it {'them' if len(missing) > 1 else 'it'} under nn.BatchNorm2d's names, "
            f"or leave it as it is: exclude=[{name!r}].",
        )
    return source


def computes_otherwise(norm: nn.Module) -> bool:
    """Tell whether a module that only looks like constants gives another output than these."""
    return _of_class(norm) is None and looks_like_constants(norm) and eps_of(norm) is None


def find_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Collect the batch norms that can change their class, by name, in the model's order; constants are left out.

    Raises:
        ConfigError: see `check_model` and `check_known`.
    """
    check_model(model, "convert")
    found = {name: norm for name, norm in find_batch_norms(model).items() if not _is_frozen(norm)}
    for name, norm in found.items():
        check_known(name, norm)
    return found


def _is_frozen(norm: nn.Module) -> bool:
    source = source_of(norm)
    return source is not None and source.frozen


_OF_A_KIND = ("sync_ranks", "group_ranks", "has_users_group", "ghost_batch", "r_max", "d_max", "warmup", "ramp")


def become(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    """Make a module one of another class, in place.

    Args:
        module: keeps its parameters, buffers, hooks and mode.
        cls: its new class; no `__init__` runs.
        attributes: what the new class needs besides.
    """
    after = after_of(module)
    module.__class__ = cls
    # torch's synchronized layer holds a process group, and ours what belongs to one step: nothing could copy them
    for name in ("process_group", "layer_name", "layer_order", *_OF_A_KIND, *OF_ONE_STEP, *AS_TORCHS):
        module.__dict__.pop(name, None)
    if issubclass(cls, TracedAsLeaf):
        module.__dict__.update(AS_TORCHS)
    if after:
        module.__dict__["after"] = after
    module.__dict__.update(attributes)


def looks_like_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module is a batch norm by its class's ancestors, or its name where it is scripted."""
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in str(getattr(module, "original_name", ""))
    return isinstance(module, _BatchNorm)
