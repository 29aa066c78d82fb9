"""Statistics that become constants in the last share of training: from which step on, and which layers are held."""

import math

import lightning.pytorch as pl
from torch import nn

from distnorm import collectives
from distnorm.convert import normalization_layers
from distnorm.errors import ConfigError


class HeldLayers:
    """The batch norms that are kept in eval mode while all else trains."""

    def __init__(self) -> None:
        self._layers: set[nn.Module] = set()

    def hold(self, model: nn.Module) -> None:
        """Put them into eval mode; before every step, for Lightning and users call `train()`."""
        self._layers |= {layer for _, layer in normalization_layers(model) if layer.training}
        for layer in self._layers:
            layer.eval()

    def release(self, model: nn.Module) -> None:
        """Let them follow the model's mode again."""
        while self._layers:
            self._layers.pop().train(model.training)


def first_frozen_step(trainer: pl.Trainer, share: float) -> float:
    """Count the optimizer's steps before the last share of training; alike on all ranks, and infinite for a share of 0.

    Collective: 1 agreement, unless the share is 0.

    Raises:
        ConfigError: training has no end that is known, or several optimizers count their steps together and not the
            epochs that end it.
    """
    if not share:
        return math.inf
    _check_one_count(trainer, share)
    steps = trainer.estimated_stepping_batches
    total: float = min(collectives.agree(steps, "the agreement on the number of steps"))
    if not 0 < total < math.inf:
        raise ConfigError(
            f"norm.frozen_last={share} is a share of all steps, and this training has no end that is known.\n"
            "Give it trainer.max_steps, or norm.frozen_last=0.",
        )
    last = math.floor(share * total + 1e-9)  # 0.29 * 100 is a little less than 29
    return int(total) - last


def _check_one_count(trainer: pl.Trainer, share: float) -> None:
    """Refuse what Lightning counts in two units: `global_step` adds all optimizers' steps, epochs have batches."""
    several = len(trainer.optimizers)
    if several > 1 and trainer.max_epochs != -1:
        raise ConfigError(
            f"norm.frozen_last={share} is a share of all steps, and the steps of {several} optimizers in "
            f"max_epochs={trainer.max_epochs} epochs are not known before.\n"
            "End training by trainer.max_steps alone (it counts the steps of all optimizers), or norm.frozen_last=0.",
        )
