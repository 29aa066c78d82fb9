"""A few integers that every rank tells the others beside the training; who does not come is named.

Legend: R ranks, K integers.
"""

import datetime as dt
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distnorm import collectives
from distnorm.errors import GroupError, ranks_in_words

_ROLL_CALL_S = 2.0


class PendingNotice:
    """A few integers of every rank that are under way beside the training; `wait` gives them."""

    def __init__(self, rows_RK: Tensor, work: Any, number: int, what: str) -> None:
        self._rows_RK, self._work, self._number, self._what = rows_RK, work, number, what

    def wait(self, timeout_s: float | None = None) -> list[list[int]]:
        """Block until every rank's integers are here: one row a rank, in rank order.

        Args:
            timeout_s: how long to wait, in seconds; `None`, and at most, the process group's own timeout.

        Raises:
            GroupError: a rank did not come in time, or died; it says which, where the group's store still answers.
        """
        began = time.monotonic()
        try:
            if self._work is not None:
                self._work.wait(*() if timeout_s is None else (dt.timedelta(seconds=timeout_s),))
        except RuntimeError as error:
            waited_s = time.monotonic() - began
            came = self._call_the_roll()
            absent = sorted(set(range(collectives.world_size())) - set(came))
            if not (came and absent):
                collectives.raise_named(error, range(collectives.world_size()), self._what)
            missing, waiting = ranks_in_words(absent), ranks_in_words(came)
            raise GroupError(
                f"{missing} did not come to {self._what}; {waiting} did, and waited {waited_s:.3g} s.\n"
                "Look at what the missing ones print; where they are only slow, give a longer timeout.",
            ) from error
        return [[int(value) for value in row] for row in self._rows_RK.tolist()]

    def given_up(self) -> list[int]:
        """Name the ranks that no longer wait for this notice; none where the group's store does not answer."""
        try:
            store = collectives.store()
            return [r for r in range(collectives.world_size()) if store.check([self._key(r)])]
        except RuntimeError:
            return []

    def _call_the_roll(self) -> list[int]:
        """Say that this rank came and gave up, and hear for a moment who else did: the store outlives a collective."""
        try:
            collectives.store().set(self._key(collectives.rank()), "")
        except RuntimeError:
            return []
        deadline = time.monotonic() + _ROLL_CALL_S
        while len(came := self.given_up()) < collectives.world_size() - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        return came

    def _key(self, of_rank: int) -> str:
        return f"distnorm/gave_up/{self._number}/{of_rank}"


def start_notice(values: Sequence[int], what: str) -> PendingNotice:
    """Start to tell every rank a few integers, beside the training collectives; the host goes on.

    Args:
        values: K integers, the same K on every rank.
        what: names the exchange in an error.

    Collective: 1 gather of K integers over the gloo side group of all ranks, from CPU memory: no device is asked.

    Raises:
        GroupError: (also from `wait`) a rank did not take part in time, or died.
    """
    own_K = torch.tensor(list(values), dtype=torch.int64)
    if collectives.world_size() == 1:
        return PendingNotice(own_K[None], None, 0, what)
    try:
        return PendingNotice(*collectives.start_notice(own_K), what)
    except RuntimeError as error:
        collectives.raise_named(error, range(collectives.world_size()), what)
