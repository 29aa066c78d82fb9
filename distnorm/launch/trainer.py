"""The Lightning trainer that a run's settings ask for, and the random streams of its ranks."""

import datetime as dt
import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from distnorm.averaging import WeightAverage
from distnorm.errors import ConfigError, did_you_mean
from distnorm.launch import console
from distnorm.launch.checkpoint_files import AtomicCheckpointIO
from distnorm.launch.checkpoints import LastCheckpoint, checkpoint_callbacks
from distnorm.launch.environment import FoundRanks
from distnorm.launch.preemption import Preemption
from distnorm.launch.ranks import Ranks
from distnorm.launch.run_dir import RunFolder
from distnorm.search import rungs
from distnorm.settings import TrainerSettings


def make_trainer(
    settings: TrainerSettings,
    ranks: Ranks,
    run: RunFolder,
    loggers: list[Logger],
    callbacks: list[Callback],
    resumed_from: str | None,
) -> pl.Trainer:
    """Make the trainer: DDP over the ranks that exist, no broadcast of buffers, two checkpoints, an end when told.

    Args:
        settings: the group `trainer`.
        ranks: who takes part.
        run: where checkpoints go.
        loggers: where numbers go.
        callbacks: in addition to the average of the weights, if any, and to the checkpoints, which come after it.
        resumed_from: the checkpoint that training goes on from.

    """
    console.quiet_libraries()  # Lightning sets its own level when it is imported
    set_threads(settings, ranks)
    checkpoints = checkpoint_callbacks(run, resumed_from)
    last = next(callback for callback in checkpoints if isinstance(callback, LastCheckpoint))
    told = Preemption(
        run,
        last.save_quickly,
        every_s=settings.checkpoint_every_s,
        time_limit_s=settings.time_limit_s,
        requeue=settings.requeue,
    )
    averages = [] if settings.ema is None else [WeightAverage(settings.ema)]
    ours: dict[str, Any] = {
        "accelerator": ranks.accelerator,
        "devices": ranks.per_node,
        "num_nodes": ranks.num_nodes,
        "precision": settings.precision,
        "max_epochs": settings.max_epochs,
        "max_steps": settings.max_steps,
        "check_val_every_n_epoch": settings.check_val_every_n_epoch,
        "log_every_n_steps": settings.log_every_n_steps,
        "accumulate_grad_batches": settings.accumulate_grad_batches,
        "gradient_clip_val": settings.gradient_clip_val,
        "default_root_dir": run.path,
        "logger": loggers,
        "callbacks": [*callbacks, *averages, *rungs.callbacks(run), *checkpoints, told],
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "enable_progress_bar": any("ProgressBar" in type(c).__name__ for c in callbacks),
        "num_sanity_val_steps": 1,
        "plugins": [_environment(ranks), AtomicCheckpointIO()],
    }
    if ranks.world_size > 1:
        ours["strategy"] = make_ddp(settings.timeout_s)
    return pl.Trainer(**ours, **settings.lightning)


def check_passthrough(extra: Mapping[str, Any]) -> None:
    """Hold `trainer.lightning` against what Lightning's trainer takes and we do not set.

    Raises:
        ConfigError: a key that it does not take, or that has a setting here.
    """
    known = inspect.signature(pl.Trainer.__init__).parameters
    for key, value in extra.items():
        if key in TrainerSettings.model_fields:
            raise ConfigError(f"trainer.lightning.{key}={value!r} has a setting of its own. Use trainer.{key}={value}.")
        if key in _OURS:
            raise ConfigError(f"trainer.lightning.{key}={value!r} is what distnorm sets itself. Leave it out.")
        if key not in known:
            near = did_you_mean(key, known)
            raise ConfigError(f"trainer.lightning.{key}={value!r} is no argument of lightning.Trainer.{near}")


_OURS = (
    "default_root_dir",
    "logger",
    "callbacks",
    "use_distributed_sampler",
    "enable_model_summary",
    "enable_progress_bar",
    "num_sanity_val_steps",
    "plugins",
    "strategy",
    "sync_batchnorm",
    "enable_checkpointing",
)


def set_threads(settings: TrainerSettings, ranks: Ranks) -> None:
    """Set the CPU threads of this rank: another number gives other bits, and ranks that share cores slow down."""
    if settings.threads_per_rank is not None:
        torch.set_num_threads(settings.threads_per_rank)
    elif ranks.accelerator == "cpu":
        torch.set_num_threads(1)


def make_ddp(timeout_s: float) -> DDPStrategy:
    """Make DDP without its broadcast of buffers, that would make rank 0's running statistics all ranks'.

    torch 2.13 has a new name for the switch, and warns of the old one.
    """
    known = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {switch: False}
    return DDPStrategy(timeout=dt.timedelta(seconds=timeout_s), gradient_as_bucket_view=True, **options)


def _environment(ranks: Ranks) -> ClusterEnvironment:
    if ranks.started_by == "slurm":
        return FoundRanks(ranks)
    return TorchElasticEnvironment() if ranks.started_by == "torchrun" else LightningEnvironment()
