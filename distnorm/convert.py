"""Turn a model's batch norms into what a `NormSpec` says, in place, and back.

In place means: the same module objects, another class. So lists, hooks, aliases, parameter objects, `training`,
`requires_grad`, dtype and device stay right by construction, and an optimizer built before stays valid; it lacks only
the constants that learn now (`Conversion.new_parameters`), which were buffers. Everything is checked before anything
changes.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm import collectives, trained, unseen
from distnorm.before import Before
from distnorm.biases import RemovedBias, redundant_biases
from distnorm.changes import (
    OF_POSITIONS,
    change,
    channels_of,
    check_change,
    dimension_of,
    suited,
    to_standardized,
)
from distnorm.conversion import Anchors, Conversion, ConvertedLayer, LeftLayer, Snapshot
from distnorm.errors import ConfigError, divisors_in_words
from distnorm.norms.base import name_layer
from distnorm.norms.surgery import check_known, check_model, source_of
from distnorm.owners import Owners, look_for_norms
from distnorm.selection import Names, Selectors, check_overrides, override_of, with_selection
from distnorm.spec import BATCH_KINDS, NormSpec
from distnorm.unsent import Unsent


def convert(
    model: nn.Module,
    spec: NormSpec,
    include: Selectors | None = None,
    exclude: Selectors | None = None,
    remove_redundant_biases: bool = False,
    *,
    example: Any = None,
) -> Conversion:
    """Make every batch norm of `model` what `spec` says, in place.

    A layer of constants (`FrozenBatchNorm`, those of detection libraries) stays, unless `spec.layers` names it. So does
    a module that applies `F.batch_norm` itself, unless `spec.layers` has its very name. A norm whose owner reads its
    attributes stays where the new layer would lack them, or never run. The table says so of each.
    Running statistics that not all ranks share are named to DDP, which then sends none of them (`distnorm.unsent`).

    Args:
        model: any module that holds `nn.BatchNorm1d/2d/3d`, `nn.SyncBatchNorm`, timm's `BatchNormAct2d`, a class that
            was registered, or distnorm's own layers; or is one.
        spec: from `decide`, or built by hand.
        include: the layers that may change: globs of names, and types of modules; each stands for all that is below
            what it finds. `None`: what `spec.include` says, that is all.
        exclude: the layers that stay, though `include` has them; likewise. `None`: what `spec.exclude` says.
        remove_redundant_biases: take the biases away that a norm with batch statistics takes out again, right after
            the layer that adds them. They are named in `Conversion.redundant_biases` either way.
        example: what the model is called with: a tensor, a tuple of arguments, or a mapping of named ones. The model
            then runs once, in eval mode, and is left as it was: what its source does not show, of code without one, is
            seen so.

    Returns:
        The record of what was changed; its `model` is the argument.

    Collective: none; with an example, what the model's own evaluation has.

    Raises:
        ConfigError: the model is wrapped in DDP or FSDP, compiled or scripted; a layer that is to change is lazy, or
            has a forward of its own; there is no batch norm at all, or none that can change; a glob or a type finds
            none; or the decision was made for other ranks than there are. Nothing is changed then.

    Example:
        >>> from distnorm import decide
        >>> model = nn.Sequential(nn.Conv1d(3, 8, 3, bias=False), nn.BatchNorm1d(8), nn.ReLU())
        >>> conversion = convert(model, decide(device_batch=2, world_size=8))
        >>> model[1]
        SyncBatchNorm(8, eps=1e-05, momentum=0.0315, affine=True, bias=True, track_running_stats=True, sync_ranks=8)
        >>> conversion.revert()[1]
        BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    check_model(model, "convert")
    _check_spec(spec)
    plan = _Plan.of(model, spec, include, exclude, example)
    _check_world(spec, plan.specs)
    trained.warn(plan.norms, plan.specs)
    return plan.carry_out(lambda _: remove_redundant_biases)


def rebuild(model: nn.Module, spec: NormSpec, keys: Container[str]) -> Conversion:
    """Convert as a run did whose decision was stored, for however many ranks there are now.

    Args:
        model: as it was before the run converted it.
        spec: what the run followed.
        keys: of the run's `state_dict`: redundant biases that it has not are taken away.

    Raises:
        ConfigError: see `convert`; the number of ranks is not looked at.
    """
    check_model(model, "convert")
    return _Plan.of(model, spec, None, None).carry_out(lambda key: key not in keys)


def normalization_layers(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Walk the batch norms of a model that keep running statistics, ours and torch's, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


_Change = Callable[[nn.Module, NormSpec], str]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is going to change: everything that can be wrong is found while it is made, and nothing changes."""

    model: nn.Module
    spec: NormSpec
    norms: dict[str, nn.Module]
    specs: dict[str, NormSpec]
    left: tuple[LeftLayer, ...]
    before: Before
    owners: Owners

    @classmethod
    def of(
        cls,
        model: nn.Module,
        spec: NormSpec,
        include: Selectors | None,
        exclude: Selectors | None,
        example: Any = None,
    ) -> "_Plan":
        norms, own, owners = look_for_norms(model, spec.layers, example)
        names = Names.of(model, norms)
        spec = with_selection(names, spec, include, exclude)
        check_overrides(names, spec)
        specs, left, before = {}, [], _look_before(model, list(norms.values()), spec)
        stuck: dict[str, unseen.Stuck] = {}
        for name, norm in norms.items():
            override = override_of(names, name, spec.layers)
            why = _why_left(names, name, norm, spec, is_named=bool(override))
            if not why and name in own and name not in spec.layers:
                stuck[name] = unseen.why_left(name, norm, own[name])
            elif not why:
                (unseen.check_own if name in own else check_known)(name, norm)
                of_layer = dataclasses.replace(spec, layers=override).of(name, before.dimension(norm))
                check_change(name, norm, of_layer)
                if found := owners.why_left(norm, of_layer, before.dimension(norm)):
                    stuck[name] = found
                else:
                    specs[name] = of_layer
            if name not in specs:
                why = why or stuck[name].why
                left.append(LeftLayer(name, channels_of(norm), type(norm).__name__, why))
        unseen.report(model, stuck, nothing_else=not specs)
        return cls(model, spec, norms, specs, tuple(left), before, owners)

    def carry_out(self, removes: Callable[[str], bool]) -> Conversion:
        """Change the model; if anything goes wrong, put back what was changed."""
        names = {module: name for name, module in self.model.named_modules()}
        biases = redundant_biases(self.model, set(self._norms_with_batch_statistics()))
        keys = {f"{names[layer]}.bias": (layer, norm) for layer, norm in biases}
        anchors, rows, snapshots = Anchors(self.model), [], []
        try:
            for name, module, own, make in self._changes():
                was, channels = type(module).__name__, channels_of(module)
                snapshots.append(Snapshot(module))
                why = make(module, own)
                snapshots[-1].finish()
                if hasattr(type(module), "layer_name"):
                    name_layer(module, name)
                rows.append(ConvertedLayer(name, channels, was, type(module).__name__, own.normalization_batch, why))
        except BaseException:
            for snapshot in reversed(snapshots):
                snapshot.restore(lambda tensor: tensor)
            raise
        removed = {key: RemovedBias(*pair) for key, pair in keys.items() if removes(key)}
        unsent = Unsent(self.model, self.spec.world_size)
        left, redundant = self.left, tuple(keys)
        return Conversion(
            self.model,
            self.spec,
            tuple(rows),
            snapshots,
            anchors,
            left=left,
            redundant_biases=redundant,
            removed=removed,
            unsent=unsent,
        )

    def _norms_with_batch_statistics(self) -> Iterator[nn.Module]:
        for name, norm in self.norms.items():
            source = source_of(norm)
            if name in self.specs:
                if self.specs[name].kind in BATCH_KINDS:
                    yield norm
            elif source is not None and not source.frozen:
                yield norm

    def _changes(self) -> list[tuple[str, nn.Module, NormSpec, _Change]]:
        places = {module: (place, name) for place, (name, module) in enumerate(self.model.named_modules())}
        changes: list[tuple[str, nn.Module, NormSpec, _Change]] = []
        for name, own in self.specs.items():
            norm, dimension = self.norms[name], self.before.dimension(self.norms[name])
            convolution, missing = self.before.convolution(norm)
            with_ws = suited(own, dimension).kind == "group_ws"
            if with_ws and convolution is not None:
                changes.append((places[convolution][1], convolution, self.spec, to_standardized))
            note = f"; not standardized: {missing}" if with_ws and missing else ""
            note += trained.note_of(norm, own) + self.owners.note_of(norm, own, dimension)
            changes.append((name, norm, own, functools.partial(_change, dimension, note)))
        return sorted(changes, key=lambda item: places[item[1]])


def _look_before(model: nn.Module, norms: list[nn.Module], spec: NormSpec) -> Before:
    """Look at what stands before the norms of whom something depends on it."""
    kinds = {spec.kind, *(override.get("kind") for override in (*spec.layers.values(), *spec.per_kind.values()))}
    if "group_ws" in kinds:
        return Before.of(model, norms)
    depends = spec.per_kind or kinds & OF_POSITIONS
    return Before.of(model, [norm for norm in norms if depends and dimension_of(norm) not in {"2d", "3d"}])


def _change(dimension: str, note: str, norm: nn.Module, spec: NormSpec) -> str:
    return change(norm, spec, dimension) + note


def _check_spec(spec: object) -> None:
    if not isinstance(spec, NormSpec):
        raise ConfigError(
            f"convert() got {spec!r} for a decision. Give it what decide() returned, or NormSpec(kind=…, "
            "normalization_batch=…)."
        )


def _check_world(spec: NormSpec, specs: dict[str, NormSpec]) -> None:
    """Refuse a decision for other ranks, where there are several.

    Alone, with a process group or without, a layer is local batch norm, whatever it was decided for; and a spec built
    by hand need not say for how many ranks.
    """
    world = collectives.world_size()
    if world == 1:
        return
    if (spec.device_batch or spec.world_size > 1) and spec.world_size != world:
        raise ConfigError(
            f"convert() got a decision for world_size={spec.world_size}, and this run has {world} ranks.\n"
            f"Decide again: decide(device_batch={spec.device_batch or '…'}, world_size={world})."
        )
    for name, own in specs.items():
        if own.kind in {"sync", "renorm"} and world % own.sync_ranks:
            raise ConfigError(
                f"layer {name!r} would share statistics over sync_ranks={own.sync_ranks}, that does not divide "
                f"world_size={world}. Use {divisors_in_words(world)}."
            )


def _why_left(names: Names, name: str, norm: nn.Module, spec: NormSpec, *, is_named: bool) -> str:
    for glob in spec.exclude:
        if name in names.covered_by(glob):
            return f"exclude={glob!r}"
    if not any(name in names.covered_by(glob) for glob in spec.include):
        return "not in include"
    source = source_of(norm)
    if source is not None and source.frozen and not is_named:
        return "constants, that no entry of layers names"
    return "a layer of distnorm's own" if source is None and type(norm).__module__.startswith("distnorm.") else ""
