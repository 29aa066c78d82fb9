"""From measurements to a table, geometric means and the targets."""

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.timing import RATIOS, Measurement, Spread


@dataclass(frozen=True)
class Target:
    """A number to reach, and whether it was; one that no row speaks to does not hold."""

    name: str
    value: float | None
    holds: bool


def geometric_mean(values: Sequence[float]) -> float | None:
    """Take the geometric mean; of nothing it is `None`."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def geometric_means(found: Sequence[Measurement]) -> dict[str, dict[str, float | None]]:
    """Take the means of the rows' median ratios, by kind of row and ratio."""
    return {
        kind: {ratio: geometric_mean([m.ratios[ratio].median for m in found if m.kind == kind]) for ratio in RATIOS}
        for kind in ("layer", "network")
    }


def targets(found: Sequence[Measurement]) -> list[Target]:
    """Hold the measurements against the targets."""
    means = geometric_means(found)["layer"]
    near, far = means["ours_to_limit"], means["naive_to_ours"]
    every = geometric_mean([m.ratios["ours_to_limit"].median for m in found])
    worst = max((m.ratios["ours_to_limit"].lower for m in found), default=None)
    return [
        Target("layers: geometric mean of ours / limit ≤ 1.10", near, near is not None and near <= 1.10),
        Target("all rows: geometric mean of ours / limit ≤ 1.10", every, every is not None and every <= 1.10),
        Target("all rows: lower quartile of ours / limit ≤ 1.4", worst, worst is not None and worst <= 1.4),
        Target("layers: geometric mean of naive / ours ≥ 2.0", far, far is not None and far >= 2.0),
    ]


def table(found: Sequence[Measurement]) -> str:
    """Print the ratios, lower quartile · median · upper quartile, then the means and the targets."""
    width = max(len(m.name) for m in found)
    lines = [f"{'':{width}}  {'ours / limit':^20}  {'naive / ours':^20}"]
    lines += [f"{m.name:{width}}  {'  '.join(_in_words(m.ratios[r]) for r in RATIOS)}" for m in found]
    lines += [
        f"{'geometric mean, ' + kind + 's':{width}}  "
        + "  ".join(f"{mean or math.nan:^20.2f}" for mean in means.values())
        for kind, means in geometric_means(found).items()
    ]
    lines += [
        f"{'holds' if t.holds else 'DOES NOT HOLD'}: {t.name}; found {math.nan if t.value is None else t.value:.2f}"
        for t in targets(found)
    ]
    return "\n".join(lines)


def write(path: Path, found: Sequence[Measurement], cuda: Sequence[dict[str, Any]], ranks: int) -> None:
    """Write everything as JSON."""
    content = {
        "environment": environment(ranks),
        "rows": as_rows(found),
        "geometric_means": geometric_means(found),
        "targets": [asdict(t) for t in targets(found)],
        "cuda": list(cuda),
    }
    write_json(path, content)


def as_rows(found: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Lay measurements out for JSON."""
    return [asdict(m) for m in found]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write results, and the folder that they go to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def environment(ranks: int) -> dict[str, Any]:
    """Name what the times depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ranks": ranks,
        "threads_a_rank": 1,
        "backend": "gloo",
        "dtype": "float32",
    }


def _in_words(spread: Spread) -> str:
    return f"{spread.lower:6.2f} {spread.median:6.2f} {spread.upper:6.2f}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
