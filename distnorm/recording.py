"""Record what every batch norm of a model is given, and leave the model, and every random stream, as they were.

Legend: N samples, C channels, T rows of running statistics (time steps; else 1), R ranks, K = T · (2C + 1).
"""

import contextlib
import operator
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.errors import ConfigError
from distnorm.moments import Moments
from distnorm.norms.base import OF_ONE_STEP
from distnorm.norms.ghost import GhostBatchNorm
from distnorm.norms.kept import kept
from distnorm.norms.over_ranks import AbstractNormOverRanks
from distnorm.norms.renorm import BatchRenorm


class Recorder:
    """Merges the moments of all that one layer is given; a forward hook.

    A layer whose running statistics have a row a time step, [T, C], says the step as an integer argument, of Python,
    numpy or torch; steps beyond the last row share that one.
    """

    def __init__(self, name: str, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self._name = name
        self._mean, self._var = layer.running_mean, layer.running_var
        self._channels = self._mean.shape[-1]
        self._last_row = self._mean.numel() // self._channels - 1
        self._rows: dict[int, Moments] = {}

    def refuse_one_value(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse an input that the layer would normalize to nothing, before torch does in words of its own.

        Raises:
            ConfigError: it has, or its last ghost, 1 value a channel, and no other rank adds some.
        """
        x = kwargs.get("input", args[0] if args else None)
        together = isinstance(layer, AbstractNormOverRanks) and len(layer.members()) > 1
        if not isinstance(x, Tensor) or x.dim() < 2 or together:
            return
        samples, run = x.shape[0], layer.ghost_batch if isinstance(layer, GhostBatchNorm) else x.shape[0]
        if samples and (samples % run or run) * x.shape[2:].numel() == 1:
            where = f"{samples} samples in runs of {run}" if run < samples else f"a batch of {samples} sample"
            raise ConfigError(
                f"calibrate() got {where}: layer {self._name!r} has 1 value a channel there, and a variance needs 2.\n"
                "Use DataLoader(…, drop_last=True), or batches that leave no sample alone.",
            )

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
    recorders = {name: Recorder(name, layer) for name, layer in layers.items()}
    handles = []
    with _streams_kept(model), _without_compiled_code(), torch.inference_mode(False), torch.no_grad(), kept(model):
        try:
            for module in model.modules():  # not `eval()`, that some modules do more in
                module.training = False
            for name, layer in layers.items():
                _use_batch_statistics(layer)
                handles.append(layer.register_forward_pre_hook(recorders[name].refuse_one_value, with_kwargs=True))
                handles.append(layer.register_forward_hook(recorders[name], with_kwargs=True))
            yield recorders
        finally:
            for handle in handles:
                handle.remove()


def _use_batch_statistics(layer: _BatchNorm) -> None:
    layer.training, layer.track_running_stats = True, False
    for name in OF_ONE_STEP:  # a recomputation may still need them
        layer.__dict__.pop(name, None)
    if isinstance(layer, BatchRenorm):
        layer.r_max, layer.d_max = 1.0, 0.0


@contextlib.contextmanager
def _streams_kept(model: nn.Module) -> Iterator[None]:
    """Leave the random streams of torch, Python and numpy where they are: loaders draw from all three."""
    devices = {tensor.device.index for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpys = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numpys)


@contextlib.contextmanager
def _without_compiled_code() -> Iterator[None]:
    """Run compiled parts eagerly: compiled code knows no hook that came later."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
