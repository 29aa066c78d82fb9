"""Batch normalization outside of batch norm layers: modules that apply the function themselves.

They are found by their source; where there is none, by watching the function while the model runs on an example.
"""

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from distnorm.errors import ConfigError
from distnorm.norms.constants import eps_of, is_own
from distnorm.norms.kept import undisturbed
from distnorm.reading import FUNCTIONS, Use

_OF_WEIGHTS = (_ConvNd, nn.Linear)
"""They normalize their weight, as some convolutions standardize it, and no batch."""

_A_NORM = re.compile(r"Norm(Act)?(\d+d)?$")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stuck:
    """Why a norm stays though it was meant.

    Attributes:
        why: as the table has it.
        remedy: what would convert it, to follow "or" in a sentence; empty: nothing would.
    """

    why: str
    remedy: str = ""


def own_norms(model: nn.Module, norms: set[nn.Module], use: Use) -> dict[str, str]:
    """Find the modules that normalize with code of their own.

    Args:
        model: is not changed.
        norms: layers that are known as batch norms.
        use: what the model's code does.

    Returns:
        Of each, by its first name, what it does.
    """
    found = {}
    for name, module in model.named_modules():
        if module in norms or not is_own(module) or isinstance(module, _OF_WEIGHTS):
            continue
        uses_a_norm = any(part in use.reads for part in module.modules())
        statistics = [getattr(module, held, None) for held in ("running_mean", "running_var")]
        if module in use.functions and not uses_a_norm:
            found[name or "(the model)"] = f"applies {use.functions[module]} in code of its own"
        elif all(isinstance(held, Tensor) for held in statistics):
            found[name or "(the model)"] = "keeps running statistics in code of its own"
    return found


def check_own(name: str, module: nn.Module) -> None:
    """Refuse to replace a module that does more, or less, than a batch norm with its values.

    Raises:
        ConfigError: its output in evaluation is another.
    """
    if eps_of(module) is None:
        cls = type(module).__name__
        raise ConfigError(
            f"layer {name!r} is a {cls} with code of its own, and its output is not that of a batch norm with its "
            "running_mean, running_var, weight and bias.\n"
            f"If it applies submodules afterwards: distnorm.register_norm({cls}, after=(…)); or take it out of layers."
        )


def why_left(name: str, module: nn.Module, does: str) -> Stuck:
    """Say of a module with code of its own why it stays, and what would convert it."""
    if eps_of(module) is None:
        return Stuck(f"{does}, which convert() cannot replace")
    return Stuck(f"{does}; layers={{{name!r}: …}} converts it", "name it in layers")


def report(model: nn.Module, stuck: Mapping[str, Stuck], *, nothing_else: bool) -> None:
    """Say once which norms stay though they were meant.

    Args:
        model: for its name.
        stuck: of each by its name, why.
        nothing_else: nothing is converted then.

    Raises:
        ConfigError: nothing is converted.
    """
    if not stuck:
        return
    name, why = next((name, found.why) for name, found in stuck.items())
    which = f"{name!r}" + (f" and {len(stuck) - 1} more" if len(stuck) > 1 else "")
    if nothing_else:
        remedies = [*dict.fromkeys(found.remedy for found in stuck.values() if found.remedy), "leave out convert()"]
        remedy = ", or ".join(remedies)
        raise ConfigError(
            f"convert() can change no batch norm of this {type(model).__name__}: {which} must stay.\n"
            f"{name}: {why}.\n{remedy[0].upper()}{remedy[1:]}."
        )
    _log.warning("convert() left %s as it was: %s. The table has the rest: print(conversion).", which, why)


def nothing_found(model: nn.Module, found: Mapping[str, str]) -> ConfigError:
    """Make the error for a model without a batch norm that can be converted; it lists what was seen instead."""
    kind, names = type(model).__name__, dict(model.named_modules())
    if found:
        name, does = next(iter(found.items()))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        module = names["" if name == "(the model)" else name]
        cls = type(module).__name__
        remedy = f"Name it, layers={{{name!r}: {{}}}}, or make its class known: distnorm.register_norm({cls})"
        if eps_of(module) is None:
            remedy = f"With a batch norm's values, and submodules after it: distnorm.register_norm({cls}, after=(…))"
        return ConfigError(
            f"convert() found no batch norm layer in {kind}, but {name!r}{more}: a {cls}, which {does}.\n"
            f"{remedy}; or build the model with nn.BatchNorm1d/2d/3d."
        )
    others = Counter(type(module).__name__ for module in names.values() if _A_NORM.search(type(module).__name__))
    seen = ", ".join(f"{count} {cls}" for cls, count in others.most_common(4)) or "no other norm either"
    return ConfigError(
        f"convert() found no batch norm in {kind}: there is nothing to decide. It has {seen}.\n"
        "Build the model with nn.BatchNorm1d/2d/3d layers, e.g. norm_layer=torch.nn.BatchNorm2d; code without source "
        "is seen on an example: convert(…, example=x)."
    )


def watch(model: nn.Module, norms: set[nn.Module], run: Callable[[], Any], use: Use) -> None:
    """Run a model in eval mode, and add to `use` who normalizes, and whose values outside of their norm are used.

    Collective: none of ours; the model's own, if its evaluation has some.
    """
    watching = _Watch(norms, use)
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(lambda m, _: watching.inside.append(m), prepend=True))
        handles.append(module.register_forward_hook(lambda *_: watching.leave(), always_call=True))
    try:
        with undisturbed(model), watching:
            run()
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    def __init__(self, norms: set[nn.Module], use: Use) -> None:
        super().__init__()
        self.norms, self.use, self.inside = norms, use, list[nn.Module]()
        held = ((m, name, t) for m in norms for name, t in {**m._parameters, **m._buffers}.items())  # noqa: SLF001
        self.held = {id(tensor): (norm, name) for norm, name, tensor in held if tensor is not None}

    def leave(self) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        where = self.inside[-1] if self.inside else None
        if where is not None and where not in self.norms and not type(where).__module__.startswith("torch.nn."):
            normalizes = getattr(func, "__hash__", None) is not None and func in FUNCTIONS
            if normalizes:
                self.use.functions.setdefault(where, FUNCTIONS[func])
            for value in pytree.tree_leaves((args, kwargs or {})):
                norm, name = self.held.get(id(value), (None, ""))
                if norm is not None:
                    place = f"{type(where).__name__}.forward"
                    self.use.reads.setdefault(norm, {}).setdefault(name, place)
                    self.use.normalized |= {norm} if normalizes else set()
        return func(*args, **(kwargs or {}))
