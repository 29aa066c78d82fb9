"""Which search finds more with 25 trials: coarse to fine, random, or a grid, over learning rate and 1 - momentum.

    python -m bench.search [FOLDER]

The main job, shortened, on one rank: 3 searches of 25 trials with each of 3 seeds, of the search and of the training.
What a folder has is not run again: killed and started again, it goes on. Leaves `tables.md`, `tables.json` and
`figure.{png,svg}` there.
"""

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distnorm.figures import COLOURS, drawn
from distnorm.launch.run_dir import code_hash, versions, write_json, write_whole
from distnorm.search.figure import best_so_far
from distnorm.search.folder import Outcome, SearchFolder

ROOT = Path(__file__).parent.parent
KINDS = ("coarse_to_fine", "random", "grid")
SEEDS = (0, 1, 2)
TRIALS = 25
AFTER = (5, 10, 25)
SETTINGS = (
    "search.tiers=[[optimizer.lr,optimizer.momentum]]",
    "trainer=cpu",
    "trainer.max_epochs=6",
    "data.device_batch=32",
    "norm=batch",
    "drift=none",
    "logger.mode=disabled",
    "search.keep=false",
)
Found = dict[tuple[str, int], dict[int, Outcome]]
"""Kind and seed → number → outcome."""


class Best(NamedTuple):
    """What a search had found after some trials."""

    loss: float
    accuracy: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/bench-search"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--trials", type=int, default=TRIALS)
    asked = parser.parse_args(arguments)
    found: Found = {}
    for seed in asked.seeds:
        for kind in KINDS:
            found[kind, seed] = search(kind, seed, asked.folder, asked.trials, asked.set)
            conclude(found, asked.folder)
    print((asked.folder / "tables.md").read_text())


def search(kind: str, seed: int, folder: Path, trials: int, more: Sequence[str]) -> dict[int, Outcome]:
    """Run one search, or what is left of it."""
    name = f"{kind}-{seed}"
    command = [sys.executable, str(ROOT / "train.py"), f"search={kind}", f"search.seed={seed}", f"seed={seed}"]
    command += [f"search.name={name}", f"search.trials={trials}", f"runs_dir={folder.resolve()}", *SETTINGS, *more]
    subprocess.run(command, check=True, cwd=ROOT)
    return SearchFolder(folder.resolve() / f"search-{name}").outcomes()


def best_after(outcomes: Mapping[int, Outcome], trials: int) -> Best:
    """Give the best of the first trials by validation loss, and that trial's test accuracy."""
    good = [o for o in outcomes.values() if o.number < trials and o.value is not None]
    best = min(good, key=lambda o: o.value or 0.0, default=None)
    if best is None or best.value is None:
        return Best(math.nan, math.nan)
    return Best(best.value, best.metrics.get("test/accuracy", math.nan))


def rows(found: Found) -> list[dict[str, Any]]:
    """Make one row a kind and number of trials: both numbers of every seed."""
    made = []
    for kind in KINDS:
        seeds = [seed for name, seed in found if name == kind]
        for after in AFTER if seeds else ():
            best = [best_after(found[kind, seed], after) for seed in seeds]
            losses, accuracies = [one.loss for one in best], [one.accuracy for one in best]
            made.append({"kind": kind, "trials": after, "seeds": seeds, "loss": losses, "accuracy": accuracies})
    return made


def markdown(found: Found) -> str:
    """Draw both tables: means with standard errors over the seeds, and each seed's best trial."""
    means = ["| search | trials | best validation loss | its test accuracy % |", "| --- | --: | --: | --: |"]
    for row in rows(found):
        accuracy = mean([100 * value for value in row["accuracy"]], 1)
        means.append(f"| {_words(row['kind'])} | {row['trials']} | {mean(row['loss'], 3)} | {accuracy} |")
    each = ["| search | seed | trial | learning rate | momentum | validation loss | test accuracy % |"]
    each.append("| --- | --: | --: | --: | --: | --: | --: |")
    for (kind, seed), outcomes in sorted(found.items()):
        good = [o for o in outcomes.values() if o.value is not None]
        o = min(good, key=lambda one: one.value or 0.0)
        lr, momentum = o.values["optimizer.lr"], o.values["optimizer.momentum"]
        numbers = f"{lr:.3g} | {momentum:.3f} | {o.value:.3f} | {100 * o.metrics.get('test/accuracy', math.nan):.1f}"
        each.append(f"| {_words(kind)} | {seed} | {o.number} | {numbers} |")
    return "\n".join([*means, "", *each, ""])


def mean(values: Sequence[float], decimals: int) -> str:
    """Write a mean, and its standard error where there are several values."""
    middle = f"{statistics.fmean(values):.{decimals}f}"
    if len(values) < 2:
        return middle
    return f"{middle} ± {statistics.stdev(values) / math.sqrt(len(values)):.{decimals}f}"


def conclude(found: Found, folder: Path) -> None:
    """Write tables and figure of what there is."""
    write_whole(folder / "tables.md", markdown(found))
    about = {"settings": SETTINGS, "versions": versions(), "code_hash": code_hash()}
    write_json(folder / "tables.json", {**about, "rows": rows(found)})
    draw(found, folder)


def draw(found: Found, folder: Path) -> None:
    """Draw the best so far against the trials: a thin line a seed, a thick one their mean."""
    with drawn(folder, 1, 7.4, 4.2) as (figure, (axes,)):
        for colour, kind in zip(COLOURS, KINDS, strict=False):
            curves = [curve(outcomes) for (name, _), outcomes in found.items() if name == kind]
            for one in curves:
                axes.step(range(1, len(one) + 1), one, where="post", color=colour, alpha=0.3, linewidth=0.8)
            together = [statistics.fmean(values) for values in zip(*curves, strict=False)]
            label = f"{_words(kind)}, mean of {len(curves)}"
            axes.step(range(1, len(together) + 1), together, where="post", color=colour, linewidth=2, label=label)
        axes.set_yscale("log")
        for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            each("{x:g}")
        axes.set_xlabel("trials")
        axes.set_ylabel("best validation loss so far")
        axes.legend()
        figure.tight_layout()


def curve(outcomes: Mapping[int, Outcome]) -> list[float]:
    """Give the best validation loss after 1, 2, … trials; a failed one changes nothing."""
    values = [outcomes[n].value for n in sorted(outcomes)]
    return best_so_far([math.inf if value is None else value for value in values], "min")


def _words(kind: str) -> str:
    return kind.replace("_", " ")


if __name__ == "__main__":
    main()
