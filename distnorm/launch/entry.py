"""From the command line to a running rank: compose, check, decide, start; mistakes end here in at most three lines."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distnorm import checkpoint, settings, targets
from distnorm.errors import ConfigError, DistNormError
from distnorm.launch import console, overrides, ranks
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
    """Let Hydra compose. A single run starts after it has returned, each job of a sweep (`-m`) inside it."""
    single: list[tuple[DictConfig, list[str]]] = []
    failures: list[DistNormError] = []

    def job(composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        if hydra_config.mode != RunMode.MULTIRUN:
            single.append((composed, list(hydra_config.overrides.task)))
            return
        name = " ".join(hydra_config.overrides.task)
        print(f"--- {name}", flush=True)
        try:
            _start(train, settings.check(composed), sweeping=True)
        except DistNormError as error:  # the other jobs go on
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failures.append(error)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let its exceptions through, to be worded here
    try:
        hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)(job)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if isinstance(error, ValueError) and overrides.NO_CHOICE not in str(error):
            raise
        raise ConfigError(overrides.in_words(error, config.parent)) from None
    for composed, changes in single:
        checked = settings.check(composed)
        if checked.study is None:
            _start(train, checked, sweeping=False)
        else:
            _conduct(train, checked, config, changes)
    if failures:
        raise type(failures[0])(f"{len(failures)} of the jobs failed; the reasons stand above.")


def _conduct(train: Train, checked: Settings, config: Path, changes: list[str]) -> None:
    """Conduct a study: runs of this experiment with changes of each row's own, in processes of their own."""
    from distnorm.launch.compose import composed  # noqa: PLC0415
    from distnorm.study.conduct import conduct  # noqa: PLC0415 — what a single run does not need

    found = ranks.find(checked.trainer)
    if found.started_by in ("torchrun", "slurm"):
        raise ConfigError(
            f"A study starts the ranks of its runs, and {found.started_by} has started {found.world_size}. "
            "Start it with: python train.py experiment=…"
        )

    def compose(of_row: Sequence[str]) -> Settings:
        return composed(config, [*changes, *of_row, "study=null"])

    conduct(train, checked, compose, [sys.argv[0], *changes])


def _start(train: Train, checked: Settings, *, sweeping: bool) -> None:
    """Check all that can be checked without ranks, then run here or start them."""
    from distnorm.launch import trainer  # noqa: PLC0415 — Lightning: seconds that a misspelt key need not wait for

    if checked.study is not None:
        raise ConfigError("-m sweeps over runs, and this experiment is a study of many already. Leave out -m.")
    found = ranks.find(checked.trainer)
    if sweeping and found.started_by in ("torchrun", "slurm"):
        raise ConfigError(
            f"-m starts ranks for each job, and {found.started_by} has started {found.world_size}. Sweep without it."
        )
    complete = checked.with_batches(found.world_size)
    spec = complete.decide(found.world_size, found.per_node)
    trainer.check_passthrough(complete.trainer.lightning)
    data = targets.build(complete.data)
    if hasattr(data, "describe"):  # ours; a data module of the user's own may have no such words
        data.describe(found.world_size)
    settings.check_fit(complete, data)
    if complete.ckpt_path is not None:
        path = checkpoint.find(complete.ckpt_path, warn=found.is_first).resolve()
        checkpoint.check_resume(path, spec)
        complete = complete.model_copy(update={"ckpt_path": str(path)})
    run = open_run(complete, found)
    if found.started_by == "distnorm" or sweeping:
        from distnorm.launch import local  # noqa: PLC0415 — the launcher loads what a rank does not need

        local.start_ranks(sys.argv[0], run, found.world_size)
    else:
        train(complete, found, run)


def _be_rank(train: Train, run: RunFolder) -> None:
    from distnorm.launch import local  # noqa: PLC0415

    checked = run.read_settings()
    found = ranks.find(checked.trainer.model_copy(update={"ranks_from": "torchrun"}))  # it is torchrun's engine
    local.become_rank(run, found.rank)
    try:
        train(checked, found, run)
    except BaseException as error:  # noqa: BLE001 — whatever ends a rank, the launcher names it
        local.note_failure(run, found.rank, error)
        sys.stdout.flush()
        os._exit(1)  # no destructor of a broken process group, no interpreter shutdown may keep this rank alive
