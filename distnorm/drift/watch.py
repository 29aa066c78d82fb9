"""Watch the normalization statistics of any training loop: measure, compare, keep, and raise the alarm.

Cost. Layers synchronized over a world of up to 16 ranks hand over the moments that their forward gathered anyway. All
others measure their input once an interval and join one packed gather, that travels during the next step. One copy to
rank 0's host an interval. Between intervals a hook returns at once.
"""

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from distnorm import collectives
from distnorm.drift.alarms import Alarms
from distnorm.drift.capture import Hooks, WatchedNorm, watched_norms
from distnorm.drift.choice import check_globs, selected
from distnorm.drift.events import Alarm, Event, Measurement, TakesEvents, Watched, WatchedLayer
from distnorm.drift.gathering import ArrivedCatch, Caught, Gathering, PendingCatch
from distnorm.drift.measuring import Measurer
from distnorm.drift.snapshots import snapshot
from distnorm.errors import ConfigError, did_you_mean

_log = logging.getLogger(__name__)
_KINDS, _ANSWERS = ("light", "full"), ("warn", "stop")
_UNUSED: dict[str, tuple[str, ...]] = {
    "running": (),
    "pooled": ("rank_spread",),
    "precise": ("rank_spread", "lag", "estimator_samples", "gap_relative"),
}
"""Measures that say nothing of what evaluation uses."""
Tier = Literal["light", "full"]


class DriftWatch:
    """Measures a model's norms once an interval, and tells what it finds.

    Batch norms with running statistics, constants, and norms of single samples (GroupNorm, LayerNorm, …) are watched;
    docs/drift.md says what each measure is. Rank 0 computes, and tells the sinks; the other ranks take part.

    Args:
        model: the same on every rank, unwrapped; or a Lightning module, with its model in `model`.
        sinks: who keeps the events: `drift.record.Record`, or whatever has `take(event)`. Used on rank 0.
        kind: `light`, cheap enough to be always on; or `full`, all measures.
        interval: steps between measurements.
        include: globs of names of layers to watch; all, if empty.
        exclude: globs of names not to watch.
        evaluation: what evaluation uses: `running`, `pooled` or `precise` statistics. Alarms about running averages
            that it does not use are not raised.
        silent: keys of further measures that raise no alarm.
        on_alarm: `stop` makes `is_stopped` true on all ranks, an interval after an alarm.

    Attributes:
        last: the last measurement on rank 0, `None` before it.
        samples: that share statistics, by layer; on rank 0, from the first measurement on.

    Collective: an interval 1 gather of 4S + 2G + 1 float64 numbers, all S channels of the G layers that are not
        synchronized over the world by a gather of their own; none where there are no such layers, unless `on_alarm` is
        `stop`. It starts at the end of a measured step and is waited for at the end of the next. Every rank measures in
        the same steps.

    Raises:
        ConfigError: a glob names no watched layer; or `kind`, `interval`, `evaluation` or `on_alarm` is none of those.

    Example:
        >>> import torch
        >>> events = []
        >>> class Sink:
        ...     take = staticmethod(events.append)
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> with DriftWatch(model, [Sink()], interval=1) as watch:
        ...     for _ in range(3):
        ...         with watch.step():
        ...             _ = model(torch.randn(16, 4))  # forward, backward and the optimizer's step
        >>> [type(event).__name__ for event in events]
        ['Watched', 'Measurement', 'Snapshot', 'Measurement', 'Snapshot', 'Measurement', 'Snapshot']
    """

    def __init__(
        self,
        model: nn.Module,
        sinks: Sequence[TakesEvents] = (),
        *,
        kind: Tier = "light",
        interval: int = 20,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        evaluation: str = "running",
        silent: Collection[str] = (),
        on_alarm: Literal["warn", "stop"] = "warn",
    ) -> None:
        _check(kind, interval, evaluation, on_alarm)
        self.sinks, self.interval, self._kind, self._stops = list(sinks), interval, kind, on_alarm == "stop"
        check_globs(model, include, exclude)
        self._in_order = selected(list(watched_norms(model)), include, exclude)
        self._gathering = Gathering(self._in_order, carries_word=self._stops)
        places = {norm: place for place, norm in enumerate(self._gathering.norms)}
        self._place = [places[norm] for norm in self._in_order]
        world, pooled = collectives.world_size(), evaluation == "pooled"
        self._measurer = Measurer(self._gathering.norms, kind, world, pooled=pooled) if self._in_order else None
        self.alarms = Alarms(self.names, {*silent, *_UNUSED[evaluation]}, world)
        self._hooks = Hooks(self._in_order, lambda _: self.is_measuring)
        self.steps = 0
        self.is_measuring = self.is_stopped = False
        self._pending: tuple[int, PendingCatch | ArrivedCatch] | None = None
        self._told_layers = False
        self._measurements = 0
        self._untold: tuple[int, Caught] | None = None
        self.last: Measurement | None = None
        self.samples: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The watched layers, in the order of all measurements."""
        return [norm.name for norm in self._in_order]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Watch one step: its forward, backward and the optimizer's step go inside."""
        self.begin(self.steps + 1)
        yield
        self.end(self.steps + 1)

    def begin(self, step: int) -> None:
        """Decide whether the step that will be the `step`-th is measured; alike on every rank."""
        self.is_measuring = step % self.interval == 0
        if self.is_measuring:
            for norm in self._in_order:
                norm.forget()

    def end(self, step: int) -> None:
        """Finish what travelled during this step, and send what this step saw.

        Collective: see the class.
        """
        self.steps = step
        self._finish()
        if self.is_measuring and self._in_order:
            self.is_measuring = False
            word = float(self._stops and bool(self.alarms.raised))
            self._pending = step, self._gathering.start(word)

    def close(self) -> None:
        """Finish what is under way, tell the last snapshot, and let go of the model.

        Collective: none is started.
        """
        self._hooks.remove()
        self.is_measuring = False
        self._finish()
        if self._untold is not None:
            self._tell_snapshot(*self._untold)

    def abandon(self) -> None:
        """Let go of the model after a failure; what is under way is not waited for, what is known is told."""
        self._pending = None
        self.close()

    def __enter__(self) -> "DriftWatch":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps after a step: rank 0's windows, streaks and alarms, and what is under way.

        Collective: none is started.
        """
        pending = None
        if self._pending is not None:
            step, catch = self._pending
            pending = {"step": step, "word": catch.word(), "caught": _plain(catch.finish())}
        untold = None if self._untold is None else {"step": self._untold[0], "caught": _plain(self._untold[1])}
        return {
            "names": self.names,
            "ranks": collectives.world_size(),
            "measurements": self._measurements,
            "pending": pending,
            "untold": untold,
            "alarms": self.alarms.state(),
            "measurer": None if self._measurer is None else self._measurer.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from rank 0's `state`; windows only of as many ranks, and nothing of other layers."""
        if state["names"] != self.names:
            return
        self.alarms.load(state["alarms"])
        if state["ranks"] != collectives.world_size() or self._measurer is None:
            return
        self._measurements = state["measurements"]
        self._measurer.load(state["measurer"])
        is_first = collectives.rank() == 0
        if (kept := state["pending"]) is not None:
            caught = Caught(**kept["caught"]) if is_first else None
            self._pending = kept["step"], ArrivedCatch(kept["word"], caught)
        if is_first and (kept := state["untold"]) is not None:
            self._untold = kept["step"], Caught(**kept["caught"])

    def tell(self, event: Event) -> None:
        """Give an event to every sink; an alarm is logged too."""
        if isinstance(event, Alarm):
            _log.log(
                logging.WARNING if event.state == "raised" else logging.INFO, "Step %d: %s", event.step, event.message
            )
        for sink in list(self.sinks):
            try:
                sink.take(event)
            except Exception as error:  # noqa: BLE001 — a full disk is no reason to lose a training
                self.sinks.remove(sink)
                _log.warning("%s takes no more of the drift: %r", type(sink).__name__, error)

    def _tell_layers(self, step: int, caught: Caught) -> None:
        """Tell which layers are watched; once, before the first measurement."""
        if self._told_layers:
            return
        self._told_layers = True
        shared = [_shared(norm, row, caught) for row, norm in enumerate(self._gathering.norms)]
        self.samples = {norm.name: max(1, count) for norm, count in zip(self._gathering.norms, shared, strict=True)}
        layers = tuple(
            WatchedLayer(norm.name, type(norm.layer).__name__, norm.channels, shared[place])
            for norm, place in zip(self._in_order, self._place, strict=True)
        )
        self.tell(Watched(step, layers, collectives.world_size(), self.interval))

    def _finish(self) -> None:
        if self._pending is None:
            return
        step, pending = self._pending
        self._pending = None
        if self._stops and pending.word():
            self.is_stopped = True
        caught = pending.finish()
        if caught is not None and self._measurer is not None:
            self._take(step, caught, self._measurer)

    def _take(self, step: int, caught: Caught, measurer: Measurer) -> None:
        if not bool(caught.count.any()) and not self._measurements:
            _log.warning(
                "Step %d: none of %d watched layers ran. Watch a model before it is compiled, and unwrapped.",
                step,
                len(self._in_order),
            )
        values, channels = measurer.measure(caught)
        self._tell_layers(step, caught)
        self.last = Measurement(step, self._ordered(values), self._ordered(channels))
        changes = self._take_measurement(self.last)
        self._measurements += 1
        self._untold = step, caught
        # At the 1st, 2nd, 4th, 8th … measurement: a bounded number, whatever the run's length.
        if self._measurements & (self._measurements - 1) == 0 or any(alarm.state == "raised" for alarm in changes):
            self._tell_snapshot(step, caught)

    def _tell_snapshot(self, step: int, caught: Caught) -> None:
        self._untold = None
        self.tell(snapshot(step, self._gathering.norms, caught))

    def take_values(self, step: int, values: Mapping[str, list[float]]) -> None:
        """Take measures of all layers that were made elsewhere, in the order of `names`; only rank 0 tells them."""
        if collectives.rank() == 0:
            self._take_measurement(Measurement(step, values))

    def _take_measurement(self, measurement: Measurement) -> list[Alarm]:
        self.tell(measurement)
        changes = self.alarms.check(measurement)
        for alarm in changes:
            self.tell(alarm)
        return changes

    def _ordered(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Bring rows from the gathering's order of layers to the model's."""
        return {key: [row[index] for index in self._place] for key, row in rows.items()}


def _shared(norm: WatchedNorm, row: int, caught: Caught) -> int:
    """Count the samples that share the statistics of rank 0."""
    if norm.family == "sample":
        return 1
    return int(caught.samples[list(norm.blocks(len(caught.samples))[0]), row].sum())


def _plain(caught: Caught | None) -> dict[str, Any] | None:
    return None if caught is None else dict(vars(caught))


def _check(kind: str, interval: int, evaluation: str, on_alarm: str) -> None:
    choices_of = {"kind": (kind, _KINDS), "evaluation": (evaluation, _UNUSED), "on_alarm": (on_alarm, _ANSWERS)}
    for argument, (value, choices) in choices_of.items():
        if value not in choices:
            near = did_you_mean(str(value), choices)
            raise ConfigError(f"drift.{argument}={value!r} is not one of {', '.join(choices)}.{near}")
    if not isinstance(interval, int) or interval < 1:
        raise ConfigError(f"drift.interval={interval!r} must be a whole number of at least 1. Use e.g. 20.")
