"""What `convert` changed: the table to read, and the snapshots that undo it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distnorm.errors import ConfigError
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
class LeftLayer:
    """A batch norm that a `Conversion` left as it is, and why."""

    name: str
    channels: int
    was: str
    why: str


class Undoable(Protocol):
    """One thing that was done to a module, and can be undone."""

    module: nn.Module

    def changed_since(self) -> str:
        """Say what the module is by now, if it is not what was made of it; else nothing."""

    def restore(self, follow: Callable[[Tensor], Tensor]) -> None:
        """Undo it; `follow` brings a tensor that was away to where the model is now."""


class Snapshot:
    """What a module was: its class, attributes, parameters and buffers; their values live on in the model."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls, self.made = module, type(module), type(module)
        self.attributes = {k: v for k, v in module.__dict__.items() if _is_attribute(k)}
        self.parameters, self.buffers = dict(module._parameters), dict(module._buffers)  # noqa: SLF001
        self.not_saved = frozenset(module._non_persistent_buffers_set)  # noqa: SLF001
        self.learns = {name: p.requires_grad for name, p in self.parameters.items() if p is not None}
        self.created: frozenset[str] = frozenset()
        self.refrozen: dict[str, bool] = {}

    def finish(self) -> None:
        """Note what the change did, once it is done: what the user does later is not undone."""
        self.made = type(self.module)
        held = {**self.module._parameters, **self.module._buffers}  # noqa: SLF001
        before = {**self.parameters, **self.buffers}
        self.created = frozenset(k for k, t in held.items() if t is not None and before.get(k) is not t)
        self.refrozen = {name: old for name, old in self.learns.items() if self.parameters[name].requires_grad != old}  # type: ignore[union-attr]

    def lost(self) -> set[str]:
        """Name the entries of the `state_dict` that the module has no more."""
        before = {**self.parameters, **self.buffers}
        held = {**self.module._parameters, **self.module._buffers}  # noqa: SLF001
        return {k for k, t in before.items() if t is not None and held.get(k) is None} - self.not_saved

    def gained(self) -> set[str]:
        """Name the entries of the `state_dict` that the module did not have."""
        before = {**self.parameters, **self.buffers}
        return {name for name in self.created if before.get(name) is None}

    def new_parameters(self) -> set[str]:
        """Name the parameters that no optimizer has seen."""
        return {name for name in self.created if self.module._parameters.get(name) is not None}  # noqa: SLF001

    def changed_since(self) -> str:
        """Say which class the module has, if not the one that the change gave it."""
        now, made = type(self.module), self.made
        return "" if now is made else f"is a {_qualified(now)} now, and convert() left a {_qualified(made)}"

    def restore(self, follow: Callable[[Tensor], Tensor]) -> None:
        """Undo the change; what the user did to hooks, mode, parameters and living buffers meanwhile stays done.

        Args:
            follow: brings a tensor, that was away while the model moved or changed its dtype, to where it would be.
        """
        module = self.module
        module.__class__ = self.cls
        for key in [k for k in module.__dict__ if _is_attribute(k) and k not in self.attributes]:
            del module.__dict__[key]
        module.__dict__.update(self.attributes)
        held: dict[str, Any] = {**module._parameters, **module._buffers}  # noqa: SLF001
        for old, now in ((self.parameters, module._parameters), (self.buffers, module._buffers)):  # noqa: SLF001
            added = {k: t for k, t in now.items() if k not in old and k not in self.created}
            back = {k: self._one_back(k, t, held, follow) for k, t in old.items()}
            now.clear()
            now.update(back | added)  # type: ignore[arg-type]
        for name, learns in self.refrozen.items():
            parameter = module._parameters[name]  # noqa: SLF001
            if parameter is not None:
                parameter.requires_grad_(learns)

    def _one_back(
        self, name: str, old: Tensor | None, held: dict[str, Tensor | None], follow: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        living = held.get(name)
        if old is None:
            return None if name in self.created else living
        if name in self.created and living is not None:  # a constant that became a parameter: it keeps what it learned
            old.data = living.detach()
            return old
        return follow(old) if living is None else living


class Anchors:
    """Where a model's tensors were, so that one that was away can follow to where they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._were = {name: (t.device, t.dtype) for name, t in _tensors(model)}

    def follow(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """Move a tensor of `module` as its neighbours moved, else as the model did."""
        prefix = next((f"{name}." for name, m in self._model.named_modules() if m is module and name), "")
        moves: dict[Any, tuple[torch.device, torch.dtype]] = {}
        for name, now in sorted(_tensors(self._model), key=lambda item: not item[0].startswith(prefix)):
            if name in self._were and now.is_floating_point():
                moves.setdefault(self._were[name], (now.device, now.dtype))
                moves.setdefault(self._were[name][0], (now.device, now.dtype))
        return _moved(tensor, moves)


def _moved(tensor: Tensor, moves: dict[Any, tuple[torch.device, torch.dtype]]) -> Tensor:
    device, dtype = moves.get((tensor.device, tensor.dtype)) or moves.get(tensor.device) or (tensor.device, None)
    if dtype is None or not tensor.is_floating_point() or (tensor.device, tensor.dtype) not in moves:
        dtype = tensor.dtype
    if (device, dtype) == (tensor.device, tensor.dtype):
        return tensor
    if tensor.is_meta:  # as `to_empty` does
        values = torch.empty_like(tensor, device=device, dtype=dtype)
        return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
    tensor.data = tensor.data.to(device, dtype)
    return tensor


class Conversion:
    """The record of a conversion: prints as a table, and can be undone.

    Attributes:
        model: the very model that was converted.
        spec: what was followed: the decision, with the `include` and `exclude` that were used, as globs of names.
        layers: one row a converted module, in the model's order.
        left: the batch norms that stayed as they are, and why.
        lost_keys: `state_dict` keys that the model had before and has no more.
        new_keys: `state_dict` keys that it has now and had not.
        new_parameters: parameters that are new objects: constants that were buffers and learn now. An optimizer built
            before `convert` does not have them.
        redundant_biases: parameters right before a norm with batch statistics, that takes them out again.
        removed_biases: those of them that were taken away.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: NormSpec,
        layers: tuple[ConvertedLayer, ...],
        snapshots: list[Snapshot],
        anchors: Anchors,
        *,
        left: tuple[LeftLayer, ...] = (),
        redundant_biases: tuple[str, ...] = (),
        removed: Mapping[str, Undoable] = MappingProxyType({}),
        unsent: Undoable | None = None,
    ) -> None:
        self.model, self.spec, self.layers, self.left = model, spec, layers, left
        lost = {s.module: s.lost() for s in snapshots}
        for bias in removed.values():
            lost[bias.module] = lost.get(bias.module, set()) | {"bias"}
        self.lost_keys = tuple(_keys(model, lost))
        self.new_keys = tuple(_keys(model, {s.module: s.gained() for s in snapshots}))
        self.new_parameters = tuple(_keys(model, {s.module: s.new_parameters() for s in snapshots}))
        self.redundant_biases, self.removed_biases = redundant_biases, tuple(removed)
        self._undo: list[Undoable] = [*snapshots, *removed.values(), *([] if unsent is None else [unsent])]
        self._anchors = anchors
        self._made = [(row.name, s.module) for row, s in zip(layers, snapshots, strict=True)]

    def revert(self) -> nn.Module:
        """Give every layer its class, settings and buffers back; weights and running statistics keep what they learned.

        What was away comes back in the dtype and on the device that its neighbours have by now. Where the model has no
        tensor left to tell (only norms, `kind="none"`, then `model.half()`) it comes back as it was.

        Returns:
            The model. A second call changes nothing.

        Raises:
            ConfigError: a layer is not any more what `convert` made it: a later conversion, or `fold`, changed it.
                Nothing is undone then.
        """
        self._check_untouched()
        self._made = []
        while self._undo:
            undoable = self._undo.pop()
            undoable.restore(functools.partial(self._anchors.follow, undoable.module))
        return self.model

    def check(self) -> None:
        """Make sure that every converted layer still is what `convert` made it; after `revert` there is none.

        Raises:
            ConfigError: one was replaced: torch's and Lightning's own conversions take any batch norm, ours too.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, made in self._made:
            now = type(modules.get("" if name == "(the model)" else name))
            if now is not type(made):
                raise ConfigError(
                    f"convert() made {name} a distnorm.{type(made).__name__}, and now it is a {_qualified(now)}.\n"
                    "Leave out Trainer(sync_batchnorm=True), and do not call convert_sync_batchnorm after convert().",
                )

    def _check_untouched(self) -> None:
        for undoable in self._undo:
            found = undoable.changed_since()
            if found:
                name = next((name for name, m in self.model.named_modules() if m is undoable.module), "")
                raise ConfigError(
                    f"revert() cannot undo the conversion: layer {name or '(the model)'!r} {found}.\n"
                    "Revert the later conversion first; after fold() there is no way back: "
                    "build the model anew and load its weights."
                )

    def __str__(self) -> str:
        """Draw the table: layer, channels, was, is, normalization batch, why; then new and idle parameters."""
        rows = [(r.name, str(r.channels), r.was, r.now, str(r.normalization_batch), r.why) for r in self.layers]
        rows += [(r.name, str(r.channels), r.was, r.was, "", f"left: {r.why}") for r in self.left]
        places = {name: place for place, (name, _) in enumerate(self.model.named_modules())}
        rows.sort(key=lambda row: places.get(row[0], 0))
        table = aligned([("layer", "channels", "was", "is", "normalization batch", "why"), *rows])
        return "\n".join([table, *self._notes()])

    def _notes(self) -> list[str]:
        stay = [name for name in self.redundant_biases if name not in self.removed_biases]
        lines = (
            [f"without effect, since a norm follows (remove_redundant_biases=True): {', '.join(stay)}"] if stay else []
        )
        if self.removed_biases:
            lines.append(f"removed, since a norm follows: {', '.join(self.removed_biases)}")
        if self.new_parameters:
            new = ", ".join(self.new_parameters)
            lines.append(f"new parameters, that an optimizer built before does not have: {new}")
        return lines


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Lay rows out as a plain-text table; the first is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _qualified(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def _is_attribute(key: str) -> bool:
    """Tell whether an entry of a module's `__dict__` is its own: no state, no hook, nothing that torch keeps there."""
    return key not in {"_parameters", "_buffers", "_modules", "training"} and "hook" not in key


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _keys(model: nn.Module, entries: dict[nn.Module, set[str]]) -> list[str]:
    """Name entries of modules as `state_dict` does: under each name that the module has."""
    modules = model.named_modules(remove_duplicate=False)
    return sorted(f"{name}.{entry}".lstrip(".") for name, module in modules for entry in entries.get(module, ()))
