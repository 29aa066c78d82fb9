"""From the command line to a running rank: compose, check, decide, start; mistakes end here in at most three lines."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distnorm import checkpoint, settings
from distnorm.errors import ConfigError, DistNormError, did_you_mean
from distnorm.launch import console, ranks
from distnorm.launch.run_dir import RUN_DIR, RunFolder, open_run
from distnorm.settings import Settings

Train = Callable[[Settings, ranks.Ranks, RunFolder], dict[str, Any]]


def main(train: Train, config: Path) -> None:
    """Run `train` with what the command line composes from `config`, on as many ranks as that says.

    Args:
        train: trains on this rank; called once on each.
        config: the root of the configuration: `conf/train.yaml`.
    """
    console.quiet_libraries()
    try:
        if RUN_DIR in os.environ:
            _be_rank(train, RunFolder(Path(os.environ[RUN_DIR])))
        else:
            _compose_and_start(train, config)
    except DistNormError as error:
        console.fail(error)


def _compose_and_start(train: Train, config: Path) -> None:
    failures: list[DistNormError] = []

    def job(composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        sweeping = hydra_config.mode == RunMode.MULTIRUN
        try:
            _start(train, settings.check(composed), sweeping=sweeping)
        except DistNormError as error:  # kept until Hydra has returned: it would print a line of its own
            failures.append(error)
            if sweeping:
                print(f"{' '.join(hydra_config.overrides.task)}: {error}", file=sys.stderr, flush=True)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let its exceptions through, to be worded here
    try:
        hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_in_words(error, config.parent)) from None
    if failures:
        raise failures[0]


def _start(train: Train, checked: Settings, *, sweeping: bool) -> None:
    """Check all that can be checked without ranks, then run here or start them."""
    found = ranks.find(checked.trainer)
    complete = checked.with_batches(found.world_size)
    complete.decide(found.world_size, found.per_node)
    data = settings.build(complete.data)
    if hasattr(data, "describe"):  # ours; a data module of the user's own may have no such words
        data.describe(found.world_size)
    if complete.ckpt_path is not None:
        path = str(checkpoint.find(complete.ckpt_path).resolve())
        complete = complete.model_copy(update={"ckpt_path": path})
    run = open_run(complete, found)
    if found.started_by == "distnorm" or sweeping:
        from distnorm.launch import local  # noqa: PLC0415 — the launcher loads what a rank does not need

        local.start_ranks(sys.argv[0], run, found.world_size)
    else:
        train(complete, found, run)


def _be_rank(train: Train, run: RunFolder) -> None:
    from distnorm.launch import local  # noqa: PLC0415

    checked = run.read_settings()
    found = ranks.find(checked.trainer)
    local.become_rank(run, found.rank)
    try:
        train(checked, found, run)
    except BaseException as error:  # noqa: BLE001 — whatever ends a rank, the launcher names it
        local.note_failure(run, found.rank, error)
        sys.stdout.flush()
        os._exit(1)  # no destructor of a broken process group, no interpreter shutdown may keep this rank alive


def _in_words(error: Exception, conf: Path) -> str:
    """Word what Hydra could not compose: its own messages run to 13 lines."""
    text = str(error)
    missing = re.search(r"(?:Could not find|find) '([\w./-]+)/([\w.-]+)'", text)
    if missing:
        group, choice = missing.groups()
        choices = sorted(file.stem for file in (conf / group).glob("[!_]*.yaml"))
        return f"{group}={choice!r} is not one of {', '.join(choices)}.{did_you_mean(choice, choices)}"
    unknown = re.search(r"Could not override '([\w.]+)'", text)
    if unknown:
        return _unknown_key(unknown.group(1), conf)
    group_like = re.search(r"No match in the defaults list.*?'([\w./@]+)'|Could not override '([\w/]+)'", text)
    if group_like:
        name = next(filter(None, group_like.groups()))
        groups = sorted(folder.name for folder in conf.iterdir() if folder.is_dir())
        return f"{name!r} is no group of conf/.{did_you_mean(name, groups)} There are: {', '.join(groups)}."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(line[:200] for line in lines[:3])


def _unknown_key(path: str, conf: Path) -> str:
    """Suggest the key that was meant, from the keys of conf/ as they are."""
    keys = _known_keys(conf)
    parent, _, key = path.rpartition(".")
    siblings = [known.rpartition(".")[2] for known in keys if known.rpartition(".")[0] == parent]
    near = did_you_mean(key, siblings)
    if near:
        where = f" Did you mean '{parent + '.' if parent else ''}{near.split(chr(39))[1]}'?"
    else:
        where = did_you_mean(path, keys)
    listing = (
        f"Keys of {parent}: {', '.join(siblings)}."
        if siblings
        else f"Groups and keys: {', '.join(_known_keys(conf, depth=1))}."
    )
    return f"{path}: there is no such key.{where}\n{listing}"


def _known_keys(conf: Path, depth: int = 2) -> list[str]:
    model: dict[str, Any] = {**Settings.model_fields}
    keys = list(model)
    if depth > 1:
        for group in ("norm", "trainer", "drift", "logger"):
            keys += [f"{group}.{key}" for key in model[group].annotation.model_fields]
        for group in ("data", "model", "task", "optimizer"):
            for file in sorted((conf / group).glob("*.yaml")):
                lines = file.read_text().splitlines()
                keys += [f"{group}.{line.split(':')[0]}" for line in lines if re.match(r"[a-z]\w*:", line)]
    return list(dict.fromkeys(keys))
