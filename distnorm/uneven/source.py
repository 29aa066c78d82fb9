"""This rank's own batches, and what became of them: more, done or failed."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Batch = TypeVar("Batch")

MORE, DONE, FAILED = range(3)


class Source(Generic[Batch]):
    """This rank's own batches, one at a time; what goes wrong is kept, so that the others can be told first."""

    def __init__(self, loader: Iterable[Batch], count: Callable[[Batch], int]) -> None:
        self._loader, self._count_of = loader, count
        self._iterator: Iterator[Batch] | None = None
        self.state, self.count, self.seconds = MORE, 0, 0.0
        self.batch: Batch | None = None
        self.failure: Exception | None = None

    def fetch(self) -> None:
        """Replace `batch`, `count` and `state` by those of the next batch."""
        began = time.monotonic()
        self.batch, self.count = None, 0
        if self.state == MORE:
            self.attempt(self._advance)
        self.seconds = time.monotonic() - began

    def attempt(self, act: Callable[[], None]) -> None:
        """Do something with the data; if it fails, this rank has failed."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 — whatever it is, the other ranks must hear of it
            self.state, self.failure, self.batch, self.count = FAILED, error, None, 0

    def _advance(self) -> None:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            self.batch = next(self._iterator)
        except StopIteration:
            self.state, self._iterator = DONE, None
        else:
            self.count = self._count_of(self.batch)
