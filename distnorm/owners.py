"""Modules that use a norm's attributes rather than call it: what may become of such a norm.

torch.ao's `ConvBn2d` reads `bn.running_var`, others give `bn`'s buffers to `F.batch_norm` themselves. Such a norm may
become what keeps the attributes that are read, as long as its owner calls it too; else it stays.
"""

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.changes import change
from distnorm.flow import calling, first_output
from distnorm.norms.quantizing import FUSED
from distnorm.norms.surgery import find_batch_norms
from distnorm.reading import Use, read_code
from distnorm.spec import BATCH_KINDS, NormSpec
from distnorm.unseen import Stuck, nothing_found, own_norms, watch

_STATISTICS = {"running_mean", "running_var"}
_BATCH = "choose kind='batch', which keeps torch's norm"
_BUILDING = ("init", "reset", "load_from", "state_dict")


@dataclasses.dataclass(frozen=True)
class Owners:
    """How the modules of a model use its norms.

    Attributes:
        use: in a forward.
        fused: of a norm, the module of torch.ao's that will be rebuilt with a norm of torch's.
        later: in any other method, but how a module is built; asked for only where a norm loses attributes.
    """

    use: Use
    fused: Mapping[nn.Module, str]
    later: Callable[[], Use]

    @classmethod
    def of(cls, model: nn.Module, norms: set[nn.Module], example: Any = None) -> "Owners":
        """Read the code of a model's modules.

        Args:
            model: is not changed.
            norms: its norms.
            example: what the model is run on, in eval mode, to see what has no source; `None`: it is not run.
        """
        use, read = Use(), []
        fused: dict[nn.Module, str] = {}
        for module in model.modules():
            if module in norms or isinstance(module, torch.jit.ScriptModule):
                continue
            is_sequence = type(module).forward is nn.Sequential.forward
            if is_sequence and FUSED is not None and isinstance(module, FUSED):
                fused |= {norm: type(module).__name__ for norm in module.children() if norm in norms}
            if is_sequence:
                use.calls |= {child for child in module.children() if child in norms}
            if not type(module).__module__.startswith(("torch.nn.", "distnorm.norms.")):
                read_code(module, norms, use)
                read.append(module)
        if example is not None:
            run = calling(model, example)
            watch(model, norms, lambda: first_output("convert", model, example, run), use)
        return cls(use, fused, functools.cache(functools.partial(_read_later, read, norms)))

    def why_left(self, norm: nn.Module, spec: NormSpec, dimension: str) -> Stuck | None:
        """Say why a norm cannot become what a decision says; `None` if it can."""
        if norm in self.fused:
            why = f"in a fused {self.fused[norm]}, which prepare_qat() rebuilds with torch's norm: convert after it"
            return Stuck(why, "call convert() on what prepare_qat() returns")
        reads = self.use.reads.get(norm, {})
        if not reads:
            return None
        after = _after(norm, spec, dimension)
        missing = _missing(norm, after, reads)
        bypassed = norm in self.use.normalized or (norm not in self.use.calls and _STATISTICS & reads.keys())
        if missing:
            why = f"{reads[missing[0]]} reads its {missing[0]}, which a {type(after).__name__} lacks"
            return Stuck(why, "choose a kind that keeps what is read (batch, sync)" if not bypassed else _BATCH)
        if bypassed and type(after) is not type(norm):
            first = next((name for name in reads if name in _STATISTICS), next(iter(reads)))
            why = f"{reads[first]} normalizes with its {first} by itself: a {type(after).__name__} would not run"
            return Stuck(why, _BATCH)
        return None

    def note_of(self, norm: nn.Module, spec: NormSpec, dimension: str) -> str:
        """Name a method besides forward that reads what a norm will lack; starts with a semicolon."""
        reads = {} if spec.kind in BATCH_KINDS else self.later().reads.get(norm, {})
        if not reads:
            return ""
        after = _after(norm, spec, dimension)
        missing = _missing(norm, after, reads)
        return f"; {reads[missing[0]]} reads its {missing[0]}, which is gone" if missing else ""


def look_for_norms(
    model: nn.Module, named: Container[str], example: Any = None
) -> tuple[dict[str, nn.Module], dict[str, str], Owners]:
    """Find all that normalizes with statistics of a batch.

    Args:
        model: is not changed.
        named: the names of `NormSpec.layers`.
        example: see `Owners.of`.

    Returns:
        By first name, in the model's order, the batch norm layers and the modules that normalize by themselves; what
        each of these does; and how the model's modules use its norms.

    Raises:
        ConfigError: there is none that can be converted.
    """
    norms = find_batch_norms(model)
    owners = Owners.of(model, set(norms.values()), example)
    own = own_norms(model, set(norms.values()), owners.use)
    if not norms and not any(name in named for name in own):
        raise nothing_found(model, own)
    modules = ((name or "(the model)", module) for name, module in model.named_modules())
    return {name: module for name, module in modules if name in norms or name in own}, own, owners


def _read_later(modules: list[nn.Module], norms: set[nn.Module]) -> Use:
    use = Use()
    for module in modules:
        read_code(module, norms, use, _own_methods(module))
    return use


def _own_methods(module: nn.Module) -> list[str]:
    """Name the methods that a module's classes, above torch's own, define; how it is built is left out."""
    classes = itertools.takewhile(lambda cls: cls is not nn.Module, type(module).__mro__)
    names = (name for cls in classes for name, value in vars(cls).items() if isinstance(value, types.FunctionType))
    return [
        name
        for name in dict.fromkeys(names)
        if not name.startswith("__") and not any(part in name for part in _BUILDING)
    ]


def _missing(norm: nn.Module, after: nn.Module, reads: Mapping[str, str]) -> list[str]:
    return [name for name in reads if hasattr(norm, name) and not hasattr(after, name)]


def _after(norm: nn.Module, spec: NormSpec, dimension: str) -> nn.Module:
    """Give what a norm would become, without its values."""
    shell: Any = object.__new__(type(norm))
    shell.__dict__.update(norm.__dict__)
    shell.__dict__["_non_persistent_buffers_set"] = set(norm._non_persistent_buffers_set)  # noqa: SLF001
    for held in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[held] = {name: _empty(value) for name, value in norm.__dict__[held].items()}
    change(shell, spec, dimension)
    return shell  # type: ignore[no-any-return]


def _empty(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
