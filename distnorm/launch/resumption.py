"""What a resume keeps of the training before it: the global batch and the normalization batch, on whatever ranks."""

from pathlib import Path
from typing import Any

from distnorm import checkpoint
from distnorm.errors import ConfigError
from distnorm.launch.ranks import Ranks
from distnorm.launch.run_dir import RunFolder
from distnorm.settings import Settings
from distnorm.spec import BATCH_KINDS, NormSpec


def prepare(settings: Settings, ranks: Ranks) -> Settings:
    """Find the checkpoint that a run goes on from, and complete its settings with what stays.

    The global batch is the checkpoint's where neither `data.device_batch` nor `data.global_batch` is typed. On another
    number of ranks, or with another device batch, the normalization batch is the checkpoint's too, exactly, unless the
    settings of `norm` are others than those of the run before.

    Args:
        settings: with a `ckpt_path`.
        ranks: that there are now.

    Returns:
        Settings with the file as `ckpt_path`, a device batch, and the norms that keep the normalization batch.

    Raises:
        ConfigError: there is no good checkpoint; its global batch does not divide over the ranks, or in the middle of
            an epoch is another; its normalization batch cannot be had; or it has another optimizer or family of norms.
    """
    path = checkpoint.find(str(settings.ckpt_path), warn=ranks.is_first).resolve()
    entry = checkpoint.entry_of(path)
    before = NormSpec.from_dict(entry["spec"])
    kept = entry.get("place", {"global_batch": 0, "step": 0})
    data = settings.data
    if kept["global_batch"] and data.get("device_batch") is None and data.get("global_batch") is None:
        _check_divides(kept["global_batch"], ranks)
        data = {**data, "global_batch": kept["global_batch"]}
    complete = settings.model_copy(update={"data": data, "ckpt_path": str(path)}).with_batches(ranks.world_size)
    _check_middle(kept, complete)
    _check_optimizer(entry.get("optimizer", {}), complete)
    now = (complete.device_batch, ranks.world_size)
    if now != (before.device_batch, before.world_size) and _norm_as_before(complete, path):
        complete = _keep_normalization_batch(complete, before)
    checkpoint.check_resume(path, complete.decide(ranks.world_size, ranks.per_node))
    return complete


def check_epoch(settings: Settings, data: Any, world_size: int) -> None:
    """Hold the data against the epoch that a run goes on in the middle of; at its end any will do.

    Args:
        settings: with a `ckpt_path`, from `prepare`.
        data: that they build; one that cannot say in which order it deals is not asked.
        world_size: ranks there are now.

    Raises:
        ConfigError: the run before had another seed, other data or, with sorted shards, another number of ranks.
    """
    place = checkpoint.entry_of(Path(str(settings.ckpt_path))).get("place", {"step": 0})
    if place["step"] and hasattr(data, "check_continues"):
        data.check_continues(place.get("order", {}), world_size)


def in_words(settings: Settings, spec: NormSpec) -> list[str]:
    """Say where a run goes on from, and what became of the training before: what was, what is, why. A line each."""
    entry = checkpoint.entry_of(Path(str(settings.ckpt_path)))
    before, lines = NormSpec.from_dict(entry["spec"]), [f"from {settings.ckpt_path}"]
    if place := entry.get("place"):
        done = (
            f"after step {place['step']} of epoch {place['epoch']}" if place["step"] else f"at epoch {place['epoch']}"
        )
        lines[0] += f", {done}"
    if before.world_size != spec.world_size:
        why = f"for the same {place['global_batch']} samples a step" if place else ""
        lines.append(
            f"{_plural(before.world_size)} before, {spec.world_size} now: "
            f"device batch {before.device_batch} → {spec.device_batch} {why}".rstrip()
        )
        lines.append("random streams begin anew, from seed, rank and step")
    if before.in_words() != spec.in_words():
        same = before.normalization_batch == spec.normalization_batch
        why = ": the same normalization batch" if same and before.kind in BATCH_KINDS else ""
        lines.append(f"{before.in_words()} → {spec.in_words()}{why}")
    had_average, has_average = "average_statistics" in entry, settings.trainer.ema is not None
    if has_average and not had_average:
        lines.append("the average of the weights begins with the checkpoint's")
    elif had_average and not has_average:
        lines.append("the trained weights, without the average that the checkpoint has of them")
    changes = changed(entry.get("optimizer", {}), settings.optimizer)
    lines += [f"optimizer.{key} {old} → {new} from this step on" for key, (old, new) in changes.items()]
    return [*lines, "the optimizer's state is the checkpoint's" + (", otherwise" if changes else "")]


def changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Give the settings that differ, each with its old and new value; only those that both have."""
    return {key: (before[key], now[key]) for key in before if key in now and before[key] != now[key]}


def _check_divides(global_batch: int, ranks: Ranks) -> None:
    if global_batch % ranks.world_size:
        divisors = [str(n) for n in range(1, min(global_batch, 64) + 1) if global_batch % n == 0]
        raise ConfigError(
            f"The checkpoint trains on {global_batch} samples a step, that do not divide over {ranks.world_size} ranks."
            f"\nUse {', '.join(divisors)} ranks, or at the end of an epoch give data.device_batch."
        )


def _check_middle(place: dict[str, Any], settings: Settings) -> None:
    now = settings.data["global_batch"]
    if place["step"] and now != place["global_batch"]:
        raise ConfigError(
            f"The checkpoint is from the middle of an epoch, {place['step']} steps of {place['global_batch']} samples, "
            f"and this run has {now} a step: samples would be lost or repeated.\n"
            f"Leave out data.device_batch and data.global_batch, or use data.global_batch={place['global_batch']}."
        )


def _check_optimizer(before: dict[str, Any], settings: Settings) -> None:
    was, now = before.get("_target_"), settings.optimizer["_target_"]
    if was is not None and was != now:
        raise ConfigError(
            f"optimizer._target_={now}, and the checkpoint has the state of {was}.\n"
            f"Use optimizer={was.rpartition('.')[2].lower()} to go on, or load the weights alone in a run of your own."
        )


def _norm_as_before(settings: Settings, path: Path) -> bool:
    """Tell whether nobody changed the settings of the norms since; a checkpoint without its run does not know.

    A run that went on from another one may have had its norms from here: then that one tells.
    """
    seen: set[Path] = set()
    while (run := RunFolder(path.parent.parent)).path not in seen and (run.path / "config.yaml").is_file():
        seen.add(run.path)
        before = run.read_settings()
        if before.norm == settings.norm:
            return True
        path = Path(before.ckpt_path or path)
    return not seen


def _keep_normalization_batch(settings: Settings, before: NormSpec) -> Settings:
    asked: dict[str, Any] = {"kind": before.kind, "sync_ranks": None}
    if before.kind == "renorm":
        if before.normalization_batch % settings.device_batch:
            raise ConfigError(
                f"Batch renormalization over {before.normalization_batch} samples, as the checkpoint has it, cannot be "
                f"had with device batch {settings.device_batch}.\nUse as many ranks as before: {before.world_size}."
            )
        asked["sync_ranks"] = before.normalization_batch // settings.device_batch
    elif before.kind in BATCH_KINDS:
        asked |= {"kind": "auto", "exact": True, "normalization_batch": before.normalization_batch}
    return settings.model_copy(update={"norm": settings.norm.model_copy(update=asked)})


def _plural(world_size: int) -> str:
    return f"{world_size} rank{'s' if world_size > 1 else ''}"
