"""When drift is alarming: limits with hysteresis, told once when they are crossed and once when they are kept again."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from distnorm.drift.catalogue import MEASURES, OF_THE_MODEL, Limit, Measure
from distnorm.drift.events import Alarm, Measurement
from distnorm.drift.noise import FEWEST_TIMES, ratio_by_chance


class Alarms:
    """Holds measurements against the limits of the catalogue.

    A measure's alarm is raised when a layer has been beyond it in `limit.times` measurements in a row, and cleared when
    none is beyond `limit.clear`. What was not measured changes nothing.

    Args:
        layers: names, in the order of the measurements.
        silent: keys of measures that do not matter here, e.g. of running statistics that evaluation does not use.
        num_ranks: that are compared.
    """

    def __init__(self, layers: Sequence[str], silent: Collection[str] = (), num_ranks: int = 1) -> None:
        self._layers = list(layers)
        known = measures(num_ranks).values()
        self._limits = {m.key: (m.title, m.unit, m.limit) for m in known if m.limit and m.key not in silent}
        self._of_model = {m.key: (m.title, m.unit, m.limit) for m in OF_THE_MODEL if m.limit and m.key not in silent}
        self._streaks: dict[str, list[int]] = {}
        self._raised: dict[str, Alarm] = {}

    @property
    def raised(self) -> tuple[Alarm, ...]:
        """The alarms that stand now."""
        return tuple(self._raised.values())

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps: streaks, and the alarms that stand."""
        raised = {key: dataclasses.asdict(alarm) for key, alarm in self._raised.items()}
        return {"streaks": {key: list(streaks) for key, streaks in self._streaks.items()}, "raised": raised}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, of the same layers."""
        self._streaks = {key: list(streaks) for key, streaks in state["streaks"].items()}
        self._raised = {key: Alarm(**alarm) for key, alarm in state["raised"].items()}

    def check(self, measurement: Measurement) -> list[Alarm]:
        """Hold a measurement of the layers against the limits: what changed."""
        changes = []
        for key, (title, unit, limit) in self._limits.items():
            values = measurement.values.get(key, [])
            known = [index for index, value in enumerate(values) if not math.isnan(value)]
            if known:
                changes += self._change(measurement.step, key, title, unit, limit, values, known, self._layers)
        return changes

    def check_model(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """Hold measures of the whole model against their limits: what changed."""
        changes = []
        for key, (title, unit, limit) in self._of_model.items():
            value = values.get(key, math.nan)
            if not math.isnan(value):
                changes += self._change(step, key, title, unit, limit, [value], [0], [""])
        return changes

    def _change(
        self,
        step: int,
        key: str,
        title: str,
        unit: str,
        limit: Limit,
        values: Sequence[float],
        known: Sequence[int],
        names: Sequence[str],
    ) -> list[Alarm]:
        streaks = self._streaks.setdefault(key, [0] * len(values))
        for index in known:
            streaks[index] = streaks[index] + 1 if _is_beyond(values[index], limit.at, limit) else 0
        worst = (max if limit.side == "above" else min)(known, key=lambda index: values[index])
        if key not in self._raised:
            beyond = [index for index in known if streaks[index] >= limit.times]
            if not beyond:
                return []
            worst = (max if limit.side == "above" else min)(beyond, key=lambda index: values[index])
            message = _in_words(title, unit, limit, values[worst], names[worst], len(beyond))
            alarm = Alarm(step, key, names[worst], float(values[worst]), limit.at, "raised", message)
            self._raised[key] = alarm
            return [alarm]
        if any(_is_beyond(values[index], limit.clear, limit) for index in known):
            return []
        del self._raised[key]
        where = f", worst in {names[worst]}" if names[worst] else ""
        message = f"{title} is {_number(values[worst])}{_of(unit)} again{where} (limit {_number(limit.at)})."
        return [Alarm(step, key, names[worst], float(values[worst]), limit.at, "cleared", message)]


def measures(num_ranks: int) -> dict[str, Measure]:
    """Give the measures by key, their limits and colour scales no narrower than what chance alone may do.

    With few ranks a large ratio between them means little: 46 with two, 9 with four, 4.4 with eight, once in 1000.
    """
    found = {measure.key: measure for measure in MEASURES}
    ratio = found["between_ranks"]
    chance = ratio_by_chance(num_ranks, FEWEST_TIMES) if num_ranks > 1 else 0.0
    if ratio.limit is not None and chance > ratio.limit.at:
        wider = chance / ratio.limit.at
        limit = dataclasses.replace(ratio.limit, at=chance, clear=ratio.limit.clear * wider)
        found["between_ranks"] = dataclasses.replace(ratio, limit=limit, span=ratio.span * wider)
    return found


def _is_beyond(value: float, at: float, limit: Limit) -> bool:
    return value > at if limit.side == "above" else value < at


def _in_words(title: str, unit: str, limit: Limit, value: float, layer: str, layers: int) -> str:
    where = f" in {layer}" if layer else ""
    others = f", beyond it in {layers} layers" if layers > 1 else ""
    beyond = f"(limit {_number(limit.at)}{others})"
    return f"{title} {_number(value)}{_of(unit)}{where} {beyond}: {limit.meaning}. {limit.remedy}"


def _of(unit: str) -> str:
    return f" {unit}" if unit else ""


def _number(value: float) -> str:
    return f"{value:.3g}"
