"""Nodes with a `_target_`: checked against the signature of what they name, then built.

So a user's own class, or a model of another library, needs no schema here, and a misspelt argument still fails early.
"""

import inspect
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import hydra.utils
from hydra.errors import HydraException
from pydantic import TypeAdapter, ValidationError

from distnorm.errors import ConfigError, did_you_mean

Node = dict[str, Any]
"""Arguments by name, and the `_target_` that takes them."""


def build(node: Node, **given: Any) -> Any:
    """Build what a node's `_target_` names, with the arguments beside it.

    Raises:
        ConfigError: (the target's own) an argument it refuses.
    """
    try:
        return hydra.utils.instantiate({k: v for k, v in node.items() if k != "global_batch"}, **given, _convert_="all")
    except HydraException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise


def check_target(path: str, node: Node, given: Sequence[str] = ()) -> None:
    """Hold a node's keys and plain values against the signature of its `_target_`.

    Args:
        path: where the node is: `model`.
        node: its values.
        given: arguments that the run adds itself.

    Raises:
        ConfigError: the target is missing or cannot be imported; a key it does not take, or a value of another type.
    """
    name = node.get("_target_")
    if not isinstance(name, str):
        raise ConfigError(
            f"{path}._target_={name!r} names nothing to build. Give a class, e.g. {path}._target_=package.Class."
        )
    try:
        target = hydra.utils.get_object(name)
    except Exception as error:  # noqa: BLE001 — importing runs code we do not know
        cause = str(error.__cause__ or error).strip().splitlines()[-1][:160]
        raise ConfigError(
            f"{path}._target_={name!r} cannot be imported: {cause}.\n"
            f"Install the package ({name.split('.')[0]}), or correct the name.",
        ) from None
    parameters = inspect.signature(target).parameters
    hints = _type_hints(target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in node.items():
        if key in ("_target_", "_partial_", "_args_", "_convert_", "_recursive_"):
            continue
        if key not in parameters and not open_ended:
            near = did_you_mean(key, parameters)
            raise ConfigError(
                f"{path}.{key}={value!r} is not an argument of {name}.{near} It takes {', '.join(parameters)}."
            )
        default = parameters[key].default if key in parameters else None
        if key in hints:
            check_value(f"{path}.{key}", value, hints[key])
        elif isinstance(default, int | float) and isinstance(value, str):
            check_value(f"{path}.{key}", value, type(default))
    for parameter in parameters.values():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and parameter.name not in node and parameter.name not in given:
            raise ConfigError(f"{path}.{parameter.name} is missing, and {name} needs it. Add {path}.{parameter.name}=…")


def check_takes(path: str, node: Node, argument: str) -> None:
    """Require that a node's target takes an argument that the run gives.

    Raises:
        ConfigError: it does not.
    """
    parameters = inspect.signature(hydra.utils.get_object(node["_target_"])).parameters
    if argument not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(
            f"{path}._target_={node['_target_']!r} takes no {argument}, that the run sets. Add it to its arguments."
        )


def _type_hints(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # hints that only a type checker can read
        return {}
    return {key: hint for key, hint in hints.items() if _is_plain(hint)}


def _is_plain(hint: Any) -> bool:
    arguments = get_args(hint)
    return hint in (int, float, bool, str, type(None)) or (
        bool(arguments) and all(map(_is_plain, arguments)) and "[" not in str(hint)
    )


def check_value(key: str, value: Any, hint: Any) -> None:
    """Hold one value against a type.

    Raises:
        ConfigError: it is of another type, or out of the type's range.
    """
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        rule = error.errors()[0]
        what = {"greater_than_equal": "a whole number of at least 1", "int_type": "a whole number"}.get(rule["type"])
        what = what or {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))
        raise ConfigError(f"{key}={value!r} must be {what}. Use e.g. {key}={_example(hint)}.") from None


def _example(hint: Any) -> str:
    return {float: "0.1", bool: "true", str: "name"}.get(hint, "16")
