"""Ranges that a search draws from: each is the unit interval seen through its scale, and back."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from distnorm.errors import ConfigError, did_you_mean

SCALES = ("linear", "log", "one_minus_log")
_KEYS = ("low", "high", "scale", "step", "integer", "choices")
_FORWARD: dict[str, Callable[[float], float]] = {
    "linear": float,
    "log": math.log,
    "one_minus_log": lambda value: -math.log1p(-value),
}
_BACK: dict[str, Callable[[float], float]] = {
    "linear": float,
    "log": math.exp,
    "one_minus_log": lambda place: -math.expm1(-place),  # 1 - e^-x, to the last digit where the value is near 1
}


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One key of the space.

    Attributes:
        key: what is set: `optimizer.lr`.
        low: the least value.
        high: the greatest.
        scale: what is uniform: the value, its logarithm, or the logarithm of 1 - value.
        step: between values; 0: any value.
        integer: whole numbers.
        choices: instead of a range, in an order that means something: a zoom keeps to neighbours.

    Example:
        >>> Dimension("optimizer.momentum", 0.5, 0.995, "one_minus_log").value(0.5)
        0.95
    """

    key: str
    low: float = 0.0
    high: float = 1.0
    scale: str = "linear"
    step: float = 0.0
    integer: bool = False
    choices: tuple[Any, ...] = ()

    def value(self, unit: float) -> Any:
        """Give the value at a place of the unit interval; both ends are values too."""
        if self.choices:
            return self.choices[min(int(unit * len(self.choices)), len(self.choices) - 1)]
        first, last = self._ends()
        value = _BACK[self.scale](first + unit * (last - first))
        if self.step:
            value = self.low + self.step * round((value - self.low) / self.step)
        digits = 15 if self.scale == "one_minus_log" else 12  # so that what one types for a value is short
        value = min(max(float(f"{value:.{digits}g}"), self.low), self._top())
        return round(value) if self.integer else value

    def unit(self, value: Any) -> float:
        """Give the place of a value: the inverse of `value`, in the middle of all places that round to it."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        first, last = self._ends()
        return min(1.0, max(0.0, (_FORWARD[self.scale](value) - first) / (last - first)))

    def grid(self, points: int) -> list[Any]:
        """Give values evenly spaced on the scale, both ends among them; fewer where there are no more."""
        if self._number() <= points:
            return list(self.choices) or [self._plain(self.low + i * self.step) for i in range(int(self._number()))]
        values = [self.value(0.5 if points == 1 else i / (points - 1)) for i in range(points)]
        return [value for place, value in enumerate(values) if value not in values[:place]]

    def _plain(self, value: float) -> float:
        return round(value) if self.integer else float(f"{value:.12g}")

    def _ends(self) -> tuple[float, float]:
        """Give the ends on the scale; half a step beyond the values, so that each of them has a full share."""
        half = self.step / 2
        return _FORWARD[self.scale](self.low - half), _FORWARD[self.scale](self._top() + half)

    def _number(self) -> float:
        if self.choices:
            return len(self.choices)
        return math.floor((self.high - self.low) / self.step + 1e-9) + 1 if self.step else math.inf

    def _top(self) -> float:
        return self.low + (self._number() - 1) * self.step if self.step else self.high


def read(key: str, node: Any) -> Dimension:
    """Read one entry of `search.space`.

    Raises:
        ConfigError: it is no range and no choices, or its scale cannot hold its values.
    """
    path = f"search.space.{key}"
    if not isinstance(node, Mapping):
        raise ConfigError(f"{path}={node!r} is no range. Write e.g. {key}: {{low: 0.01, high: 1.0, scale: log}}.")
    for name in node:
        if name not in _KEYS:
            near = did_you_mean(str(name), _KEYS)
            raise ConfigError(f"{path}.{name}: a range has no such key.{near} It has {', '.join(_KEYS)}.")
    if "choices" in node:
        return _read_choices(path, key, node)
    low, high = (_number(path, node, name) for name in ("low", "high"))
    if low >= high:
        raise ConfigError(f"{path}: low={low:g} is not below high={high:g}. Exchange them, or leave the key out.")
    scale = node.get("scale", "linear")
    if scale not in SCALES:
        near = did_you_mean(str(scale), SCALES)
        raise ConfigError(f"{path}.scale={scale!r} is not one of {', '.join(SCALES)}.{near}")
    integer = node.get("integer", False)
    step = _number(path, node, "step") if node.get("step") is not None else float(bool(integer))
    _check_step(path, low, high, scale, step, integer, given="step" in node)
    _check_scale(path, low, high, scale, step)
    return Dimension(key, low, high, scale, step, bool(integer))


def _read_choices(path: str, key: str, node: Mapping[str, Any]) -> Dimension:
    choices, others = node["choices"], [name for name in node if name != "choices"]
    if not isinstance(choices, list) or not choices or others:
        besides = f", and {', '.join(others)} besides" if others else ""
        raise ConfigError(
            f"{path} has choices={choices!r}{besides}. Give a list of values and nothing else, or low and high."
        )
    return Dimension(key, choices=tuple(choices))


def _number(path: str, node: Mapping[str, Any], name: str) -> float:
    value = node.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{path}.{name}={value!r} must be a number. Give low and high, or choices: […].")
    return float(value)


def _check_step(path: str, low: float, high: float, scale: str, step: float, integer: Any, *, given: bool) -> None:
    if integer not in (True, False):
        raise ConfigError(f"{path}.integer={integer!r} must be true or false. Leave it out for any number.")
    if (given and step <= 0) or step > high - low:
        raise ConfigError(
            f"{path}.step={step:g} must be above 0 and at most high - low = {high - low:g}. Leave it out."
        )
    if integer and any(number != int(number) for number in (low, high, step)):
        raise ConfigError(
            f"{path} is of whole numbers, and low={low:g}, high={high:g}, step={step:g} are not. Leave integer out."
        )
    if step and scale == "one_minus_log":
        raise ConfigError(f"{path}: step={step:g} does not go with scale=one_minus_log. Give choices: […] instead.")


def _check_scale(path: str, low: float, high: float, scale: str, step: float) -> None:
    if scale == "log" and low - step / 2 <= 0:
        half = ", less half a step," if step else ""
        raise ConfigError(f"{path}: low={low:g}{half} has no logarithm. Give a low above 0, or scale: linear.")
    if scale == "one_minus_log" and not (low > 0 and high < 1):
        raise ConfigError(
            f"{path}: scale=one_minus_log takes values between 0 and 1, and the range is {low:g} to {high:g}. "
            "Use e.g. low: 0.5, high: 0.999."
        )
