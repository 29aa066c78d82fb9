"""What the drift monitor tells those who keep it: which layers are watched, what was measured, alarms, whole layers.

An event is written as one row, a dictionary that JSON can hold: the record keeps it as a line, wandb as a text.

Legend: L layers, C channels, K ranks.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol


@dataclasses.dataclass(frozen=True)
class WatchedLayer:
    """One watched layer.

    Attributes:
        name: in the model.
        kind: its class.
        channels: C.
        samples: that share its statistics; 1 for a norm of single samples.
    """

    name: str
    kind: str
    channels: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Watched:
    """Which layers are watched, in the order that all measurements have; told at the start, and after a requeue."""

    step: int
    layers: tuple[WatchedLayer, ...]
    world_size: int
    interval: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured at one step.

    Attributes:
        step: optimizer steps done.
        values: L numbers a measure, by its key in the catalogue, or by `key.p95` and `key.max`, over channels; nan
            where a layer could not be measured.
        worst_channels: L channels a measure that has a `max`; -1 where there is none.
    """

    step: int
    values: Mapping[str, list[float]]
    worst_channels: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Whole layers at one step: by layer the arrays `running_mean`, `running_var`, `batch_mean`, `batch_var` of C.

    `rank_means` and `rank_vars`, where there are several ranks, have K rows of C.
    """

    step: int
    layers: Mapping[str, Mapping[str, list[Any]]]


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A limit that was crossed, or is kept again.

    Attributes:
        step: when.
        measure: key in the catalogue.
        layer: the worst; empty for a measure of the whole model.
        value: measured there.
        limit: that was crossed.
        state: what happened.
        message: layer, value, limit, what it means and what to do.
    """

    step: int
    measure: str
    layer: str
    value: float
    limit: float
    state: Literal["raised", "cleared"]
    message: str


Event = Watched | Measurement | Snapshot | Alarm
_NAMES: dict[str, type[Any]] = {"watched": Watched, "drift": Measurement, "snapshot": Snapshot, "alarm": Alarm}
_DIGITS = 4


class TakesEvents(Protocol):
    """Keeps what the monitor tells: the record, wandb, or a list of one's own."""

    def take(self, event: Event) -> None:
        """Keep an event."""


def to_row(event: Event) -> dict[str, Any]:
    """Write an event as a row: its step, and the rest under its name; numbers are rounded to 4 digits.

    A number that JSON has no word for is the string "nan", "inf" or "-inf".
    """
    name = next(name for name, kind in _NAMES.items() if isinstance(event, kind))
    return {"step": event.step, name: _plain({k: v for k, v in dataclasses.asdict(event).items() if k != "step"})}


def to_text(event: Event) -> str:
    """Write `to_row` of an event as JSON: the same row, ten times as fast as by `json.dumps`.

    Example:
        >>> to_text(Measurement(10, {"lag": [0.123456, float("nan")]}))
        '{"step": 10, "drift": {"values": {"lag": [0.1235,"nan"]}, "worst_channels": {}}}'
    """
    name = next(name for name, kind in _NAMES.items() if isinstance(event, kind))
    return f'{{"step": {event.step}, "{name}": {_text({k: v for k, v in vars(event).items() if k != "step"})}}}'


def from_row(row: Mapping[str, Any]) -> Event | None:
    """Read what `to_row` wrote; `None` if the row is something else."""
    name = next((name for name in _NAMES if isinstance(row.get(name), dict)), None)
    if name is None:
        return None
    values = {key: value if name == "watched" else _numbers(value) for key, value in row[name].items()}
    if name == "watched":
        values["layers"] = tuple(WatchedLayer(**layer) for layer in values["layers"])
    event: Event = _NAMES[name](step=row["step"], **values)
    return event


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json.dumps(key)}: {_text(item)}' for key, item in value.items())}}}"
    if not isinstance(value, list | tuple):
        return json.dumps(_plain(value))
    kinds = set(map(type, value))
    if kinds == {int}:
        return json.dumps(value)
    if kinds == {float}:  # 100 layers x 60 measures: the one loop that must be quick
        text = (f"%.{_DIGITS}g," * len(value))[:-1] % tuple(value)
        if "n" not in text:  # of nan and inf
            return f"[{text}]"
    return f"[{','.join(map(_text, value))}]"


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
