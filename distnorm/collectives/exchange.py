"""The exchanges: gather and sum for layers, agreements and notices beside them. An error names the missing."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor

from distnorm import positions, whereabouts
from distnorm.collectives.groups import control_group, group_of, is_debugging, twin_of
from distnorm.collectives.world import rank, store, world_size
from distnorm.errors import GroupError, ranks_in_words

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
_notice_numbers: tuple[Any, Iterator[int]] = (None, itertools.count())  # of a control group; alike on all ranks


def gather(values: Tensor, ranks: tuple[int, ...], what: str) -> Tensor:
    """Gather one flat tensor of equal length from each rank.

    Args:
        values: flat tensor of K numbers, the same K and dtype on every rank.
        ranks: who takes part, this rank among them.
        what: names the exchange in an error, e.g. `layer4.0.bn1 forward`.

    Returns:
        [len(ranks), K], rows in rank order, equal on all ranks bit for bit.

    Collective: 1 gather of K numbers over `ranks`.

    Raises:
        GroupError: a rank did not take part in time, or died.
    """
    if len(ranks) == 1:
        return values.unsqueeze(0)
    rows_RK = values.new_empty(len(ranks) * values.numel())
    place = positions.enter(what, ranks)
    if is_debugging():
        _check_same_place(values, ranks, what)
    try:
        _all_gather(rows_RK, values.contiguous(), group=group_of(ranks))
    except RuntimeError as error:
        raise_named(error, ranks, what)
    positions.leave(place)
    return rows_RK.view(len(ranks), -1)


class PendingSum:
    """A sum over ranks that is under way; `wait` gives the tensor that holds it."""

    def __init__(self, values: Tensor, work: Any, ranks: tuple[int, ...], what: str, place: int = 0) -> None:
        self._values, self._work, self._ranks, self._what, self._place = values, work, ranks, what, place

    def wait(self) -> Tensor:
        """Block (on CUDA: let the stream wait) until the sum has arrived."""
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise_named(error, self._ranks, self._what)
            positions.leave(self._place)
        return self._values


def start_sum(values: Tensor, ranks: tuple[int, ...], what: str) -> PendingSum:
    """Start to sum a flat tensor over ranks, in place.

    Collective: 1 sum of `values.numel()` numbers over `ranks`.

    Raises:
        GroupError: (also from `wait`) a rank did not take part in time, or died.
    """
    work, place = None, 0
    if len(ranks) > 1:
        place = positions.enter(what, ranks)
        if is_debugging():
            _check_same_place(values, ranks, what)
        try:
            work = dist.all_reduce(values, group=group_of(ranks), async_op=True)
        except RuntimeError as error:
            raise_named(error, ranks, what)
    return PendingSum(values, work, ranks, what, place)


def agree(value: Any, what: str, *, call_roll: bool = False) -> list[Any]:
    """Tell every rank something, and hear it from every rank, beside the training collectives.

    Args:
        value: anything that pickles; small.
        what: names the exchange in an error.
        call_roll: leave word in the process group's store first, so that an error names the ranks that never came.

    Returns:
        One value a rank, in rank order, equal on all ranks.

    Collective: 2 gathers over the gloo side group of all ranks; the first call makes that group. Blocks the host.

    Raises:
        GroupError: a rank did not take part in time, or died.
    """
    if world_size() == 1:
        return [value]
    ranks = tuple(range(world_size()))
    place = positions.enter(what, ranks)
    roll = _Roll(what) if call_roll else None
    try:
        answers = _hear_all(value, ranks, control_group())
    except RuntimeError as error:
        raise_named(error, ranks, what, roll.missing() if roll else [])
    positions.leave(place)
    return answers


def _hear_all(value: Any, ranks: tuple[int, ...], group: Any) -> list[Any]:
    answers: list[Any] = [None] * len(ranks)
    dist.all_gather_object(answers, value, group=group)
    return answers


class _Roll:
    """Who came to an agreement, as the process group's store knows it."""

    _calls = 0

    def __init__(self, what: str) -> None:
        _Roll._calls += 1
        self._key = f"distnorm/{what}/{_Roll._calls}"
        self._store = store()
        with contextlib.suppress(RuntimeError):  # the store went with its rank: the exchange that follows says so
            self._store.set(f"{self._key}/{rank()}", "here")

    def missing(self) -> list[int]:
        """Name the ranks that left no word; none where the store is gone with the rank that held it."""
        try:
            return [r for r in range(world_size()) if not self._store.check([f"{self._key}/{r}"])]
        except RuntimeError:
            return []


def start_notice(own_K: Tensor) -> tuple[Tensor, Any, int]:
    """Start to tell every rank K integers, beside the training collectives: for `uneven.notice`, that words failures.

    Returns:
        [R, K], filled once the work that comes next has been waited for; and the number of this notice, alike on all
        ranks.

    Collective: 1 gather of K integers over the gloo side group of all ranks; the first call makes that group.
    """
    global _notice_numbers  # noqa: PLW0603
    group, rows_RK = control_group(), own_K.new_empty(world_size() * len(own_K))
    if _notice_numbers[0] is not group:
        _notice_numbers = (group, itertools.count())
    work = _all_gather(rows_RK, own_K, group=group, async_op=True)
    return rows_RK.view(world_size(), -1), work, next(_notice_numbers[1])


def _check_same_place(values: Tensor, ranks: tuple[int, ...], what: str) -> None:
    """Tell the ranks of a group what this one is about to exchange; raise on all of them where they differ."""
    twin = twin_of(ranks)
    if twin is None:
        return
    header = whereabouts.Header(what, values.numel(), str(values.dtype), positions.step_now())
    try:
        headers = _hear_all(header, ranks, twin)
    except RuntimeError as error:
        raise_named(error, ranks, what)
    if parted := whereabouts.compare(ranks, headers):
        raise GroupError(parted)


def raise_named(error: RuntimeError, ranks: Sequence[int], what: str, missing: Sequence[int] = ()) -> NoReturn:
    """Turn a backend's words into ours: who waited, where, for whom; and who was missing, where that is known."""
    waits = whereabouts.Wait(rank(), tuple(ranks), what, (str(error).strip().splitlines() or ["no words"])[0][:160])
    raise GroupError(waits.in_words(missing, positions.read_this_run())) from error


def raise_together(own: Exception | None, where: str) -> NoReturn:
    """Raise on all ranks alike where some failed: an error that names them, or, where all did, each its own.

    Args:
        own: what this rank raised, if it did.
        where: e.g. `in train_eval_gap()`.

    Collective: 1 agreement; every rank must call.

    Raises:
        GroupError: some ranks did not fail.
    """
    words = None if own is None else f"{type(own).__name__}: {(str(own).strip().splitlines() or [''])[0][:160]}"
    every = agree(words, f"the news of what failed {where}")
    failed = [r for r, text in enumerate(every) if text is not None]
    if own is not None and len(failed) == len(every):  # whatever it is, nobody waits
        raise own
    raise GroupError(
        f"{ranks_in_words(failed)} raised {where}: {every[failed[0]]}\n"
        "All ranks stop here, and their models are as they were. The traceback of the rank that raised has the cause.",
    ) from own
