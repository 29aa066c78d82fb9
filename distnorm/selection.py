"""Which layers are meant: by name globs, and by types of modules."""

import dataclasses
import fnmatch
import glob as globs
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from distnorm.errors import ConfigError, did_you_mean
from distnorm.spec import NormSpec

Selector = str | type[nn.Module]
Selectors = Selector | Iterable[Selector]


@dataclasses.dataclass(frozen=True)
class Names:
    """The batch norms of a model, and every name that each is known by.

    Attributes:
        norms: by first name, in the model's order.
        aliases: of each first name, all names, the norm's own and those of the modules that it is in.
        holders: of each first name, the modules that it is in, itself among them.
        covered: by each glob that was asked for, the first names that it covers.
    """

    norms: dict[str, nn.Module]
    aliases: dict[str, tuple[str, ...]]
    holders: dict[str, tuple[nn.Module, ...]]
    covered: dict[str, frozenset[str]] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module, norms: dict[str, nn.Module]) -> "Names":
        """Collect the names under which a model holds its norms."""
        modules = dict(model.named_modules(remove_duplicate=False))
        first = {id(norm): name for name, norm in norms.items()}
        paths: dict[str, dict[str, nn.Module]] = {name: {} for name in norms}
        for name, module in modules.items():
            if id(module) in first:
                parts = name.split(".") if name else []
                above = [".".join(parts[:n]) for n in range(len(parts) + 1)]
                paths[first[id(module)]] |= {path: modules[path] for path in reversed(above)}
        aliases = {name: tuple(path or "(the model)" for path in found) for name, found in paths.items()}
        return cls(norms, aliases, {name: tuple(found.values()) for name, found in paths.items()})

    def covered_by(self, glob: str) -> frozenset[str]:
        """Find the norms that a glob names, or that are below a module that it names."""
        if glob not in self.covered:
            fits = {name: any(_fits(path, glob) for path in paths) for name, paths in self.aliases.items()}
            self.covered[glob] = frozenset(name for name, does in fits.items() if does)
        return self.covered[glob]

    def resolve(self, selectors: Selectors, argument: str) -> tuple[str, ...]:
        """Turn globs and types into globs that each cover a norm.

        Raises:
            ConfigError: one of them is neither, or finds nothing.
        """
        given = tuple(selectors) if isinstance(selectors, Iterable) and not isinstance(selectors, str) else (selectors,)
        found: list[str] = []
        for selector in given:
            if isinstance(selector, type) and issubclass(selector, nn.Module):
                found += self._of_type(selector, argument)
            elif isinstance(selector, str):
                self.check(selector, argument)
                found.append(selector)
            else:
                raise ConfigError(
                    f"convert() got {selector!r} in {argument}, that is neither a glob nor a type of modules.\n"
                    f"Give names or classes, e.g. {argument}=['layer4.*', torch.nn.BatchNorm1d]."
                )
        return tuple(dict.fromkeys(found))

    def check(self, glob: str, argument: str) -> None:
        """Refuse a glob that matches nothing.

        Raises:
            ConfigError: it names no batch norm, and no module that holds one.
        """
        if not self.covered_by(glob):
            paths = {path for found in self.aliases.values() for path in found}
            some = ", ".join([*self.norms][:4]) + (", …" if len(self.norms) > 4 else "")
            raise ConfigError(
                f"{argument}={glob!r} matches no batch norm of the model: it has {some}.{_near(glob, paths)}\n"
                "Name a layer, a module that holds some, or a glob of them, e.g. 'layer4' or '*.bn1'."
            )

    def _of_type(self, cls: type[nn.Module], argument: str) -> list[str]:
        found = [name for name, holders in self.holders.items() if any(isinstance(m, cls) for m in holders)]
        if not found:
            types = sorted({type(norm).__name__ for norm in self.norms.values()})
            raise ConfigError(
                f"{argument}={cls.__name__} matches no batch norm of the model, and no module that holds one.\n"
                f"Its batch norms are {', '.join(types)}: name one of these types, or a layer's name."
            )
        return [globs.escape(name) for name in found]


def with_selection(names: Names, spec: NormSpec, include: Selectors | None, exclude: Selectors | None) -> NormSpec:
    """Write into the decision which layers it is for, types as the names of the layers they stand for.

    Raises:
        ConfigError: no layer is chosen, or a glob or a type finds none.
    """
    included = names.resolve(spec.include if include is None else include, "include")
    excluded = names.resolve(spec.exclude if exclude is None else exclude, "exclude")
    if not included:
        raise ConfigError(
            "convert() got include=[], that selects no layer. Leave it out for all, or name some: include=['layer4']."
        )
    chosen = set().union(*map(names.covered_by, included)).difference(*map(names.covered_by, excluded))
    if not chosen:
        raise ConfigError(
            f"include={list(included)} less exclude={list(excluded)} leaves no batch norm to convert.\n"
            "Exclude fewer, or do not call convert()."
        )
    return dataclasses.replace(spec, include=included, exclude=excluded)


def check_overrides(names: Names, spec: NormSpec) -> None:
    """Refuse overrides that name no layer, or set what a spec has not.

    Raises:
        ConfigError: one does.
    """
    for dimension, override in spec.per_kind.items():
        check_override(override, f"spec.per_kind[{dimension!r}]")
    for glob, override in spec.layers.items():
        names.check(glob, "spec.layers")
        check_override(override, f"spec.layers[{glob!r}]")


def override_of(names: Names, name: str, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Find the override of one layer: the first glob that covers it, as a mapping of its own name."""
    found = (change for glob, change in layers.items() if name in names.covered_by(glob))
    return {globs.escape(name): change for change in [next(found, None)] if change is not None}


def check_override(change: Mapping[str, Any], where: str) -> None:
    """Refuse an override that is no set of a spec's fields.

    Raises:
        ConfigError: it is no mapping, or names a field that a spec has not.
    """
    fields = [field.name for field in dataclasses.fields(NormSpec)]
    if not isinstance(change, Mapping):
        raise ConfigError(f"{where} is {change!r}, that must map fields to values. Give e.g. {{'kind': 'group'}}.")
    for key in change:
        if key not in fields:
            raise ConfigError(
                f"{where} sets {key!r}, that a NormSpec has not.{did_you_mean(str(key), fields)}\n"
                "Give some of kind, groups, sync_ranks, ghost_batch, momentum."
            )


def _fits(path: str, glob: str) -> bool:
    return fnmatch.fnmatchcase("" if path == "(the model)" else path, glob) or path == glob


def _near(glob: str, paths: set[str]) -> str:
    return did_you_mean(glob, paths) or did_you_mean(glob.rstrip(".*"), paths)
