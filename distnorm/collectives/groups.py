"""Which ranks pool together, and the process groups that carry it.

Every group is made by all ranks of the world, members or not, in the same order; a new world forgets the old one's.
torch holds the groups until `destroy_process_group`. They are held weakly here, so that they end with that call: a
gloo group has threads, and one that outlives the interpreter's last instruction may abort the process.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from distnorm.collectives.late import forget_marks
from distnorm.collectives.marks import forget_places
from distnorm.collectives.world import is_running, rank, timeout, world_size
from distnorm.errors import ConfigError, GroupError, divisors_in_words

Ranks = tuple[int, ...]

_Held = Callable[[], Any]
"""A group that torch holds; gives `None` once that has been destroyed."""
_groups: dict[Ranks, _Held] = {}
_groups_of: _Held = lambda: None  # noqa: E731
_members: dict[tuple[int | None, Ranks | None, bool], Ranks] = {}
_control: _Held = lambda: None  # noqa: E731 — the gloo side group of all ranks
_adopted: dict[Ranks, Any] = {}  # made by the user; kept apart, for other ranks know nothing of them
_twins: dict[Ranks, _Held] = {}  # of each group, a gloo group of the same ranks for headers
_debug = False


def members(
    sync_ranks: int | None, group_ranks: tuple[int, ...] | None = None, *, of_user: bool = False
) -> tuple[int, ...]:
    """Name the ranks that pool with this one, and make their process group where there is none yet.

    Args:
        sync_ranks: ranks that pool together, in blocks of consecutive ranks; `None` means all.
        group_ranks: an arbitrary subset instead; a rank outside it stays alone.
        of_user: `group_ranks` came from `adopt`: other ranks know nothing of that group, and none is made.

    Returns:
        Rank numbers in ascending order, this rank's among them.

    Collective: the first call for a partition must be reached by *every* rank of the world, members or not: nccl can
        split a communicator only so. Later calls: none.

    Raises:
        ConfigError: `sync_ranks` does not divide the world size, or `group_ranks` are not ranks in ascending order; or
            the user's group belongs to another world than this one.
    """
    if not is_running():
        _check_sync_ranks(sync_ranks)
        return (0,)
    _forget_other_worlds()
    asked = (sync_ranks, group_ranks, of_user)
    if asked not in _members:
        _members[asked] = _find_members(sync_ranks, group_ranks, of_user)
    return _members[asked]


def _find_members(sync_ranks: int | None, group_ranks: tuple[int, ...] | None, of_user: bool) -> tuple[int, ...]:
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
        if not of_user:  # also where the user has made one of the same ranks: the ranks outside it do not know that
            _make_groups((group_ranks,))
        elif group_ranks not in _adopted and 1 < len(group_ranks) < world:
            raise ConfigError(
                f"A layer was made with a process group of ranks {group_ranks}, which is not of this process's world.\n"
                "Give it the group of this one: SyncBatchNorm.convert_sync_batchnorm(model, process_group)."
            )
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

    Raises:
        ConfigError: it is no process group.
    """
    _forget_other_worlds()
    if process_group is dist.group.WORLD and process_group is not None:
        return tuple(range(world_size()))
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        return (rank(),)
    if not isinstance(process_group, dist.ProcessGroup):
        raise ConfigError(
            f"process_group={process_group!r} is no process group. "
            "Give it what torch.distributed.new_group(ranks) returned, or group_ranks=(0, 1)."
        )
    ranks = tuple(sorted(dist.get_process_group_ranks(process_group)))
    if rank() not in ranks:
        return (rank(),)
    _adopted.setdefault(ranks, process_group)
    return ranks


def set_debug(on: bool) -> None:
    """Switch the check before every gather and sum that all ranks of the group are at the same one.

    Collective: none here; later each takes 2 gathers more over gloo. Set it alike on all ranks.
    """
    global _debug  # noqa: PLW0603
    _debug = on
    _members.clear()  # whose groups have no twins yet


def make_twins(groups: Iterable[Ranks]) -> None:
    """Make the header groups of groups that users have made, while debugging.

    Collective: every rank calls it with the same groups, whoever is in them.
    """
    for ranks in groups:
        if _debug and 1 < len(ranks) < dist.get_world_size() and ranks not in _twins:
            _twins[ranks] = _held(dist.new_group(list(ranks), backend="gloo", timeout=timeout()))


def is_debugging() -> bool:
    """Tell whether ranks compare their places before every exchange."""
    return _debug


def group_of(ranks: Ranks) -> Any:
    """Give the process group of ranks that `members` named.

    Raises:
        GroupError: it has been destroyed.
    """
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    return _adopted[ranks] if ranks in _adopted else _living(_groups[ranks], ranks)


def twin_of(ranks: Ranks) -> Any:
    """Give the gloo group of the same ranks; `None` if the group was made before debugging was switched on."""
    if len(ranks) == dist.get_world_size():
        return control_group()
    return _living(_twins[ranks], ranks) if ranks in _twins else None


def control_group() -> Any:
    """Give the gloo group of all ranks that control messages take, whatever backend trains."""
    global _control  # noqa: PLW0603
    _forget_other_worlds()
    if (group := _control()) is None:
        group = dist.new_group(backend="gloo", timeout=timeout())
        _control = _held(group)
    return group


class Numbers:
    """Numbers the exchanges of one kind over the control group: alike on all ranks, from 0 in each world."""

    def __init__(self) -> None:
        self._of: _Held = lambda: None
        self._count = itertools.count()

    def next_of(self, group: Any) -> int:
        """Give the next number of a control group."""
        if self._of() is not group:
            self._of, self._count = _held(group), itertools.count()
        return next(self._count)


def _forget_other_worlds() -> None:
    global _groups_of, _control  # noqa: PLW0603
    if _groups_of() is not dist.group.WORLD:
        _groups.clear()
        _adopted.clear()
        _twins.clear()
        _members.clear()
        forget_places(world_size())
        forget_marks()
        _control = lambda: None  # noqa: E731
        _groups_of = _held(dist.group.WORLD)


def _held(group: Any) -> _Held:
    """Refer to a group without keeping it alive; on a rank that is not in it torch gives a plain number instead."""
    return weakref.ref(group) if isinstance(group, dist.ProcessGroup) else lambda: group


def _living(held: _Held, ranks: Ranks) -> Any:
    if (group := held()) is None:
        raise GroupError(
            f"The process group of ranks {ranks} has been destroyed, and a layer or the drift monitor still exchanges "
            "over it.\nCall torch.distributed.destroy_process_group() without arguments, after the last step."
        )
    return group


def _make_groups(partition: tuple[Ranks, ...]) -> None:
    """Make the process groups of a partition, on all ranks in the same order, with the timeout of the world."""
    for ranks in partition:
        part = 1 < len(ranks) < dist.get_world_size()
        if part and ranks not in _groups:
            _groups[ranks] = _held(dist.new_group(list(ranks), timeout=timeout()))
        if part and _debug and ranks not in _twins:
            _twins[ranks] = _held(dist.new_group(list(ranks), backend="gloo", timeout=timeout()))
