"""Looking up what a model's objects hold and what their code says, without running any of it."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Iterable
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Method:
    """A function, and the object that it belongs to."""

    function: types.FunctionType
    owner: Any
    cls: type | None


@dataclasses.dataclass(frozen=True)
class Property:
    """A property of an object: what it gives is in its code."""

    method: Method


@dataclasses.dataclass(frozen=True)
class Super:
    """An object, seen from the class after one of its own."""

    owner: Any
    cls: type | None


class _AtAnyPlace(tuple[Any, ...]):
    """Values of which nobody knows where in a list they are."""

    __slots__ = ()


def as_method(target: Any) -> Method | None:
    """Find the Python function that a call runs, and whose it is."""
    owner, cls = None, None
    if isinstance(target, Method):
        target, owner, cls = target.function, target.owner, target.cls
    if isinstance(target, functools.partial):
        target = target.func
    if isinstance(target, types.MethodType):
        target, owner = target.__func__, target.__self__
    target = inspect.unwrap(target) if callable(target) and not isinstance(target, type | nn.Module) else None
    return Method(target, owner, cls) if isinstance(target, types.FunctionType) else None


def attribute_of(base: Any, name: str) -> list[Any]:
    """Look an attribute up without running anything."""
    if isinstance(base, types.ModuleType):
        return [vars(base)[name]] if name in vars(base) else []
    owner, after = (base.owner, base.cls) if isinstance(base, Super) else (base, None)
    if isinstance(owner, nn.Module) and after is None:
        for held in (owner._modules, vars(owner)):  # noqa: SLF001
            if held.get(name) is not None:
                return [held[name]]
    if isinstance(base, type):
        return [vars(cls)[name] for cls in base.__mro__ if name in vars(cls)][:1]
    mro = type(owner).__mro__
    for cls in mro[mro.index(after) + 1 :] if after in mro else mro:
        if name in vars(cls):
            return _bound(vars(cls)[name], owner, cls) if isinstance(owner, nn.Module) else []
    return []


def _bound(value: Any, owner: nn.Module, cls: type) -> list[Any]:
    if isinstance(value, staticmethod):
        return [value.__func__]
    if isinstance(value, types.FunctionType):
        return [Method(inspect.unwrap(value), owner, cls)]
    if isinstance(value, property) and isinstance(value.fget, types.FunctionType):
        return [Property(Method(value.fget, owner, cls))]
    return [value] if isinstance(value, nn.Module) else []


def elements_of(base: Any, key: Any = None, *, deep: bool = False) -> list[Any]:
    """Give what a container holds; under a key, if there is one, else all."""
    if isinstance(base, nn.Module):
        if isinstance(key, int) and isinstance(base, nn.Sequential | nn.ModuleList):
            return [base[key]] if -len(base) <= key < len(base) else []
        named = base._modules  # noqa: SLF001
        if isinstance(key, re.Pattern):
            return [module for name, module in named.items() if key.fullmatch(name)]
        return [named[key]] if key in named else [*(base.modules() if deep else base.children())]
    if isinstance(base, dict):
        return [base[key]] if key in base else list(base.values())
    if isinstance(base, list | tuple):
        is_place = isinstance(key, int) and -len(base) <= key < len(base) and not isinstance(base, _AtAnyPlace)
        return [base[key]] if is_place else list(base)
    return []


def parts_of(base: Any, place: int, count: int | None) -> list[Any]:
    """Give what unpacking a container may bind to one of its targets.

    Args:
        base: what is no container stands for itself.
        place: of the target.
        count: how many targets there are; `None`: any number, one of them is starred.
    """
    if not isinstance(base, list | tuple | dict | nn.Module):
        return [base]
    return elements_of(base, place if isinstance(base, _IN_ORDER) and len(base) == count else None)


def ways_of(elements: list[list[Any]]) -> list[Any]:
    """Give tuples that have every value of every element at its place; one without places where there are many.

    Args:
        elements: of each, what it may stand for; where nothing is known, its place has `None`.
    """
    most = max(map(len, elements), default=0)
    if most > _MOST_WAYS:  # lists of lists would double with each one
        return [_AtAnyPlace(value for element in elements for value in element)]
    return [tuple(values[min(way, len(values) - 1)] if values else None for values in elements) for way in range(most)]


def identity_of(value: Any, deepest: int = 3) -> Any:
    """Give a key that equal looks at the same objects share, though each look makes new tuples and methods."""
    if isinstance(value, tuple) and deepest:
        return tuple(identity_of(held, deepest - 1) for held in value)
    return (id(value.function), id(value.owner), id(value.cls)) if isinstance(value, Method) else id(value)


def key_of(node: ast.expr) -> Any:
    """Give a key that code has: a constant, or a pattern for a name that it puts together; else `None`."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else None for part in node.values)
        return re.compile("".join(".*" if part is None else re.escape(str(part)) for part in parts))
    return node.value if isinstance(node, ast.Constant) else None


def holds(value: Any, norms: set[nn.Module]) -> bool:
    """Tell whether a value is one of these modules, or has one inside."""
    if isinstance(value, nn.Module):
        return value in norms or any(module in norms for module in value.modules())
    return isinstance(value, list | tuple) and any(holds(v, norms) for v in value)


def unique(values: Iterable[Any]) -> list[Any]:
    """Leave out what is the same object as one before."""
    return list({id(value): value for value in values}.values())


_MOST_WAYS = 8
_IN_ORDER = (list, tuple, nn.Sequential, nn.ModuleList)
_BINDING = (ast.Assign, ast.NamedExpr, ast.AnnAssign, ast.For, ast.AsyncFor, ast.comprehension)


@dataclasses.dataclass(frozen=True)
class Code:
    """What of a function's source says something: its parameters, and nodes by what they do."""

    parameters: list[str]
    bind: list[ast.AST]
    use: list[ast.Attribute | ast.Call]
    give: list[ast.expr]

    @classmethod
    def of(cls, tree: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> "Code":
        """Sort the nodes of a function."""
        parameters = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
        body = [tree.body] if isinstance(tree, ast.Lambda) else tree.body
        nodes = [node for statement in body for node in ast.walk(statement)]
        bind = [node for node in nodes if isinstance(node, _BINDING)]
        use = [node for node in nodes if isinstance(node, ast.Call) or _is_read(node)]
        give = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
        return cls(parameters, bind, use, give)  # type: ignore[arg-type]


def _is_read(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)


def code_of(function: types.FunctionType) -> Code | None:
    """Read the source of a function; `None` where there is none."""
    return _parsed(function.__code__)


@functools.lru_cache(maxsize=4096)
def _parsed(code: types.CodeType) -> Code | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return next((Code.of(node) for node in ast.walk(tree) if isinstance(node, kinds)), None)
