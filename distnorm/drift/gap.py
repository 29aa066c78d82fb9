"""The train/eval gap: what evaluating with other statistics than those of the batch costs, and which layer costs it.

Legend: N samples, K numbers.
"""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.drift.losses import Inquiry, Loss
from distnorm.norms.kept import undisturbed
from distnorm.population import check_statistics
from distnorm.recording import batch_norms, held_norms, refusing_one_value, use_batch_statistics


@dataclass(frozen=True)
class Gap:
    """What the choice of statistics changes for one batch; means over the samples of all ranks.

    Attributes:
        batch_loss: with the batch's own statistics, as in training.
        running_loss: with those of evaluation.
        gap: `running_loss - batch_loss`.
        relative: `gap / |batch_loss|`.
        flip_rate: share of predictions (argmax over dimension 1) that differ; nan where the loss gave no outputs
            [N, 2 classes or more, *].
    """

    batch_loss: float
    running_loss: float
    gap: float
    relative: float
    flip_rate: float


def train_eval_gap(model: nn.Module, batch: Any, loss: Loss, *, statistics: Mapping[str, Tensor] | None = None) -> Gap:
    """Measure what a model's loss gains when the statistics of evaluation take the place of the batch's own.

        gap = loss(batch; evaluation statistics) - loss(batch; its own statistics)

    The same batch twice, with the same weights and random streams: all else, dropout too, is in eval mode in both. A
    layer normalizes as in training, with its batch's own statistics: synchronized layers with those of their ranks,
    ghosts as ghosts, batch renormalization with its correction; but a batch norm that is in eval mode while the model
    trains is held constant, and stays so. A model without batch statistics has gap 0 exactly.

    The model is left as it was, whatever happens: parameters, gradients, buffers, modes, hooks, graphs that wait for
    their backward, and every random stream.

    Args:
        model: not wrapped in DDP; the same on every rank.
        batch: this rank's. Ranks may have different numbers of samples, or none.
        loss: of a batch; see `Loss`.
        statistics: of evaluation, from `calibrate` or `pool_running_stats`; `None`: the layers' running ones.

    Collective: 1 sum of 5 numbers over all ranks, and what the model's layers exchange in one training forward: in
        eval mode they exchange nothing. Every rank must call; one without samples runs the model only where its layers
        exchange.

    Raises:
        ConfigError: the model is wrapped in DDP; no rank has samples; a layer gets 1 value a channel; the loss is no
            single number; or `statistics` are not this model's.
        GroupError: (on all ranks alike) the model or the loss of some ranks raised. Where that happens between the
            exchanges of its layers, the others wait there for the group's timeout.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))  # its running statistics are mean 0, variance 1
        >>> found = train_eval_gap(model, torch.tensor([[3.0], [5.0]]), lambda model, x: model(x).square().mean())
        >>> f"{found.batch_loss:.3f} {found.running_loss:.3f}"
        '1.000 17.000'

    Source: the train-test inconsistency of Wu & Johnson 2021, for one batch.
    """
    inquiry = Inquiry("train_eval_gap()", model, batch, loss)
    with _switched(model, statistics, "train_eval_gap()") as norms:

        def measure() -> Tensor:
            batch_loss, outputs = inquiry.ask()
            expected = _predictions(outputs)
            running_loss, flipped = batch_loss, outputs
            if norms.with_two_ways:
                norms.evaluate(norms.layers)
                running_loss, flipped = inquiry.ask()
            share = _share_that_differs(expected, _predictions(flipped))
            return inquiry.samples * torch.stack([value.to(like_3) for value in (batch_loss, running_loss, share)])

        like_3 = torch.zeros(3, dtype=torch.float64, device=inquiry.device())
        batch_loss, running_loss, flip_rate = inquiry.over_ranks(measure, like_3).tolist()
    gap = running_loss - batch_loss
    relative = gap / abs(batch_loss) if batch_loss else math.copysign(math.inf, gap) if gap else 0.0
    return Gap(batch_loss, running_loss, gap, relative, flip_rate)


def attribute(
    model: nn.Module, batch: Any, loss: Loss, *, statistics: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Find the layers that the train/eval gap comes from: what each adds when it alone has statistics of evaluation.

        share of a layer = loss(its evaluation statistics, all others the batch's own) - loss(all the batch's own)

    In the unit of the loss. The shares do not add up to the gap exactly: each is measured with the others as in
    training, and a layer's change goes through, and is partly undone by, the norms behind it.

    Args:
        model: as for `train_eval_gap`.
        batch: likewise.
        loss: likewise.
        statistics: likewise.

    Returns:
        A share by the name of each layer that can normalize in both ways, in the model's order.

    Collective: 1 sum of 3 numbers and 1 a layer over all ranks, and for each of the forwards, 1 and 1 a layer, what the
        layers on batch statistics exchange.

    Raises:
        ConfigError: as `train_eval_gap`.
        GroupError: likewise.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
        >>> model[1].running_mean.fill_(2.0)
        tensor([2.])
        >>> shares = attribute(model, torch.tensor([[3.0], [5.0]]), lambda model, x: model(x).square().mean())
        >>> {name: f"{share:.2f}" for name, share in shares.items()}
        {'0': '0.00', '1': '4.00'}
    """
    inquiry = Inquiry("attribute()", model, batch, loss)
    with _switched(model, statistics, "attribute()") as norms:
        names = norms.with_two_ways

        def measure() -> Tensor:
            losses = [inquiry.ask()[0].to(like_K)]
            for name in names:
                norms.evaluate({name})
                losses.append(inquiry.ask()[0].to(like_K))
            return inquiry.samples * torch.stack(losses)

        like_K = torch.zeros(1 + len(names), dtype=torch.float64, device=inquiry.device())
        base, *switched = inquiry.over_ranks(measure, like_K).tolist()
    return {name: value - base for name, value in zip(names, switched, strict=True)}


class _Norms:
    """The batch norms of an undisturbed model, each on the statistics of its batch or on those of evaluation."""

    def __init__(self, layers: dict[str, _BatchNorm], held: Collection[str], statistics: Mapping[str, Tensor]) -> None:
        self.layers = layers
        self._held, self._statistics = held, statistics
        self._own = {name: dict(layer._buffers) for name, layer in layers.items()}  # noqa: SLF001
        for layer in layers.values():
            use_batch_statistics(layer)
        self.evaluate(())

    @property
    def with_two_ways(self) -> list[str]:
        """Name the layers that evaluation changes."""
        given = {key.rpartition(".")[0] for key in self._statistics}
        return [name for name in self.layers if name not in self._held or name in given]

    def evaluate(self, names: Collection[str]) -> None:
        """Give these layers the statistics of evaluation, all others those of their batch.

        Buffers are bound anew, not written: a graph may wait for its backward.
        """
        for name, layer in self.layers.items():
            layer.training = name not in names and name not in self._held
            for key, own in self._own[name].items():
                found = self._statistics.get(f"{name}.{key}".lstrip(".")) if name in names else None
                layer._buffers[key] = own if own is None or found is None else found.to(own)  # noqa: SLF001


@contextlib.contextmanager
def _switched(model: nn.Module, statistics: Mapping[str, Tensor] | None, asked: str) -> Iterator[_Norms]:
    if statistics is not None:
        check_statistics(model, statistics)
    layers = batch_norms(model)
    held = held_norms(model)
    with undisturbed(model), refusing_one_value(layers, asked):
        yield _Norms(layers, held, statistics or {})


def _predictions(outputs: Any) -> Tensor | None:
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or outputs.shape[1] < 2:
        return None
    return outputs.argmax(1)


def _share_that_differs(expected: Tensor | None, found: Tensor | None) -> Tensor:
    if expected is None or found is None or not expected.numel():
        return torch.tensor(math.nan)
    return (expected != found).double().mean()
