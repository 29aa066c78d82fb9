"""Words for what is wrong with settings."""

import inspect
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from distnorm.errors import did_you_mean
from distnorm.policy import suggest
from distnorm.spec import KINDS


def in_words(error: ValidationError, settings: type[BaseModel]) -> str:
    """Word the first mistake that pydantic found: the key as one types it, the value, the rule, what to type instead.

    Args:
        error: what it raised.
        settings: the model that it checked.
    """
    first = error.errors()[0]
    model, keys, value = _locate(settings, [part for part in first["loc"] if isinstance(part, str)])
    path, value = ".".join(keys), first["input"]
    if first["type"] == "extra_forbidden":
        parent = ".".join(keys[:-1])
        choices = list(model.model_fields)
        near = did_you_mean(keys[-1], choices)
        where = f"Keys of {parent}" if parent else "Keys"
        return f"{path}={value!r}: there is no such key.{near} {where}: {', '.join(choices)}."
    if first["type"] == "missing":
        return f"{path} is missing. Compose conf/ with a choice for each group, e.g. {keys[0]}={KINDS[0]}."
    field = model.model_fields[keys[-1]]
    if first["type"] == "literal_error" and field.description is None:
        choices = [str(choice) for choice in get_args(field.annotation)]
        return f"{path}={value!r} is not one of {', '.join(choices)}.{suggest(path, value, choices)}"
    rule = field.description or _description_of(field) or first["msg"].removeprefix("Input should be ")
    examples = field.examples or _examples_of(field)
    if field.annotation == list[str] and isinstance(value, str):
        examples = [f"[{value}]"]
    quote = "'" if " " in str(examples[:1]) else ""
    remedy = f" Use e.g. {quote}{path}={examples[0]}{quote}." if examples else f" Give {path} such a value."
    return f"{path}={value!r} must be {rule}.{remedy}"


def _locate(model: type[BaseModel], parts: list[str]) -> tuple[type[BaseModel], list[str], None]:
    """Walk down the models as far as an error's location names fields: the rest is pydantic's own."""
    keys: list[str] = []
    for part in parts:
        keys.append(part)
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (inspect.isclass(annotation) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return model, keys, None


def _description_of(field: Any) -> str | None:
    return next((info.description for info in _infos(field) if info.description), None)


def _examples_of(field: Any) -> list[Any]:
    return next((info.examples for info in _infos(field) if info.examples), [])


def _infos(field: Any) -> list[Any]:
    """Find the notes that an annotated member of a union carries."""
    return [info for member in get_args(field.annotation) for info in getattr(member, "__metadata__", ())]
