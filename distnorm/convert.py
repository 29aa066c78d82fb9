"""Turn a model's batch norms into what a `NormSpec` says, in place, and back.

In place means: the same module objects, another class. So lists, hooks, aliases, parameter objects, `training`,
`requires_grad`, dtype and device stay right by construction, and an optimizer built before stays valid.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.changes import CHANGES, channels_of, dimension_of, to_standardized
from distnorm.errors import ConfigError
from distnorm.norms.base import AbstractBatchStatisticsNorm
from distnorm.norms.surgery import find_norms
from distnorm.norms.weight import STANDARDIZED
from distnorm.spec import NormSpec


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """One row of a `Conversion`: what the layer was, what it is now, and which samples share its statistics."""

    name: str
    channels: int
    was: str
    now: str
    normalization_batch: int
    why: str


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """What a module was: its class, and its attributes less the parameters' and buffers' values, that live on."""

    module: nn.Module
    cls: type[nn.Module]
    attributes: dict[str, Any]
    buffers: dict[str, torch.Tensor | None]
    not_saved: frozenset[str]


class Conversion:
    """The record of a conversion: prints as a table, and can be undone.

    Attributes:
        model: the very model that was converted.
        spec: the decision it follows.
        layers: one row a converted module, in the model's order.
        lost_keys: `state_dict` keys that the model had before and has no more.
    """

    def __init__(
        self, model: nn.Module, spec: NormSpec, layers: tuple[ConvertedLayer, ...], snapshots: list[_Snapshot]
    ) -> None:
        self.model, self.spec, self.layers = model, spec, layers
        self.lost_keys = tuple(sorted(_lost_keys(model, snapshots)))
        self._snapshots = snapshots

    def revert(self) -> nn.Module:
        """Give every layer its class, settings and buffers back; weights and running statistics keep what they learned.

        Returns:
            The model. A second call changes nothing.
        """
        while self._snapshots:
            _restore(self._snapshots.pop())
        return self.model

    def check(self) -> None:
        """Make sure that every converted layer still is what `convert` made it; after `revert` there is none.

        Raises:
            ConfigError: one was replaced: torch's and Lightning's own conversions take any batch norm, ours too.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, made in zip([row.name for row in self.layers], self._snapshots, strict=False):
            now = modules.get("" if name == "(the model)" else name)
            if type(now) is not type(made.module):
                cls = f"{type(now).__module__.partition('.')[0]}.{type(now).__name__}"
                raise ConfigError(
                    f"convert() made {name} a distnorm.{type(made.module).__name__}, and now it is a {cls}.\n"
                    "Leave out Trainer(sync_batchnorm=True), and do not call convert_sync_batchnorm after convert().",
                )

    def __str__(self) -> str:
        """Draw the table: layer, channels, was, is, normalization batch, why."""
        rows = [(r.name, str(r.channels), r.was, r.now, str(r.normalization_batch), r.why) for r in self.layers]
        return aligned([("layer", "channels", "was", "is", "normalization batch", "why"), *rows])


def convert(model: nn.Module, spec: NormSpec) -> Conversion:
    """Make every batch norm of `model` what `spec` says, in place.

    Args:
        model: any module that holds `nn.BatchNorm1d/2d/3d`, `nn.SyncBatchNorm` or distnorm's own layers, or is one.
        spec: from `decide`, or built by hand.

    Returns:
        The record of what was changed; its `model` is the argument.

    Collective: none.

    Raises:
        ConfigError: the model is wrapped in DDP, scripted, has a lazy norm or a subclass with its own forward, or no
            batch norm at all. Nothing is changed then.

    Example:
        >>> from distnorm import decide
        >>> model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU())
        >>> conversion = convert(model, decide(device_batch=2, world_size=8))
        >>> model[1]
        SyncBatchNorm(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, sync_ranks=8)
        >>> conversion.revert()[1]
        BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    norms = find_norms(model)
    if not norms:
        raise ConfigError(
            f"convert() found no batch norm in {type(model).__name__}: there is nothing to decide.\n"
            "Build the model with nn.BatchNorm1d/2d/3d layers, e.g. norm_layer=torch.nn.BatchNorm2d.",
        )
    specs = {name: spec.of(name, dimension_of(norm)) for name, norm in norms.items()}
    changes: list[tuple[str, nn.Module, NormSpec, Callable[[nn.Module, NormSpec], str]]] = []
    standardized = {name: norm for name, norm in norms.items() if specs[name].kind == "group_ws"}
    changes += [(name, conv, spec, to_standardized) for name, conv in _convolutions_before(model, standardized)]
    changes += [(name, norm, specs[name], CHANGES[specs[name].kind]) for name, norm in norms.items()]
    order = {id(module): place for place, module in enumerate(model.modules())}
    rows, snapshots = [], []
    for name, module, own, change in sorted(changes, key=lambda item: order[id(item[1])]):
        snapshots.append(_take_snapshot(module))
        was, channels = type(module).__name__, channels_of(module)
        why = change(module, own)
        if isinstance(module, AbstractBatchStatisticsNorm):
            module.layer_name = name
        rows.append(ConvertedLayer(name, channels, was, type(module).__name__, own.normalization_batch, why))
    return Conversion(model, spec, tuple(rows), snapshots)


def normalization_layers(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Walk the batch norms of a model that keep running statistics, ours and torch's, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Lay rows out as a plain-text table; the first is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _convolutions_before(model: nn.Module, norms: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Find the convolutions whose output a norm takes: registered right before one, with as many channels.

    Only those may lose their weights' scale, for only there a norm takes it out again.
    """
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    ids = {id(norm) for norm in norms.values()}
    for (name, module), (_, after) in itertools.pairwise(leaves):
        if type(module) not in STANDARDIZED or id(after) not in ids or channels_of(module) != channels_of(after):
            continue
        if module.weight[0].numel() > 1:  # a filter of one weight would be standardized to 0
            yield name, module


_STATE = {"_parameters", "_buffers", "_modules", "training", "_non_persistent_buffers_set"}


def _take_snapshot(module: nn.Module) -> _Snapshot:
    attributes = {k: v for k, v in module.__dict__.items() if k not in _STATE and not k.endswith("_hooks")}
    not_saved = frozenset(module._non_persistent_buffers_set)  # noqa: SLF001
    return _Snapshot(module, type(module), attributes, dict(module._buffers), not_saved)  # noqa: SLF001


def _restore(snapshot: _Snapshot) -> None:
    """Undo one change; what the user did to hooks, mode, parameters and living buffers meanwhile stays done."""
    module = snapshot.module
    module.__class__ = snapshot.cls
    for key in [k for k in module.__dict__ if k not in _STATE and not k.endswith("_hooks")]:
        if key not in snapshot.attributes:
            del module.__dict__[key]
    module.__dict__.update(snapshot.attributes)
    like = next(module.parameters(recurse=False), None)  # the model may have moved, or changed its dtype, meanwhile
    for name, buffer in snapshot.buffers.items():
        if name not in module._buffers:  # noqa: SLF001
            follows = buffer is not None and like is not None
            module._buffers[name] = _moved(buffer, like) if follows else buffer  # type: ignore[arg-type]  # noqa: SLF001


def _moved(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return buffer.to(like.device, like.dtype if buffer.is_floating_point() else None)


def _lost_keys(model: nn.Module, snapshots: list[_Snapshot]) -> Iterator[str]:
    names = {id(module): name for name, module in model.named_modules()}
    for snapshot in snapshots:
        for buffer in snapshot.buffers.keys() - snapshot.module._buffers.keys() - snapshot.not_saved:  # noqa: SLF001
            yield f"{names[id(snapshot.module)]}.{buffer}".lstrip(".")
