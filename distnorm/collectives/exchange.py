"""The exchanges: gather and sum for layers, agreements and notices beside them. An error names the missing."""

import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm import positions, whereabouts
from distnorm.collectives import late, marks
from distnorm.collectives.groups import Numbers, control_group, group_of, is_debugging, twin_of
from distnorm.collectives.world import rank, store, world_size
from distnorm.errors import GroupError, ranks_in_words

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
_notice_numbers = Numbers()


def gather(values: Tensor, ranks: tuple[int, ...], what: str) -> Tensor:
    """Gather one flat tensor of equal length from each rank.

    Args:
        values: flat tensor of K numbers, the same K and dtype on every rank; float64 where `what` is a `Place`.
        ranks: who takes part, this rank among them.
        what: names the exchange in an error, e.g. `layer4.0.bn1 forward`. A `Place` says which layer's numbers these
            are, too: one more number travels, and the ranks compare.

    Returns:
        [len(ranks), K], rows in rank order, equal on all ranks bit for bit.

    Collective: 1 gather of K numbers over `ranks`, K + 1 with a `Place`.

    Raises:
        GroupError: a rank did not take part in time, or died; or the ranks' numbers are of different layers, or of
            different calls: on all of them alike. On an accelerator a later exchange raises that.
    """
    if len(ranks) == 1:
        return values.unsqueeze(0)
    place = _enter(values, ranks, what)
    if isinstance(what, marks.Place):
        values = torch.cat((values.new_full((1,), what.next_mark(ranks)), values))
    rows_RK = values.new_empty(len(ranks) * values.numel())
    try:
        _all_gather(rows_RK, values.contiguous(), group=group_of(ranks))
    except RuntimeError as error:
        raise_named(error, ranks, what)
    positions.leave(place)
    rows_RK = rows_RK.view(len(ranks), -1)
    if not isinstance(what, marks.Place):
        return rows_RK
    _compare(rows_RK[:, 0], marks.Gathered(ranks, what))
    return rows_RK[:, 1:]


def _compare(came: Tensor, marks_of: marks.Gathered | marks.Summed) -> None:
    """Raise on all ranks of a group where their marks differ; on an accelerator at a later exchange."""
    if came.is_cuda:
        late.look(came, marks_of)
    elif not marks_of.alike(came.tolist()):
        _raise_parted(marks_of, came.tolist())


def _raise_parted(marks_of: marks.Gathered | marks.Summed, came: list[float]) -> NoReturn:
    """Say which ranks were at which layer: all of them have found that they differ, and meet here once more."""
    ranks = marks_of.ranks
    try:
        whose = _hear_all(marks_of.place.whose(ranks), ranks, group_of(ranks))
    except RuntimeError as error:  # gloo ends a rank that receives more than it expects
        raise GroupError(marks_of.describe(came)) from error
    finally:
        marks_of.take_back()
    raise GroupError(whereabouts.parted(dict(zip(ranks, whose, strict=True)), positions.step_now()))


def start_gather(values: Tensor, ranks: tuple[int, ...], what: str) -> "Pending":
    """Start to gather one flat tensor of equal length from each rank; `wait` gives [len(ranks), K], as `gather` does.

    Collective: 1 gather of K numbers over `ranks`.

    Raises:
        GroupError: (also from `wait`) a rank did not take part in time, or died.
    """
    if len(ranks) == 1:
        return Pending(values.unsqueeze(0), None, ranks, what)
    rows_RK = values.new_empty(len(ranks) * values.numel())
    place, work = _enter(values, ranks, what), None
    try:
        work = _all_gather(rows_RK, values.contiguous(), group=group_of(ranks), async_op=True)
    except RuntimeError as error:
        raise_named(error, ranks, what)
    return Pending(rows_RK.view(len(ranks), -1), work, ranks, what, place)


class Pending:
    """An exchange that is under way; `wait` gives the tensor that holds it."""

    def __init__(
        self,
        values: Tensor,
        work: Any,
        ranks: tuple[int, ...],
        what: str,
        place: int = 0,
        mark: marks.Summed | None = None,
    ) -> None:
        self._values, self._work, self._ranks, self._what, self._place = values, work, ranks, what, place
        self._mark = mark

    def wait(self) -> Tensor:
        """Block (on CUDA: let the stream wait) until the result has arrived."""
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise_named(error, self._ranks, self._what)
            positions.leave(self._place)
        if self._mark is not None:
            mark, self._mark, came = self._mark, None, self._values[-marks.Summed.NUMBERS :]
            self._values = self._values[: -marks.Summed.NUMBERS]
            _compare(came, mark)
        return self._values


def start_sum(values: Tensor, ranks: tuple[int, ...], what: str) -> Pending:
    """Start to sum a flat tensor over ranks; `wait` gives the sums, in the place of the values or not.

    Args:
        values: flat tensor of K numbers; float32 or float64 where `what` is a `Place`.
        ranks: who takes part, this rank among them.
        what: names the exchange in an error; a `Place` marks it, as in `gather`.

    Collective: 1 sum of K numbers over `ranks`, K + 4 with a `Place`.

    Raises:
        GroupError: (also from `wait`) as `gather`; of a layer's calls a sum is not compared.
    """
    work, place, mark = None, 0, None
    if len(ranks) > 1:
        place = _enter(values, ranks, what)
        if isinstance(what, marks.Place):
            mark = what.marked_sum(ranks, values)
            values = torch.cat((values, mark.tensor))
        try:
            work = dist.all_reduce(values, group=group_of(ranks), async_op=True)
        except RuntimeError as error:
            raise_named(error, ranks, what)
    return Pending(values, work, ranks, what, place, mark)


def _enter(values: Tensor, ranks: tuple[int, ...], what: str) -> int:
    """Note where this rank is, and under `debug` compare it with the others."""
    place = positions.enter(what, ranks)
    if is_debugging():
        _check_same_place(values, ranks, what)
    return place


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
    group, rows_RK = control_group(), own_K.new_empty(world_size() * len(own_K))
    work = _all_gather(rows_RK, own_K, group=group, async_op=True)
    return rows_RK.view(world_size(), -1), work, _notice_numbers.next_of(group)


def _check_same_place(values: Tensor, ranks: tuple[int, ...], what: str) -> None:
    """Tell the ranks of a group what this one is about to exchange; raise on all of them where they differ."""
    twin = twin_of(ranks)
    if twin is None:
        return
    header = whereabouts.Header(str(what), values.numel(), str(values.dtype), positions.step_now())
    try:
        headers = _hear_all(header, ranks, twin)
    except RuntimeError as error:
        raise_named(error, ranks, what)
    if parted := whereabouts.compare(ranks, headers):
        raise GroupError(parted)


def raise_named(error: RuntimeError, ranks: Sequence[int], what: str, missing: Sequence[int] = ()) -> NoReturn:
    """Turn a backend's words into ours: who waited, where, for whom; and who was missing, where that is known."""
    if isinstance(error, GroupError):  # ours already: the group was destroyed
        raise error
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
