"""The drift monitor: a Lightning callback that measures every batch norm with running statistics, once an interval.

Cost. Layers synchronized over a world of up to 16 ranks hand over the moments that their forward gathered anyway. All
others join one packed gather an interval. Between intervals a hook returns at once. One device-to-host copy an
interval.

Legend: C channels, R ranks, B blocks of ranks that share statistics, K = 2C + 1 packed moments.
"""

import collections
import dataclasses
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm import collectives
from distnorm.convert import normalization_layers
from distnorm.drift.divergence import FEWEST_SAMPLES, excess
from distnorm.drift.noise import between_rank_ratio
from distnorm.moments import Moments
from distnorm.norms import pooling
from distnorm.norms.over_ranks import AbstractNormOverRanks

_WINDOW = 25
_FEWEST_TIMES = 5
_RECENT = 10


@dataclasses.dataclass(frozen=True)
class WorstDrift:
    """The layer furthest off in the last measurements: mean excess Jeffreys divergence, in nats."""

    value: float
    layer: str


@dataclasses.dataclass
class _Watched:
    """One layer, and what its forward left in a step that is measured."""

    name: str
    layer: _BatchNorm
    reference: Tensor | None = None  # [2C] running mean and variance before the step
    own: Tensor | None = None  # [K] this rank's batch
    positions: int = 1
    windows: tuple[Moments | None, Moments] | None = None

    def forget(self) -> None:
        self.reference = self.own = None


class DriftMonitor(Callback):
    """Log how far each layer's batch is from its running statistics, and the ranks from each other.

    Logged as `drift/<layer>/jeffreys` (mean over channels of the excess Jeffreys divergence, nats),
    `drift/<layer>/jeffreys_max` (its worst channel) and `drift/<layer>/between_ranks` (persistent between-rank ratio,
    median over channels; from the 5th measurement on, with 2 ranks or more). The divergence needs a normalization batch
    of at least 4.

    Args:
        interval: steps between measurements.

    Collective: 1 gather of 4C + 1 float numbers a layer that is not synchronized over the world (or over a world
        of more than 16 ranks), all in one, an interval; none where all layers are. Every rank measures in the same
        steps.
    """

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self._watched: list[_Watched] = []
        self._handles: list[Any] = []
        self._measuring = False
        self._steps_before = 0
        self._recent: dict[str, collections.deque[float]] = {}

    @property
    def worst(self) -> WorstDrift | None:
        """The worst layer by the mean of its last measurements; `None` where nothing was measured, and off rank 0."""
        means = {name: sum(values) / len(values) for name, values in self._recent.items() if values}
        if not means:
            return None
        layer = max(means, key=means.__getitem__)
        return WorstDrift(means[layer], layer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the layers."""
        self._watched = [
            _Watched(name.removeprefix("model."), layer) for name, layer in normalization_layers(pl_module)
        ]
        self._handles = [w.layer.register_forward_pre_hook(self._hook_of(w)) for w in self._watched]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of them."""
        self.on_fit_end(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this step is measured; alike on every rank."""
        self._steps_before = trainer.global_step
        self._measuring = (trainer.global_step + 1) % self.interval == 0
        for watched in self._watched:
            watched.forget()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare, and log from rank 0, when the optimizer has stepped."""
        if self._measuring and trainer.global_step > self._steps_before:
            values = self._measure()
            for logger in trainer.loggers if trainer.is_global_zero and values else ():
                logger.log_metrics(values, step=trainer.global_step)
        self._measuring = False

    def _hook_of(self, watched: _Watched) -> Any:
        @torch.no_grad()
        def look(layer: _BatchNorm, args: tuple[Tensor, ...]) -> None:
            if not self._measuring or not layer.training or watched.own is not None:
                return
            x = args[0]
            watched.reference = _reference(watched)
            watched.positions = x.shape[2:].numel()
            if not 1 < _block_size(layer) <= pooling.GATHER_UP_TO:
                watched.own = Moments.of(x).pack()

        return look

    def _measure(self) -> dict[str, float]:
        """Bring all ranks' moments together, and compute and name the numbers on rank 0, on the CPU in float64."""
        rows = self._gathered() | self._free()
        if collectives.rank() or not rows:
            return {}
        # One copy to the host for all layers.
        flat = torch.cat([part.flatten().double() for pair in rows.values() for part in pair]).cpu()
        parts = iter(torch.split(flat, [part.numel() for pair in rows.values() for part in pair]))
        by_name = {watched.name: watched for watched in self._watched}
        numbers: dict[str, float] = {}
        for name, (moments_RK, _) in rows.items():
            ranks = len(moments_RK)
            numbers |= self._compare(by_name[name], next(parts).view(ranks, -1), next(parts).view(ranks, -1))
        return self._keep(numbers)

    def _gathered(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Gather the layers that do not gather from all ranks themselves; one that was not reached here sends zeros."""
        watched = [w for w in self._watched if w.layer.training and not _gathers_from_all(w.layer)]
        if not watched:
            return {}
        parts = [torch.cat((_own_moments(w), _reference(w))).double() for w in watched]
        everyone = tuple(range(collectives.world_size()))
        packed = collectives.gather(torch.cat(parts), everyone, "the drift monitor")
        columns = torch.split(packed, [len(part) for part in parts], 1)
        widths = [2 * w.layer.num_features for w in watched]
        return {
            w.name: (column[:, :-width], column[:, -width:])
            for w, column, width in zip(watched, columns, widths, strict=True)
        }

    def _free(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Take the moments of all ranks that layers synchronized over the world have gathered in their forward."""
        return {
            w.name: (w.layer.rank_moments, w.reference.expand(len(w.layer.rank_moments), -1))
            for w in self._watched
            if isinstance(w.layer, AbstractNormOverRanks) and _gathers_from_all(w.layer)
            if w.reference is not None and w.layer.rank_moments is not None
        }

    def _compare(self, watched: _Watched, moments_RK: Tensor, reference_R2C: Tensor) -> dict[str, float]:
        groups = _groups(watched.layer, len(moments_RK))
        scalars: dict[str, float] = {}
        merged = [Moments.unpack(moments_RK[list(group)]).merged().pack() for group in groups]
        batch = Moments.unpack(torch.stack(merged))
        samples_B = (batch.count / watched.positions).tolist()
        if min(samples_B) >= FEWEST_SAMPLES:
            mean_BC, var_BC = reference_R2C[[group[0] for group in groups]].chunk(2, 1)
            eps, samples_B1 = watched.layer.eps, (batch.count / watched.positions).unsqueeze(1)
            variances = (batch.mean, batch.var + eps), (mean_BC, var_BC + eps)
            excess_C = excess(*variances, samples_B1, watched.layer.momentum, ("jeffreys",))["jeffreys"].mean(0)
            scalars |= {"jeffreys": float(excess_C.mean()), "jeffreys_max": float(excess_C.max())}
        over_time = self._over_time(watched, Moments.unpack(moments_RK)) if len(moments_RK) > 1 else None
        if over_time is not None:
            scalars["between_ranks"] = float(between_rank_ratio(over_time).median())
        return {f"drift/{watched.name}/{key}": value for key, value in scalars.items()}

    def _over_time(self, watched: _Watched, ranks: Moments) -> Moments | None:
        """Add this measurement to the window of the last 25 to 50; `None` while there are too few."""
        if not bool((ranks.count > 0).all()):
            return None
        means = ranks.mean
        now = Moments(means.new_tensor(1.0), means.flatten(), torch.zeros_like(means).flatten())
        before, current = watched.windows or (None, Moments(now.count * 0, now.mean * 0, now.m2))
        current = current + now
        watched.windows = (
            (before, current) if current.count < _WINDOW else (current, Moments(now.count * 0, now.mean * 0, now.m2))
        )
        window = current if before is None else before + current
        if window.count < _FEWEST_TIMES:
            return None
        return Moments(window.count, window.mean.view_as(means), window.m2.view_as(means))

    def _keep(self, numbers: dict[str, float]) -> dict[str, float]:
        layers = {key.split("/")[1]: value for key, value in numbers.items() if key.endswith("/jeffreys")}
        for name, value in layers.items():
            self._recent.setdefault(name, collections.deque(maxlen=_RECENT)).append(value)
        worst = {"drift/worst/jeffreys": max(layers.values())} if layers else {}
        ratios = [value for key, value in numbers.items() if key.endswith("/between_ranks")]
        return numbers | worst | ({"drift/worst/between_ranks": max(ratios)} if ratios else {})


def _block_size(layer: _BatchNorm) -> int:
    return len(layer.members()) if isinstance(layer, AbstractNormOverRanks) else 1


def _groups(layer: _BatchNorm, num_ranks: int) -> list[tuple[int, ...]]:
    """Part the ranks into those that share statistics."""
    if isinstance(layer, AbstractNormOverRanks) and layer.group_ranks is not None:
        return [layer.group_ranks, *((rank,) for rank in range(num_ranks) if rank not in layer.group_ranks)]
    size = _block_size(layer)
    return [tuple(range(first, first + size)) for first in range(0, num_ranks, size)]


def _gathers_from_all(layer: _BatchNorm) -> bool:
    return 1 < _block_size(layer) == collectives.world_size() <= pooling.GATHER_UP_TO


def _own_moments(watched: _Watched) -> Tensor:
    """Give this rank's moments: measured by the hook, or by the layer itself; zeros if it was not reached."""
    layer = watched.layer
    if watched.own is not None:
        return watched.own
    if watched.reference is not None and isinstance(layer, AbstractNormOverRanks) and layer.rank_moments is not None:
        return layer.rank_moments[layer.members().index(collectives.rank())]
    assert layer.running_mean is not None
    return layer.running_mean.new_zeros(2 * layer.num_features + 1)


def _reference(watched: _Watched) -> Tensor:
    layer = watched.layer
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return torch.cat((layer.running_mean, layer.running_var)) if watched.reference is None else watched.reference
