"""Time what it costs that an exchange says whose numbers travel: the same layer with the mark and without, in one run.

    python -m bench.marks --rows 16x64x8x8

On two local gloo ranks, the two in turn within every repetition; prints the ratio's quartiles per row.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import ranks, report
from bench.rows import Step, all_rows
from bench.sync_batchnorm import GROUP_TIMEOUT_S, NETWORK_SHARE, pin
from bench.timing import Measurement, measure_steps
from distnorm import collectives

RESULTS = Path(__file__).parent / "results" / "marks.json"
RATIO = {"marked_to_unmarked": ("marked", "unmarked")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.marks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=100, help="samples of either (100)")
    parser.add_argument("--rows", default="", metavar="FILTER", help="only rows with this in their name")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go (a whole run: bench/results)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="distnorm-bench-") as name:
        folder = Path(name)
        work = (folder, options.rows, options.repetitions)
        outcome = ranks.run(_run_rank, *work, world=2, kept=folder / "rows")
    found: list[Measurement] = outcome.found or []
    if found:
        medians = [m.ratios["marked_to_unmarked"].median for m in found]
        mean = math.exp(sum(map(math.log, medians)) / len(medians))
        print(f"geometric mean of marked / unmarked over {len(found)} rows: {mean:.3f}")
        path = options.json or (RESULTS.with_suffix(".part.json") if options.rows or outcome.failure else RESULTS)
        content = {"environment": report.environment(2), "geometric_mean": mean, "rows": report.as_rows(found)}
        report.write_json(path, content)
        print(f"written to {path}")
    if outcome.failure:
        raise SystemExit(outcome.failure)


def without_marks(step: Step) -> Step:
    """Make a step exchange as it did before numbers said whose they are."""
    marked = collectives.place_of

    def unmarked() -> None:
        collectives.place_of = lambda layer, _, kind: f"{layer} {kind}"  # type: ignore[assignment,return-value]
        try:
            step()
        finally:
            collectives.place_of = marked

    return unmarked


def _run_rank(rank: int, folder: Path, pattern: str, repetitions: int) -> None:
    pin(rank)
    collectives.start_ranks(rank=rank, world_size=2, store_path=str(folder / "store"), timeout_s=GROUP_TIMEOUT_S)
    found = []
    for row in all_rows():
        if pattern not in row.name:
            continue
        steps = {"marked": row.build("ours"), "unmarked": without_marks(row.build("ours"))}
        share = 1 if row.kind == "layer" else NETWORK_SHARE
        found.append(measure_steps(row, steps, RATIO, max(3, repetitions // share), 5))
        spread = found[-1].ratios["marked_to_unmarked"]
        if rank == 0:
            ranks.keep(folder / "rows", found)
            print(f"{row.name:28} {spread.lower:.3f} {spread.median:.3f} {spread.upper:.3f}", flush=True)
    collectives.end_ranks()


if __name__ == "__main__":
    main()
