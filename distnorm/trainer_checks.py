"""What evaluation statistics need of somebody's own Trainer and module, checked before the first step."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from distnorm import collectives
from distnorm.convert import normalization_layers
from distnorm.errors import ConfigError
from distnorm.norms.over_ranks import AbstractNormOverRanks


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
