"""The drift monitor: a Lightning callback that watches a training, and evaluates with the statistics in doubt."""

import collections
import contextlib
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from distnorm import collectives
from distnorm.drift.catalogue import BY_KEY, MEASURES
from distnorm.drift.events import Event, Measurement
from distnorm.drift.gap import attribute, train_eval_gap
from distnorm.drift.precise import against_precise
from distnorm.drift.shift import EvaluationShift
from distnorm.drift.summary import summarize
from distnorm.drift.watch import DriftWatch
from distnorm.errors import ConfigError
from distnorm.population import evaluation_statistics, pool_running_stats
from distnorm.replay import again, model_of, training_forward, training_inputs

_log = logging.getLogger(__name__)
_RECENT = 10
_NONE = torch.full((1,), math.nan)
_SILENT = {
    "running": (),
    "pooled": ("rank_spread",),
    "precise": ("rank_spread", "lag", "estimator_samples"),
}


@dataclasses.dataclass(frozen=True)
class WorstDrift:
    """The layer furthest off in the last measurements: median excess Jeffreys divergence, in nats."""

    value: float
    layer: str


class DriftMonitor(Callback):
    """Watch the statistics of every norm while a Trainer trains; see `DriftWatch` and docs/drift.md.

    Every logger that has `take(event)` gets whole events: measurements of all layers, alarms, snapshots. All loggers
    get numbers: `drift/worst/<measure>`, the worst layer's; `drift/<layer>/<measure>` of the layers that have lately
    been the worst; and `drift/model/<measure>`. `full` also measures what evaluation makes of it: the shift of the
    evaluation data's first batches against the statistics, and every `gap_interval` steps the train/eval gap of the
    step's batch, with the layers that it comes from when it is alarming.

    Args:
        kind: `light`, `full`, or `none` to do nothing.
        interval: steps between measurements.
        include: globs of names of layers to watch; all, if empty.
        exclude: globs of names not to watch.
        on_alarm: `warn`, or `stop` the training an interval after an alarm; what follows training runs.
        evaluation: what evaluation uses: `running`, `pooled` or `precise` statistics. Alarms about running averages
            that evaluation does not use are not raised.
        worst_layers: of how many layers numbers go to the loggers.
        gap_interval: steps between measurements of the train/eval gap. They need a `probe_loss(model, batch)` of the
            task, that gives mean loss and logits; a task without is not measured, which is said once.
        precise_samples: samples that precise statistics take, over all ranks, with which running ones are compared when
            training ends.

    Collective: that of `DriftWatch`. `full`: 1 gather an evaluation; every `gap_interval` those of `train_eval_gap`;
        at the end those of `against_precise`.
    """

    def __init__(
        self,
        kind: Literal["none", "light", "full"] = "light",
        interval: int = 10,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        on_alarm: Literal["warn", "stop"] = "warn",
        evaluation: str = "running",
        worst_layers: int = 5,
        gap_interval: int = 100,
        precise_samples: int = 1024,
    ) -> None:
        self._options: dict[str, Any] = {"kind": kind, "interval": interval, "include": include, "exclude": exclude}
        self._options |= {"on_alarm": on_alarm, "silent": _SILENT.get(evaluation, ())}
        self._kind, self._evaluation = kind, evaluation
        self._worst_layers, self._gap_interval, self._precise_samples = worst_layers, gap_interval, precise_samples
        self._watch: DriftWatch | None = None
        self._trainer: pl.Trainer | None = None
        self._steps_before = 0
        self._severity: dict[str, float] = {}
        self._recent: dict[str, collections.deque[float]] = {}
        self._shift: EvaluationShift | None = None
        self._loader: Any = None  # the trainer forgets it when training ends
        self._cannot_probe = False

    @property
    def worst(self) -> WorstDrift | None:
        """The worst layer by the mean of its last measurements; `None` where nothing was measured, and off rank 0."""
        means = {name: sum(values) / len(values) for name, values in self._recent.items() if values}
        if not means:
            return None
        layer = max(means, key=means.__getitem__)
        return WorstDrift(means[layer], layer)

    @property
    def alarms(self) -> tuple[str, ...]:
        """Messages of the alarms that stand; on rank 0."""
        return () if self._watch is None else tuple(alarm.message for alarm in self._watch.alarms.raised)

    @property
    def has_stopped(self) -> bool:
        """Whether an alarm ended the training."""
        return self._watch is not None and self._watch.is_stopped

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the layers."""
        if self._kind == "none":
            return
        self._trainer = trainer
        sinks = [logger for logger in trainer.loggers if hasattr(logger, "take")] if trainer.is_global_zero else []
        self._watch = DriftWatch(pl_module, [*sinks, self], **self._options)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this step is measured; alike on every rank."""
        self._steps_before, self._loader = trainer.global_step, trainer.train_dataloader
        if self._watch is not None:
            self._watch.begin(trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, when the optimizer has stepped."""
        step = trainer.global_step
        if self._watch is None or step == self._steps_before:
            return
        self._watch.end(step)
        if self._kind == "full" and step % self._gap_interval == 0:
            self._measure_gap(self._watch, step, pl_module, batch)
        if self._watch.is_stopped:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish what is under way, compare with precise statistics, and let go of the layers."""
        if self._watch is not None:
            self._watch.close()
            if self._kind == "full" and self._watch.names:
                self._measure_precise(self._watch, trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keep the last snapshot, and let go of the layers."""
        if self._watch is not None:
            self._watch.abandon()
        self._shift = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the evaluation data, once the statistics of evaluation are in place."""
        if self._kind == "full" and self._watch is not None and not trainer.sanity_checking:
            self._shift = EvaluationShift(pl_module, self._watch.names)

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """Make ready for a batch."""
        if self._shift is not None:
            self._shift.begin_batch()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Take a batch in."""
        if self._shift is not None:
            self._shift.end_batch()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the evaluation data with the statistics."""
        shift, self._shift = self._shift, None
        values = None if shift is None else shift.finish()
        if values is not None and self._watch is not None:
            self._watch.take_values(trainer.global_step, values)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the test data likewise."""
        self._trainer = trainer
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_start(self, *_: Any, **__: Any) -> None:
        """Make ready for a batch."""
        self.on_validation_batch_start()

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Take a batch in."""
        self.on_validation_batch_end()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare."""
        self.on_validation_end(trainer, pl_module)

    def take(self, event: Event) -> None:
        """Log the numbers of a measurement."""
        if not isinstance(event, Measurement) or self._watch is None:
            return
        self._keep(event, self._watch.names)
        self._log(event.step, self._scalars(event, self._watch.names))

    def _log(self, step: int, scalars: Mapping[str, float]) -> None:
        if scalars and self._trainer is not None and self._trainer.is_global_zero:
            for logger in self._trainer.loggers:
                logger.log_metrics(dict(scalars), step=step)

    def _keep(self, event: Measurement, names: Sequence[str]) -> None:
        """Remember who was bad lately."""
        for name, value in zip(names, event.values.get("jeffreys", ()), strict=False):
            if not math.isnan(value):
                self._recent.setdefault(name, collections.deque(maxlen=_RECENT)).append(value)
        for index, name in enumerate(names):
            now = max((_severity(key, row[index]) for key, row in event.values.items()), default=0.0)
            self._severity[name] = 0.9 * self._severity.get(name, now) + 0.1 * now

    def _scalars(self, event: Measurement, names: Sequence[str]) -> dict[str, float]:
        scalars: dict[str, float] = {}
        ranked = sorted(names, key=lambda name: self._severity.get(name, 0.0), reverse=True)
        shown = [index for index, name in enumerate(names) if name in set(ranked[: self._worst_layers])]
        for measure in MEASURES:
            row = event.values.get(measure.key)
            known = [value for value in row or () if not math.isnan(value)]
            if row is None or not known:
                continue
            scalars[f"drift/worst/{measure.key}"] = (max if measure.span > measure.healthy else min)(known)
            if measure.tier == "light":
                scalars |= {f"drift/{names[i]}/{measure.key}": row[i] for i in shown if not math.isnan(row[i])}
        return scalars

    def _measure_gap(self, watch: DriftWatch, step: int, pl_module: pl.LightningModule, batch: Any) -> None:
        """Measure the train/eval gap; where it is alarming, ask which layers it comes from. Alike on all ranks."""
        loss = getattr(pl_module, "probe_loss", None)
        if loss is None:
            if not self._cannot_probe and pl_module.global_rank == 0:
                _log.info(
                    "%s has no probe_loss(model, batch): no train/eval gap is measured.", type(pl_module).__name__
                )
            self._cannot_probe = True
            return
        model = model_of(pl_module)
        statistics = None if self._evaluation == "running" else pool_running_stats(model)
        gap = train_eval_gap(model, batch, loss, statistics=statistics)
        values = {"gap": gap.gap, "gap_relative": gap.relative, "flip_rate": gap.flip_rate}
        changes = watch.alarms.check_model(step, values)
        if any(change.state == "raised" for change in changes):
            shares = attribute(model, batch, loss, statistics=statistics)
            watch.take_values(step, {"gap_share": [shares.get(name, math.nan) for name in watch.names]})
            worst = max(shares, key=shares.__getitem__, default="")
            changes = [
                dataclasses.replace(c, layer=worst, message=f"{c.message} Most of it comes from {worst}.")
                for c in changes
            ]
        if collectives.rank() == 0:
            self._log(step, {f"drift/model/{key}": value for key, value in values.items() if not math.isnan(value)})
            for change in changes:
                watch.tell(change)

    def _measure_precise(self, watch: DriftWatch, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare what evaluation averages over training with statistics of the weights as they are now."""
        try:
            model, forward = model_of(pl_module), training_forward(trainer, pl_module)
            inputs = training_inputs(trainer, pl_module, again(self._loader))
        except ConfigError as error:  # alike on all ranks
            _log.info("Running statistics are not compared with precise ones: %s", error)
            return
        pool = contextlib.nullcontext() if self._evaluation == "running" else evaluation_statistics(model)
        with pool:
            found = against_precise(model, inputs, self._precise_samples, forward, normalization_batch=watch.samples)
        names = {name.removeprefix("model."): precise for name, precise in found.items()}
        values: dict[str, list[float]] = {}
        for key, attribute_name in {"precise_jeffreys": "jeffreys", "precise_ratio": "ratio"}.items():
            rows = [getattr(names[name], attribute_name).flatten() if name in names else _NONE for name in watch.names]
            summed = summarize(torch.cat([row.double().cpu() for row in rows]), [len(row) for row in rows])
            parts = {"": summed.median, ".p95": summed.p95, ".max": summed.max}
            values |= {f"{key}{part}": row.tolist() for part, row in parts.items()}
        watch.take_values(trainer.global_step, values)


def _severity(key: str, value: float) -> float:
    """How far a measure is towards the end of its colour scale."""
    measure = BY_KEY.get(key)
    if measure is None or math.isnan(value):
        return 0.0
    return (value - measure.healthy) / (measure.span - measure.healthy)
