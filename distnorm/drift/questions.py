"""What a Lightning training is asked beside its steps: the train/eval gap, precise statistics, probes of the loss.

Every rank asks, alike; rank 0 tells.
"""

import contextlib
import dataclasses
import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from distnorm import collectives
from distnorm.convert import normalization_layers
from distnorm.drift.gap import attribute, train_eval_gap
from distnorm.drift.losses import TellsLoss
from distnorm.drift.precise import Precise, against_precise
from distnorm.drift.probes import covariate_shift, landscape
from distnorm.drift.summary import summarize
from distnorm.drift.watch import DriftWatch
from distnorm.errors import ConfigError
from distnorm.population import evaluation_statistics, pool_running_stats
from distnorm.replay import again, model_of, training_forward, training_inputs

_log = logging.getLogger(__name__)
_FEWEST_FLIPS = 0.05
_NONE = torch.full((1,), math.nan)


class Questions:
    """Asks on behalf of a watch.

    Args:
        watch: that takes measures of layers, and alarms.
        evaluation: what evaluation uses: `running`, `pooled` or `precise` statistics. The gap of `precise` ones is that
            of pooled ones: measuring them takes a pass over data.
    """

    def __init__(self, watch: DriftWatch, evaluation: str) -> None:
        self._watch, self._evaluation = watch, evaluation
        self._said_no = False

    def gap(self, step: int, task: pl.LightningModule, batch: Any) -> dict[str, float]:
        """Ask what the statistics of evaluation cost on a batch; where that is alarming, which layers cost it.

        Returns:
            Numbers of the whole model; none where the task does not tell its loss.

        Collective: those of `train_eval_gap`, and of `pool_running_stats` unless evaluation is `running`; where an
            alarm is raised those of `attribute`.
        """
        if not self._tells_loss(task):
            return {}
        assert isinstance(task, TellsLoss)
        statistics = None if self._evaluation == "running" else pool_running_stats(task.model)
        gap = train_eval_gap(task.model, batch, task.probe_loss, statistics=statistics)
        values = {"gap": gap.gap, "gap_relative": gap.relative, "flip_rate": gap.flip_rate}
        # A loss near 0 makes any gap a large one: it matters where predictions change too.
        matters = math.isnan(gap.flip_rate) or gap.flip_rate >= _FEWEST_FLIPS
        changes = self._watch.alarms.check_model(step, {"gap_relative": gap.relative if matters else 0.0})
        if any(change.state == "raised" for change in changes):
            shares = attribute(task.model, batch, task.probe_loss, statistics=statistics)
            self._watch.take_values(step, {"gap_share": [shares.get(name, math.nan) for name in self._watch.names]})
            worst = max(shares, key=shares.__getitem__, default="")
            words = f"Most of it comes from {worst}."
            changes = [dataclasses.replace(c, layer=worst, message=f"{c.message} {words}") for c in changes]
        if collectives.rank() == 0:
            for change in changes:
                self._watch.tell(change)
        return {key: value for key, value in values.items() if not math.isnan(value)}

    def probes(self, step: int, task: pl.LightningModule, batch: Any) -> dict[str, float]:
        """Ask how smooth the loss is along its gradient, and how far layers shift under one another.

        Returns:
            Numbers of the whole model; none where the task does not tell its loss.

        Collective: those of `landscape` and `covariate_shift`.
        """
        if not self._tells_loss(task):
            return {}
        assert isinstance(task, TellsLoss)
        lr = float(task.trainer.optimizers[0].param_groups[0]["lr"])
        if not lr > 0:
            return {}
        trained = {name for name, layer in task.model.named_modules() if _is_trained(layer)}
        names = [name for name in self._watch.names if name in trained]
        shifts = covariate_shift(task.model, batch, task.probe_loss, lr, names) if names else {}
        rows = [shifts[name].relative if name in shifts else math.nan for name in self._watch.names]
        self._watch.take_values(step, {"covariate_shift": rows})
        found = landscape(task.model, batch, task.probe_loss, lr)
        low, high = found.loss_range
        return {
            "loss_range": high - low,
            "gradient_predictiveness": found.gradient_predictiveness[1],
            "smoothness": found.smoothness,
        }

    def precise(self, trainer: pl.Trainer, task: pl.LightningModule, loader: Any, num_samples: int) -> None:
        """Ask how far the statistics of evaluation are from those of the weights as they are now.

        Collective: those of `against_precise`, and of `evaluation_statistics` unless evaluation is `running`.
        """
        try:
            model, forward = model_of(task), training_forward(trainer, task)
            if not _norms_of(model):
                return
            inputs = training_inputs(trainer, task, again(loader))
            shared = {name: self._watch.samples.get(name.removeprefix("model."), 32) for name in _norms_of(model)}
            with contextlib.nullcontext() if self._evaluation == "running" else evaluation_statistics(model):
                found = against_precise(model, inputs, num_samples, forward, normalization_batch=shared)
        except ConfigError as error:  # alike on all ranks; a training that is over is not lost for a diagnosis
            _log.warning("Running statistics are not compared with precise ones: %s", error)
            return
        self._watch.take_values(trainer.global_step, _values(self._watch.names, found))

    def _tells_loss(self, task: pl.LightningModule) -> bool:
        if isinstance(task, TellsLoss):
            return True
        if not self._said_no and collectives.rank() == 0:
            _log.info("%s has no probe_loss(model, batch): no train/eval gap is measured.", type(task).__name__)
        self._said_no = True
        return False


def _values(names: list[str], found: dict[str, Precise]) -> dict[str, list[float]]:
    """Summarize channels by layer."""
    by_name = {name.removeprefix("model."): precise for name, precise in found.items()}
    values: dict[str, list[float]] = {}
    for key, field in {"precise_jeffreys": "jeffreys", "precise_ratio": "ratio"}.items():
        rows = [getattr(by_name[name], field).flatten() if name in by_name else _NONE for name in names]
        summed = summarize(torch.cat([row.double().cpu() for row in rows]), [len(row) for row in rows])
        parts = {"": summed.median, ".p95": summed.p95, ".max": summed.max}
        values |= {f"{key}{part}": row.tolist() for part, row in parts.items()}
    return values


def _norms_of(model: nn.Module) -> list[str]:
    return [name for name, _ in normalization_layers(model)]


def _is_trained(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())
