"""Ranks, their groups and the few exchanges that distnorm makes: the only room that talks to `torch.distributed`.

A layer never holds a process group; it names its ranks (`sync_ranks` or `group_ranks`) and asks here, so that it can be
copied, pickled and moved to another cluster. Without a process group every function answers for one rank alone.
"""

import datetime as dt
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.errors import ConfigError, GroupError, divisors_in_words

_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)  # its older name
_groups: dict[tuple[int, ...], Any] = {}
_groups_of: Any = None
_members: dict[tuple[int | None, tuple[int, ...] | None], tuple[int, ...]] = {}
_control: tuple[Any, Any] = (None, None)  # the world it belongs to, and its gloo side group
_notice_numbers: Iterator[int] = itertools.count()  # of that group; alike on all ranks


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
    if not is_running():
        _check_sync_ranks(sync_ranks)
        return (0,)
    _forget_other_worlds()
    asked = (sync_ranks, group_ranks)
    if asked not in _members:
        _members[asked] = _find_members(sync_ranks, group_ranks)
    return _members[asked]


def _find_members(sync_ranks: int | None, group_ranks: tuple[int, ...] | None) -> tuple[int, ...]:
    me, world = rank(), world_size()
    _check_sync_ranks(sync_ranks)
    if world == 1:
        return (0,)
    if group_ranks is not None:
        if sorted(set(group_ranks)) != list(group_ranks) or not set(group_ranks) <= set(range(world)):
            raise ConfigError(
                f"group_ranks={group_ranks} must be different ranks below world_size={world}, in ascending order.\n"
                f"Use e.g. group_ranks={tuple(range(world))[:2]}.",
            )
        if group_ranks not in _groups and group_ranks != (me,):
            _make_groups((group_ranks,))
        return group_ranks if me in group_ranks else (me,)
    size = world if sync_ranks is None else sync_ranks
    if world % size:
        raise ConfigError(
            f"sync_ranks={size} does not divide world_size={world}. Use {divisors_in_words(world)}.",
        )
    _make_groups(tuple(tuple(range(first, first + size)) for first in range(0, world, size)))
    return tuple(range(me - me % size, me - me % size + size))


def _check_sync_ranks(sync_ranks: int | None) -> None:
    if sync_ranks is not None and sync_ranks < 1:
        raise ConfigError(f"sync_ranks={sync_ranks} must be at least 1. Give a number of ranks, or None for all.")


def adopt(process_group: Any) -> tuple[int, ...]:
    """Take over a process group that the user has made, under the ranks it holds.

    Returns:
        Its ranks, for `group_ranks`; this rank alone, where it is not one of them.

    Collective: none.
    """
    _forget_other_worlds()
    if process_group is dist.group.WORLD:
        return tuple(range(world_size()))
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        return (rank(),)
    ranks = tuple(sorted(dist.get_process_group_ranks(process_group)))
    if rank() not in ranks:
        return (rank(),)
    _groups.setdefault(ranks, process_group)
    return ranks


def _forget_other_worlds() -> None:
    global _groups_of  # noqa: PLW0603
    if _groups_of is not dist.group.WORLD:
        _groups.clear()
        _members.clear()
        _groups_of = dist.group.WORLD


def _make_groups(partition: tuple[tuple[int, ...], ...]) -> None:
    """Make the process groups of a partition, on all ranks in the same order, with the timeout of the world."""
    for ranks in partition:
        if 1 < len(ranks) < dist.get_world_size() and ranks not in _groups:
            _groups[ranks] = dist.new_group(list(ranks), timeout=_world_timeout())


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
    try:
        _all_gather(rows_RK, values.contiguous(), group=_group_of(ranks))
    except RuntimeError as error:
        raise_named(error, ranks, what)
    return rows_RK.view(len(ranks), -1)


def agree(value: Any, what: str) -> list[Any]:
    """Tell every rank something, and hear it from every rank, beside the training collectives.

    Args:
        value: anything that pickles; small.
        what: names the exchange in an error.

    Returns:
        One value a rank, in rank order, equal on all ranks.

    Collective: 2 gathers over the gloo side group of all ranks; the first call makes that group. Blocks the host.

    Raises:
        GroupError: a rank did not take part in time, or died.
    """
    if world_size() == 1:
        return [value]
    answers: list[Any] = [None] * world_size()
    try:
        dist.all_gather_object(answers, value, group=_control_group())
    except RuntimeError as error:
        raise_named(error, range(world_size()), what)
    return answers


def _control_group() -> Any:
    """Give the gloo group of all ranks that control messages take, whatever backend trains."""
    global _control, _notice_numbers  # noqa: PLW0603
    if _control[0] is not dist.group.WORLD:
        _notice_numbers = itertools.count()
        _control = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=_world_timeout()))
    return _control[1]


def start_notice(own_K: Tensor) -> tuple[Tensor, Any, int]:
    """Start to tell every rank K integers, beside the training collectives: for `uneven.notice`, that words failures.

    Returns:
        [R, K], filled once the work that comes next has been waited for; and the number of this notice, alike on all
        ranks.

    Collective: 1 gather of K integers over the gloo side group of all ranks; the first call makes that group.
    """
    group, rows_RK = _control_group(), own_K.new_empty(world_size() * len(own_K))
    work = _all_gather(rows_RK, own_K, group=group, async_op=True)
    return rows_RK.view(world_size(), -1), work, next(_notice_numbers)


class PendingSum:
    """A sum over ranks that is under way; `wait` gives the tensor that holds it."""

    def __init__(self, values: Tensor, work: Any, ranks: tuple[int, ...], what: str) -> None:
        self._values, self._work, self._ranks, self._what = values, work, ranks, what

    def wait(self) -> Tensor:
        """Block (on CUDA: let the stream wait) until the sum has arrived."""
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise_named(error, self._ranks, self._what)
        return self._values


def start_sum(values: Tensor, ranks: tuple[int, ...], what: str) -> PendingSum:
    """Start to sum a flat tensor over ranks, in place.

    Collective: 1 sum of `values.numel()` numbers over `ranks`.

    Raises:
        GroupError: (also from `wait`) a rank did not take part in time, or died.
    """
    work = None
    if len(ranks) > 1:
        try:
            work = dist.all_reduce(values, group=_group_of(ranks), async_op=True)
        except RuntimeError as error:
            raise_named(error, ranks, what)
    return PendingSum(values, work, ranks, what)


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


def store() -> Any:
    """Give the key-value store that the process group was started over: it outlives a collective that failed."""
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001


def _world_timeout() -> dt.timedelta:
    """Read the timeout the world was started with: `new_group` would fall back to the backend's 10 or 30 minutes."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    options = getattr(dist.group.WORLD, "_get_backend")(device).options  # noqa: B009
    return options._timeout if options is not None else dt.timedelta(minutes=10)  # noqa: SLF001


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Spell some ranks: `"rank 2"`, `"ranks 0, 1, 3"`."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"


def raise_named(error: RuntimeError, ranks: Sequence[int], what: str) -> NoReturn:
    """Turn a backend's words into ours: who waited, where, for whom."""
    first_line = str(error).strip().splitlines()[0][:160]
    raise GroupError(
        f"rank {rank()} waited in {what} for ranks {', '.join(map(str, ranks))}; one of them failed or never came.\n"
        f"Does every rank run the same model, and reach this layer in every step? Backend: {first_line}",
    ) from error
