"""The loss of a batch, asked of a model beside its training, as the mean over the samples of all ranks.

Legend: K numbers.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distnorm import collectives
from distnorm.errors import ConfigError
from distnorm.norms.kept import streams_kept
from distnorm.norms.over_ranks import AbstractNormOverRanks
from distnorm.uneven.batch import count_samples

Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Any]]
"""Gives the mean loss of a batch, one number, over this rank's samples; if it likes with the outputs [N, classes, *].

    lambda model, batch: cross_entropy(model(batch[0]), batch[1])
"""


@runtime_checkable
class TellsLoss(Protocol):
    """What a task has so that the gap between training and evaluation, and the probes, are measured.

    A `LightningModule` with these two is measured: `train_eval_gap(task.model, batch, task.probe_loss)`. One without
    goes unmeasured.

    Attributes:
        model: the network, that takes no part in logging.
    """

    model: nn.Module

    def probe_loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Give the mean training loss over a batch of this rank, and the outputs [N, classes, *].

        Logs nothing, counts nothing, and takes no part in any collective of its own. It is called in eval mode, with
        gradients or without; `batch` may have no samples.
        """


class Inquiry:
    """One question to a model: a batch of each rank, and what became of it.

    What fails on a rank is kept until all ranks meet, and raised on all of them.

    Args:
        asked: what the user called, for messages.
        model: the model itself.
        batch: this rank's, with tensors whose dimension 0 is samples; there may be none.
        loss: of it.

    Raises:
        ConfigError: the model is wrapped, or no model; or `loss` cannot be called.
    """

    def __init__(self, asked: str, model: nn.Module, batch: Any, loss: Loss) -> None:
        if not isinstance(model, nn.Module) or isinstance(model, nn.parallel.DistributedDataParallel):
            remedy = "Pass model.module." if isinstance(model, nn.Module) else "Give it the model, then the batch."
            raise ConfigError(f"{asked} got a {type(model).__name__}, that is not the model itself. {remedy}")
        if not callable(loss):
            raise ConfigError(
                f"{asked} got {loss!r} for its loss, that cannot be called.\n"
                "Give e.g. lambda model, batch: cross_entropy(model(batch[0]), batch[1]).",
            )
        self._asked, self._model, self._batch, self._loss = asked, model, batch, loss
        self.samples = 0
        self._failure: Exception | None = None
        try:
            self.samples = self._count()
        except ConfigError as error:
            self._failure = error
        exchanges = any(isinstance(m, AbstractNormOverRanks | nn.SyncBatchNorm) for m in model.modules())
        self._has_part = exchanges or self.samples > 0

    def ask(self) -> tuple[Tensor, Any]:
        """Run the loss: the mean over this rank's samples, and the outputs or `None`. Draws alike every time.

        Raises:
            ConfigError: the loss is no single number.
        """
        with streams_kept(self._model):
            answer = self._loss(self._model, self._batch)
        mean, outputs = (answer[0], answer[1]) if isinstance(answer, tuple) and len(answer) > 1 else (answer, None)
        if not isinstance(mean, Tensor) or mean.numel() != 1:
            what = f"a tensor {tuple(mean.shape)}" if isinstance(mean, Tensor) else f"a {type(mean).__name__}"
            raise ConfigError(
                f"The loss given to {self._asked} returned {what}; it must be one number, the mean over the batch.\n"
                "Return losses.mean(), or (losses.mean(), outputs).",
            )
        return mean.reshape(()), outputs

    def over_ranks(self, measure: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Measure K sums over this rank's samples, add up all ranks', and divide by all samples.

        Args:
            measure: gives them; it is not called where the batch has no samples, unless layers exchange in a forward.
            like: [K], of their dtype and device.

        Collective: 1 sum of K + 2 numbers over all ranks; and what `measure` exchanges. Every rank must call.

        Raises:
            ConfigError: no rank has a sample.
            GroupError: a rank failed and others did not; where all did, each raises its own.
        """
        sums_K = torch.zeros_like(like)
        if self._failure is None and self._has_part:
            try:
                found_K = measure()
                sums_K = found_K if self.samples else sums_K  # means over nothing are nan
            except Exception as error:  # noqa: BLE001 — whatever it is, the other ranks must hear of it
                self._failure = error
        flags = like.new_tensor([self.samples, self._failure is not None])
        everyone = tuple(range(collectives.world_size()))
        total_K = collectives.start_sum(torch.cat((sums_K, flags)), everyone, self._asked).wait()
        samples, failed = total_K[-2:].tolist()
        if failed:
            collectives.raise_together(self._failure, f"in {self._asked}")
        if not samples:
            raise ConfigError(
                f"{self._asked} got no samples: the batch is empty on all of {collectives.world_size()} ranks.\n"
                "Give it a batch with samples on some rank.",
            )
        return total_K[:-2] / float(samples)

    def device(self) -> torch.device:
        """Tell where the model is: its first parameter's or buffer's device."""
        tensors = (*self._model.parameters(), *self._model.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    def _count(self) -> int:
        try:
            return count_samples(self._batch)
        except ConfigError:
            raise ConfigError(
                f"{self._asked} got a batch of type {type(self._batch).__name__} without a tensor, so that its samples "
                "cannot be counted.\nGive one that holds a tensor with the samples in dimension 0.",
            ) from None
