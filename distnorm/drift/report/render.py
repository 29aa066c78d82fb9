"""The report of one or several runs as one page, that loads nothing and needs no server."""

import html
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import distnorm
from distnorm.drift.history import History
from distnorm.drift.report import tables
from distnorm.drift.report.payload import payload, safe_json
from distnorm.errors import ConfigError

_SCRIPTS = ("codec.js", "scale.js", "chart.js", "heatmap.js", "overview.js", "layer.js", "page.js")


def render(histories: Sequence[History], out: Path) -> Path:
    """Write the page of some runs.

    Args:
        histories: at least one, with names of their own.
        out: the file; its folder is made.

    Returns:
        The file.

    Raises:
        ConfigError: no run, two of one name, or a file that cannot be written.
    """
    names = [history.name for history in histories]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice is not None:
        failed = "no run" if not names else f"two runs of the name {twice!r:.80}"
        raise ConfigError(f"The report got {failed}. It shows runs of different names. Give each once.")
    text = _page(histories).encode("utf-8", "replace")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(text)
    except OSError as error:
        raise ConfigError(
            f"The report cannot be written to {str(out)!r}: {error.strerror}.\n"
            "Give a file in a folder that you can write, e.g. --out report.html."
        ) from None
    return out


def _page(histories: Sequence[History]) -> str:
    names = [history.name for history in histories]
    has_gap = any(name.startswith("drift/model/") or name.endswith("/loss") for h in histories for name in h.scalars)
    sections = {"compare": "Runs"} if len(names) > 1 else {}
    sections |= {"drift": "Drift", **({"gap": "Train and eval"} if has_gap else {})}
    sections |= {"alarms": "Alarms", "worst": "Worst layers", "decision": "Decision"}
    gap = (
        '<section id="gap" aria-labelledby="gap-h"><h2 id="gap-h">Training against evaluation</h2>'
        '<div id="gap-lines" class="lines wide"></div></section>'
    )
    parts = {
        "version": distnorm.__version__,
        "title": html.escape(f"{', '.join(names)} · drift report"),
        "css": _asset("page.css"),
        "nav": "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in sections.items()),
        "verdict": tables.verdicts(histories),
        "compare": tables.comparison(histories),
        "gap": gap if has_gap else "",
        "alarms": tables.alarms(histories),
        "worst": tables.worst_layers(histories),
        "decision": tables.decisions(histories),
        "data": safe_json(payload(histories)),
        "js": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return resources.files("distnorm.drift.report").joinpath(name).read_text(encoding="utf-8")
