"""Uneven data: ranks with different numbers of batches finish an epoch together; no hang, no sample left out.

Legend: N samples of this rank, R ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NoReturn, TypeVar, cast

from torch import nn

from distnorm import collectives
from distnorm.errors import ConfigError, GroupError, ranks_in_words
from distnorm.uneven.batch import count_samples, empty_like
from distnorm.uneven.layers import intolerant_layer
from distnorm.uneven.notice import PendingNotice, start_notice
from distnorm.uneven.source import DONE, FAILED, MORE, Source

Batch = TypeVar("Batch")


class EvenLoader(Generic[Batch]):
    """Go through a loader so that all ranks take as many steps as the one with most batches.

    A rank that has run out gets *empty* batches: the same structure with N = 0. It goes on taking part in every
    collective of the step, so that synchronized layers and DDP's reduction of gradients work as before. Divide the
    summed loss by `share`, the samples of the step over all ranks / R: DDP's mean over ranks is then the gradient of
    the mean loss over the joined batch, whatever each rank contributed. Evaluation needs none of this
    (`EvaluationBatchSampler`).

    One batch is fetched ahead, and what this rank has is told to the others before the step in between: the notice
    is there when it is read. A loader that raises is told too: the step that is under way is finished, then all ranks
    raise together.

    Ranks need not be given the data by any rule, and nothing deals it for them: each goes through its own loader.
    Lightning puts no `DistributedSampler` into an `EvenLoader`.

    Empty batches in torch (2.13, CPU, training and backward): linear, convolutions, pooling, padding, upsampling,
    group, layer and RMS norm, embeddings, RNN, LSTM and GRU, attention, transformer layers and dropout take them and
    give gradients of zero. `nn.InstanceNorm*` raises if affine, and makes running statistics NaN; `nn.PixelShuffle`
    and `nn.PixelUnshuffle` raise in backward; `x.view(len(x), -1)` is ambiguous (`x.flatten(1)` is not); a `mean` loss
    is 0 / 0. `nn.BatchNorm*` leaves mean and variance alone but adds 1 to `num_batches_tracked`, which is wrong for
    `momentum=None`, and it normalizes each rank alone, so that no weighting makes it one joined batch. `model` refuses
    these layers, and knows no others: what a model's own code does with N = 0 is for its author to see.

    Args:
        loader: this rank's batches: any iterable, with or without `len`, that can be gone through once an epoch; e.g. a
            DataLoader. Every tensor of a batch (in tuples, lists and dictionaries of any depth) has the samples in
            dimension 0.
        model: checked before the first step for layers that cannot take an empty batch, if a rank may run out before
            others; `None`: not checked.
        empty: what a rank that has run out gets; `None` makes it of the first batch, on a rank that never had one of
            another rank's (on the CPU).
        count: counts the samples of a batch (or tokens, whatever the loss is a mean over); `None`: dimension 0 of
            its first tensor.
        timeout_s: how long to wait for the slowest rank's next batch, in seconds; `None`, and at most, the process
            group's own.

    Attributes:
        loader: the wrapped one.

    Collective: each step 1 gather of 5 integers over the gloo side group, started a step ahead. Once, when constructed
        (before there is a process group: at the first `len` or step): 1 agreement on the ranks' lengths. Where a rank
        may run out first: 1 a pass on `model`; once 1 on the empty batch, if a rank never had any. Every rank must
        construct it, go through it, and leave the loop in the same step. Without a process group: none.

    Raises:
        ConfigError: (from the first step, on all ranks alike) `model` has layers that cannot take an empty batch.
        GroupError: (on all ranks alike) a rank's loader raised, or did not give a batch in time, or ranks left
            the loop in different steps.

    Example:
        >>> import torch
        >>> loader = EvenLoader([(torch.ones(3, 2), torch.ones(3)), (torch.ones(1, 2), torch.ones(1))])
        >>> for inputs, targets in loader:
        ...     print(len(inputs), loader.share)
        3 3.0
        1 1.0

    Source: the purpose of torch's `Join` (torch.distributed.algorithms.join), which shadows the collectives of DDP for
        ranks that have run out. It knows nothing of a layer's own collectives, nor of a rank's number of samples.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        model: nn.Module | None = None,
        *,
        empty: Batch | None = None,
        count: Callable[[Batch], int] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if isinstance(loader, nn.Module) or not isinstance(loader, Iterable):
            raise ConfigError(
                f"EvenLoader got a {type(loader).__name__}, that gives no batches. "
                "Give it the loader first, then the model."
            )
        if timeout_s is not None and timeout_s <= 0:
            raise ConfigError(f"timeout_s={timeout_s} must be above 0. Give seconds, or None for the process group's.")
        self.loader = loader
        self._model, self._empty, self._timeout_s = model, empty, timeout_s
        self._count: Callable[[Batch], int] = count or count_samples
        self._totals: list[int] = []
        self._passes = 0
        self._unheard: tuple[PendingNotice, str] | None = None
        self._lengths: list[int | None] = []
        self._agree_on_lengths()

    @property
    def share(self) -> float:
        """Samples of the step that the loop is in, over all ranks, divided by the ranks; 1 / R if there are none.

        Who fetches ahead, as Lightning may, asks `global_count` with the number of the step instead.
        """
        return max(1, self.global_count(len(self._totals) - 1)) / collectives.world_size()

    def global_count(self, step: int) -> int:
        """Count the samples of one step over all ranks.

        Args:
            step: of this pass through the data, 0 for the first; it must have been fetched.

        Raises:
            IndexError: it has not been fetched yet.
        """
        if not 0 <= step < len(self._totals):
            raise IndexError(
                f"step={step} is none of the {len(self._totals)} that were fetched in this pass. Ask inside its loop."
            )
        return self._totals[step]

    @property
    def sampler(self) -> Any:
        """The wrapped loader's sampler: Lightning announces epochs to it."""
        return getattr(self.loader, "sampler", None)

    @property
    def batch_sampler(self) -> Any:
        """The wrapped loader's batch sampler, for the same purpose."""
        return getattr(self.loader, "batch_sampler", None)

    def set_epoch(self, epoch: int) -> None:
        """Announce an epoch to the wrapped loader and its samplers, whichever of them listen.

        Args:
            epoch: 0 for the first.
        """
        listeners = [self.loader, self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None)]
        for listener in {id(one): one for one in listeners}.values():
            if callable(announce := getattr(listener, "set_epoch", None)):
                announce(epoch)

    def check(self, model: nn.Module) -> None:
        """Refuse a model with layers that cannot take an empty batch, unless all ranks' lengths are equal.

        Args:
            model: in the mode it is trained in.

        Collective: 1 agreement, if ranks' lengths differ or are unknown.

        Raises:
            ConfigError: on all ranks alike: the first such layer of the lowest rank that has one.
        """
        lengths = self._agree_on_lengths()
        if len(lengths) > 1 and (None in lengths or len(set(lengths)) > 1):
            known = ", ".join("unknown" if length is None else str(length) for length in lengths)
            self._refuse_layers(model, f"the ranks have {known} batches")
        self._model = model

    def __len__(self) -> int:
        """Count the steps of an epoch: the most batches that a rank has.

        Raises:
            TypeError: some rank's loader has no length.
        """
        lengths = self._agree_on_lengths()
        without = [r for r, length in enumerate(lengths) if length is None]
        if without:
            raise TypeError(f"EvenLoader has no len(): the loader of {ranks_in_words(without)} has none.")
        return max(length or 0 for length in lengths)

    def __iter__(self) -> Iterator[Batch]:
        totals: list[int] = []
        self._totals = totals
        if collectives.world_size() == 1:
            for batch in self.loader:
                totals.append(self._count(batch))
                yield batch
            return
        if self._unheard is not None:  # the last loop was left early: on all ranks in the same step, or they hear it
            self._hear_places(*self._unheard)
        if self._model is not None:
            self.check(self._model)
        self._passes += 1
        source = Source(self.loader, self._count)
        notice = self._announce(source, 0)
        someone_ran_dry = False
        while True:
            rows = self._hear(notice, source, len(totals))
            if all(row[0] == DONE for row in rows):
                return
            if not someone_ran_dry and any(row[0] == DONE for row in rows):
                someone_ran_dry = True
                self._prepare_for_empty(rows)
            own = self._empty if source.state == DONE else source.batch
            totals.append(sum(row[1] for row in rows))
            notice = self._announce(source, len(totals))
            yield cast("Batch", own)

    def _announce(self, source: Source[Batch], step: int) -> PendingNotice:
        """Fetch this rank's next batch, and start to tell the others what it has."""
        source.fetch()
        if source.state == MORE and self._empty is None:
            source.attempt(lambda: self._keep_template(source.batch))
        needs_template = source.state == DONE and self._empty is None
        what = _what(self._passes, step)
        notice = start_notice((source.state, source.count, self._passes, step, needs_template), what)
        self._unheard = notice, what
        return notice

    def _hear(self, notice: PendingNotice, source: Source[Batch], step: int) -> list[list[int]]:
        """Wait for what the ranks have, and raise on all alike where they cannot go on."""
        what = _what(self._passes, step)
        if self._timeout_s is not None and source.seconds > self._timeout_s and (gone := notice.given_up()):
            raise GroupError(
                f"The loader of rank {collectives.rank()} took {source.seconds:.3g} s for {what}; "
                f"{ranks_in_words(gone)} gave up after timeout_s={self._timeout_s}.\n"
                "Load faster (more num_workers), or give EvenLoader a longer timeout_s.",
            )
        rows = self._hear_places(notice, what)
        if any(row[0] == FAILED for row in rows):
            _raise_failure(source.failure, what)
        return rows

    def _hear_places(self, notice: PendingNotice, what: str) -> list[list[int]]:
        """Wait for a notice, and raise on all ranks where theirs are of different steps."""
        self._unheard = None
        rows = notice.wait(self._timeout_s)
        if len({(row[2], row[3]) for row in rows}) > 1:
            places = ", ".join(f"rank {r} in step {row[3]} of pass {row[2]}" for r, row in enumerate(rows))
            raise GroupError(
                f"The ranks are at different places of their data: {places}.\n"
                "Construct an EvenLoader, start a pass and leave its loop on all ranks in the same step.",
            )
        return rows

    def _prepare_for_empty(self, rows: list[list[int]]) -> None:
        """Do what is needed before the first empty batch of a pass; every rank gets here, for all have read `rows`."""
        if self._model is not None:
            dry = [r for r, row in enumerate(rows) if row[0] == DONE]
            self._refuse_layers(self._model, f"{ranks_in_words(dry)} ran out first")
        if any(row[4] for row in rows):
            offered = collectives.agree(self._empty, "the structure of an empty batch")
            if self._empty is None:
                self._empty = next(empty for empty in offered if empty is not None)

    def _keep_template(self, batch: Batch | None) -> None:
        self._empty = empty_like(batch)

    def _refuse_layers(self, model: nn.Module, why: str) -> None:
        found = collectives.agree(intolerant_layer(model), "the check of layers for empty batches")
        first = next((layer for layer in found if layer is not None), None)
        if first is not None:
            name, rule, remedy = first
            raise ConfigError(
                f"{name} {rule}, and a rank will get empty batches: {why}.\n"
                f"{remedy}, or give every rank as many batches.",
            )

    def _agree_on_lengths(self) -> list[int | None]:
        """Learn every rank's length once: where a `len` or a step asks, ranks need not be at the same place."""
        if collectives.world_size() == 1:
            return [_length_of(self.loader)]
        if not self._lengths:
            self._lengths = collectives.agree(_length_of(self.loader), "the agreement on the length of an EvenLoader")
        return self._lengths


def _length_of(loader: object) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 — a rank that raised here would leave the others waiting for its length
        return None


def _raise_failure(own: Exception | None, what: str) -> NoReturn:
    words = None if own is None else f"{type(own).__name__}: {(str(own).strip().splitlines() or [''])[0][:160]}"
    every = collectives.agree(words, "the news of a loader that raised")
    failed = [r for r, text in enumerate(every) if text is not None]
    raise GroupError(
        f"The loader of {ranks_in_words(failed)} raised at {what}: {every[failed[0]]}\n"
        "All ranks stop here. The traceback of the rank that raised has the cause.",
    ) from own


def _what(passes: int, step: int) -> str:
    return f"batch {step} of pass {passes} through the data"
