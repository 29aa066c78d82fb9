"""What a layer is fed: vectors [N, C], or maps [N, C, *]. Told by what came before it, without running anything.

A layer that leaves the dimensions alone (an activation, dropout, a norm of any dimension) is looked through.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

VECTORS, MAPS, UNKNOWN = "vectors", "maps", ""

_LINEARS = (nn.Linear, nn.Bilinear)
_POOLS_TO_ONE = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "median", "logsumexp", "std", "var", "norm"}
_TURNS = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "unflatten"}
_SIZES = {"view", "reshape"}


def fed_by_graph(node: fx.Node, layer_of: Mapping[fx.Node, nn.Module]) -> str:
    """Tell what a node of a traced model takes: walk back to the first thing that makes vectors, or maps.

    Args:
        node: of a layer.
        layer_of: the layer of each node that is one.

    Returns:
        `VECTORS`, `MAPS`, or `UNKNOWN` where the model's own input comes first.
    """
    seen, todo = {node}, list(node.all_input_nodes)
    while todo:
        current = todo.pop(0)
        if current in seen:
            continue
        seen.add(current)
        layer = layer_of.get(current)
        given = _given_by(layer) if layer is not None else _given_by_call(current)
        if given:
            return given
        todo += current.all_input_nodes
    return UNKNOWN


def fed_by_order(norm: nn.Module, leaves: list[nn.Module]) -> str:
    """Guess what a norm takes from the layers registered before it, or, if nothing is told there, right after it.

    Args:
        norm: one of `leaves`.
        leaves: the model's, in its order.
    """
    place = next(n for n, leaf in enumerate(leaves) if leaf is norm)
    given = _first(_given_in_order(leaf, norm) for leaf in reversed(leaves[:place]))
    return given or _first(_taken_by(leaf) for leaf in leaves[place + 1 :])


def _first(found: Iterable[str]) -> str:
    return next(filter(None, found), UNKNOWN)


def _given_by(layer: nn.Module) -> str:
    if isinstance(layer, nn.Flatten):
        return VECTORS if layer.start_dim <= 1 else MAPS
    if isinstance(layer, _LINEARS):
        return VECTORS
    if isinstance(layer, _ConvNd | nn.Unflatten | nn.BatchNorm2d | nn.BatchNorm3d):
        return MAPS
    return UNKNOWN


def _given_in_order(layer: nn.Module, norm: nn.Module) -> str:
    """Tell what a layer gives to a norm after it, if only functions are between: they may flatten."""
    if isinstance(layer, _POOLS_TO_ONE) and layer.output_size in (1, (1, 1), (1, 1, 1)):
        return VECTORS
    given = _given_by(layer)
    if given == MAPS and isinstance(norm, nn.BatchNorm1d):
        return MAPS if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d | nn.Unflatten) else VECTORS
    return given


def _taken_by(layer: nn.Module) -> str:
    if isinstance(layer, _LINEARS):
        return VECTORS
    return MAPS if isinstance(layer, _ConvNd | _BatchNorm) and _given_by(layer) else UNKNOWN


def _given_by_call(node: fx.Node) -> str:
    if node.op not in {"call_method", "call_function"}:
        return UNKNOWN
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in _TURNS or name.startswith("conv"):
        return MAPS
    if name in _SIZES:
        return _of_sizes(node)
    if name == "flatten" and _argument(node, 1, "start_dim", 0) not in {0, 1}:
        return MAPS
    return VECTORS if name in {"linear", "squeeze", "flatten"} or _takes_positions_out(node, name) else UNKNOWN


def _takes_positions_out(node: fx.Node, name: str) -> bool:
    if name in _REDUCTIONS:
        dim, keeps = _argument(node, 1, "dim", None), _argument(node, 2, "keepdim", False)
        return isinstance(dim, int | tuple | list) and not keeps
    index = node.args[1] if node.target is operator.getitem else ()
    return isinstance(index, tuple) and any(isinstance(i, int) for i in index)


def _of_sizes(node: fx.Node) -> str:
    sizes: Any = node.args[1:] or tuple(node.kwargs.values())
    sizes = sizes[0] if len(sizes) == 1 else sizes
    if not isinstance(sizes, tuple | list):
        return UNKNOWN
    return VECTORS if len(sizes) == 2 else MAPS


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
