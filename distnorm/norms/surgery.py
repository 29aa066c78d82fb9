"""Which modules are batch norms that another class can take over, and how a module changes its class in place."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.errors import ConfigError
from distnorm.norms.base import OF_ONE_STEP

SOURCES: dict[type[nn.Module], tuple[str, ...]] = {}
"""Classes that can be taken over, and the names of the submodules their forward applies after the normalization."""


def register(cls: type[nn.Module], after: tuple[str, ...] = ()) -> None:
    """Tell `convert` that a class is a batch norm, though its forward is its own.

    Args:
        cls: has `nn.BatchNorm`'s parameters, buffers and settings, under their names.
        after: names of the submodules that its forward applies to what was normalized, in their order, e.g. `("act",)`;
            the converted layer applies them too.
    """
    SOURCES[cls] = after


for _cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    register(_cls)


def find_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Collect the batch norms that can change their class, by name, in the model's order.

    Raises:
        ConfigError: the model is wrapped in DDP, scripted, or has a lazy norm or a subclass with its own forward.
    """
    if not isinstance(model, nn.Module):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ConfigError(f"convert() got {kind!r}, that is no module. Give it the model, an nn.Module.")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ConfigError(
            f"convert() got a {type(model).__name__} model. Convert before wrapping, or pass model.module.",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            "convert() got a scripted model, whose layers are fixed. Convert the module it was made from."
        )
    norms: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) in SOURCES:
            norms[name or "(the model)"] = module
        elif isinstance(module, nn.modules.lazy.LazyModuleMixin) and isinstance(module, _BatchNorm):
            raise ConfigError(
                f"layer {name!r} is a {type(module).__name__}, that does not know its channels yet.\n"
                "Run one batch through the model first, then convert.",
            )
        elif isinstance(module, _BatchNorm):
            raise ConfigError(
                f"layer {name!r} is a {type(module).__name__}, a batch norm with a forward of its own, that convert() "
                "would drop.\nReplace it with nn.BatchNorm1d/2d/3d and what it does besides.",
            )
    return norms


def become(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    """Make a module one of another class, in place.

    Args:
        module: keeps its parameters, buffers, hooks and mode.
        cls: its new class; no `__init__` runs.
        attributes: what the new class needs besides.
    """
    module.__class__ = cls
    # torch's synchronized layer holds a process group, and ours what belongs to one step: nothing could copy them
    for name in ("process_group", "layer_name", *OF_ONE_STEP):
        module.__dict__.pop(name, None)
    module.__dict__.update(attributes)
