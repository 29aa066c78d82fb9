"""The drift monitor: a Lightning callback that watches a training, and evaluates with the statistics in doubt."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from distnorm.drift.catalogue import BY_KEY, MEASURES
from distnorm.drift.choice import check_globs
from distnorm.drift.events import Event, Measurement
from distnorm.drift.questions import Questions
from distnorm.drift.shift import EvaluationShift
from distnorm.drift.watch import DriftWatch
from distnorm.errors import ConfigError
from distnorm.lightning_names import EitherName

_RECENT = 10
_OF_LAYERS = ("jeffreys", "between_ranks", "lag", "effective_samples")


@dataclasses.dataclass(frozen=True)
class WorstDrift:
    """The layer furthest off in the last measurements: median excess Jeffreys divergence, in nats."""

    value: float
    layer: str


class DriftMonitor(EitherName, Callback):
    """Watch the statistics of every norm while a Trainer trains; see `DriftWatch` and docs/drift.md.

    Every logger that has `take(event)` gets whole events: measurements of all layers, alarms, snapshots. All loggers
    get numbers: `drift/worst/<measure>`, the worst layer's; some `drift/<layer>/<measure>` of the layers that have
    lately been the worst; and `drift/model/<measure>`. `full` also measures what evaluation makes of it: the shift of
    the evaluation data's first batches against the statistics, and every `gap_interval` steps the train/eval gap of the
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
        probe_interval: steps between probes of the loss along its gradient, and of internal covariate shift: some 10
            forwards and backwards each and 2 a layer; never, if `None`. They need `probe_loss` too.
        precise_samples: samples that precise statistics take, over all ranks, with which running ones are compared when
            training ends.

    Raises:
        ConfigError: `gap_interval` or `probe_interval` is below 1; in `on_fit_start` what `DriftWatch` refuses.

    Collective: that of `DriftWatch`. `full`: 1 gather an evaluation; every `gap_interval` those of `train_eval_gap`;
        at the end those of `against_precise`.
    """

    def __init__(
        self,
        kind: Literal["none", "light", "full"] = "light",
        interval: int = 20,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        on_alarm: Literal["warn", "stop"] = "warn",
        evaluation: str = "running",
        worst_layers: int = 5,
        gap_interval: int = 100,
        probe_interval: int | None = None,
        precise_samples: int = 1024,
    ) -> None:
        for name, value in {"gap_interval": gap_interval, "probe_interval": probe_interval or 1}.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"drift.{name}={value!r} must be a whole number of at least 1. Use e.g. 100.")
        self._options: dict[str, Any] = {"kind": kind, "interval": interval, "include": include, "exclude": exclude}
        self._options |= {"on_alarm": on_alarm, "evaluation": evaluation}
        self._kind, self._evaluation = kind, evaluation
        self._worst_layers, self._gap_interval, self._precise_samples = worst_layers, gap_interval, precise_samples
        self._watch: DriftWatch | None = None
        self._questions: Questions | None = None
        self._trainer: pl.Trainer | None = None
        self._steps_before = 0
        self._probe_interval = probe_interval
        self._severity: dict[str, float] = {}
        self._recent: dict[str, collections.deque[float]] = {}
        self._shift: EvaluationShift | None = None
        self._loader: Any = None  # the trainer forgets it when training ends
        self._stored: dict[str, Any] | None = None

    def check(self, model: nn.Module) -> None:
        """Hold `include` and `exclude` against a model, before anything is started; alike on every rank.

        Raises:
            ConfigError: a glob names none of its norms.
        """
        if self._kind != "none":
            check_globs(model, self._options["include"], self._options["exclude"])

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
        self._questions = Questions(self._watch, self._evaluation)
        stored, self._stored = self._stored, None
        if stored is not None:
            self._watch.load(stored["watch"])
            self._severity = dict(stored["severity"])
            self._recent = {name: collections.deque(rows, maxlen=_RECENT) for name, rows in stored["recent"].items()}

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps; Lightning writes rank 0's."""
        if self._watch is None:
            return {}
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"watch": self._watch.state(), "severity": dict(self._severity), "recent": recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the next training goes on from."""
        self._stored = state_dict

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
        if self._questions is not None:
            self._ask(self._questions, step, pl_module, batch)
        if self._watch.is_stopped:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish what is under way, compare with precise statistics, and let go of the layers."""
        if self._watch is not None:
            self._watch.close()
            if self._questions is not None and self._kind == "full" and self._watch.names:
                self._questions.precise(trainer, pl_module, self._loader, self._precise_samples)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keep the last snapshot, and let go of the layers."""
        if self._watch is not None:
            self._watch.abandon()
        if self._shift is not None:
            self._shift.remove()
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

    def _ask(self, questions: Questions, step: int, pl_module: pl.LightningModule, batch: Any) -> None:
        values: dict[str, float] = {}
        if self._kind == "full" and step % self._gap_interval == 0:
            values |= questions.gap(step, pl_module, batch)
        if self._probe_interval is not None and step % self._probe_interval == 0:
            values |= questions.probes(step, pl_module, batch)
        self._log(step, {f"drift/model/{key}": value for key, value in values.items()})

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
            if measure.key in _OF_LAYERS:
                scalars |= {f"drift/{names[i]}/{measure.key}": row[i] for i in shown if not math.isnan(row[i])}
        return scalars


def _severity(key: str, value: float) -> float:
    """How far a measure is towards the end of its colour scale."""
    measure = BY_KEY.get(key)
    if measure is None or math.isnan(value):
        return 0.0
    return (value - measure.healthy) / (measure.span - measure.healthy)
