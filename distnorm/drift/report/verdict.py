"""The headline of a report: one sentence on a run, from its alarms and its worst values."""

import dataclasses
from typing import Literal

import numpy as np

from distnorm.drift.catalogue import BY_KEY, OF_THE_MODEL, Measure, ModelMeasure
from distnorm.drift.events import Alarm
from distnorm.drift.history import History
from distnorm.drift.report.worst import layers_beyond, measures_of, worst

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_OF_THE_MODEL = {measure.key: measure for measure in OF_THE_MODEL}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What to think of a run.

    Attributes:
        state: `alarm` if one is left at the end, `recovered` if all were cleared or not raised again after a requeue,
            `healthy` if there was none, `unknown` if nothing was measured.
        sentence: says so, with the worst layer, value and limit.
        measure: the sentence is about; empty for none.
    """

    state: Literal["alarm", "recovered", "healthy", "unknown"]
    sentence: str
    measure: str = ""


def verdict(history: History) -> Verdict:
    """Judge a run in one sentence."""
    if not len(history.steps) and not history.alarms:
        return Verdict("unknown", "Nothing to judge: the record holds no measurements of drift")
    left = open_alarms(history)
    if left:
        first = max(left, key=lambda key: _severity(history, key))
        more = f"; {len(left) - 1} more alarm{'s' if len(left) > 2 else ''}" if len(left) > 1 else ""
        return Verdict("alarm", _alarming(history, first) + more, first)
    if history.alarms:
        last = max(history.alarms, key=lambda alarm: alarm.step)
        return Verdict("recovered", _recovered(history, last), last.measure)
    return _healthy(history)


def number(value: float) -> str:
    """Write a number with three significant digits, and thin spaces between thousands."""
    if not np.isfinite(value):
        return "–" if np.isnan(value) else ("∞" if value > 0 else "−∞")
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, exponent = f"{value:.2e}".split("e")
        digits = digits.rstrip("0").rstrip(".")
        return f"{digits}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", "−")
    rounded = float(f"{value:.3g}")
    text = f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"
    return text.replace(",", "\u2009").replace("-", "−")


def open_alarms(history: History) -> list[str]:
    """Name the measures that have an alarm at the end of the run."""
    last = {alarm.measure: alarm for alarm in history.alarms if alarm not in history.ended}
    return [measure for measure, alarm in last.items() if alarm.state == "raised"]


def _severity(history: History, key: str) -> float:
    """How many times the limit the worst value is."""
    found, limit = _worst_alarm(history, key), _measure(history, key).limit
    if limit is None:
        return 0.0
    over, under = (found.value, limit.at) if limit.side == "above" else (limit.at, found.value)
    return float(over / under) if under > 0 else float("inf")


def _measure(history: History, key: str) -> Measure | ModelMeasure:
    unknown = ModelMeasure(key, key.replace("_", " "), "", "")
    return measures_of([history]).get(key) or _OF_THE_MODEL.get(key, unknown)


def _worst_alarm(history: History, key: str) -> Alarm:
    """Give the alarm with the worst value, and that of the measurements where it is worse still."""
    limit = _measure(history, key).limit
    sign = -1 if limit is not None and limit.side == "below" else 1
    alarm = max((one for one in history.alarms if one.measure == key), key=lambda one: sign * one.value)
    found = worst(history, key) if key in BY_KEY else None
    if found is not None and sign * found[0] > sign * alarm.value:
        return dataclasses.replace(alarm, value=found[0], layer=history.layers[found[1]].name)
    return alarm


def _alarming(history: History, key: str) -> str:
    measure, alarm = _measure(history, key), _worst_alarm(history, key)
    limit = measure.limit
    meaning = f"{limit.meaning[0].upper()}{limit.meaning[1:]}: " if limit else ""
    beyond = f"{_title(measure)} {limit.side if limit else 'beyond'} {number(alarm.limit)}"
    if not alarm.layer:
        return f"{meaning}{beyond}, worst {number(alarm.value)}"
    values = history.values.get(key)
    count = int(layers_beyond(values, limit).sum()) if values is not None and limit else 1
    layers = f"{max(count, 1)} of {len(history.layers)} layers"
    return f"{meaning}{beyond} in {layers}, worst {number(alarm.value)} in {alarm.layer}"


def _title(measure: Measure | ModelMeasure) -> str:
    return measure.title.split(":")[0]


def _recovered(history: History, last: Alarm) -> str:
    measure, alarm = _measure(history, last.measure), _worst_alarm(history, last.measure)
    where = f" in {alarm.layer}" if alarm.layer else ""
    side = measure.limit.side if measure.limit else "beyond"
    cleared = last.state == "cleared"
    how = f"keeps its limit since step {number(last.step)}" if cleared else "no alarm was raised again after a requeue"
    return (
        f"Recovered: {_title(measure)} was {side} {number(alarm.limit)} (worst {number(alarm.value)}{where}), and {how}"
    )


def _healthy(history: History) -> Verdict:
    """Say which measure came nearest to its limit, on the way from healthy to it."""
    nearest: tuple[float, str] = (-np.inf, "")
    for key, measure in measures_of([history]).items():
        found = worst(history, key)
        if found is not None and measure.limit is not None and measure.limit.at != measure.healthy:
            share = (found[0] - measure.healthy) / (measure.limit.at - measure.healthy)
            nearest = max(nearest, (share, key))
    steps = f"Healthy: no alarm in {_steps(history)} steps"
    if not nearest[1]:
        return Verdict("healthy", steps)
    key = nearest[1]
    value, layer, _ = worst(history, key) or (np.nan, 0, 0)
    limit = _measure(history, key).limit
    of = f" (limit {number(limit.at)})" if limit else ""
    how = "too briefly beyond its limit for one was" if nearest[0] > 1 else "nearest to its limit came"
    near = f"{how} {BY_KEY[key].title}, {number(value)} in {history.layers[layer].name}{of}"
    return Verdict("healthy", f"{steps}; {near}", key)


def _steps(history: History) -> str:
    return f"{int(history.steps[-1]):,}".replace(",", "\u2009")
