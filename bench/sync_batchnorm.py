"""Time the synchronized batch norm against its limit and against the widespread way, on ranks of this machine.

    python -m bench.sync_batchnorm --ranks 2 --rows channels_last

Side by side in one gloo group, one thread a rank, forward and backward in float32: torch's local layer, the same with
the two bare exchanges (the limit), ours, and the naive way. On CUDA also torch's synchronized function against ours.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import cuda, ranks, report
from bench.rows import Row, all_rows
from bench.timing import Measurement, measure
from distnorm import collectives

RESULTS = Path(__file__).parent / "results" / "sync_batchnorm.json"
GROUP_TIMEOUT_S = 120
NETWORK_SHARE = 2  # a network's step averages over its layers already: it needs fewer repetitions


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = _parser().parse_args(arguments)
    names = [row.name for row in _chosen(options.rows)]
    if not names:
        raise SystemExit(f"--rows {options.rows!r} is in no row's name. Rows: {', '.join(r.name for r in all_rows())}.")
    repetitions, warmup = (3, 1) if options.quick else (options.repetitions, 5)
    found, on_cuda, failures = _run_everywhere(options.ranks, options.rows, repetitions, warmup)
    whole = len(found) == len(names)
    if found:
        print(report.table(found))
        part = RESULTS.with_suffix(".part.json")  # a quick look must not replace a whole measurement
        path = options.json or (part if options.quick or options.rows or not whole else RESULTS)
        report.write(path, found, on_cuda, options.ranks)
        print(f"written to {path}")
    if failures:
        raise SystemExit("\n".join([f"{len(found)} of {len(names)} rows were measured, and then:", *failures]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.sync_batchnorm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks on this machine (2)")
    parser.add_argument("--repetitions", type=int, default=60, help="samples of every variant (60)")
    parser.add_argument("--rows", default="", metavar="FILTER", help="only rows with this in their name")
    parser.add_argument("--quick", action="store_true", help="three repetitions: to see that it runs, not to measure")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go (a whole run: bench/results)")
    return parser


def _chosen(pattern: str) -> list[Row]:
    return [row for row in all_rows() if pattern in row.name]


def _run_everywhere(
    world: int, pattern: str, repetitions: int, warmup: int
) -> tuple[list[Measurement], list[dict[str, Any]], list[str]]:
    """Start the ranks, and the CUDA process after them: rows, rows on CUDA, and the failures of either."""
    with tempfile.TemporaryDirectory(prefix="distnorm-bench-") as name:
        folder = Path(name)
        work = (world, folder, pattern, repetitions, warmup)
        on_ranks, on_cuda = ranks.run(_run_rank, *work, world=world, kept=folder / "rows"), ranks.Outcome([], None)
        if torch.cuda.is_available():
            on_cuda = ranks.run(_run_cuda, folder, pattern, repetitions, world=1, kept=folder / "cuda")
    failures = [outcome.failure for outcome in (on_ranks, on_cuda) if outcome.failure]
    return on_ranks.found or [], on_cuda.found or [], failures


def pin(rank: int) -> None:
    """Give a rank one thread and one core: a rank that wanders between cores is timed with cold caches."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def _run_rank(rank: int, world: int, folder: Path, pattern: str, repetitions: int, warmup: int) -> None:
    pin(rank)
    collectives.start_ranks(rank=rank, world_size=world, store_path=str(folder / "store"), timeout_s=GROUP_TIMEOUT_S)
    rows, found = _chosen(pattern), []
    for number, row in enumerate(rows, 1):
        started_s = time.perf_counter()
        share = 1 if row.kind == "layer" else NETWORK_SHARE
        found.append(measure(row, max(3, repetitions // share), warmup))
        took_s = time.perf_counter() - started_s
        ratios = ", ".join(f"{key.replace('_', ' ')} {r.median:.2f}" for key, r in found[-1].ratios.items())
        if rank == 0:
            ranks.keep(folder / "rows", found)
            print(f"[{number}/{len(rows)}] {row.name}: {ratios}  ({took_s:.1f} s)", flush=True)
    collectives.end_ranks()


def _run_cuda(_: int, folder: Path, pattern: str, repetitions: int) -> None:
    ranks.keep(folder / "cuda", cuda.run(folder, repetitions, pattern))


if __name__ == "__main__":
    main()
