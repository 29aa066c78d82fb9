"""The parts of the page that are text: they are there without its script too, and all that comes from data is escaped.

Legend: L layers, T measurements.
"""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distnorm.drift.catalogue import MEASURES, OF_THE_MODEL, Measure
from distnorm.drift.history import History
from distnorm.drift.report.verdict import Verdict, number, open_alarms, verdict
from distnorm.drift.report.worst import badness, constant, is_healthy, layers_beyond, measures_of, worst
from distnorm.errors import DistNormError
from distnorm.spec import NormSpec

_STATES = {"alarm": "Alarm", "recovered": "Recovered", "healthy": "Healthy", "unknown": "Unknown"}
_TITLES = {m.key: m.title for m in MEASURES} | {m.key: m.title.split(":")[0] for m in OF_THE_MODEL}
_ROWS = 12


def verdicts(histories: Sequence[History]) -> str:
    """Render the headline of each run, what it was, and what of it was lost."""
    parts = []
    for history in histories:
        found = verdict(history)
        tag = "h1" if len(histories) == 1 else "h2"
        lost = "".join(f'<p class="note lost">{_text(line)}</p>' for line in history.lost)
        parts.append(
            f'<div class="verdict {found.state}" data-measure="{_text(found.measure)}">'
            f'<p class="run">{_badge(found)}<b>{_text(history.name)}</b>'
            f'<span class="dim">{_text(_facts(history))}</span></p>'
            f'<{tag} class="sentence">{_text(found.sentence)}.</{tag}>{lost}</div>'
        )
    title = "" if len(histories) == 1 else f'<h1 class="hidden">Drift of {len(histories)} runs</h1>'
    return title + "".join(parts)


def comparison(histories: Sequence[History]) -> str:
    """Render a table of all runs: the worst value of each measure; empty for one run."""
    if len(histories) < 2:
        return ""
    shown = [
        measure
        for measure in measures_of(histories).values()
        if any(measure.key in history.values for history in histories)
    ]
    head = ["Worst value and layer", *(history.name for history in histories)]
    rows = [[_named(m), *(_worst_cell(history, m) for history in histories)] for m in shown if m.limit]
    rest = [[_named(m), *(_worst_cell(history, m) for history in histories)] for m in shown if not m.limit]
    rows += [
        [f"{title}, last", *(_last(history, name) for history in histories)]
        for name, title in (
            ("val/loss", "val/loss"),
            ("train/loss", "train/loss"),
            ("drift/model/gap", "train/eval gap"),
        )
        if any(name in history.scalars for history in histories)
    ]
    more = f"<details><summary>{len(rest)} measures without a limit</summary>" if rest else ""
    more += f"{_table('The measures without a limit', head, rest)}</details>" if rest else ""
    return (
        '<section id="compare" aria-labelledby="compare-h"><h2 id="compare-h">Runs side by side</h2>'
        f"{_table('Worst value of each measure in each run', head, rows)}{more}</section>"
    )


def alarms(histories: Sequence[History]) -> str:
    """Render all alarms in order, with what to do."""
    parts = []
    for index, history in enumerate(histories):
        name = f"<h3>{_text(history.name)}</h3>" if len(histories) > 1 else ""
        items = "".join(_alarm(history, index, place) for place in range(len(history.alarms)))
        parts.append(name + (f'<ol class="alarms">{items}</ol>' if items else '<p class="dim">None.</p>'))
    return "".join(parts)


def worst_layers(histories: Sequence[History]) -> str:
    """Render the layers' worst values of every measure that has a limit, the worst layer first."""
    return "".join(_layers(history, named=len(histories) > 1) for history in histories)


def decisions(histories: Sequence[History]) -> str:
    """Render what was decided for each run, and why."""
    parts = []
    for history in histories:
        name = f"<h3>{_text(history.name)}</h3>" if len(histories) > 1 else ""
        rest = {key: value for key, value in history.about.items() if key not in {"decision", "schema", "time"}}
        parts.append(name + _decision(history.about.get("decision")) + _settings(rest))
    return f'<div class="decisions">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def _text(value: Any) -> str:
    return html.escape(str(value))


def _badge(found: Verdict) -> str:
    return f'<span class="badge {found.state}">{_STATES[found.state]}</span>'


def _facts(history: History) -> str:
    steps = f"{int(history.steps[-1]):,} steps".replace(",", "\u2009") if len(history.steps) else "no measurements"
    ranks = f"{history.world_size} rank{'s' if history.world_size != 1 else ''}"
    return f"{steps} · {ranks} · {len(history.layers)} layers"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a table; the cells of its rows are HTML already, its head is text."""
    top = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(cells)}</tr>' for first, *cells in rows)
    return (
        f'<div class="scroll" role="region" aria-label="{_text(caption)}" tabindex="0"><table><caption class="hidden">'
        f"{_text(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _heading(measure: Measure) -> str:
    return f"{measure.title} ({measure.unit})" if measure.unit else measure.title


def _named(measure: Measure) -> str:
    return _text(_heading(measure))


def _cell(value: float, measure: Measure, *, is_beyond: bool, layer: str = "") -> str:
    if not is_beyond and is_healthy(value, measure):
        return f'<td class="quiet">{number(value)}</td>'
    mark = ' class="beyond"' if is_beyond else ""
    return f"<td{mark}>{number(value)}{f' <span>{_text(layer)}</span>' if layer else ''}</td>"


def _worst_cell(history: History, measure: Measure) -> str:
    found = worst(history, measure.key)
    if found is None:
        return "<td>–</td>"
    is_beyond = measure.limit is not None and layers_beyond(history.values[measure.key], measure.limit).any()
    return _cell(found[0], measure, is_beyond=bool(is_beyond), layer=history.layers[found[1]].name)


def _last(history: History, name: str) -> str:
    points = history.scalars.get(name)
    return f"<td>{number(float(points[1][-1])) if points is not None and len(points[1]) else '–'}</td>"


def _alarm(history: History, run: int, place: int) -> str:
    alarm = history.alarms[place]
    state: str = alarm.state
    if state == "raised" and alarm in history.ended:
        state = "raised, before a requeue"
    elif state == "raised" and alarm.measure not in open_alarms(history):
        state = "raised, cleared later"
    known = alarm.measure in history.values and alarm.layer in {layer.name for layer in history.layers}
    show = f'<button type="button" data-run="{run}" data-alarm="{place}">Show</button>' if known else ""
    title, step = _text(_TITLES.get(alarm.measure, alarm.measure)), f"{alarm.step:,}".replace(",", "\u2009")
    return (
        f'<li class="{_text(alarm.state)}"><p><span class="mark">{_text(state)}</span> <b>{title}</b> '
        f'<span class="dim">step {step}{f" · {_text(alarm.layer)}" if alarm.layer else ""}</span> {show}</p>'
        f"<p>{_text(alarm.message)}</p></li>"
    )


def _layers(history: History, *, named: bool) -> str:
    measured = [m for m in measures_of([history]).values() if m.key in history.values]
    shown = [m for m in measured if m.limit is not None] or measured
    if not shown or not len(history.steps):
        return '<p class="dim">Nothing was measured.</p>'
    order = _order(history, shown)
    beyond = {m.key: layers_beyond(history.values[m.key], m.limit) for m in shown if m.limit}
    same = {m.key: constant(history.values[m.key]) for m in shown if not beyond.get(m.key, np.zeros(1)).any()}
    folded = [f"{_text(m.title)}: {number(value)}" for m in shown if (value := same.get(m.key)) is not None]
    note = f'<p class="note">The same in all layers throughout. {"; ".join(folded)}.</p>' if folded else ""
    shown = [m for m in shown if same.get(m.key) is None]
    head = ["Layer", *map(_heading, shown)]
    rows = [
        [_text(history.layers[row].name), *(_layer_cell(history, m, row, beyond.get(m.key)) for m in shown)]
        for row in order
    ]
    caption = f"Worst values of each layer{f' of {history.name}' if named else ''}, the worst layer first"
    more = ""
    if len(rows) > _ROWS:
        rest = _table(f"{caption}: the rest", head, rows[_ROWS:])
        more = f"<details><summary>{len(rows) - _ROWS} more layers</summary>{rest}</details>"
    title = f"<h3>{_text(history.name)}</h3>" if named else ""
    return title + (_table(caption, head, rows[:_ROWS]) + more if shown else "") + note


def _layer_cell(history: History, measure: Measure, row: int, beyond_L: Any) -> str:
    values = history.values[measure.key][row]
    if np.isnan(values).all():
        return "<td>–</td>"
    value = float(values[badness(values, measure).argmax()])
    return _cell(value, measure, is_beyond=beyond_L is not None and bool(beyond_L[row]))


def _order(history: History, shown: Sequence[Measure]) -> list[int]:
    """Sort layers by the limits they were beyond, then by how far their worst values are on the way to them."""
    beyond, way = np.zeros(len(history.layers)), np.zeros(len(history.layers))
    for measure in shown:
        values_LT = history.values[measure.key]
        known = np.where(np.isnan(values_LT), measure.healthy, values_LT)
        way += np.clip((known - measure.healthy) / (measure.span - measure.healthy), 0, 2).max(1, initial=0)
        beyond += layers_beyond(values_LT, measure.limit) if measure.limit is not None else 0
    return [int(row) for row in np.lexsort((-way, -beyond))]


def _decision(values: Any) -> str:
    try:
        spec = NormSpec.from_dict(values)
    except (DistNormError, TypeError):
        return '<p class="dim">The record does not say.</p>'
    facts = {
        "normalization batch": spec.normalization_batch,
        "device batch": spec.device_batch or "–",
        "ranks": spec.world_size,
        "evaluation": f"{spec.evaluation} statistics",
        "momentum": "the layers’ own" if spec.momentum is None else number(spec.momentum),
    }
    if spec.penalty is not None:
        facts["expected penalty"] = f"{spec.penalty:g} points"
    if spec.cost_ms is not None:
        facts["synchronization"] = f"{spec.cost_ms:.3g} ms a step"
    listed = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    return (
        f'<p class="kind">{_text(spec.in_words())}</p><dl class="facts">{listed}</dl>'
        + _list("Because", spec.reasons)
        + _list("Differs in", [_override(*one) for one in (*spec.layers.items(), *spec.per_kind.items())])
        + _list("Evidence", spec.evidence)
        + _list("Alternatives", [_alternative(other.setting, other) for other in spec.alternatives])
    )


def _override(name: str, change: Mapping[str, Any]) -> str:
    return f"{name}: {', '.join(f'{key}={value}' for key, value in change.items())}"


def _settings(about: Mapping[str, Any]) -> str:
    """Fold all settings away, by their names on the command line."""
    lines = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in _flat(about))
    return f'<details><summary>All settings</summary><dl class="settings">{lines}</dl></details>' if lines else ""


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _alternative(setting: str, other: Any) -> str:
    penalty = "" if other.penalty is None else f" ({other.penalty:g} points expected)"
    return f"{setting}{penalty}{f': {other.why}' if other.why else ''}"


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<h4>{title}</h4><ul>{items}</ul>" if items else ""
