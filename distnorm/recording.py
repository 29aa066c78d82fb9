"""Record what every batch norm of a model is given, and leave the model, and every random stream, as they were.

Legend: N samples, C channels, T rows of running statistics (time steps; else 1), R ranks, K = T · (2C + 1).
"""

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.errors import ConfigError
from distnorm.moments import Moments
from distnorm.norms.base import OF_ONE_STEP
from distnorm.norms.ghost import GhostBatchNorm
from distnorm.norms.kept import undisturbed
from distnorm.norms.over_ranks import AbstractNormOverRanks
from distnorm.norms.renorm import BatchRenorm


class Recorder:
    """Merges the moments of all that one layer is given; a forward hook.

    A layer whose running statistics have a row a time step, [T, C], says the step as an integer argument, of Python,
    numpy or torch; steps beyond the last row share that one.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self._mean, self._var = layer.running_mean, layer.running_var
        self._channels = self._mean.shape[-1]
        self._last_row = self._mean.numel() // self._channels - 1
        self._rows: dict[int, Moments] = {}

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take one input in, once the layer has taken it: what does not fit has been refused."""
        given = [*args, *kwargs.values()]
        x: Tensor = kwargs.get("input", given[0])
        mask = next((value for value in given if isinstance(value, Tensor) and value.dtype == torch.bool), None)
        row = next((step for step in map(_step, given) if step is not None), 0)
        if mask is not None:
            mask = mask.reshape(*mask.shape, *[1] * (x.dim() - 1 - mask.dim()))
        found, row = Moments.of(x, mask), min(row, self._last_row)
        self._rows[row] = self._rows[row] + found if row in self._rows else found

    def packed(self) -> Tensor:
        """Write the moments of every row into one flat float64 tensor [K]; zeros where nothing came."""
        nothing = self._mean.new_zeros(2 * self._channels + 1, dtype=torch.float64)
        rows = (self._rows.get(row) for row in range(self._last_row + 1))
        return torch.cat([nothing if moments is None else moments.pack() for moments in rows])

    def merged(self, packed_RK: Tensor) -> tuple[Tensor, Tensor] | None:
        """Merge what `packed` wrote on every rank: mean and unbiased variance, shaped as the running statistics.

        A row with less than 2 values keeps what the layer has; `None` if that is every row.
        """
        parts_TRK = packed_RK.view(len(packed_RK), self._last_row + 1, -1).transpose(0, 1)
        moments = Moments.unpack(parts_TRK.to(self._mean.device)).merged()
        is_known = (moments.count > 1).view(*self._mean.shape[:-1], 1)
        if not is_known.any():
            return None
        mean, var = (
            found.view(self._mean.shape).to(self._mean.dtype) for found in (moments.mean, moments.unbiased_var)
        )
        return torch.where(is_known, mean, self._mean), torch.where(is_known, var, self._var)


def _step(value: Any) -> int | None:
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dim() or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor of floats too
        return None


@contextlib.contextmanager
def recording(model: nn.Module, layers: dict[str, _BatchNorm]) -> Iterator[dict[str, Recorder]]:
    """Let the layers normalize with their batch's own statistics, all else evaluate, and record what they are given.

    On leaving, however that happens, modes, attributes, buffers, hooks and random streams are what they were.
    """
    recorders = {name: Recorder(layer) for name, layer in layers.items()}
    handles = []
    with undisturbed(model), refusing_one_value(layers, "calibrate()"):
        try:
            for name, layer in layers.items():
                use_batch_statistics(layer)
                if isinstance(layer, BatchRenorm):
                    layer.r_max, layer.d_max = 1.0, 0.0
                handles.append(layer.register_forward_hook(recorders[name], with_kwargs=True))
            yield recorders
        finally:
            for handle in handles:
                handle.remove()


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Find the layers that normalize with their batch's statistics in training, those without running ones too."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def held_norms(model: nn.Module) -> set[str]:
    """Name those that do not, being in eval mode while the model trains: they are held constant."""
    return {name for name, layer in batch_norms(model).items() if model.training and not layer.training}


def use_batch_statistics(layer: _BatchNorm) -> None:
    """Let a layer of a model that is `undisturbed` normalize with its batch's statistics, and move none of its own."""
    layer.training, layer.track_running_stats = True, False
    for name in OF_ONE_STEP:  # a recomputation may still need them
        layer.__dict__.pop(name, None)


@contextlib.contextmanager
def refusing_one_value(layers: dict[str, _BatchNorm], asked: str) -> Iterator[None]:
    """Refuse inputs that a layer would normalize to nothing, before torch does in words of its own.

    Args:
        layers: by name; those in eval mode take any input.
        asked: what the user called, for the message.

    Raises:
        ConfigError: (from a layer's forward) its input has, or its last ghost, 1 value a channel, and no other rank
            adds some.
    """
    handles = [
        layer.register_forward_pre_hook(functools.partial(_refuse_one_value, name, asked), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_one_value(name: str, asked: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = kwargs.get("input", args[0] if args else None)
    together = isinstance(layer, AbstractNormOverRanks) and len(layer.members()) > 1
    if not layer.training or not isinstance(x, Tensor) or x.dim() < 2 or together:
        return
    samples, run = x.shape[0], layer.ghost_batch if isinstance(layer, GhostBatchNorm) else x.shape[0]
    if samples and (samples % run or run) * x.shape[2:].numel() == 1:
        where = f"{samples} samples in runs of {run}" if run < samples else f"a batch of {samples} sample"
        raise ConfigError(
            f"{asked} got {where}: layer {name!r} has 1 value a channel there, and a variance needs 2.\n"
            "Use DataLoader(…, drop_last=True), or batches that leave no sample alone.",
        )
