"""What a finished run is worth: read from its record and measured on its last checkpoint, always the same weights."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from distnorm import checkpoint
from distnorm.calibration import calibrate
from distnorm.convert import convert, normalization_layers
from distnorm.drift import record
from distnorm.launch.run_dir import RunFolder
from distnorm.population import Statistics, own_running_stats, pooled, swap_in
from distnorm.settings import Settings
from distnorm.spec import NormSpec
from distnorm.study.design import Probe
from distnorm.targets import build

_PREFIX = "model."  # of the model in the task
_EVALUATION_BATCH = 120


def measure(settings: Settings, run: RunFolder, probes: dict[str, Probe]) -> dict[str, float]:
    """Measure one run.

    Returns:
        By column: `train_loss`, the mean over the last tenth of all steps; `val_loss` and `test_error` (per cent) with
        the statistics that the run saved; `between_ranks`, where the drift was recorded; each probe's test error or
        loss. A model without running statistics has no other probes than those of saved ones.

    Collective: none; the ranks of the run have ended.
    """
    values = of_record(run)
    trained = _Trained(settings, run)
    values["val_loss"] = trained.evaluate(Probe(), "val")[0]
    values["test_error"] = trained.evaluate(Probe(), "test")[1]
    for name, probe in probes.items():
        if probe.statistics == "saved" or trained.has_statistics:
            values[name] = trained.evaluate(probe, "test")[probe.of == "error"]
    return values


def of_record(run: RunFolder) -> dict[str, float]:
    """Read the training loss at the end, and the drift between ranks."""
    rows = record.read(run.record)
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    last = [loss for step, loss in losses.items() if step > 0.9 * max(losses)]
    values = {"train_loss": sum(last) / len(last)} if last else {}
    between = [row["drift/worst/between_ranks"] for row in rows if "drift/worst/between_ranks" in row]
    return values | ({"between_ranks": between[-1]} if between else {})


def largest_difference(run: RunFolder, other: RunFolder) -> float:
    """Compare the training losses of two runs, step by step; infinite where they have none in common."""
    losses = [
        {row["step"]: row["train/loss"] for row in record.read(one.record) if "train/loss" in row}
        for one in (run, other)
    ]
    common = losses[0].keys() & losses[1].keys()
    return max((abs(losses[0][step] - losses[1][step]) for step in common), default=math.inf)


class _Trained:
    """The weights of a run, and the statistics to evaluate them with."""

    def __init__(self, settings: Settings, run: RunFolder) -> None:
        path = run.checkpoints / "last.ckpt"
        self._settings = settings
        self._model = checkpoint.load(build(settings.model), path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
        entry = stored[checkpoint.ENTRY]
        spec = NormSpec.from_dict(entry["spec"])
        if spec.kind == "sync":  # here is one process, with all samples
            convert(self._model, NormSpec("batch", spec.normalization_batch))
        states = {"saved": stored["state_dict"], "trained": stored.get("current_model_state", stored["state_dict"])}
        names = self._model.state_dict().keys()
        self._states = {
            weights: {key: value for key, value in _without_prefix(state).items() if key in names}
            for weights, state in states.items()
        }
        trained = [_without_prefix(statistics) for statistics in entry["rank_statistics"]]
        averaged = [_without_prefix(statistics) for statistics in entry.get("average_statistics", [])]
        self._ranks = {"saved": averaged or trained, "trained": trained}

    @property
    def has_statistics(self) -> bool:
        """Whether the model keeps running statistics."""
        return bool(own_running_stats(self._model))

    def evaluate(self, probe: Probe, split: str) -> tuple[float, float]:
        """Evaluate as a probe says.

        Returns:
            The mean loss, and the error in per cent.
        """
        self._model.load_state_dict(self._states[probe.weights])
        by_batch = probe.statistics == "batch"
        data = self._data(probe.data, self._normalization_samples if by_batch else _EVALUATION_BATCH)
        swap_in(self._model, self._statistics(probe))
        with _batch_statistics(self._model, by_batch):
            return _score(self._model, data.val_dataloader() if split == "val" else data.test_dataloader())

    @property
    def _normalization_samples(self) -> int:
        """Samples a forward takes for batch statistics like training's: ghosts part what one device gets."""
        return self._settings.device_batch

    def _statistics(self, probe: Probe) -> Statistics:
        if probe.statistics == "first_rank":
            return self._ranks[probe.weights][0]
        if probe.statistics == "pooled":
            return pooled(self._ranks[probe.weights])
        if probe.statistics == "precise":
            source = probe.data if probe.calibrate is None else probe.calibrate
            batches = self._data(source, self._settings.device_batch).train_dataloader()
            there = len(batches) * self._settings.device_batch
            return calibrate(self._model, batches, min(probe.samples, there))
        return own_running_stats(self._model)

    def _data(self, changes: dict[str, Any], device_batch: int) -> Any:
        return build({**self._settings.data, "shards": "shuffled", **changes, "device_batch": device_batch})


class _batch_statistics:  # noqa: N801 — reads as what it does
    """Let the norms use each batch's own statistics, and leave their running ones as they were."""

    def __init__(self, model: nn.Module, active: bool) -> None:
        self._model, self._active = model, active

    def __enter__(self) -> None:
        self._before = own_running_stats(self._model)
        for _, layer in normalization_layers(self._model):
            layer.train(self._active)

    def __exit__(self, *_: object) -> None:
        self._model.eval()
        swap_in(self._model, self._before)


@torch.no_grad()
def _score(model: nn.Module, batches: Any) -> tuple[float, float]:
    loss, wrong, count = 0.0, 0, 0
    for inputs, targets in batches:
        logits = model(inputs)
        loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
        wrong += int((logits.argmax(1) != targets).sum())
        count += len(targets)
    return loss / count, 100 * wrong / count


def _without_prefix(statistics: Statistics) -> Statistics:
    return {key.removeprefix(_PREFIX): value for key, value in statistics.items()}
