"""Where each rank is, kept in a small file a rank: what a hang or a kill leaves behind to be read.

A rank that waits cannot be asked and a killed one says nothing, so each writes down, before it enters an exchange and
after it has left it, what that was. The file is mapped into memory: a write costs a microsecond and no system call,
and the kernel keeps it when the process is gone.

Layout of `rankN.position`: header | ring of the last exchanges | their names. The n-th exchange of a group is the same
one on all its ranks, so the rings also tell where two ranks that both go on have parted.
"""

import dataclasses
import mmap
import platform
import struct
import time
from pathlib import Path

_MAGIC = b"dnplace1"
_HEADER = struct.Struct("=8sdIIq64s")  # magic, the run's time stamp, rank, world size, step, host
_STEP, _STEP_AT = struct.Struct("=q"), 24
_SLOT = struct.Struct("=QQiHBx")  # exchanges so far, of its group so far, step, line of its name, is waiting
_WAITING_AT = 22
_RING = 1024
_SLOTS_AT = 128
_NAMES_AT = _SLOTS_AT + _RING * _SLOT.size
_SIZE = _NAMES_AT + 2**17
_NO_NAME = 2**16 - 1
_NO_STEP = -1


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One exchange that a rank entered.

    Attributes:
        what: its name, e.g. `layer4.0.bn1 forward`.
        ranks: who takes part.
        number: how many exchanges these ranks have had, this one included.
        step: the training step, `None` where nobody said.
        waiting: the rank had not left it.
    """

    what: str
    ranks: tuple[int, ...]
    number: int
    step: int | None
    waiting: bool


@dataclasses.dataclass(frozen=True)
class Position:
    """What a rank's file says.

    Attributes:
        rank: whose it is.
        world_size: how many ranks its run has.
        host: where it ran.
        step: the step it had begun, `None` where nobody said.
        count: how many exchanges it has entered.
        trail: the last of them, in order; empty before the first.
    """

    rank: int
    world_size: int
    host: str
    step: int | None
    count: int
    trail: tuple[Exchange, ...]


class _Keeper:
    """This rank's file, open for writing."""

    def __init__(self, folder: Path, rank: int, world_size: int, run: float) -> None:
        self.folder, self.run = folder, run
        self.count, self.step = 0, _NO_STEP
        folder.mkdir(parents=True, exist_ok=True)
        path = _file_of(folder, rank)
        path.unlink(missing_ok=True)  # a process of an earlier run may still hold the old one
        with path.open("w+b") as file:
            file.write(bytes(_SIZE))  # takes the room now: a full disk must not end a step
            file.flush()
            self.map = mmap.mmap(file.fileno(), _SIZE)
        host = platform.node().encode()[:64]
        _HEADER.pack_into(self.map, 0, _MAGIC, run, rank, world_size, self.step, host)
        self._last_of: dict[str, tuple[int, tuple[int, ...], list[int]]] = {}
        self._lines: dict[tuple[str, tuple[int, ...]], int] = {}
        self._counters: dict[tuple[int, ...], list[int]] = {}
        self._names_end = _NAMES_AT

    def enter(self, what: str, ranks: tuple[int, ...]) -> int:
        known = self._last_of.get(what)
        if known is None or known[1] != ranks:
            known = self._learn(what, ranks)
        line, _, counter = known
        self.count += 1
        counter[0] += 1
        place = _SLOTS_AT + self.count % _RING * _SLOT.size
        _SLOT.pack_into(self.map, place, self.count, counter[0], self.step, line, True)
        return place

    def _learn(self, what: str, ranks: tuple[int, ...]) -> tuple[int, tuple[int, ...], list[int]]:
        """Write a name down at its first use."""
        if (what, ranks) not in self._lines:
            text = f"{' '.join(what.split())}\t{_pack_ranks(ranks)}\n".encode()
            end, line = self._names_end + len(text), len(self._lines)
            if end > _SIZE or line >= _NO_NAME:
                line = _NO_NAME
            else:
                self.map[self._names_end : end] = text
                self._names_end = end
            self._lines[what, ranks] = line
        self._last_of[what] = self._lines[what, ranks], ranks, self._counters.setdefault(ranks, [0])
        return self._last_of[what]


_kept: _Keeper | None = None


def keep(folder: Path, rank: int, world_size: int = 1, run: float | None = None) -> None:
    """Start to keep this rank's position in `folder/rankN.position`; an older file is dropped.

    Args:
        folder: made where it is missing; one for all ranks, on a disk that they share.
        rank: this process.
        world_size: how many ranks the run has.
        run: a time stamp equal on all ranks of a run, in seconds since 1970: it tells this run's files from older ones.

    Raises:
        OSError: the file cannot be written. Positions are off then.
    """
    global _kept  # noqa: PLW0603
    _kept = None
    _kept = _Keeper(Path(folder), rank, world_size, time.time() if run is None else run)


def stop() -> None:
    """Keep positions no longer; the file stays."""
    global _kept  # noqa: PLW0603
    _kept = None


def enter(what: str, ranks: tuple[int, ...]) -> int:
    """Note that this rank enters an exchange; nothing where positions are not kept.

    Args:
        what: names the exchange.
        ranks: who takes part.

    Returns:
        What `leave` takes. An exchange that fails is not left.
    """
    return 0 if _kept is None else _kept.enter(what, ranks)


def leave(place: int) -> None:
    """Note that the exchange which `enter` answered `place` for is over."""
    if _kept is not None and place:
        _kept.map[place + _WAITING_AT] = 0


def at_step(step: int) -> None:
    """Note that a training step begins."""
    if _kept is not None:
        _kept.step = step
        _STEP.pack_into(_kept.map, _STEP_AT, step)


def step_now() -> int | None:
    """Give the step that `at_step` noted last; `None` where positions are not kept or nobody said."""
    return None if _kept is None or _kept.step == _NO_STEP else _kept.step


def read_this_run() -> dict[int, Position]:
    """Read the positions of all ranks of the run that this process is a rank of; none where they are not kept."""
    return {} if _kept is None else read(_kept.folder, _kept.run)


def read(folder: Path, since: float = 0.0) -> dict[int, Position]:
    """Read the positions of all ranks whose file is there, whole, and not of an older run.

    Args:
        folder: where the ranks keep them.
        since: leave out runs whose time stamp is older, in seconds since 1970.
    """
    found = {}
    for path in sorted(Path(folder).glob("rank*.position")):
        try:
            run, position = _parse(path.read_bytes())
        except (OSError, ValueError, IndexError, struct.error):  # cut short, or not ours
            continue
        if run >= since and path == _file_of(Path(folder), position.rank):
            found[position.rank] = position
    return dict(sorted(found.items()))


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.position"


def _parse(content: bytes) -> tuple[float, Position]:
    magic, run, rank, world_size, step, host = _HEADER.unpack_from(content)
    if magic != _MAGIC or len(content) != _SIZE:
        raise ValueError("not a position file")
    lines = content[_NAMES_AT:].rstrip(b"\0").decode().splitlines()
    names = [line.split("\t") for line in lines]
    slots = sorted(_SLOT.iter_unpack(content[_SLOTS_AT:_NAMES_AT]))
    trail = tuple(
        Exchange(*_name(names, line), number, None if at == _NO_STEP else at, bool(waiting))
        for count, number, at, line, waiting in slots
        if count
    )
    at = None if step == _NO_STEP else step
    return run, Position(rank, world_size, host.rstrip(b"\0").decode(), at, slots[-1][0], trail)


def _name(names: list[list[str]], line: int) -> tuple[str, tuple[int, ...]]:
    if line == _NO_NAME:
        return "an exchange", ()
    what, ranks = names[line]
    return what, _unpack_ranks(ranks)


def _pack_ranks(ranks: tuple[int, ...]) -> str:
    block = ranks == tuple(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if block else ",".join(map(str, ranks))


def _unpack_ranks(text: str) -> tuple[int, ...]:
    first, dash, last = text.partition("-")
    return tuple(range(int(first), int(last) + 1)) if dash else tuple(map(int, text.split(",")))
