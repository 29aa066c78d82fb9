"""Averaged weights in a Lightning training: the average that is evaluated and saved in place of the trained weights.

Lightning's `WeightAveraging` keeps the average in a copy of the module. It swaps weights *and buffers* of the two when
the epoch of a validation starts, which is after every `on_validation_start`, and back when it ends. So statistics that
are put into the *copy* before are in the model for the evaluation, in whatever order the callbacks are listed.
"""

import contextlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from distnorm.errors import ConfigError
from distnorm.lightning_names import EitherName, counterpart, is_either
from distnorm.population import Statistics, write_into

_log = logging.getLogger(__name__)
_TOO_MUCH_OF_THE_FIRST = 0.1
_CURRENT = "current_model_state"
"""Where Lightning saves the trained weights, the `state_dict` being the average's."""


class WeightAverage(EitherName, WeightAveraging):
    """Keep an exponential moving average of the weights, to be evaluated, saved, and left in the model after `fit`.

        average = decay · average + (1 - decay) · weights,  after each step of the optimizer; at first the weights

    Lightning's engine with four changes. Buffers of whole numbers are copied: an average of equal ones, rounded down,
    may be one less. The average is on the model's device, where Lightning leaves it where the model was before it was
    moved. The trained weights stay in the model until `on_fit_end`, so that a checkpoint of `on_train_end` has both. A
    checkpoint that is loaded to be tested has the average as its weights, and is no reason to warn.

    Args:
        decay: above 0 and below 1; the average holds about 1 / (1 - decay) steps.

    Collective: none; ranks with the same weights have the same average. Each averages its own running statistics.
    """

    def __init__(self, decay: float) -> None:
        def update(averages: list[Tensor], values: list[Tensor], _: Any) -> None:
            if averages[0].is_floating_point() or averages[0].is_complex():
                torch._foreach_lerp_(averages, values, 1 - decay)  # as torch's get_ema_multi_avg_fn
            else:
                torch._foreach_copy_(averages, values)

        super().__init__(multi_avg_fn=torch.no_grad()(update))
        self._decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the module, with the code of the Lightning that it is made of: each knows its own modules alone."""
        is_ours = isinstance(pl_module, pl.LightningModule)
        (WeightAveraging if is_ours else counterpart(WeightAveraging)).setup(self, trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the average to the model's device; its counter stays on the host, so that reading it is no wait."""
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where training is too short for the average to leave its beginning behind."""
        steps = float(trainer.estimated_stepping_batches)
        first = self._decay**steps
        if first > _TOO_MUCH_OF_THE_FIRST and trainer.is_global_zero:
            _log.warning(
                "The average of the weights decays by %g a step (trainer.ema), and training has %d steps: at its end "
                "%d %% of the average are the weights after the first. Use a smaller decay, e.g. trainer.ema=%g.",
                self._decay,
                steps,
                round(100 * first),
                max(0.5, 1 - float(f"{10 / steps:.1g}")),
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the trained weights where they are."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the model."""
        if self._average_model is not None:
            super().on_train_end(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over what training resumes with."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def check_averages(trainer: pl.Trainer, frozen_last: float) -> None:
    """Refuse averaging callbacks that would evaluate, or leave behind, wrong weights or statistics.

    Raises:
        ConfigError: there are two averages, or one whose last epoch measures statistics that are held constant.
    """
    names = [type(callback).__name__ for callback in _averagings(trainer)]
    if len(names) > 1:
        raise ConfigError(
            f"The trainer has {len(names)} averages of the weights: {', '.join(names)}. Each swaps its own in for the "
            "validation, and none is left as it was.\nKeep one of them in callbacks=[…].",
        )
    if frozen_last and any(is_either(callback, StochasticWeightAveraging) for callback in _callbacks(trainer)):
        raise ConfigError(
            f"norm.frozen_last={frozen_last} keeps the statistics constant, and StochasticWeightAveraging resets them "
            "to 0 and 1 to measure them in a last epoch.\nUse norm.frozen_last=0, or EMAWeightAveraging instead.",
        )


def find_average(trainer: pl.Trainer) -> AveragedModel | None:
    """Find the average that a callback of the trainer keeps, during a fit."""
    return next((callback._average_model for callback in _averagings(trainer)), None)  # noqa: SLF001


def has_averaging(trainer: pl.Trainer) -> bool:
    """Tell whether a callback of the trainer averages weights, during a fit or not."""
    return bool(_averagings(trainer))


def current_average(trainer: pl.Trainer, pl_module: pl.LightningModule) -> AveragedModel | None:
    """Find the average and complete it for an evaluation; `None` where there is none.

    An average that has not begun becomes the current weights, as its first update would make it; until then it has
    the untrained ones. Whole numbers become the current ones.
    """
    average = find_average(trainer)
    if average is None:
        return None
    has_begun = bool(average.n_averaged)
    with torch.no_grad():
        for averaged, value in _pairs(average, pl_module):
            if not has_begun or not (averaged.is_floating_point() or averaged.is_complex()):
                averaged.copy_(value)
    return average


def swap_weights(pl_module: nn.Module, average: AveragedModel) -> None:
    """Swap the model's weights and buffers with the average's."""
    with torch.no_grad():
        for averaged, value in _pairs(average, pl_module):
            kept = averaged.clone()
            averaged.copy_(value)
            value.copy_(kept)


@contextlib.contextmanager
def having_average(pl_module: nn.Module, average: AveragedModel | None) -> Iterator[None]:
    """Let the model have the averaged weights within; without an average, its own."""
    if average is None:
        yield
        return
    swap_weights(pl_module, average)
    try:
        yield
    finally:
        swap_weights(pl_module, average)


def leave_average(trainer: pl.Trainer, pl_module: nn.Module) -> None:
    """Leave the average in the model for good, and let its callback forget it.

    Lightning's would swap it in again in a later `validate`, and leave it out of a later `test` of a checkpoint.
    """
    for callback in _averagings(trainer):
        average = callback._average_model  # noqa: SLF001
        if average is not None:
            with torch.no_grad():
                for averaged, value in _pairs(average, pl_module):
                    value.copy_(averaged)
    forget_average(trainer)


def forget_average(trainer: pl.Trainer) -> None:
    """Let the callback forget its average: a test uses the model's weights, or a checkpoint's."""
    for callback in _averagings(trainer):
        callback._average_model = None  # noqa: SLF001


def write_average(
    checkpoint: dict[str, Any], pl_module: nn.Module, average: AveragedModel, statistics: Statistics, own: Statistics
) -> None:
    """Write statistics into a checkpoint that has, or will have, the average in its `state_dict`.

    Args:
        checkpoint: in an `on_save_checkpoint`, before or after that of the averaging callback.
        pl_module: the module that trains.
        average: its average.
        statistics: of the average.
        own: of the trained weights, for a resume on another number of ranks.
    """
    is_written = _CURRENT in checkpoint
    write_into(checkpoint[_CURRENT if is_written else "state_dict"], pl_module, own)
    if is_written:
        write_into(checkpoint["state_dict"], average.module, statistics)
        return

    def write(_: nn.Module, state_dict: dict[str, Tensor], *__: Any) -> None:
        once.remove()
        write_into(state_dict, average.module, statistics)

    once = average.register_state_dict_post_hook(write)  # the callback asks for the average's state, once


def load_trained_weights(pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> bool:
    """Load the trained weights from a checkpoint whose `state_dict` has their average; return whether it has."""
    if _CURRENT not in checkpoint:
        return False
    pl_module.load_state_dict(checkpoint[_CURRENT], strict=pl_module.strict_loading)
    return True


def sample_weights(trainer: pl.Trainer, model: nn.Module) -> Tensor:
    """Take one number of each parameter, as bits, to recognize the weights by; nothing of sharded ones, which vary."""
    values = defaultdict[torch.device, list[Tensor]](list)
    if any(is_either(trainer.strategy, cls) for cls in (DDPStrategy, SingleDeviceStrategy)):
        for p in model.parameters():
            if not is_lazy(p) and p.numel():
                values[p.device].append(p.detach()[(0,) * p.dim()].to(torch.complex64))
    parts = [torch.view_as_real(torch.stack(part).cpu()).view(torch.int32) for part in values.values()]
    return torch.cat(parts) if parts else torch.zeros(0)


def _pairs(average: AveragedModel, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    copied = itertools.chain(average.module.parameters(), average.module.buffers())
    values = itertools.chain(model.parameters(), model.buffers())
    yield from ((one.detach(), other.detach()) for one, other in zip(copied, values, strict=True))


def _averagings(trainer: pl.Trainer) -> list[WeightAveraging]:
    return [callback for callback in _callbacks(trainer) if is_either(callback, WeightAveraging)]


def _callbacks(trainer: pl.Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # Lightning adds it late
