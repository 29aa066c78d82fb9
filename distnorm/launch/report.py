"""What a run says of itself, on the console and in its folder: what was chosen and why, and the result."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from distnorm.conversion import Conversion
from distnorm.drift.monitor import DriftMonitor, WorstDrift
from distnorm.launch import console, resumption
from distnorm.launch.ranks import Ranks
from distnorm.launch.run_dir import RunFolder, code_hash, versions, write_json, write_whole
from distnorm.settings import Settings
from distnorm.spec import NormSpec

_log = logging.getLogger(__name__)


def announce(settings: Settings, ranks: Ranks, run: RunFolder, data: Any, conversion: Conversion) -> None:
    """Print what was chosen and why, and keep the decision table in the run folder. First rank only.

    Collective: none.
    """
    if not ranks.is_first:
        return
    plural = "s" if ranks.world_size > 1 else ""
    devices = f"{ranks.world_size} {ranks.accelerator.upper()} rank{plural}"
    devices += f" on {ranks.num_nodes} nodes" if ranks.num_nodes > 1 else ""
    accumulated = settings.trainer.accumulate_grad_batches
    total = settings.device_batch * ranks.world_size * accumulated
    devices += f", {accumulated} batches accumulated" if accumulated > 1 else ""
    print(f"run       {run.path}")
    print(f"devices   {devices}, device batch {settings.device_batch}, {total} samples a step")
    if hasattr(data, "describe"):
        print(f"data      {data.describe(ranks.world_size)}")
    print("norm      " + str(conversion.spec).replace("\n", "\n          "))
    weights = _weights(settings)
    if weights:
        print(f"weights   {weights}")
    if settings.ckpt_path is not None:
        print("resumed   " + "\n          ".join(resumption.in_words(settings, conversion.spec)))
    print(flush=True)
    lines = [str(conversion.spec), *([f"weights {weights}"] if weights else []), "", str(conversion), ""]
    write_whole(run.path / "decision.txt", "\n".join(lines))


def config(settings: Settings, conversion: Conversion) -> dict[str, Any]:
    """Join configuration and decision, layer by layer too, as wandb and the record keep them."""
    layers = [dataclasses.asdict(layer) for layer in conversion.layers]
    layers += [
        {"name": x.name, "channels": x.channels, "was": x.was, "now": x.was, "normalization_batch": None, "why": x.why}
        for x in conversion.left
    ]
    decision = {"decision": conversion.spec.to_dict(), "decision_layers": layers}
    return {**settings.model_dump(), **decision}


def finish(
    settings: Settings,
    ranks: Ranks,
    run: RunFolder,
    spec: NormSpec,
    tested: Path,
    metrics: dict[str, float],
    samples_per_s: float | None,
    drift: DriftMonitor,
) -> dict[str, Any]:
    """Write `result.json`, and print the table and the folder. First rank only.

    Args:
        settings: what was asked for.
        ranks: who took part.
        run: the folder.
        spec: the decision.
        tested: the checkpoint that the metrics are of.
        metrics: of the test set.
        samples_per_s: training samples a second over all ranks.
        drift: what it saw, and whether it stopped the training.

    Returns:
        What `result.json` holds.

    Collective: none.
    """
    worst = drift.worst
    result = {
        "metrics": metrics,
        "checkpoint": str(tested),
        "resumed_from": settings.ckpt_path,
        "samples_per_s": samples_per_s,
        "worst_drift": {"layer": worst.layer, "excess_jeffreys_nats": worst.value} if worst else None,
        "alarms": list(drift.alarms),
        "stopped_by_alarm": drift.has_stopped,
        "decision": spec.to_dict(),
        "ema": settings.trainer.ema,
        "seed": settings.seed,
        "world_size": ranks.world_size,
        "versions": versions(),
        "code_hash": code_hash(),
    }
    if not ranks.is_first:
        return result
    try:
        write_json(run.result, result)
    except OSError as error:
        _log.warning("%s could not be written: %s. What follows is all there is of it.", run.result, error)
    console.table(
        f"Result on the test set, {tested.stem} checkpoint",
        [
            *(
                (name.removeprefix("test/"), f"{value:.4f}")
                for name, value in sorted(metrics.items())
                if name.startswith("test/")
            ),
            ("normalization", spec.in_words()),
            *([("weights", _weights(settings))] if settings.trainer.ema is not None else []),
            ("training", f"{samples_per_s:.0f} samples/s" if samples_per_s else "too short to time"),
            ("worst drift", _in_words(worst)),
            *(("alarm", message) for message in drift.alarms),
            *([("stopped", "by an alarm: drift.on_alarm=stop")] if drift.has_stopped else []),
        ],
    )
    print(run.path, flush=True)
    return result


def _weights(settings: Settings) -> str:
    """Say which weights are evaluated and saved, where they are not those that were trained."""
    ema = settings.trainer.ema
    return "" if ema is None else f"averaged over about {1 / (1 - ema):.0f} steps (trainer.ema={ema})"


def _in_words(worst: WorstDrift | None) -> str:
    if worst is None:
        return "not measured"
    if worst.value <= 0:
        return f"none beyond sampling noise ({worst.value:+.3f} nats, in {worst.layer})"
    return f"{worst.value:+.3f} nats beyond sampling noise, in {worst.layer}"
