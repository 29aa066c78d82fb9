"""Votes of all ranks beside the training: each says what it wants, and all hear the most that anybody wants.

Legend: K wishes.
"""

import contextlib
import datetime as dt
from typing import Any

import torch.distributed as dist
from torch import Tensor

from distnorm import positions
from distnorm.collectives.exchange import raise_named
from distnorm.collectives.groups import Numbers, control_group
from distnorm.collectives.world import rank, store, world_size

_numbers = Numbers()


class Vote:
    """A vote that is under way; `wait` gives its outcome.

    Started at one step and waited for at the next it costs nearly nothing: it has arrived by then.

    Args:
        wishes_K: this rank's, then everybody's.
        what: names the vote in an error.
        work: what carries it; `None` for one rank alone.
        number: of this vote, alike on all ranks.
    """

    def __init__(self, wishes_K: Tensor, what: str, work: Any, number: int) -> None:
        self._wishes_K, self._what, self._work, self._number = wishes_K, what, work, number

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Block until every rank has voted.

        Args:
            timeout_s: how long to wait for the others, in seconds; `None`: as long as any exchange of the group may.

        Returns:
            [K], of each wish the greatest; equal on all ranks.

        Raises:
            GroupError: a rank did not vote in time, or died; the message names those that had not come.
        """
        if self._work is None:
            return self._wishes_K
        ranks = tuple(range(world_size()))
        place = positions.enter(self._what, ranks)
        if not self._work.is_completed():
            self._leave_word()
        try:
            self._work.wait(*(() if timeout_s is None else (dt.timedelta(seconds=timeout_s),)))
        except RuntimeError as error:
            raise_named(error, ranks, self._what, self._missing())
        positions.leave(place)
        return self._wishes_K

    def _key(self, of: int) -> str:
        return f"distnorm/vote/{self._number}/{of}"

    def _leave_word(self) -> None:
        """Tell the store that this rank waits: whoever left no word when a vote fails had not come."""
        with contextlib.suppress(RuntimeError):  # the store went with its rank: the wait that follows says so
            store().set(self._key(rank()), "here")

    def _missing(self) -> list[int]:
        """Name the other ranks that left no word; none where the store is gone with the rank that held it."""
        try:
            return [r for r in range(world_size()) if r != rank() and not store().check([self._key(r)])]
        except RuntimeError:
            return []


def start_vote(wishes_K: Tensor, what: str) -> Vote:
    """Start to tell all ranks how much this one wants of each of K things, beside the training collectives.

    Args:
        wishes_K: integers [K], as many on every rank; 0 wants nothing. Overwritten with the outcome.
        what: names the vote in an error.

    Collective: 1 maximum of K integers over the gloo side group of all ranks; the first call makes that group. Every
        rank must call. Without a process group, or with one rank in it: none.

    Raises:
        GroupError: a rank is known to have died.

    Example:
        >>> import torch
        >>> start_vote(torch.tensor([2, 0]), "the vote on lunch").wait().tolist()
        [2, 0]
    """
    if world_size() == 1:
        return Vote(wishes_K, what, None, 0)
    group = control_group()
    try:
        work = dist.all_reduce(wishes_K, op=dist.ReduceOp.MAX, group=group, async_op=True)
    except RuntimeError as error:
        raise_named(error, tuple(range(world_size())), what)
    return Vote(wishes_K, what, work, _numbers.next_of(group))
