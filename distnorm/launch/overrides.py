"""Mistakes on the command line, worded: Hydra's own messages run to 13 lines, and advise what hides a typo."""

import re
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException
from pydantic import BaseModel

from distnorm.errors import did_you_mean
from distnorm.settings import Settings

NO_CHOICE = "Config group override must be a string"
"""How the plain `ValueError` begins that Hydra raises for `norm=null` or `norm=2`."""

_LAYERS = (
    "norm.layers takes one dictionary of globs and kinds, without quotes inside it, given once.\n"
    "Write e.g. 'norm.layers={layer4.*: group, head.bn: {kind: sync, sync_ranks: 2}}'; ++norm.layers={…} adds to one "
    "that an experiment has."
)
_PLAIN_GROUPS = ("norm", "trainer", "drift", "logger")
_TARGET_GROUPS = ("data", "model", "task", "optimizer", "search")


def in_words(error: Exception, conf: Path) -> str:
    """Say what Hydra could not compose, and what was probably meant.

    Args:
        error: Hydra's or OmegaConf's.
        conf: the folder of groups; what is valid is read from it.

    Returns:
        At most three lines.
    """
    text = str(error)
    if found := re.search(r"Could not find '([\w./-]+)/([\w.-]*)'", text):
        group, choice = found.groups()
        choices = sorted(file.stem for file in (conf / group).glob("[!_]*.yaml"))
        return f"{group}={choice!r} is not one of {', '.join(choices)}.{did_you_mean(choice, choices)}"
    if found := re.search(r"Could not override '([\w.]+)'", text):
        return _unknown_key(found.group(1), conf)
    if found := re.search(r"Ambiguous value for argument '(.+?)'", text):
        return f"{found.group(1)} gives several values for one run. Add -m to run one after the other, or give one."
    if NO_CHOICE in text:
        return "A group takes the name of one of its choices. Write e.g. norm=sync or trainer=cpu; `--help` lists them."
    if isinstance(error, OverrideParseException):
        typed = f"{error.override!r} cannot be read as key=value. "
        return typed + (_LAYERS if "norm.layers" in typed else "Write e.g. norm=sync; quote what a shell would split.")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(line[:200] for line in lines[:3])


def is_of(group: str, change: str) -> bool:
    """Tell whether a change, as typed, chooses a group or sets a key below it."""
    return re.match(rf"[+~]*{group}(@[^=]*)?([.=]|$)", change) is not None


def _unknown_key(path: str, conf: Path) -> str:
    """Suggest the key that was meant, from the keys of conf/ as they are."""
    if f"{path}.".startswith("norm.layers."):
        return f"{path} cannot be set so. {_LAYERS}"
    parent, _, key = path.rpartition(".")
    if "trainer.lightning" in (path, parent):
        added = path if parent == "trainer.lightning" else f"{path}.<argument>"
        return f"{path} is passed on to lightning.Trainer: add each argument with a plus, +{added}=…"
    keys = _known_keys(conf)
    if path in keys and (having := _choices_with(conf / parent, key)):
        return f"{path} is a key of {having} alone. Add {having.split(' or ')[0]}, or leave {path} out."
    siblings = {known.rpartition(".")[2]: known for known in keys if known.rpartition(".")[0] == parent}
    near = did_you_mean(key, siblings)
    if near and parent:
        near = near.replace("'", f"'{parent}.", 1)
    near = near or did_you_mean(path, keys)
    of = f"Keys of {parent}" if parent and siblings else "Groups and keys"
    choices = siblings or [known for known in keys if "." not in known]
    return f"{path}: there is no such key.{near}\n{of}: {', '.join(choices)}."


def _choices_with(group: Path, key: str) -> str:
    """Name the choices of a group whose files have a key: `search=grid`."""
    found = {file.stem for file in group.glob("*.yaml") if re.search(rf"^{key}:", file.read_text(), re.MULTILINE)}
    if "_base" in found:
        found = {file.stem for file in group.glob("[!_]*.yaml")}
    return " or ".join(f"{group.name}={name}" for name in sorted(found))


def _known_keys(conf: Path) -> list[str]:
    fields: dict[str, Any] = {**Settings.model_fields}
    keys = list(fields)
    for group in _PLAIN_GROUPS:
        keys += _keys_below(group, fields[group].annotation)
    for group in _TARGET_GROUPS:
        for file in sorted((conf / group).glob("*.yaml")):
            names = (line.split(":")[0] for line in file.read_text().splitlines() if re.match(r"[a-z]\w*:", line))
            keys += [f"{group}.{name}" for name in names if name != "defaults"]
    return list(dict.fromkeys(keys))


def _keys_below(path: str, model: type[BaseModel]) -> list[str]:
    keys = []
    for key, field in model.model_fields.items():
        keys.append(f"{path}.{key}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys_below(keys[-1], field.annotation)
    return keys
