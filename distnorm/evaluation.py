"""The statistics that an evaluation of a Lightning training normalizes with: gathered, pooled or measured, and kept."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from distnorm import averaging, collectives
from distnorm.calibration import calibrate
from distnorm.convert import normalization_layers
from distnorm.norms.apart import shares_one_set
from distnorm.population import Statistics, gather_running_stats, own_running_stats, pooled
from distnorm.replay import again, has_training_loader, training_forward, training_inputs, training_loader
from distnorm.spec import NormSpec
from distnorm.swapping import SwappedStatistics


class ComputedStatistics:
    """Compute them once per training step, for the weights that are evaluated, and keep them until the next.

    Args:
        spec: the decision.
        batches: what precise statistics are measured over; `None`: the training loader's, from its beginning.
        num_samples: samples that they are measured over.
        swapped: what evaluation has put in place of the ranks' own.

    Attributes:
        has_moved: whether the weights have moved since the statistics that the model came with.
        is_frozen: whether the statistics have become constants, which all ranks share.
        loader: the training loader, which the trainer forgets when training ends.
    """

    def __init__(
        self, spec: NormSpec, batches: Iterable[Any] | None, num_samples: int, swapped: SwappedStatistics
    ) -> None:
        self._spec, self._batches, self._num_samples, self._swapped = spec, batches, num_samples, swapped
        self._gathered: dict[str, list[Statistics]] = {}  # of the ranks: own statistics, and those of the average
        self._evaluated: Statistics | None = None
        self._weights = torch.zeros(0)  # a sample of those that these statistics are of
        self.has_moved = self.is_frozen = False
        self.loader: Any = None

    def forget(self) -> None:
        """Compute again when asked next."""
        self._gathered, self._evaluated = {}, None

    def keep(self, trainer: pl.Trainer, model: nn.Module) -> None:
        """Use the statistics that a model came with until a step is made."""
        self._evaluated = own_running_stats(model)
        self._weights = averaging.sample_weights(trainer, model)

    @property
    def is_evaluation(self) -> bool:
        """Whether the last computation gave the statistics that were decided, not pooled ones for a quick save."""
        return self._evaluated is not None

    def is_of(self, trainer: pl.Trainer, model: nn.Module) -> bool:
        """Tell whether the statistics are of the weights that a model has."""
        return torch.equal(averaging.sample_weights(trainer, model), self._weights)

    def is_precise(self, pl_module: pl.LightningModule) -> bool:
        """Tell whether there is something to measure, in this model."""
        return self._spec.evaluation == "precise" and any(True for _ in normalization_layers(pl_module))

    def can_measure(self, trainer: pl.Trainer) -> bool:
        """Tell whether there are batches to measure precise statistics over."""
        return self._batches is not None or self.loader is not None or has_training_loader(trainer)

    def compute(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        average: AveragedModel | None = None,
        *,
        quick: bool = False,
    ) -> Statistics:
        """Compute what evaluation normalizes with, once a training step; pooled, where precise would not be quick.

        The same on every rank. Where there is an `average`, they are of the averaged weights, and computed again where
        that was updated. Constants are those that training normalizes with.
        """
        shared, precise = self._is_shared(pl_module), self.is_precise(pl_module) and not self.is_frozen
        weights = averaging.sample_weights(trainer, pl_module if average is None else average.module)
        others = self._evaluated is not None and not torch.equal(weights, self._weights)
        stale, moved = self._evaluated is None or others, self.has_moved or others
        if precise or not shared:  # a rank whose batches have ended made no step, and must come along
            every = collectives.agree((stale, moved), "the agreement on new evaluation statistics")
            stale, moved = (any(told) for told in zip(*every, strict=True))
        if stale or self._evaluated is None:
            self.forget()
            self._weights = weights
            ranks = self.gather(pl_module, None if self.is_frozen else average)
            if quick and precise and moved:
                return pooled(ranks)
            self._evaluated = dict(ranks[0]) if shared or self._spec.evaluation == "running" else pooled(ranks)
            if precise and moved:
                with averaging.having_average(pl_module, average):
                    self._evaluated |= self._calibrate(trainer, pl_module)
        return self._evaluated

    def gather(self, pl_module: pl.LightningModule, average: AveragedModel | None = None) -> list[Statistics]:
        """Give the running statistics of all ranks: those of training, or those that the average holds."""
        key, model = ("own", pl_module) if average is None else ("average", average.module)
        if key not in self._gathered:
            own = {name: value.to(pl_module.device) for name, value in self._swapped.own_of(model).items()}
            shared = self._is_shared(pl_module)
            self._gathered[key] = [own] * collectives.world_size() if shared else gather_running_stats(pl_module, own)
        return self._gathered[key]

    def _is_shared(self, pl_module: pl.LightningModule) -> bool:
        return self.is_frozen or all(shares_one_set(layer) for _, layer in normalization_layers(pl_module))

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Statistics:
        batches = self._batches
        if batches is None:  # where nothing was left to train, there was no loader
            batches = again(training_loader(trainer) if self.loader is None else self.loader)
        inputs, forward = training_inputs(trainer, pl_module, batches), training_forward(trainer, pl_module)
        return calibrate(pl_module, inputs, self._num_samples, forward=forward)
