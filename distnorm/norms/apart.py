"""Running statistics that belong to one rank: kept apart from the buffers that DDP sends around.

`DistributedDataParallel` sends rank 0's buffers to all ranks before a forward (and the last rank's at the end of
`join`). Of statistics that ranks do not share, nothing is left to pool then. `convert` names them to DDP, which leaves
them out (`distnorm.unsent`). Where the names do not reach (DDP wraps a parent of what was converted, a layer was built
by hand), the first training forward inside a DDP finds that DDP and keeps them apart: from then on it sends copies. The
collective stays the same one, so a rank where no forward came yet cannot fall out of step.

Restoring after each overwriting would not do: DDP preserves the buffers' version counters, so that nothing shows it,
and a deliberate write between two forwards would be lost.
"""

import functools
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from distnorm import collectives

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

_log = logging.getLogger(__name__)
_LOOKED, _EVERY, _COPIES, _RUNS = "_distnorm_looked", "_distnorm_every", "_sync_module_buffers", "_active_ddp_module"
_Loaded = list[tuple[str, weakref.ref[Tensor], int, Tensor]]
_loaded: weakref.WeakKeyDictionary[nn.Module, _Loaded] = weakref.WeakKeyDictionary()
_looked_at: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


def shares_one_set(layer: nn.Module) -> bool:
    """Tell whether a batch norm's running statistics are alike on all ranks by construction: all pool together."""
    world = collectives.world_size()
    return world == 1 or would_share(layer, world)


def would_share(layer: nn.Module, world: int | None) -> bool:
    """Tell whether all ranks of a world pool together in this layer; `None`: of any world."""
    if isinstance(layer, nn.SyncBatchNorm):
        return layer.process_group is None
    if not hasattr(layer, "sync_ranks"):
        return False
    if layer.group_ranks is not None:
        return len(layer.group_ranks) == world  # type: ignore[arg-type]
    return layer.sync_ranks in (None, world)


def watch(layer: nn.Module) -> None:
    """Keep the ranks' own statistics apart in the DDP whose forward runs; called in a layer's training forward.

    What was loaded into the layer is forgotten then, for the forward writes: torch's own batch norm moves its
    statistics, and not their version counters. What AOTAutograd compiled (inductor, too) moves both.

    A compiled graph takes the look for a constant, and guards on it: inside another DDP it is compiled once more.

    Collective: none.
    """
    if torch.compiler.is_compiling():
        _look()
        ddp = getattr(DistributedDataParallel, _RUNS, None)
        if ddp is not None and getattr(ddp, _LOOKED, None):
            return
    else:
        if not hasattr(DistributedDataParallel, _RUNS) and not shares_one_set(layer):
            _say_unseen()
        _look()
        if _loaded:
            _loaded.pop(layer, None)


def _look() -> None:
    ddp = getattr(DistributedDataParallel, _RUNS, None)
    if ddp is not None and _LOOKED not in ddp.__dict__ and sends_buffers(ddp):
        ddp.__dict__[_LOOKED] = True
        _looked_at.add(ddp)
        keep_apart(ddp)


# What torch.compiler.assume_constant_result would set, if it did not load the whole compiler to do so.
_look._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


def watch_hook(module: nn.Module, input: tuple[Tensor]) -> None:  # noqa: A002, ARG001 — as torch.jit.script wants it
    """Watch in a norm that has no code of ours: a forward pre-hook."""
    if not torch.jit.is_scripting() and module.training:
        watch(module)


def has_hook(module: nn.Module) -> bool:
    """Tell whether `watch_hook` is on a module."""
    return watch_hook in module._forward_pre_hooks.values()  # noqa: SLF001


def set_hook(module: nn.Module, *, on: bool) -> None:
    """Put `watch_hook`, and `note_load` with it, on a module, or take them off."""
    if on and not has_hook(module):
        module.register_forward_pre_hook(watch_hook)
        module.register_load_state_dict_post_hook(note_load)
    elif not on:
        for hooks in (module._forward_pre_hooks, module._load_state_dict_post_hooks):  # noqa: SLF001
            for key in [key for key, hook in hooks.items() if hook in (watch_hook, note_load)]:
                del hooks[key]


def is_ours(module: nn.Module) -> bool:
    """Tell whether a batch norm has code of ours, which watches without a hook."""
    return hasattr(type(module), "layer_name")


def note_load(layer: nn.Module, *_: Any) -> None:
    """Remember what was loaded into a layer, which DDP's first sending overwrites; also a `load_state_dict` post hook.

    That sending comes before the first forward that could keep the statistics apart.
    """
    if not shares_one_set(layer):
        held = ((name, layer._buffers.get(name)) for name in STATISTICS)  # noqa: SLF001
        _loaded[layer] = [
            (name, weakref.ref(buffer), buffer._version, buffer.detach().clone())  # noqa: SLF001
            for name, buffer in held
            if buffer is not None and not is_lazy(buffer) and not buffer.is_inference()
        ]


def _restore_loaded(layers: list[nn.Module]) -> None:
    """Put back what was loaded and overwritten, unless someone has written since, or replaced the buffer.

    DDP preserves version counters since torch 2.12; with 2.11 its sending looks like a write of the user's.
    """
    for layer in layers:
        for name, loaded, version, value in _loaded.pop(layer, ()):
            buffer = layer._buffers.get(name)  # noqa: SLF001
            is_same = buffer is not None and buffer is loaded() and buffer._version == version  # noqa: SLF001
            if buffer is not None and is_same and not torch.compiler.is_compiling():
                with torch.no_grad():
                    buffer.copy_(value)


def look_again() -> None:
    """Let every DDP be looked at once more, since a conversion changed which statistics belong to one rank."""
    for ddp in _looked_at:
        ddp.__dict__.pop(_LOOKED, None)
    _looked_at.clear()


def sends_buffers(ddp: DistributedDataParallel) -> bool:
    """Tell whether a DDP sends rank 0's buffers before its forwards; torch 2.13 has a new name for the switch."""
    new = getattr(ddp, "forward_sync_buffers", None)
    return bool(getattr(ddp, "broadcast_buffers", False) if new is None else new)


def own_layers(model: nn.Module, *, every: bool = False) -> Iterator[nn.Module]:
    """Walk the batch norms whose running statistics belong to one rank: ours, and those that `convert` marked.

    Args:
        model: what DDP wraps.
        every: unmarked ones of torch's too.
    """
    for module in model.modules():
        belongs = isinstance(module, _BatchNorm) and module.running_mean is not None and not shares_one_set(module)
        if belongs and (every or is_ours(module) or has_hook(module)):
            yield module


def keep_apart(ddp: DistributedDataParallel, *, every: bool = False) -> bool:
    """Make a DDP send copies of the ranks' own running statistics, and say so once.

    Args:
        ddp: sends buffers.
        every: of all its batch norms, also of those that no `convert` has seen.

    Returns:
        Whether the statistics stay as they are; `False`: this torch has other private names.

    Collective: none.
    """
    layers = [layer for layer in own_layers(ddp.module, every=every) if _is_sent(layer, ddp)]
    if _COPIES in ddp.__dict__:
        kept = set(own_layers(ddp.module, every=_keeps_every(ddp)))
        layers = [layer for layer in layers if layer not in kept]
    if not layers:
        return True
    known = ("modules_buffers", "named_module_buffers", _COPIES, "_sync_final_model")
    can = all(hasattr(ddp, name) for name in known)
    if can:
        ddp.__dict__[_EVERY] = every or _keeps_every(ddp)
        ddp.__dict__[_COPIES] = functools.partial(_send_copies, ddp)
        ddp.__dict__["_sync_final_model"] = functools.partial(_send_final_copies, ddp)
        _restore_loaded(layers)
    _say(ddp, len(layers), can=can)
    return can


def _keeps_every(ddp: DistributedDataParallel) -> bool:
    return bool(ddp.__dict__.get(_EVERY, False))


def _is_sent(layer: nn.Module, ddp: DistributedDataParallel) -> bool:
    sent = {id(buffer) for buffer in getattr(ddp, "modules_buffers", ddp.module.buffers())}
    return any(id(layer._buffers.get(name)) in sent for name in STATISTICS)  # noqa: SLF001


def _say(ddp: DistributedDataParallel, layers: int, *, can: bool) -> None:
    if collectives.rank() != 0:
        return
    switch = f"{'forward_sync' if hasattr(ddp, 'forward_sync_buffers') else 'broadcast'}_buffers=False"
    did = "they are kept apart, and it sends copies" if can else "with this torch they cannot be kept apart"
    _log.warning(
        "DDP sends rank 0's buffers to all ranks before each forward, also the running statistics of %d layers that "
        "belong to each rank: %s.\nCall distnorm.convert() on the very model that DDP wraps, before it does; or use "
        "DistributedDataParallel(model, %s).",
        layers,
        did,
        switch,
    )


@functools.cache
def _say_unseen() -> None:
    if collectives.rank() == 0:
        _log.warning(
            "This torch does not tell which DDP's forward runs: one that sends rank 0's buffers before its forwards "
            "overwrites the running statistics that belong to each rank.\nCall distnorm.convert() on the very model "
            "that DDP wraps, before it does; or use DistributedDataParallel(model, forward_sync_buffers=False), "
            "broadcast_buffers=False before torch 2.13.",
        )


def _own_buffers(ddp: DistributedDataParallel) -> dict[int, Tensor]:
    layers = own_layers(ddp.module, every=_keeps_every(ddp))
    buffers = (layer._buffers.get(name) for layer in layers for name in STATISTICS)  # noqa: SLF001
    return {id(buffer): buffer for buffer in buffers if buffer is not None}


def _send_copies(ddp: Any, *arguments: Any, **options: Any) -> None:
    """Send what DDP sends, this rank's own statistics as copies, which rank 0's may overwrite."""
    own, sent, named = _own_buffers(ddp), ddp.modules_buffers, ddp.named_module_buffers
    ddp.modules_buffers = [buffer.clone() if id(buffer) in own else buffer for buffer in sent]
    ddp.named_module_buffers = dict(zip(named, ddp.modules_buffers, strict=True))
    try:
        type(ddp)._sync_module_buffers(ddp, *arguments, **options)  # noqa: SLF001
    finally:
        ddp.modules_buffers, ddp.named_module_buffers = sent, named


def _send_final_copies(ddp: Any, *arguments: Any, **options: Any) -> None:
    """End a `join` as DDP does, and put this rank's own statistics back."""
    kept = [(buffer, buffer.clone()) for buffer in _own_buffers(ddp).values()]
    type(ddp)._sync_final_model(ddp, *arguments, **options)  # noqa: SLF001
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
