"""What a module's own code does with the norms that it holds, read from its source: nothing runs.

A module that calls its norms leaves everything to them. One that reads their statistics, or gives them to
`F.batch_norm` itself, depends on attributes that another kind of norm lacks, or never runs the new layer.

The source is followed from `forward` into the methods and functions that it calls, with what `self` holds: names,
containers, loops over them. What cannot be read (no source, a value known only at run time) counts as unused.
"""

import ast
import builtins
import dataclasses
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from distnorm.lookup import (
    Code,
    Method,
    Property,
    Super,
    as_method,
    attribute_of,
    code_of,
    elements_of,
    holds,
    identity_of,
    key_of,
    parts_of,
    unique,
    ways_of,
)

FUNCTIONS: dict[Any, str] = {
    function: f"{'F' if module is functional else 'torch'}.{name}"
    for module in (functional, torch)
    for name in ("batch_norm", "native_batch_norm", "instance_norm")
    if (function := getattr(module, name, None)) is not None
}
"""Functions that normalize with batch norm's kernel, and their names."""

_DEEPEST, _MOST = 12, 400
_PLACE_OF_TRAINING = 5
_WITH_NAMES = {"named_children", "named_modules", "items"}
_ALL_OF = {"children", "modules", "values"} | _WITH_NAMES
_PASSED_ON = {list, tuple, reversed, iter, sorted, set}


@dataclasses.dataclass
class Use:
    """What code does with norms.

    Attributes:
        reads: of each norm, the attributes that are read, and where.
        calls: norms that are called, by themselves or in a container.
        normalized: norms whose attributes are given to one of `FUNCTIONS`, other than with `training=False`.
        functions: modules that call one of `FUNCTIONS` in methods of their own, and which.
    """

    reads: dict[nn.Module, dict[str, str]] = dataclasses.field(default_factory=dict)
    calls: set[nn.Module] = dataclasses.field(default_factory=set)
    normalized: set[nn.Module] = dataclasses.field(default_factory=set)
    functions: dict[nn.Module, str] = dataclasses.field(default_factory=dict)


def read_code(module: nn.Module, norms: set[nn.Module], use: Use, methods: Iterable[str] = ("forward",)) -> None:
    """Add what a module's methods do with norms.

    Args:
        module: whose methods are read.
        norms: are looked for.
        use: is added to.
        methods: where reading starts.
    """
    reader = _Reader(norms, use)
    for method in methods:
        for found in attribute_of(module, method):
            reader.call(found, [], {}, 0)


class _Reader:
    def __init__(self, norms: set[nn.Module], use: Use) -> None:
        self.norms, self.use = norms, use
        self.done: dict[Any, list[Any]] = {}
        self.alive: list[Any] = []  # what the keys of `done` name by its id, which another object may get later

    def call(
        self, target: Any, given: list[list[Any]], named: dict[str, list[Any]], depth: int, caller: Any = None
    ) -> list[Any]:
        """Read a function that is called with these values, and give what it may return."""
        method = as_method(target)
        if method is None or depth > _DEEPEST or len(self.done) > _MOST:
            return []
        function = method.function
        source = code_of(function)
        if source is None:
            return []
        values = ([[method.owner]] if method.owner is not None else []) + given
        scope = {name: list(value) for name, value in zip(source.parameters, values, strict=False)} | named
        key = function.__code__, tuple(sorted((k, tuple(map(identity_of, v))) for k, v in scope.items()))
        if key not in self.done:
            self.alive.append([*scope.values()])
            self.done[key] = []  # for a function that calls itself
            frame = _Frame(self, method, scope, depth, caller)
            self.done[key] = frame.run(source)
        return self.done[key]


class _Frame:
    """One function: what its names stand for, whatever way it takes."""

    def __init__(self, reader: _Reader, method: Method, scope: dict[str, list[Any]], depth: int, caller: Any) -> None:
        self.reader, self.method, self.scope, self.depth = reader, method, scope, depth
        self.owner = caller if method.owner is None else method.owner
        code, cells = method.function.__code__, method.function.__closure__ or ()
        self.closure: dict[str, Any] = {}
        for name, cell in zip(code.co_freevars, cells, strict=False):
            try:
                self.closure[name] = cell.cell_contents
            except ValueError:  # not filled yet
                continue

    def run(self, source: Code) -> list[Any]:
        for _ in range(2):  # a name may be used before the line that binds it, in a loop
            for node in source.bind:
                self.bind(node)
        for use in source.use:
            if isinstance(use, ast.Attribute):
                self.read(use.value, use.attr)
                self.of(use)  # a property has code
            else:
                self.note_call(use)
        return unique(v for given in source.give for v in self.of(given))

    # -- names

    def bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, node.value)
        elif isinstance(node, ast.NamedExpr | ast.AnnAssign) and node.value is not None:
            self.assign(node.target, node.value)
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            self.assign_each(node.target, node.iter)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
            for one, its in zip(target.elts, value.elts, strict=False):
                self.assign(one, its)
        else:
            self.name(target, self.of(value))

    def assign_each(self, target: ast.expr, iterated: ast.expr) -> None:
        called = iterated.func.id if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name) else ""
        if called in {"zip", "enumerate"} and isinstance(iterated, ast.Call) and isinstance(target, ast.Tuple):
            sources: list[ast.expr | None] = [*([None] if called == "enumerate" else []), *iterated.args]
            for one, source in zip(target.elts, sources, strict=False):
                if source is not None:
                    self.assign_each(one, source)
            return
        self.name(target, [e for v in self.of(iterated) for e in elements_of(v)])

    def name(self, target: ast.expr, values: list[Any]) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            count = None if any(isinstance(one, ast.Starred) for one in target.elts) else len(target.elts)
            for place, one in enumerate(target.elts):
                self.name(one, [part for value in values for part in parts_of(value, place, count)])
        elif isinstance(target, ast.Starred):
            self.name(target.value, [(value,) for value in values])  # at any place of a list
        elif isinstance(target, ast.Name) and values:
            self.scope[target.id] = unique([*self.scope.get(target.id, []), *values])

    # -- values

    def of(self, node: ast.expr) -> list[Any]:
        """Give what an expression may stand for: modules, containers of them, functions."""
        match node:
            case ast.Name():
                found = self.of_name(node.id)
            case ast.Attribute():
                found = self.seen(v for base in self.bases(node.value) for v in attribute_of(base, node.attr))
            case ast.Subscript():
                found = [v for base in self.of(node.value) for v in elements_of(base, key_of(node.slice))]
            case ast.IfExp():
                found = [*self.of(node.body), *self.of(node.orelse)]
            case ast.BoolOp():
                found = [v for value in node.values for v in self.of(value)]
            case ast.Tuple() | ast.List():
                found = ways_of([self.of(element) for element in node.elts])
            case ast.NamedExpr():
                found = self.of(node.value)
            case ast.Call():
                found = self.of_call(node)
            case _:
                found = []
        return unique(found)

    def seen(self, values: Iterable[Any]) -> list[Any]:
        """Replace properties by what they give."""
        found: list[Any] = []
        for value in values:
            is_read = isinstance(value, Property)
            found += self.reader.call(value.method, [], {}, self.depth + 1) if is_read else [value]
        return unique(found)

    def of_name(self, name: str) -> list[Any]:
        if name in self.scope:
            return self.scope[name]
        for names in (self.closure, self.method.function.__globals__, vars(builtins)):
            if name in names:
                return [names[name]]
        return []

    def bases(self, node: ast.expr) -> list[Any]:
        """Give what an attribute is taken of; `super()` is the same object, seen from the next class."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
            return [Super(self.method.owner, self.method.cls)]
        return self.of(node)

    def of_call(self, node: ast.Call) -> list[Any]:
        functions = self.of(node.func)
        if _is_among(getattr, functions) and len(node.args) > 1:
            key = key_of(node.args[1])
            look_up = attribute_of if isinstance(key, str) else elements_of
            return unique(v for base in self.of(node.args[0]) for v in look_up(base, key))
        if any(function in _PASSED_ON for function in functions if isinstance(function, type)) and node.args:
            return self.of(node.args[0])
        if isinstance(node.func, ast.Attribute) and node.func.attr in _ALL_OF:
            bases = self.of(node.func.value)
            held = [e for b in bases for e in elements_of(b, deep="modules" in node.func.attr)]
            return [tuple((None, e) for e in held) if node.func.attr in _WITH_NAMES else tuple(held)]
        given = [self.of(argument) for argument in node.args if not isinstance(argument, ast.Starred)]
        named = {k.arg: self.of(k.value) for k in node.keywords if k.arg}
        found: list[Any] = []
        for function in functions:
            with_norm = any(holds(v, self.reader.norms) for values in (*given, *named.values()) for v in values)
            if with_norm or self.is_near(function):
                found += self.reader.call(function, given, named, self.depth + 1, self.owner)
        return unique(found)

    def is_near(self, function: Any) -> bool:
        """Tell whether a function is worth reading though it gets no norm: a method, or one of the same package."""
        if isinstance(function, Method):
            return isinstance(function.owner, nn.Module) and function.cls is not nn.Module
        packages = [getattr(f, "__module__", None) or "" for f in (function, self.method.function)]
        return isinstance(function, types.FunctionType) and len({p.partition(".")[0] for p in packages}) == 1

    # -- what is done with norms

    def read(self, node: ast.expr, attribute: str) -> None:
        for value in self.of(node):
            if isinstance(value, nn.Module) and value in self.reader.norms:
                if attribute in {"forward", "__call__"}:
                    self.reader.use.calls.add(value)
                elif not hasattr(nn.Module, attribute):
                    self.reader.use.reads.setdefault(value, {}).setdefault(attribute, self.place())

    def note_call(self, node: ast.Call) -> None:
        functions, use = self.of(node.func), self.reader.use
        if _is_among(getattr, functions) and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
            self.read(node.args[0], str(node.args[1].value))
        for function in functions:
            if isinstance(function, nn.Module):
                use.calls |= self.reader.norms & set(function.modules())
            elif isinstance(function, types.FunctionType | types.BuiltinFunctionType) and function in FUNCTIONS:
                if isinstance(self.owner, nn.Module):
                    use.functions.setdefault(self.owner, FUNCTIONS[function])
                if not _is_evaluation(node):
                    bases = [v for n in ast.walk(node) if isinstance(n, ast.Attribute) for v in self.of(n.value)]
                    use.normalized |= {v for v in bases if isinstance(v, nn.Module) and v in self.reader.norms}
        self.of_call(node)

    def place(self) -> str:
        return self.method.function.__qualname__.replace("<locals>.", "")


def _is_evaluation(node: ast.Call) -> bool:
    given = node.args[_PLACE_OF_TRAINING : _PLACE_OF_TRAINING + 1]
    values = [*given, *(k.value for k in node.keywords if k.arg in {"training", "train"})]
    default = not values and not any(isinstance(argument, ast.Starred) for argument in node.args)
    return default or any(isinstance(value, ast.Constant) and value.value is False for value in values)


def _is_among(function: Any, values: list[Any]) -> bool:
    return any(value is function for value in values)
