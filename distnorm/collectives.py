"""Ranks, their groups and the few exchanges that distnorm makes: the only room that talks to `torch.distributed`.

A layer never holds a process group; it names its ranks (`sync_ranks` or `group_ranks`) and asks here, so that it can be
copied, pickled and moved to another cluster. Without a process group every function answers for one rank alone.
"""

import contextlib
import datetime as dt
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm import positions, whereabouts
from distnorm.errors import ConfigError, GroupError, divisors_in_words

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
_groups: dict[tuple[int, ...], Any] = {}
_groups_of: Any = None
_control: tuple[Any, Any] = (None, None)  # the world it belongs to, and its gloo side group
_twins: dict[tuple[int, ...], Any] = {}  # of each group, a gloo group of the same ranks for headers
_debug = False


def is_running() -> bool:
    """Tell whether this process is one of several that share a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among all ranks; 0 without a process group."""
    return dist.get_rank() if is_running() else 0


def world_size() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if is_running() else 1


def members(sync_ranks: int | None, group_ranks: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Name the ranks that pool with this one, and make their process group where there is none yet.

    Args:
        sync_ranks: ranks that pool together, in blocks of consecutive ranks; `None` means all.
        group_ranks: an arbitrary subset instead; a rank outside it stays alone.

    Returns:
        Rank numbers in ascending order, this rank's among them.

    Collective: the first call for a partition must be reached by *every* rank of the world, members or not: nccl can
        split a communicator only so. Later calls: none.

    Raises:
        ConfigError: `sync_ranks` does not divide the world size, or `group_ranks` are not ranks in ascending order.
    """
    me, world = rank(), world_size()
    if sync_ranks is not None and sync_ranks < 1:
        raise ConfigError(f"sync_ranks={sync_ranks} must be at least 1. Give a number of ranks, or None for all.")
    if world == 1:
        return (0,)
    if group_ranks is not None:
        if sorted(set(group_ranks)) != list(group_ranks) or not set(group_ranks) <= set(range(world)):
            raise ConfigError(
                f"group_ranks={group_ranks} must be different ranks below world_size={world}, in ascending order.\n"
                f"Use e.g. group_ranks={tuple(range(world))[:2]}.",
            )
        _make_groups((group_ranks,))
        return group_ranks if me in group_ranks else (me,)
    size = world if sync_ranks is None else sync_ranks
    if world % size:
        raise ConfigError(
            f"sync_ranks={size} does not divide world_size={world}. Use {divisors_in_words(world)}.",
        )
    _make_groups(tuple(tuple(range(first, first + size)) for first in range(0, world, size)))
    return tuple(range(me - me % size, me - me % size + size))


def _make_groups(partition: tuple[tuple[int, ...], ...]) -> None:
    """Make the process groups of a partition, on all ranks in the same order, with the timeout of the world."""
    global _groups_of  # noqa: PLW0603
    if _groups_of is not dist.group.WORLD:
        _groups.clear()
        _twins.clear()
        _groups_of = dist.group.WORLD
    for ranks in partition:
        part = 1 < len(ranks) < dist.get_world_size()
        if part and ranks not in _groups:
            _groups[ranks] = dist.new_group(list(ranks), timeout=_world_timeout())
        if part and _debug and ranks not in _twins:
            _twins[ranks] = dist.new_group(list(ranks), backend="gloo", timeout=_world_timeout())


def _group_of(ranks: tuple[int, ...]) -> Any:
    return dist.group.WORLD if len(ranks) == dist.get_world_size() else _groups[ranks]


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
    if _debug:
        _check_same_place(values, ranks, what)
    try:
        _all_gather(rows_RK, values.contiguous(), group=_group_of(ranks))
    except RuntimeError as error:
        _raise_named(error, ranks, what)
    positions.leave(place)
    return rows_RK.view(len(ranks), -1)


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
        answers = _hear_all(value, ranks, _control_group())
    except RuntimeError as error:
        _raise_named(error, ranks, what, roll.missing() if roll else [])
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
        self._store = getattr(dist.distributed_c10d, "_get_default_store")()  # noqa: B009
        with contextlib.suppress(RuntimeError):  # the store went with its rank: the exchange that follows says so
            self._store.set(f"{self._key}/{rank()}", "here")

    def missing(self) -> list[int]:
        """Name the ranks that left no word; none where the store is gone with the rank that held it."""
        try:
            return [r for r in range(world_size()) if not self._store.check([f"{self._key}/{r}"])]
        except RuntimeError:
            return []


def set_debug(on: bool) -> None:
    """Switch the check before every gather and sum that all ranks of the group are at the same one.

    Collective: none here; later each takes 2 gathers more over gloo. Set it alike on all ranks.
    """
    global _debug  # noqa: PLW0603
    _debug = on


def _check_same_place(values: Tensor, ranks: tuple[int, ...], what: str) -> None:
    """Tell the ranks of a group what this one is about to exchange; raise on all of them where they differ."""
    twin = _control_group() if len(ranks) == dist.get_world_size() else _twins.get(ranks)
    if twin is None:  # the group was made before debugging was switched on
        return
    header = whereabouts.Header(what, values.numel(), str(values.dtype), positions.step_now())
    try:
        headers = _hear_all(header, ranks, twin)
    except RuntimeError as error:
        _raise_named(error, ranks, what)
    if parted := whereabouts.compare(ranks, headers):
        raise GroupError(parted)


def _control_group() -> Any:
    """Give the gloo group of all ranks that control messages take, whatever backend trains."""
    global _control  # noqa: PLW0603
    if _control[0] is not dist.group.WORLD:
        _control = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=_world_timeout()))
    return _control[1]


class PendingSum:
    """A sum over ranks that is under way; `wait` gives the tensor that holds it."""

    def __init__(self, values: Tensor, work: Any, ranks: tuple[int, ...], what: str, place: int) -> None:
        self._values, self._work, self._ranks, self._what, self._place = values, work, ranks, what, place

    def wait(self) -> Tensor:
        """Block (on CUDA: let the stream wait) until the sum has arrived."""
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                _raise_named(error, self._ranks, self._what)
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
        if _debug:
            _check_same_place(values, ranks, what)
        try:
            work = dist.all_reduce(values, group=_group_of(ranks), async_op=True)
        except RuntimeError as error:
            _raise_named(error, ranks, what)
    return PendingSum(values, work, ranks, what, place)


def start_ranks(*, rank: int, world_size: int, store_path: str, timeout_s: float) -> None:
    """Start a gloo process group over a file both small scripts and tests can share, with no port to choose.

    Args:
        rank: this process.
        world_size: how many processes call this.
        store_path: a file on a disk that all of them see; it must not exist before the first call.
        timeout_s: how long any exchange may take, in seconds.
    """
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store_path, world_size),
        rank=rank,
        world_size=world_size,
        timeout=dt.timedelta(seconds=timeout_s),
    )


def agreed_through_launcher(value: str, *, key: str, rank: int, address: str, port: int, timeout_s: float = 60) -> str:
    """Agree on rank 0's `value` before there is a process group, through the store that torchrun keeps for its ranks.

    Args:
        value: what rank 0 proposes; ignored on the others.
        key: names the question.
        rank: this process.
        address: torchrun's MASTER_ADDR.
        port: torchrun's MASTER_PORT.
        timeout_s: how long to wait for rank 0, in seconds.

    Collective: rank 0 writes, all read; no training collective.
    """
    store = dist.TCPStore(address, port, is_master=False, timeout=dt.timedelta(seconds=timeout_s))
    if rank == 0:
        store.set(key, value)
    return bytes(store.get(key)).decode()


def _world_timeout() -> dt.timedelta:
    """Read the timeout the world was started with: `new_group` would fall back to the backend's 10 or 30 minutes."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    options = getattr(dist.group.WORLD, "_get_backend")(device).options  # noqa: B009
    return options._timeout if options is not None else dt.timedelta(minutes=10)  # noqa: SLF001


def _raise_named(error: RuntimeError, ranks: Sequence[int], what: str, missing: Sequence[int] = ()) -> NoReturn:
    """Turn a backend's words into ours: who waited, where, for whom; and who was missing, where that is known."""
    waits = whereabouts.Wait(rank(), tuple(ranks), what, str(error).strip().splitlines()[0][:160])
    raise GroupError(waits.in_words(missing, positions.read_this_run())) from error
