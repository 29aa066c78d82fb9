"""Precise batch norm: evaluation statistics measured anew, over real batches, with the weights of the moment.

A running average remembers 19 normalization batches at momentum 0.1, of weights that have moved since. Here the
`Moments` of every layer's inputs are merged over many batches and all ranks instead, as if all values had been measured
at once: nothing is averaged that is not an average, and no E[x²] - E[x]² is formed.

What may exchange in a forward needs all ranks there, however many batches each has. So ranks go in rounds: before each
they tell one another what they have, and one that ran out joins with an empty batch.

Legend: N samples, C channels, T rows of running statistics (time steps; else 1), R ranks, K packed numbers.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm import collectives
from distnorm.convert import normalization_layers
from distnorm.errors import ConfigError, GroupError
from distnorm.norms.over_ranks import AbstractNormOverRanks
from distnorm.population import Statistics
from distnorm.recording import Recorder, recording
from distnorm.uneven.batch import count_samples, empty_like
from distnorm.uneven.notice import start_notice
from distnorm.uneven.source import DONE, FAILED, MORE, Source

_log = logging.getLogger(__name__)
_TELL_EVERY_S = 20.0

Forward = Callable[[nn.Module, Any], Any]
"""Runs the model on a batch: `lambda model, batch: model(batch["image"])`."""


def calibrate(
    model: nn.Module, batches: Iterable[Any], num_samples: int = 1024, *, forward: Forward | None = None
) -> Statistics:
    """Measure the evaluation statistics of a model over real batches, its weights fixed.

        mean = sum x / n;  var = sum (x - mean)² / (n - 1);  over all n values of a channel, of all batches and ranks

    Each batch norm normalizes with its batch's own statistics while its inputs are recorded: what a layer is given
    depends on the *batch* statistics of the layers before it, as in training, in one pass over the data. So give
    batches as large as training's; with other, e.g. augmented or unlabelled, data the statistics are that data's
    (domain adaptation). A layer that the model runs several times a forward merges them all, and masked values of a
    synchronized layer are left out. Batch renormalization goes uncorrected (r = 1, d = 0), for its correction leans on
    the very running statistics that are replaced; ghosts and groups of ranks stay what they are. `FrozenBatchNorm` is
    constant and has no part. All other layers are in eval mode: dropout would add a variance that evaluation has not.

    The model is left as it was, whatever happens: parameters, buffers, modes, hooks, attributes that its forward binds
    anew, and every random stream. What a forward changes inside an attribute, e.g. a list it appends to, stays.

    Args:
        model: with batch norms that keep running statistics, the same on every rank; not wrapped in DDP.
        batches: this rank's: inputs, or tuples, lists or dictionaries whose first entry is the input [N, …]. Any
            iterable; ranks may have different numbers of batches and samples, or none. At most `num_samples` are taken.
        num_samples: samples to measure, over all ranks; 1,000 to 10,000 are plenty. Ends with the round in which they
            are reached; with fewer in the data all are used, and a warning says how many.
        forward: runs the model on a batch that is something else, on the right device; `None`: `model(input)`, with the
            input moved to the model's device.

    Returns:
        Statistics by `state_dict` key, the same on every rank, for `swap_in`, `save_statistics` or
        `evaluation_statistics`. A layer that no value reached is left out, and a warning names it.

    Collective: a round 1 gather of 5 integers over the gloo side group, and what the model's layers exchange forward;
        where those exchange, 1 agreement on the structure of an empty batch, in the first round in which a rank has had
        no batch yet and another has one;
        at the end 1 gather of 2C + 1 float64 numbers a layer, all layers in one. Every rank must call. Without
        synchronized layers a rank that ran out only takes part in the gathers.

    Raises:
        ConfigError: the model is wrapped in DDP or has no batch norm; `batches` cannot be gone through; `num_samples`
            is no number of at least 1; no rank has a sample; a batch is of a type that the model's input cannot be
            found in; or a layer gets 1 value a channel, e.g. from a last batch of 1 sample.
        GroupError: (on all ranks alike) the batches or the model of a rank raised, or a rank did not come. Where the
            model raises between the exchanges of its layers, the others wait there for the group's timeout.

    Example:
        >>> from distnorm.population import evaluation_statistics
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> statistics = calibrate(model, [torch.tensor([[0.0, 5.0], [2.0, 7.0]])], num_samples=2)
        >>> statistics["0.running_mean"], statistics["0.running_var"]
        (tensor([1., 6.]), tensor([2., 2.]))

    Source: Wu & Johnson 2021, section 3.2. Merged by Chan, Golub & LeVeque 1983 and over ranks, where published
        implementations average the batches' E[x²] of one rank.
    """
    return calibrated(model, batches, num_samples, forward)[0]


def calibrated(
    model: nn.Module, batches: Iterable[Any], num_samples: int, forward: Forward | None
) -> tuple[Statistics, int]:
    """Calibrate, and tell how many samples that took, over all ranks; see `calibrate`."""
    layers = _layers_of(model)
    _check_arguments(batches, num_samples)
    if forward is None:
        batches, forward = _inputs_of(batches), _run_model
    with recording(model, layers) as recorders:
        seen = _Rounds(model, layers, batches, num_samples, forward).run()
    _check_seen(seen, num_samples)
    return _merged_over_ranks(layers, recorders), seen


class _Rounds:
    """The ranks' way through their batches, together."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, _BatchNorm],
        batches: Iterable[Any],
        num_samples: int,
        forward: Forward,
    ) -> None:
        self._model, self._num_samples, self._forward = model, num_samples, forward
        self._source = Source(batches, _count)
        self._exchanges = any(isinstance(m, AbstractNormOverRanks | nn.SyncBatchNorm) for m in model.modules())
        self._layout = sum(buffer.numel() for layer in layers.values() for buffer in layer.buffers(recurse=False))
        self._empty: Any = None
        self._round = self._seen = 0

    def run(self) -> int:
        """Record until all ranks together have seen the samples, or have no more.

        Returns:
            The samples seen, over all ranks.
        """
        told_at = time.monotonic()
        while True:
            if self._seen < self._num_samples:
                self._source.fetch()
                self._source.attempt(self._keep_template)
            elif self._source.state == MORE:
                self._source.state, self._source.count = DONE, 0
            rows = self._hear_all()
            if all(row[0] == DONE for row in rows):
                return self._seen
            self._source.attempt(self._record)
            self._seen += sum(row[1] for row in rows)
            self._round += 1
            if time.monotonic() - told_at > _TELL_EVERY_S:
                told_at = time.monotonic()
                _log.info("calibrate(): %d of %d samples", self._seen, self._num_samples)

    def _keep_template(self) -> None:
        if self._exchanges and self._empty is None and self._source.state == MORE:
            self._empty = empty_like(self._source.batch)

    def _hear_all(self) -> list[list[int]]:
        """Learn what every rank has for this round, and raise on all of them where one cannot go on."""
        source, what = self._source, f"round {self._round + 1} of calibrate()"
        needs_template = self._exchanges and self._empty is None
        own = (source.state, source.count, needs_template, self._num_samples, self._layout)
        try:
            rows = start_notice(own, what).wait()
        except GroupError as error:
            if source.failure is None:
                raise
            raise source.failure from error  # what the others did not come for
        if any(row[0] == FAILED for row in rows):
            collectives.raise_together(source.failure, f"before {what}")
        _check_alike(rows)
        if any(row[2] for row in rows) and any(row[0] == MORE for row in rows):
            offered = collectives.agree(_on_host(self._empty), "the structure of an empty batch")
            if self._empty is None:
                self._empty = next(empty for empty in offered if empty is not None)
        return rows

    def _record(self) -> None:
        if self._source.state == MORE:
            self._forward(self._model, self._source.batch)
        elif self._exchanges:
            self._forward(self._model, self._empty)


def _layers_of(model: nn.Module) -> dict[str, _BatchNorm]:
    if not isinstance(model, nn.Module) or isinstance(model, nn.parallel.DistributedDataParallel):
        remedy = "Pass model.module." if isinstance(model, nn.Module) else "Give it the model first, then the batches."
        raise ConfigError(f"calibrate() got a {type(model).__name__}, that is not the model itself. {remedy}")
    layers = dict(normalization_layers(model))
    if not layers:
        raise ConfigError(
            f"calibrate() found no batch norm with running statistics in {type(model).__name__}: nothing is to be "
            "measured.\nGive it a model with nn.BatchNorm1d/2d/3d or distnorm's layers, before fold().",
        )
    return layers


def _check_arguments(batches: object, num_samples: int) -> None:
    if not isinstance(num_samples, SupportsIndex) or int(num_samples) < 1:
        raise ConfigError(f"calibrate() got num_samples={num_samples!r}; it must be at least 1. Give e.g. 1024.")
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise ConfigError(
            f"calibrate() got {batches!r} for its batches, that cannot be gone through. Give a DataLoader, or [x].",
        )
    if isinstance(batches, Tensor):
        raise ConfigError(
            f"calibrate() got one tensor {tuple(batches.shape)} for its batches. Give a list of batches: [x], or "
            "x.split(64).",
        )


def _check_alike(rows: list[list[int]]) -> None:
    for place, what in ((3, "num_samples"), (4, "the numbers in the batch norms")):
        values = [row[place] for row in rows]
        if len(set(values)) > 1:
            raise ConfigError(
                f"calibrate() was called with different models or settings: {what} are {values} on ranks 0, 1, ….\n"
                "Give every rank the same model and num_samples; only the batches may differ.",
            )


def _check_seen(seen: int, num_samples: int) -> None:
    if not seen:
        raise ConfigError(
            f"calibrate() got no samples: no batch came on any of {collectives.world_size()} ranks.\n"
            "Give it batches, e.g. a DataLoader; a generator gives them only once.",
        )
    if seen < num_samples:
        _log.warning("calibrate() measured %d samples: the batches had no more of the %d.", seen, num_samples)


def _inputs_of(batches: Iterable[Any]) -> Iterator[Tensor]:
    for batch in batches:  # a generator expression would begin here and now, where no random stream is kept
        yield input_of(batch)


def input_of(batch: Any) -> Tensor:
    """Take the input out of a batch: itself, or the first entry of a tuple, list or dictionary.

    Raises:
        ConfigError: that is no tensor with samples.
    """
    found = batch
    if isinstance(batch, Mapping):
        found = next(iter(batch.values()), None)
    elif isinstance(batch, tuple | list) and batch:
        found = batch[0]
    if not isinstance(found, Tensor) or not found.dim():
        raise ConfigError(
            f"calibrate() got a batch of type {type(batch).__name__}, whose first entry is no tensor [N, …].\n"
            'Say how the model takes it: forward=lambda model, batch: model(batch["…"]).',
        )
    return found


def _run_model(model: nn.Module, inputs: Tensor) -> Any:
    return model(inputs.to(next(normalization_layers(model))[1].running_mean.device))  # type: ignore[union-attr]


def _count(batch: Any) -> int:
    try:
        return count_samples(batch)
    except ConfigError:
        raise ConfigError(
            f"calibrate() got a batch of type {type(batch).__name__} without a tensor, so that its samples cannot be "
            "counted.\nGive batches that hold a tensor with the samples in dimension 0.",
        ) from None


def _on_host(empty: Any) -> Any:
    return empty.cpu() if isinstance(empty, Tensor) else empty


def _merged_over_ranks(layers: dict[str, _BatchNorm], recorders: dict[str, Recorder]) -> Statistics:
    """Merge the ranks' moments, all layers in one exchange."""
    packed = [recorder.packed() for recorder in recorders.values()]
    own_K = torch.cat([part.to(packed[0].device) for part in packed])
    rows_RK = collectives.gather(own_K, tuple(range(collectives.world_size())), "the gathering of calibrated moments")
    statistics: Statistics = {}
    for (name, layer), recorder, rows in zip(
        layers.items(), recorders.values(), rows_RK.split([len(part) for part in packed], 1), strict=True
    ):
        found = recorder.merged(rows)
        if found is None:
            _log.warning("calibrate(): no value came to layer %r: it is left out, and keeps its statistics.", name)
            continue
        mean, var = found
        own = {"running_mean": mean, "running_var": var, "num_batches_tracked": layer.num_batches_tracked}
        statistics |= {f"{name}.{key}".lstrip("."): value.clone() for key, value in own.items() if value is not None}
    return statistics
