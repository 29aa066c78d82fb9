"""Which layer's output another takes, and nothing else: what a norm may be merged into, or makes superfluous.

Found by tracing the model with `torch.fx`, or by watching it run on a batch.
"""

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from distnorm.errors import ConfigError
from distnorm.feeding import fed_by_graph
from distnorm.norms.apart import watch_hook
from distnorm.norms.quantizing import PRODUCERS as OF_TORCH
from distnorm.norms.surgery import looks_like_batch_norm, source_of
from distnorm.norms.weight import STANDARDIZED

PRODUCERS: tuple[type[nn.Module], ...] = (*OF_TORCH, *STANDARDIZED.values())
"""Layers, of exactly these classes, that a batch norm can be merged into."""


@dataclasses.dataclass
class Flow:
    """What was seen of a model's inner traffic.

    Attributes:
        calls: how often each layer was called.
        takers: of each layer, who took its output: another layer, or `None` for anything else.
        sources: of each layer, whose output it took as its only argument, or `None`.
        touched: layers whose parameters were used apart from them.
        fed: of each layer, what it was given, each time: vectors, maps, or nobody knows. Of traces only.
    """

    calls: Counter[nn.Module] = dataclasses.field(default_factory=Counter)
    takers: dict[nn.Module, list[nn.Module | None]] = dataclasses.field(default_factory=dict)
    sources: dict[nn.Module, nn.Module | None] = dataclasses.field(default_factory=dict)
    touched: set[nn.Module] = dataclasses.field(default_factory=set)
    fed: dict[nn.Module, list[str]] = dataclasses.field(default_factory=dict)


def traced(model: nn.Module) -> list[Flow] | None:
    """Trace a model: once with the defaults of its forward's arguments, and, where that works, with none.

    Nothing runs but Python code of `forward`, without values; what it leaves in attributes is taken back.

    Returns:
        What was seen each time; `None` if the first trace fails: the model decides on values.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    flows = []
    for concrete in (defaults, {}) if defaults else ({},):
        kept = [_keep(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        try:
            flows.append(_flow_of(model, _Tracer().trace(model, concrete_args=concrete or None)))
        except Exception:  # noqa: BLE001 — a forward may raise anything on a value that is not there
            if not flows:
                return None
        finally:
            for put_back in kept:
                put_back()
    return flows


def traced_parts(model: nn.Module) -> Iterator[tuple[nn.Module, list[Flow]]]:
    """Trace a model in train and in eval mode; where that fails, its children, each as far as it can be traced.

    Returns:
        The parts that could be traced, and what was seen in each.
    """
    if _is_leaf(model):
        return
    flows: list[Flow] | None = []
    for training in (True, False):
        found = _traced_in(model, training)
        flows = None if flows is None or found is None else flows + found
    if flows is not None:
        yield model, flows
    else:
        for child in model.children():
            yield from traced_parts(child)


def _traced_in(model: nn.Module, training: bool) -> list[Flow] | None:
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = training
        return traced(model)
    finally:
        for module, mode in modes.items():
            module.training = mode


def watched(model: nn.Module, run: Callable[[], Any]) -> Flow:
    """Run a model, and watch which layers take which outputs."""
    watch = _Watch(model)
    leaves = [module for module in model.modules() if module is not model and _is_leaf(module)]
    handles = [leaf.register_forward_pre_hook(watch.enter, with_kwargs=True) for leaf in leaves]
    handles += [leaf.register_forward_hook(watch.leave, always_call=True) for leaf in leaves]
    try:
        with torch.no_grad(), watch:
            watch.take(run(), None)
    finally:
        for handle in handles:
            handle.remove()
    return watch.flow


def calling(model: nn.Module, example: Any) -> Callable[[], Any]:
    """Make the function that runs a model on an example: a tensor, a tuple of arguments, or a mapping of named ones."""

    def run() -> Any:
        given = pytree.tree_map_only(Tensor, Tensor.clone, example)  # the model may work on it in place
        with torch.no_grad():
            if isinstance(given, Mapping):
                return model(**given)
            return model(*given) if isinstance(given, tuple | list) else model(given)

    return run


def first_output(verb: str, model: nn.Module, example: Any, run: Callable[[], Any]) -> Any:
    """Run a model on its example.

    Raises:
        ConfigError: it fails on it.
    """
    try:
        return run()
    except Exception as error:
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
        given = f"shape {', '.join(map(str, shapes))}" if shapes else f"type {type(example).__name__}"
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{verb}() could not run the model on example of {given}: {said}\n"
            f"Give it what {type(model).__name__} is called with: a tensor, a tuple, or a mapping of names."
        ) from error


def certain_pairs(flows: list[Flow]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Give the layers that are called once, and whose output one layer takes, that takes nothing else, in each flow."""
    for layer, takers in flows[0].takers.items():
        after = takers[0] if len(takers) == 1 else None
        if after is not None and all(why_not(flow, layer, after) == "" for flow in flows):
            yield layer, after


def why_not(flow: Flow, layer: nn.Module, after: nn.Module) -> str:
    """Say why `after` cannot be taken as the only one that sees `layer`'s output; empty if it is."""
    if flow.calls[after] != 1:
        return f"it is called {flow.calls[after]} times"
    if flow.sources.get(after) is not layer:
        return "it takes something else"
    if flow.calls[layer] != 1:
        return f"the layer before it is called {flow.calls[layer]} times"
    if flow.takers[layer] != [after]:
        return "something else takes the output of the layer before it too"
    return "parameters are used apart from their layer" if {layer, after} & flow.touched else ""


def is_hooked(module: nn.Module) -> bool:
    """Tell whether someone watches, or changes, what goes through a module; `convert`'s own hook does neither."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(hook is not watch_hook for hooks in kinds for hook in getattr(module, hooks).values())


def tied_parameters(model: nn.Module) -> set[int]:
    """Find the parameters that several modules hold, by `id`."""
    holders: Counter[int] = Counter()
    for module in model.modules():
        holders.update({id(p) for p in module._parameters.values() if p is not None})  # noqa: SLF001
    return {parameter for parameter, count in holders.items() if count > 1}


def _is_leaf(module: nn.Module) -> bool:
    if source_of(module) is not None or looks_like_batch_norm(module):
        return True
    if isinstance(module, PRODUCERS) or is_hooked(module) or type(module).__module__.startswith("distnorm.norms"):
        return True
    return not any(True for _ in module.children()) and type(module).__module__.startswith("torch.nn")


def _keep(module: nn.Module) -> Callable[[], None]:
    """Remember a module's attributes, and give the function that puts them back."""
    dictionaries = [module.__dict__, module._parameters, module._buffers, module._modules]  # noqa: SLF001
    copies = [dict(dictionary) for dictionary in dictionaries]

    def put_back() -> None:
        for dictionary, copy in zip(dictionaries, copies, strict=True):
            dictionary.clear()
            dictionary.update(copy)

    return put_back


_SHAPES = ("shape", "ndim", "dtype", "device")
_READS = {Tensor.size, Tensor.dim, *(getattr(Tensor, name).__get__ for name in _SHAPES)}
"""What is asked of a tensor without looking at its values."""


class _Tracer(fx.Tracer):
    """Looks into containers, and takes norms, convolutions, and whatever is hooked, as one piece."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _flow_of(model: nn.Module, graph: fx.Graph) -> Flow:
    flow, modules = Flow(), dict(model.named_modules(remove_duplicate=False))
    layer_of = {node: modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    for node in graph.nodes:
        layer = layer_of.get(node)
        if layer is not None:
            flow.calls[layer] += 1
            takers = [layer_of.get(user) for user in node.users if not _reads_no_values(user)]
            flow.takers.setdefault(layer, []).extend(takers)
            only = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            flow.sources[layer] = layer_of.get(only) if isinstance(only, fx.Node) else None
            flow.fed.setdefault(layer, []).append(fed_by_graph(node, layer_of))
        elif node.op == "get_attr":
            flow.touched.add(modules[str(node.target).rpartition(".")[0]])
    return flow


def _reads_no_values(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in {"size", "dim"}
    return node.op == "call_function" and node.target is getattr and node.args[1] in _SHAPES


class _Watch(TorchFunctionMode):
    """Sees every use of a tensor that a layer gave out, by another layer or by anything else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flow = Flow()
        self._owners = {id(p): m for m in model.modules() for p in m._parameters.values() if p is not None}  # noqa: SLF001
        self._inside: list[nn.Module] = []
        self._made: dict[int, tuple[Tensor, nn.Module]] = {}  # the tensors are kept, for their ids

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inside:
            self.flow.calls[module] += 1
            self.take((args, kwargs), module)
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            self.flow.sources[module] = self._made.get(id(args[0]), (None, None))[1] if alone else None
        self._inside.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside.pop()
        if not self._inside and isinstance(output, Tensor):
            self.flow.takers.setdefault(module, [])
            self._made[id(output)] = (output, module)

    def take(self, values: Any, taker: nn.Module | None) -> None:
        """Note that `taker` has seen these values."""
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor) and id(value) in self._made:
                self.flow.takers[self._made[id(value)][1]].append(taker)
            elif taker is None and id(value) in self._owners:
                self.flow.touched.add(self._owners[id(value)])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside and func not in _READS:
            self.take((args, kwargs or {}), None)
        return func(*args, **(kwargs or {}))
