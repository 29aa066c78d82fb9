"""What evaluation statistics need of somebody's own Trainer and module, checked before the first step."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from distnorm.convert import normalization_layers
from distnorm.errors import ConfigError
from distnorm.lightning_names import is_either
from distnorm.norms.apart import keep_apart, sends_buffers, shares_one_set


def check_buffers_stay(trainer: pl.Trainer, model: nn.Module) -> None:
    """Keep every rank's running statistics its own under a DDP that sends rank 0's before each forward.

    Collective: none; alike on all ranks.

    Raises:
        ConfigError: a layer that trains keeps statistics of its own rank, and this torch's DDP cannot leave them alone.
    """
    wrapped = trainer.strategy.model
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel) or not sends_buffers(wrapped):
        return
    own = [name for name, layer in normalization_layers(model) if layer.training and not shares_one_set(layer)]
    if own and not keep_apart(wrapped, every=True):
        raise ConfigError(
            f"DDP sends rank 0's buffers to all ranks before each forward: layer {own[0]!r} could not keep its own "
            "rank's statistics to be pooled.\nUse Trainer(strategy=DDPStrategy(forward_sync_buffers=False)), "
            "broadcast_buffers=False before torch 2.13; or norm.evaluation=running.",
        )


def check_whole_checkpoints(trainer: pl.Trainer) -> None:
    """Refuse checkpoints of weights only: Lightning asks no callback about them.

    Raises:
        ConfigError: the trainer has a `ModelCheckpoint` that writes them.
    """
    if any(is_either(c, ModelCheckpoint) and c.save_weights_only for c in trainer.checkpoint_callbacks):
        raise ConfigError(
            "ModelCheckpoint(save_weights_only=True) would save rank 0's own statistics and no decision: Lightning "
            "asks no callback then.\nUse save_weights_only=False; distnorm.load() reads the model from such a file.",
        )
