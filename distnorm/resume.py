"""Exact resume: a training that goes on from a checkpoint does what it would have done without the interruption."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torchmetrics import Metric

from distnorm import checkpoint as checkpoints
from distnorm import collectives, loop_state, random_state
from distnorm.data.order import Order
from distnorm.lightning_names import EitherName

_log = logging.getLogger(__name__)


@runtime_checkable
class KeepsRankState(Protocol):
    """A LightningModule that counts something on each rank, and goes on counting after a resume."""

    def rank_state(self) -> dict[str, Any]:
        """Give what this rank has counted: tensors and plain values."""

    def load_rank_states(self, states: Sequence[dict[str, Any]], own: Sequence[int]) -> None:
        """Take over what the ranks had counted, when training starts.

        Args:
            states: of all ranks that there were.
            own: those that this rank goes on for: itself; on another number of ranks several, or none.
        """


class ExactResume(EitherName, Callback):
    """Save what each rank needs to go on exactly, and put it back.

    Lightning's checkpoint has weights, optimizer, schedule and counters of rank 0. This adds, in the entry `distnorm`,
    the place in the epoch (`place`), and of each rank (`ranks`) its random streams, the torchmetrics of the module that
    have counted something, and what the module counts besides, if it is a `KeepsRankState`. Checkpoints are right
    between two steps of the optimizer: at the end of a batch that made one, of a validation, of an epoch.

    A resumed epoch goes on with its next batch, if the loader's `sampler` or `batch_sampler` has `start_at(step)`, as
    `GlobalBatchSampler` does, or the loader keeps a state (`state_dict`), which is Lightning's business. Else its
    batches are those of the epoch's beginning, which is said. What decides the order of a `GlobalBatchSampler` is kept
    with the place, and must be the same.

    A logger that has `rewind(step, time_s)` is asked to forget what was logged after the checkpoint.

    On another number of ranks random streams begin anew, from seed, rank and step; what was counted is shared out.

    Place it after all other callbacks. What a module draws in its own `on_train_start` is drawn after the streams are
    put back; what it does in its `on_train_batch_end` comes after a checkpoint that a callback saves there, and is not
    done on resume.

    Args:
        seed: the run's, for streams that begin anew.
        global_batch: samples a step over all ranks, kept with the place.
        optimizer: settings of the optimizer by name, kept too. Those that differ from the checkpoint's apply from the
            resumed step on, the learning rate along its schedule; all else of the optimizer is the checkpoint's.

    Collective: 1 gather of the states over the control group a checkpoint. Every rank saves.

    Raises:
        ConfigError: (when training starts, on all ranks) it goes on in the middle of an epoch with another seed, other
            data or, with sorted shards, another number of ranks.
    """

    def __init__(self, seed: int, global_batch: int = 0, optimizer: Mapping[str, Any] | None = None) -> None:
        self._seed, self._global_batch, self._optimizer = seed, global_batch, dict(optimizer or {})
        self._stored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Bring the ranks' states together, and settle the loops' counters."""
        own = {"random": random_state.take(), "metrics": _metrics_of(pl_module)}
        if isinstance(pl_module, KeepsRankState):
            own["module"] = pl_module.rank_state()
        entry = checkpoint.setdefault(checkpoints.ENTRY, {})
        entry["ranks"] = collectives.agree(own, "the gathering of the ranks' states")
        epoch, step = loop_state.settle(trainer, checkpoint["loops"]["fit_loop"])
        entry["optimizer"], entry["saved_at_s"] = self._optimizer, time.time()
        order: Order = next(
            (able.order for _, able in _late_beginners(trainer) if hasattr(able, "check_continues")), {}
        )
        entry["place"] = {"epoch": epoch, "step": step, "global_batch": self._global_batch, "order": order}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what is put back when training starts."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._stored = checkpoint.get(checkpoints.ENTRY)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put everything back: whatever Lightning and loaders draw at a start has been drawn."""
        stored, self._stored = self._stored or {}, None
        if "place" not in stored:
            if not trainer.global_step:  # a requeue before the first checkpoint finds rows, and begins anew
                _rewind(trainer, -1, 0.0)
            return
        _rewind(trainer, trainer.global_step, stored["saved_at_s"])
        loop_state.begin_epoch_anew(trainer)
        _go_to(trainer, **stored["place"])
        ranks, rank, world = stored["ranks"], collectives.rank(), collectives.world_size()
        own = range(rank, len(ranks), world)
        _load_metrics(pl_module, [ranks[r]["metrics"] for r in own])
        if isinstance(pl_module, KeepsRankState) and all("module" in state for state in ranks):
            pl_module.load_rank_states([state["module"] for state in ranks], own)
        for key, old in stored["optimizer"].items():
            if key in self._optimizer and self._optimizer[key] != old:
                _change(trainer, key, old, self._optimizer[key])
        if len(ranks) == world:
            random_state.put(ranks[rank]["random"])
        else:
            random_state.seed_rank(self._seed, rank, trainer.global_step)


def _rewind(trainer: pl.Trainer, step: int, time_s: float) -> None:
    for logger in trainer.loggers:
        if hasattr(logger, "rewind"):
            logger.rewind(step, time_s)


def _late_beginners(trainer: pl.Trainer) -> Iterator[tuple[Any, Any]]:
    """Give each training loader, with its sampler that can begin an epoch late, or `None`."""
    loaders = [] if trainer.train_dataloader is None else CombinedLoader(trainer.train_dataloader).flattened
    for loader in loaders:
        samplers = [getattr(loader, name, None) for name in ("batch_sampler", "sampler")]
        yield loader, next((sampler for sampler in samplers if hasattr(sampler, "start_at")), None)


def _order_of(trainer: pl.Trainer) -> Order:
    orders = (able.order for _, able in _late_beginners(trainer) if hasattr(able, "check_continues"))
    return next(orders, {})


def _go_to(
    trainer: pl.Trainer,
    epoch: int,
    step: int,
    global_batch: int,  # noqa: ARG001
    order: Order | None = None,
) -> None:
    """Let the loaders go on in the middle of an epoch."""
    if not step:
        return
    for loader, able in _late_beginners(trainer):
        if able is not None:
            if hasattr(able, "check_continues"):
                able.check_continues(order or {})
            able.set_epoch(epoch)
            able.start_at(step)
        elif not hasattr(loader, "state_dict") and trainer.is_global_zero:
            _log.warning(
                "Epoch %d goes on after its step %d, with the batches of its beginning: the training loader's sampler "
                "has no start_at(step). Use distnorm.data.GlobalBatchSampler, or a loader with a state_dict.",
                epoch,
                step,
            )


def _change(trainer: pl.Trainer, key: str, old: Any, new: Any) -> None:
    """Change a setting of the optimizer in the groups that had it from there, and what its schedule starts from."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            if key == "lr" and group.get("initial_lr", group["lr"]) == old:
                group["lr"] = new * (group["lr"] / old) if old else new
                group["initial_lr"] = new
            elif key != "lr" and key in group and _plain(group[key]) == _plain(old):
                group[key] = type(group[key])(new) if isinstance(group[key], tuple) else new
    for config in trainer.lr_scheduler_configs if key == "lr" else ():
        if hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs = [new if base == old else base for base in config.scheduler.base_lrs]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _counting(pl_module: nn.Module) -> Iterator[tuple[str, Metric]]:
    for name, module in pl_module.named_modules():
        if isinstance(module, Metric):
            yield name, module


def _metrics_of(pl_module: nn.Module) -> dict[str, Any]:
    """Copy the states of the metrics that have counted something."""
    found = {}
    for name, metric in _counting(pl_module):
        if metric.update_count:
            found[name] = {"updates": metric.update_count, "state": _on_cpu(metric.metric_state)}
    return found


def _load_metrics(pl_module: nn.Module, states: Sequence[dict[str, Any]]) -> None:
    """Let metrics go on from what was counted, by one rank or several."""
    for name, metric in _counting(pl_module):
        of_ranks = [state[name] for state in states if name in state]
        for number, counted in enumerate(of_ranks):
            state = _to(counted["state"], metric.device)
            if number:
                metric.merge_state(state)
            else:
                for key, value in state.items():
                    setattr(metric, key, value)
        if of_ranks:
            metric._update_count = sum(counted["updates"] for counted in of_ranks)  # noqa: SLF001
            metric._computed = None  # noqa: SLF001


def _on_cpu(value: Any) -> Any:
    """Copy tensors to the host, in lists and dictionaries too."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    return _each(value, _on_cpu)


def _to(value: Any, device: torch.device) -> Any:
    return (
        value.to(device, copy=True) if isinstance(value, torch.Tensor) else _each(value, lambda item: _to(item, device))
    )


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    return [change(item) for item in value] if isinstance(value, list) else value
