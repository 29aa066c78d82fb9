"""Merge batch norms into the layers before them, for inference."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distnorm.changes import channels_of, to_identity
from distnorm.conversion import Snapshot, aligned
from distnorm.errors import ConfigError
from distnorm.flow import PRODUCERS, Flow, calling, first_output, is_hooked, tied_parameters, traced, watched, why_not
from distnorm.norms.constants import eps_of
from distnorm.norms.surgery import after_of, become, check_model, computes_otherwise, find_batch_norms, source_of
from distnorm.norms.weight import STANDARDIZED, standardized, standardized_transposed

_ONE_PATH = "torch.fx could not trace the model: only the path of the example was checked"

_PLAIN = {standard: plain for plain, standard in STANDARDIZED.items()}


@dataclasses.dataclass(frozen=True)
class Folding:
    """What `fold` did: prints as a table.

    Attributes:
        model: the very model that was given.
        folded: each merged pair: the layer, and the norm that it took in.
        left: each batch norm that stayed, and why.
        warning: what was not checked: a model that could not be traced was watched on the path of its example only.
    """

    model: nn.Module
    folded: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    warning: str = ""

    def __str__(self) -> str:
        """Draw the table: norm, and what became of it; then the warning, if there is one."""
        rows = [(norm, f"folded into {layer}") for layer, norm in self.folded]
        table = aligned([("norm", "now"), *rows, *((norm, f"left: {why}") for norm, why in self.left)])
        return f"{table}\nwarning: {self.warning}" if self.warning else table


def fold(model: nn.Module, example: Any = None) -> Folding:
    """Merge every batch norm that follows a convolution or linear layer into it, in place, for inference.

        weight' = weight * s    bias' = (bias - running_mean) * s + norm.bias    s = norm.weight / sqrt(var + eps)

    Merged are pairs where the layer is called once and the norm alone takes its output; each norm becomes an identity,
    and what it applied afterwards (timm's activations) stays. A linear layer is taken to give [N, C]. There is no way
    back: keep the weights.

    Args:
        model: in eval mode. Batch norms of torch, of distnorm, constants of torchvision and timm, and registered ones.
        example: what the model is called with: a tensor, a tuple of arguments, or a mapping of named ones. Needed where
            `torch.fx` cannot trace the model, which is then watched running it: if its forward decides on values, only
            the path that the example takes is seen, and another may be wrong afterwards (`Folding.warning` says so). If
            given, the outputs before and after are compared, and a difference undoes everything.

    Returns:
        The record of what was merged, what was left, and why.

    Collective: none.

    Raises:
        ConfigError: the model is in training mode, wrapped or scripted; no pair is found; the model cannot be traced
            and there is no example; or the model fails on the example, or gives another output. Nothing is changed
            then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> print(fold(model))
        norm  now
        ----  -------------
        1     folded into 0
        >>> model[1]
        Identity()

    Source: Jacob et al. 2018, equation 14, for an affine part and a bias.
    """
    check_model(model, "fold")
    norms = find_batch_norms(model)
    _check_mode(model, norms)
    run = None if example is None else calling(model, example)
    flows = traced(model)
    if flows is None and run is None:
        raise ConfigError(
            f"fold() could not trace {type(model).__name__}: its forward decides on values.\n"
            "Give it a batch to watch the model with: fold(model, example=x)."
        )
    before = None if run is None else first_output("fold", model, example, run)
    warning = _ONE_PATH if flows is None else ""
    flows = [watched(model, run)] if flows is None and run is not None else flows or []
    pairs, left = _sort_out(model, norms, flows)
    if not pairs:
        reasons = "; ".join(f"{name}: {why}" for name, why in left[:2]) or "it has no batch norm"
        raise ConfigError(
            f"fold() found no batch norm to merge in {type(model).__name__} ({reasons}).\n"
            "It merges one that follows a convolution or linear layer; without any, use the model as it is."
        )
    undo: list[Callable[[], None]] = []
    try:
        for layer, norm in pairs:
            undo += [_keep(layer), _keep(norm)]
            _merge(layer, norm)
        if run is not None:
            _check_output(model, before, run())
    except BaseException:
        for put_back in reversed(undo):
            put_back()
        raise
    names = {module: name or "(the model)" for name, module in model.named_modules()}
    return Folding(model, tuple((names[layer], names[norm]) for layer, norm in pairs), tuple(left), warning)


def _check_mode(model: nn.Module, norms: dict[str, nn.Module]) -> None:
    constants = {norm for norm in norms.values() if (source := source_of(norm)) is not None and source.frozen}
    training = [name for name, norm in norms.items() if norm.training and norm not in constants]
    if model.training or training:
        which = f"layer {training[0]!r}" if training and not model.training else type(model).__name__
        raise ConfigError(
            f"fold() got a model in training mode ({which}), whose norms take the statistics of each batch.\n"
            "Call model.eval() first."
        )


def _sort_out(
    model: nn.Module, norms: dict[str, nn.Module], flows: list[Flow]
) -> tuple[list[tuple[nn.Module, nn.Module]], list[tuple[str, str]]]:
    """Part the norms into those that can be merged, with the layer before each, and those that stay, and why."""
    tied, pairs, left = tied_parameters(model), [], []
    for name, norm in norms.items():
        layer = flows[0].sources.get(norm)
        why = next(_reasons_to_stay(norm, layer, flows, tied), "")
        if why or layer is None:
            left.append((name, why))
        else:
            pairs.append((layer, norm))
    return pairs, left


def _reasons_to_stay(norm: nn.Module, layer: nn.Module | None, flows: list[Flow], tied: set[int]) -> Iterator[str]:
    if source_of(norm) is None:
        yield f"{type(norm).__name__} has code of its own"
    if computes_otherwise(norm):
        yield f"{type(norm).__name__} holds what a frozen batch norm does, and computes something else"
    if not isinstance(getattr(norm, "running_mean", None), Tensor):
        yield "it has no running statistics"
    if not flows[0].calls[norm]:
        yield "it is not called, or inside a module that hooks watch"
    if flows[0].calls[norm] > 1:
        yield f"it is called {flows[0].calls[norm]} times"
    if layer is None or type(layer) not in PRODUCERS:
        yield f"it takes the output of {'no layer alone' if layer is None else f'a {type(layer).__name__}'}"
        return
    yield from filter(None, (why_not(flow, layer, norm) for flow in flows))
    if is_hooked(layer) or is_hooked(norm):
        yield "hooks watch it, or the layer before it"
    if any(id(p) in tied for module in (layer, norm) for p in module.parameters(recurse=False)):
        yield "its parameters, or those of the layer before it, are tied to others"
    if channels_of(layer) != channels_of(norm):
        yield f"the layer before it gives {channels_of(layer)} features, and it normalizes {channels_of(norm)} channels"


@torch.no_grad()
def _merge(layer: Any, norm: Any) -> None:
    if type(layer) in _PLAIN:
        wide = layer.weight.double()
        filters = standardized_transposed(wide, layer.groups) if layer.transposed else standardized(wide)
        layer.weight.data = filters.to(layer.weight.dtype)
        become(layer, _PLAIN[type(layer)])
    scale_C = (norm.running_var.double() + (norm.eps if hasattr(norm, "eps") else eps_of(norm))).rsqrt()
    if norm.weight is not None:
        scale_C = scale_C * norm.weight.double()
    shift_C = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    bias_C = shift_C * scale_C if norm.bias is None else torch.addcmul(norm.bias.double(), shift_C, scale_C)
    layer.weight.data = (layer.weight.double() * _along_filters(layer, scale_C)).to(layer.weight.dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias_C.to(layer.weight.dtype), layer.weight.requires_grad)
    else:
        layer.bias.data = bias_C.to(layer.bias.dtype)
    to_identity(norm)
    if not after_of(norm):
        become(norm, nn.Identity)


def _along_filters(layer: Any, scale_C: Tensor) -> Tensor:
    """Lay a number a channel along a weight: [C, C_in / groups, *], transposed [C_in, C / groups, *]."""
    weight = layer.weight
    if not getattr(layer, "transposed", False):
        return scale_C.view(-1, *[1] * (weight.dim() - 1))
    by_group = scale_C.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1)
    return by_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def _keep(module: nn.Module) -> Callable[[], None]:
    """Remember a module, values and all, and give the function that puts it back."""
    snapshot = Snapshot(module)
    values = [(parameter, parameter.data) for parameter in module.parameters(recurse=False)]

    def put_back() -> None:
        snapshot.finish()
        snapshot.restore(lambda tensor: tensor)
        for parameter, data in values:
            parameter.data = data

    return put_back


def _check_output(model: nn.Module, before: Any, after: Any) -> None:
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
    for old, new in ((a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point() and a.numel()):
        same_nan = torch.equal(old.isfinite(), new.isfinite())
        error = float((old - new).nan_to_num(0, 0, 0).abs().max()) if same_nan else float("inf")
        error /= max(1.0, float(old.nan_to_num(0, 0, 0).abs().max()))
        allowed = max(1e-5, 8 * torch.finfo(old.dtype).eps)
        if error > allowed:
            raise ConfigError(
                f"fold() changed the output of {type(model).__name__} by {error:.1e} of its largest value, more than "
                f"{allowed:.0e}, and undid it.\n"
                "Does it compute the same each time? A forward hook on a layer keeps it from being merged."
            )
