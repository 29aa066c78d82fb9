"""What drift=light and drift=full cost in step time: the main job on two ranks, against drift=none in the same run.

    python -m bench.drift

One training, whose monitor is exchanged every 100 steps: none, light, full, in turning order. Ratios are formed between
neighbours, so that other work on the machine slows both.
"""

import argparse
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.callbacks import Callback

from bench import ranks, report
from bench.timing import Spread
from distnorm import collectives, convert
from distnorm.callbacks import EvaluationStatistics
from distnorm.convert import normalization_layers
from distnorm.drift.monitor import DriftMonitor
from distnorm.launch import console
from distnorm.launch import ranks as launched
from distnorm.launch.compose import composed
from distnorm.launch.run_dir import RunFolder
from distnorm.launch.trainer import make_trainer
from distnorm.random_state import seed_rank, seed_weights
from distnorm.targets import build
from distnorm.tracking import make_loggers

CONFIG = Path(__file__).parent.parent / "conf" / "train.yaml"
RESULTS = Path(__file__).parent / "results" / "drift.json"
KINDS: tuple[Literal["none", "light", "full"], ...] = ("none", "light", "full")
LIMITS = {"light": 1.02, "full": 1.08}
BLOCK_STEPS = 100


class Block(NamedTuple):
    """What one block of steps took rank 0: on the clock, and of its processor."""

    kind: str
    wall_s: float
    cpu_s: float


class Alternating(Callback):
    """Lets one monitor after the other watch the same training, and times its steps.

    The first block of a monitor is left out: caches fill, windows open.

    Args:
        evaluation: of the decision.
        block: steps a monitor has before the next takes over.
    """

    def __init__(self, evaluation: str, block: int) -> None:
        self.block = block
        self.monitors = {kind: DriftMonitor(kind, evaluation=evaluation) for kind in KINDS}
        self.took: list[Block] = []
        self._kind, self._started, self._steps = KINDS[0], (0.0, 0.0), 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.block == 0 and self._steps == 0:
            number = trainer.global_step // self.block
            lap, place = divmod(number, len(KINDS))
            self._kind = KINDS[(place + lap) % len(KINDS)]
            self.monitors[self._kind].on_fit_start(trainer, pl_module)
            self._started = time.perf_counter(), time.process_time()
        self.monitors[self._kind].on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.monitors[self._kind].on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._steps += 1
        if self._steps == self.block:
            # Not `on_train_end`: precise statistics are measured once a training, and not once a block.
            self.monitors[self._kind].on_exception(trainer, pl_module, StopIteration())
            wall_s, cpu_s = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
            self.took.append(Block(self._kind, wall_s, cpu_s))
            self._steps = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.drift", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks on this machine (2)")
    parser.add_argument("--laps", type=int, default=12, help="blocks of each kind (12)")
    parser.add_argument("--quick", action="store_true", help="short blocks: to see that it runs, not to measure")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the results go (a whole run: bench/results)")
    parser.add_argument("overrides", nargs="*", help="of the run, as for train.py: model=convnet norm=sync")
    options = parser.parse_args(arguments)
    laps, block = (2, 10) if options.quick else (options.laps, BLOCK_STEPS)
    with tempfile.TemporaryDirectory(prefix="distnorm-bench-") as name:
        folder = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        work = (options.ranks, port, folder, laps, block, options.overrides)
        outcome = ranks.run(_run_rank, *work, world=options.ranks, kept=folder / "took")
    took: list[Block] | None = outcome.found
    if took is None:
        raise SystemExit(outcome.failure)
    print(table(took, block))
    part = RESULTS.with_suffix(".part.json")  # a quick look must not replace what was measured
    path = options.json or (part if options.quick or options.overrides else RESULTS)
    report.write_json(path, content(took, block, options.ranks))
    print(f"written to {path}")
    if outcome.failure:
        raise SystemExit(f"All blocks were measured, and then: {outcome.failure}")


def ratios(took: Sequence[Block], field: str) -> dict[str, Spread]:
    """Form each kind's ratio to `none` within a lap; the first lap is left out."""
    size = len(KINDS)
    laps = [{b.kind: getattr(b, field) for b in took[first : first + size]} for first in range(size, len(took), size)]
    return {kind: Spread.of(torch.tensor([lap[kind] / lap["none"] for lap in laps])) for kind in LIMITS}


def table(took: Sequence[Block], block: int) -> str:
    """Print the ratios, lower quartile · median · upper quartile, and whether they hold."""
    base = Spread.of(torch.tensor([one.wall_s for one in took if one.kind == "none"])).median
    lines = [f"step without monitor: {base / block * 1000:.1f} ms; ratios to it, paired, step time · processor time"]
    wall, cpu = ratios(took, "wall_s"), ratios(took, "cpu_s")
    for kind, limit in LIMITS.items():
        verdict = "holds" if wall[kind].median <= limit else "DOES NOT HOLD"
        numbers = " · ".join(f"{s.lower:.3f} {s.median:.3f} {s.upper:.3f}" for s in (wall[kind], cpu[kind]))
        lines.append(f"drift={kind:5} / none  {numbers}   {verdict}: at most {limit}")
    return "\n".join(lines)


def content(took: Sequence[Block], block: int, world: int) -> dict[str, Any]:
    """Give everything that is written as JSON."""
    found = {field: ratios(took, field) for field in ("wall_s", "cpu_s")}
    return {
        "environment": report.environment(world),
        "block_steps": block,
        "ms_a_step": [[b.kind, round(b.wall_s / block * 1000, 3), round(b.cpu_s / block * 1000, 3)] for b in took],
        "ratios": {
            field: {kind: [spread.lower, spread.median, spread.upper] for kind, spread in spreads.items()}
            for field, spreads in found.items()
        },
        "limits": LIMITS,
    }


def _run_rank(rank: int, world: int, port: int, folder: Path, laps: int, block: int, overrides: Sequence[str]) -> None:
    """Train on one rank, as train.py does."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="bench", OMP_NUM_THREADS="1",
        TORCHELASTIC_USE_AGENT_STORE="False", GROUP_RANK="0",
    )  # fmt: skip
    console.quiet_libraries()
    steps = laps * len(KINDS) * block
    changes = [
        "trainer=cpu", f"trainer.max_steps={steps}", "trainer.max_epochs=1000",
        "+trainer.lightning.limit_val_batches=0", *overrides,
    ]  # fmt: skip
    settings = composed(CONFIG, changes).with_batches(world)
    found = launched.find(settings.trainer)
    run = RunFolder(folder / "run")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    data = build(settings.data)
    seed_weights(settings.seed)
    model = build(settings.model)
    channels = [layer.num_features for _, layer in normalization_layers(model)]
    spec = convert(model, settings.decide(world, world, channels)).spec
    alternating = Alternating(spec.evaluation, block)
    loggers = make_loggers(settings.logger, run, {}, is_first=rank == 0)
    trainer = make_trainer(settings.trainer, found, run, loggers, [EvaluationStatistics(spec), alternating], None)
    task = build(settings.task, model=model, optimizer=build(settings.optimizer))
    seed_rank(settings.seed, rank)
    trainer.fit(task, datamodule=data)
    if rank == 0:
        ranks.keep(folder / "took", alternating.took)
    collectives.end_ranks()


if __name__ == "__main__":
    main()
