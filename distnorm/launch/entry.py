"""From the command line to a running rank: compose, check, decide, start; mistakes end here in at most three lines."""

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from distnorm import collectives, settings, targets
from distnorm.errors import ConfigError, DistNormError
from distnorm.launch import console, failures, overrides, ranks, requeue, resumption, run_dir, signals
from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.preflight import Preflight
from distnorm.launch.run_dir import RUN_DIR, RunFolder
from distnorm.settings import Settings

_WANDB_S = 20
Train = Callable[[Settings, ranks.Ranks, RunFolder], dict[str, Any]]


def main(train: Train, config: Path) -> None:
    """Run `train` with what the command line composes from `config`, on as many ranks as that says.

    Args:
        train: trains on this rank; called once on each.
        config: the root of the configuration: `conf/train.yaml`.

    On a rank of several, the process ends here: code after this call does not run on it.
    """
    try:
        _enter(train, config)
    except SystemExit as ended:
        if collectives.is_running():
            collectives.end_process(_exit_code(ended))
        raise
    if collectives.is_running():
        collectives.end_process()


def _exit_code(ended: SystemExit) -> int:
    """Give the exit code that Python would give; a message is printed, as Python prints it."""
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


def _enter(train: Train, config: Path) -> None:
    console.quiet_libraries()
    is_rank = RUN_DIR in os.environ
    try:
        with signals.listening() if is_rank or ranks.is_task() else contextlib.nullcontext():
            if is_rank:
                _be_rank(train, RunFolder(Path(os.environ[RUN_DIR])))
            else:
                _compose_and_start(train, config)
    except RunInterruptedError as error:
        raise SystemExit(_requeued(error).exit_code) from None
    except DistNormError as error:
        console.fail(error)


def _compose_and_start(train: Train, config: Path) -> None:
    """Let Hydra compose, all jobs of a sweep (`-m`) too, and start what it has composed once it has returned."""
    composed: list[tuple[DictConfig, list[str]]] = []
    modes = set[RunMode | None]()

    def job(one: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        modes.add(hydra_config.mode)
        composed.append((one, list(hydra_config.overrides.task)))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let its exceptions through, to be worded here
    try:
        with _scratch():
            hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)(job)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if isinstance(error, ValueError) and overrides.NO_CHOICE not in str(error):
            raise
        raise ConfigError(overrides.in_words(error, config.parent)) from None
    if RunMode.MULTIRUN in modes:
        _sweep(train, composed)
        return
    for one, changes in composed:  # none after --help or --cfg
        checked = settings.check(one)
        if checked.study is None and checked.search is None:
            _start(train, checked)
        else:
            _conduct(train, checked, config, changes)


@contextlib.contextmanager
def _scratch() -> Iterator[None]:
    """Let Hydra put its `multirun.yaml` where it is in nobody's way."""
    typed = list(sys.argv)
    with tempfile.TemporaryDirectory(prefix="distnorm-") as folder:
        sys.argv.append(f"hydra.sweep.dir={folder}")
        try:
            yield
        finally:
            sys.argv[:] = typed


def _sweep(train: Train, composed: list[tuple[DictConfig, list[str]]]) -> None:
    """Run the jobs of a sweep. What is wrong with all of them is refused; what is wrong with one is that one's."""
    from distnorm import sweep  # noqa: PLC0415 — what a single run does not need

    checked = [(_checked(one), changes) for one, changes in composed]
    good = [one for one, _ in checked if not isinstance(one, DistNormError)]
    if not good:
        raise next(one for one, _ in checked if isinstance(one, DistNormError))
    if any(one.study is not None or one.search is not None for one in good):
        raise ConfigError("-m sweeps over runs, and this is a study or a search of many already. Leave out -m.")
    found = ranks.find(good[0].trainer)
    if found.started_by == "torchrun" or (found.started_by == "slurm" and "SLURM_ARRAY_TASK_ID" not in os.environ):
        raise ConfigError(
            f"-m starts ranks for each job, and {found.started_by} has started {found.world_size}. "
            "Sweep without it, or as an array: slurm/sweep.sbatch."
        )
    jobs = sweep.plan(checked, Path(good[0].runs_dir))
    sweep.conduct(jobs, lambda one, place: _start(train, one, place))


def _checked(composed: DictConfig) -> Settings | DistNormError:
    try:
        return settings.check(composed)
    except DistNormError as error:
        return error


def _conduct(train: Train, checked: Settings, config: Path, changes: list[str]) -> None:
    """Conduct a study or a search: runs of this experiment with changes of their own, in processes of their own."""
    from distnorm.launch.compose import composed  # noqa: PLC0415
    from distnorm.search.conduct import conduct as search  # noqa: PLC0415 — what a single run does not need
    from distnorm.study.conduct import conduct as study  # noqa: PLC0415

    found = ranks.find(checked.trainer)
    what = "study" if checked.search is None else "search"
    if found.started_by in ("torchrun", "slurm"):
        raise ConfigError(
            f"A {what} starts the ranks of its runs, and {found.started_by} has started {found.world_size}. "
            f"Start it with: python train.py {'experiment' if what == 'study' else 'search'}=…"
        )
    if checked.study is not None and checked.search is not None:
        raise ConfigError(
            "This experiment is a study of many runs already, and cannot be searched. Leave out search=…."
        )
    kept = [change for change in changes if not overrides.is_of("search", change)]

    def compose(of_run: Sequence[str]) -> Settings:
        return composed(config, [*kept, *of_run, "study=null"])

    conduct = study if what == "study" else search
    conduct(train, checked, compose, [sys.argv[0], *changes])


def _start(train: Train, checked: Settings, place: RunFolder | None = None) -> None:
    """Check all that can be checked without ranks, then run here or start them.

    Args:
        train: trains on this rank.
        checked: the settings.
        place: the folder of a sweep's job, that goes on from a checkpoint there; `None`: a new one, or that of a run
            that SLURM or torchrun has started again.
    """
    found = ranks.find(checked.trainer)
    with Preflight(found, checked.trainer.timeout_s) as preflight:
        complete, run = _open(checked, found, place)
        preflight.check(complete, run)
    of_many = place is not None and "SLURM_ARRAY_TASK_ID" not in os.environ  # an array's task has one job, and is fresh
    if found.started_by == "distnorm" or (of_many and found.started_by == "nobody"):
        from distnorm.launch import local  # noqa: PLC0415 — the launcher loads what a rank does not need

        local.start_ranks(sys.argv[0], run, found.world_size)
    else:
        if found.rank:
            console.leave_to(run.log_of(found.rank))
        _train_here(train, complete, found, run)


def _open(checked: Settings, found: ranks.Ranks, place: RunFolder | None) -> tuple[Settings, RunFolder]:
    """Check what this rank can by itself, and open the run's folder; the settings, resolved."""
    from distnorm.launch import trainer  # noqa: PLC0415 — Lightning: seconds that a misspelt key need not wait for

    run = place or run_dir.locate(checked, found)
    again = place is not None or run_dir.has_restarted(run)
    own = _own_settings(run) if again and place is None else checked
    if again and any((run.checkpoints / file).is_file() for file in ("last.ckpt", "previous.ckpt")):
        own = own.model_copy(update={"ckpt_path": str(run.path)})
    if own.ckpt_path is None:
        complete = own.with_batches(found.world_size)
        complete.decide(found.world_size, found.per_node)
    else:
        complete = resumption.prepare(own, found)
    trainer.check_passthrough(complete.trainer.lightning)
    data = targets.build(complete.data)
    if hasattr(data, "describe"):  # ours; a data module of the user's own may have no such words
        data.describe(found.world_size)
    settings.check_fit(complete, data)
    if complete.ckpt_path is not None:
        resumption.check_epoch(complete, data, found.world_size)
    run_dir.open_run(complete, found, run, again=again)
    return complete, run


def _train_here(train: Train, checked: Settings, found: ranks.Ranks, run: RunFolder) -> None:
    """Train in this process, alone or as a rank of torchrun or srun.

    Told to stop, the first rank says so, asks for the requeue, and has the exit code. Every process then ends at once:
    a destructor of its process group might abort it, and change its exit code.
    """
    noted = failures.noted(run, found.rank) if found.world_size > 1 else contextlib.nullcontext()
    with noted, signals.listening():
        try:
            train(checked, found, run)
        except RunInterruptedError as error:
            _close_wandb()
            if not found.is_first:
                _leave(0)  # srun --kill-on-bad-exit and torchrun would kill the first rank, that is still at it
            ending = _requeued(error)
            restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))  # torchrun would start it again at once
            _leave(0 if restarts else ending.exit_code)


def _requeued(error: RunInterruptedError) -> RunInterruptedError:
    """Say what ended the run, then ask for the requeue: SLURM may end this process before it has answered."""
    print(error, file=sys.stderr, flush=True)
    ending = requeue.requeue(error)
    print(str(ending).removeprefix(str(error)).lstrip(), end="\n" if ending is not error else "", file=sys.stderr)
    return ending


def _close_wandb() -> None:
    """Let wandb write what it holds, where it was loaded."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return

    def finish() -> None:
        with contextlib.suppress(Exception):  # its process may have been told too, and have gone
            wandb.finish()

    closing = threading.Thread(target=finish, daemon=True)
    closing.start()
    closing.join(_WANDB_S)  # an upload may take longer than the time until this process is killed


def _leave(exit_code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _own_settings(run: RunFolder) -> Settings:
    """Read what a run was started with, whatever conf/ says by now; on other ranks the global batch stays."""
    own = run.read_settings()
    return own.model_copy(update={"data": {**own.data, "device_batch": None}})


def _be_rank(train: Train, run: RunFolder) -> None:
    from distnorm.launch import local  # noqa: PLC0415

    checked = run.read_settings()
    found = ranks.find(checked.trainer.model_copy(update={"ranks_from": "torchrun"}))  # it is torchrun's engine
    local.become_rank(run, found.rank)
    with failures.noted(run, found.rank, aloud=not found.is_first), signals.listening():
        try:
            with Preflight(found, checked.trainer.timeout_s) as preflight:
                preflight.check(checked, run)
            train(checked, found, run)
        except RunInterruptedError as error:
            _close_wandb()
            local.note_ending(run, found.rank, error)
            _leave(0)  # torch's launcher takes other codes for failures, and ends the ranks that still close files
