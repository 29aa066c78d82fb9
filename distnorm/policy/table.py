"""A decision as a person reads it: every field in words, wrapped, and the alternatives as a table."""

import dataclasses
import textwrap

from distnorm.policy.statistics import has_batch_statistics
from distnorm.spec import BATCH_KINDS, Alternative, NormSpec

WIDTH = 110
_MARGIN = 14
_NORMS_OF = {"vector": "norms of vectors"}


def render(spec: NormSpec) -> str:
    """Lay a decision out: what, why, on what evidence, for which layers, at what price, and what else.

    Example:
        >>> from distnorm.policy import decide
        >>> print(render(decide(16, 1)).splitlines()[0])
        decision      local batch norm, normalization batch 16
    """
    rows = [
        ("decision", (spec.in_words(),)),
        ("because", spec.reasons),
        ("evidence", spec.evidence),
        ("layers", _layers(spec)),
        ("momentum", (_momentum(spec),)),
        ("evaluation", (_evaluation(spec),)),
        ("predicted", (f"{_points(spec.penalty)} points below the best, {_time(spec.cost_ms)} ms a step to exchange",)),
        ("instead", _alternatives(spec.alternatives)),
    ]
    return "\n".join(line for name, texts in rows for line in _row(name, texts))


def _row(name: str, texts: tuple[str, ...]) -> list[str]:
    deeper = " " * (17 if name == "instead" else 2)
    wrapped = (textwrap.wrap(text, WIDTH - _MARGIN, subsequent_indent=deeper, break_long_words=False) for text in texts)
    lines = [line for part in wrapped for line in part]
    return [(name if place == 0 else "").ljust(_MARGIN) + line for place, line in enumerate(lines)]


def _layers(spec: NormSpec) -> tuple[str, ...]:
    changes = {
        **spec.layers,
        **{_NORMS_OF.get(dimension, dimension): change for dimension, change in spec.per_kind.items()},
    }
    plain = dataclasses.replace(spec, layers={}, per_kind={})
    lines = [f"{which}: {dataclasses.replace(plain, **change).in_words()}" for which, change in changes.items()]
    lines += [f"only {', '.join(spec.include)}"] if spec.include != ("*",) else []
    lines += [f"all but {', '.join(spec.exclude)}"] if spec.exclude else []
    return tuple(lines) or ("all alike",)


def _momentum(spec: NormSpec) -> str:
    if spec.kind not in BATCH_KINDS:
        return _none(spec)
    return "each layer's own" if spec.momentum is None else f"{spec.momentum:g}"


def _none(spec: NormSpec) -> str:
    return "none: constants" if spec.kind == "frozen" else "none: no running statistics"


def _evaluation(spec: NormSpec) -> str:
    if not has_batch_statistics(spec):
        return _none(spec)
    texts = {
        "running": "running statistics",
        "pooled": "running statistics of all ranks, pooled",
        "precise": "precise statistics, measured anew with the weights of the moment",
    }
    frozen = f"; constants for the last {spec.frozen_last:.0%} of training" if spec.frozen_last else ""
    return texts[spec.evaluation] + frozen


def _alternatives(others: tuple[Alternative, ...]) -> tuple[str, ...]:
    rows = [f"{_points(other.penalty):6}  {_time(other.cost_ms):7}  {other}" for other in others]
    return ("points  ms/step  setting", *rows) if rows else ()


def _points(penalty: float | None) -> str:
    return "?" if penalty is None else f"{penalty:.1f}"


def _time(cost_ms: float | None) -> str:
    return "?" if cost_ms is None else f"{cost_ms:.1f}"
