"""What evaluation statistics need of somebody's own Trainer and module, checked before the first step."""

import copy
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from distnorm import collectives
from distnorm.convert import normalization_layers
from distnorm.errors import ConfigError
from distnorm.norms.over_ranks import AbstractNormOverRanks
from distnorm.uneven import EvenLoader


def shares_one_set(layer: nn.Module) -> bool:
    """Tell whether a batch norm's running statistics are alike on all ranks by construction: all pool together."""
    world = collectives.world_size()
    if isinstance(layer, AbstractNormOverRanks):
        if layer.group_ranks is not None:
            return len(layer.group_ranks) == world
        return layer.sync_ranks in (None, world)
    return world == 1 or (isinstance(layer, nn.SyncBatchNorm) and layer.process_group is None)


def check_buffers_stay(trainer: pl.Trainer, model: nn.Module) -> None:
    """Refuse a DDP that overwrites every rank's running statistics with rank 0's before each forward.

    Collective: none; alike on all ranks.

    Raises:
        ConfigError: it does, and a layer that trains keeps statistics of its own rank.
    """
    wrapped = trainer.strategy.model
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return
    if not getattr(wrapped, "forward_sync_buffers", None) and not wrapped.broadcast_buffers:
        return
    for name, layer in normalization_layers(model):
        if layer.training and not shares_one_set(layer):
            raise ConfigError(
                f"DDP sends rank 0's buffers to all ranks before each forward: layer {name!r} could not keep its own "
                "rank's statistics to be pooled.\nUse Trainer(strategy=DDPStrategy(forward_sync_buffers=False)), "
                "broadcast_buffers=False before torch 2.13; or norm.evaluation=running.",
            )


def check_whole_checkpoints(trainer: pl.Trainer) -> None:
    """Refuse checkpoints of weights only: Lightning asks no callback about them.

    Raises:
        ConfigError: the trainer has a `ModelCheckpoint` that writes them.
    """
    if any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in trainer.checkpoint_callbacks):
        raise ConfigError(
            "ModelCheckpoint(save_weights_only=True) would save rank 0's own statistics and no decision: Lightning "
            "asks no callback then.\nUse save_weights_only=False; distnorm.load() reads the model from such a file.",
        )


def model_of(pl_module: pl.LightningModule) -> nn.Module:
    """Find what maps an input to an output: the module itself, or its `model`.

    Raises:
        ConfigError: it has neither.
    """
    if type(pl_module).forward is not pl.LightningModule.forward:
        return pl_module
    model = getattr(pl_module, "model", None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"Precise statistics need a model to run, and {type(pl_module).__name__} has neither a forward nor a model."
            "\nGive it forward(self, inputs), or use norm.evaluation=pooled.",
        )
    return model


def again(loader: Any) -> Iterable[Any]:
    """Give the batches of a training loader from the beginning; whoever goes through it now notices nothing.

    A copy has samplers, generator and workers of its own; the data set is the same.

    Raises:
        ConfigError: it is no DataLoader, and cannot be copied.
    """
    loader = loader.loader if isinstance(loader, EvenLoader) else loader
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"Precise statistics cannot take batches from a training loader of type {type(loader).__name__} without "
            "disturbing it.\nGive EvaluationStatistics(spec, batches=…) a loader of its own.",
        )
    names = ("sampler", "batch_sampler", "generator")
    theirs = {name: getattr(loader, name) for name in names}
    ours = copy.deepcopy(theirs, {id(loader.dataset): loader.dataset})
    copied = copy.copy(loader)
    vars(copied).update(ours, persistent_workers=False, _iterator=None)  # a DataLoader refuses to be set otherwise
    return copied
