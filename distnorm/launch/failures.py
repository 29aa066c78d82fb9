"""Which rank failed first, and why: each that raises leaves a note in the run folder; who reads them names the first.

One that lost its peer is not the first. One that ended without a note, killed or with its machine, may be.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distnorm import positions, whereabouts
from distnorm.errors import DistNormError, GroupError, ranks_in_words
from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.run_dir import RunFolder, job_name, write_json

_LOST_PEER = ("closed by peer", "Connection reset", "Broken pipe", "Timed out waiting", "NCCL", "Gloo", "gloo")
_STARTED = "started.json"


@contextlib.contextmanager
def noted(run: RunFolder, rank: int, *, aloud: bool = True) -> Iterator[None]:
    """Leave word of what ends this rank, and end its process at once: nobody shall wait for it.

    No destructor of a broken process group, no interpreter shutdown may keep it alive.

    Args:
        run: takes the note.
        rank: this process.
        aloud: print it too; a launcher of ours will say what rank 0 would.
    """
    try:
        yield
    except RunInterruptedError:  # it was told to, as the others were
        raise
    except BaseException as error:  # noqa: BLE001 — whatever ends a rank, it is to be named
        with contextlib.suppress(OSError):  # the disk may be what failed
            note(run, rank, error)
        if not isinstance(error, DistNormError):
            sys.stderr.write("".join(traceback.format_exception(error)) if aloud else "")
        elif aloud and error.aloud:
            print(error, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code if isinstance(error, DistNormError) else 1)


def note(run: RunFolder, rank: int, error: BaseException) -> None:
    """Leave word of the exception that ends this rank, with the time, so that the first can be found."""
    text, whole = str(error), "".join(traceback.format_exception(error))
    message = text if isinstance(error, DistNormError) else _short_traceback(error)
    lost_peer = isinstance(error, GroupError) or any(word in text for word in _LOST_PEER)
    kind, now = type(error).__name__, time.time()
    content = {"time": now, "kind": kind, "message": message, "lost_peer": lost_peer, "traceback": whole.splitlines()}
    if not lost_peer:
        _tell_torchrun(message, whole, now)
    write_json(run.error_of(rank), content)


def _tell_torchrun(message: str, whole: str, now: float) -> None:
    """Leave the same word where torchrun looks: its table of failures, printed last, has it then."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": whole, "timestamp": str(int(now))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def forget(run: RunFolder) -> None:
    """Remove what ranks of an earlier attempt left: whose clock wrote it is not to be compared with this one's."""
    for file in run.ranks.glob("rank*.error.json"):
        file.unlink(missing_ok=True)


def note_start(run: RunFolder, world_size: int, where: str) -> None:
    """Write down who takes part, once all ranks have come: of one that leaves no word this is all that is known."""
    job = job_name() if "SLURM_JOB_ID" in os.environ else None
    write_json(run.ranks / _STARTED, {"time": time.time(), "world_size": world_size, "where": where, "job": job})


def job_of(run: RunFolder) -> str | None:
    """Name the SLURM job whose ranks were here last, as its run folders' names begin; `None`: none, or nobody knows."""
    started = _read(run.ranks / _STARTED) or {}
    job: str | None = started.get("job")
    return job


def reason(run: RunFolder) -> str | None:
    """Give the words of the rank that failed first; `None` where none left any."""
    notes = _notes(run)
    first = _first(notes, {}, 0)
    return str(notes[first[0]]["message"]) if first else None


def after(run: RunFolder) -> str:
    """Name the rank of an ended run that failed first, with its traceback, its log and where it was.

    Args:
        run: its folder.

    Returns:
        Lines for the console; the last is what matters most.
    """
    started = _read(run.ranks / _STARTED) or {"time": 0.0, "world_size": 0, "where": "nobody knows where"}
    return in_words(run, started["time"], {}, world_size=started["world_size"])


def in_words(run: RunFolder, started: float, ended: Mapping[int, str], *, world_size: int = 0) -> str:
    """Say which rank failed first, and why; that comes last, where one looks.

    Args:
        run: its folder holds the notes of this attempt.
        started: when the run did, in seconds since 1970: older positions are another's.
        ended: how ranks ended, where the launcher knows.
        world_size: how many there were, where it does not.
    """
    notes = _notes(run)
    first = _first(notes, ended, world_size)
    lines = [f"rank {rank} then ended with {note['kind']}" for rank, note in sorted(notes.items()) if rank not in first]
    lines += where_the_ranks_were(run, started)
    lines += [f"rank {rank} wrote {run.log_of(rank)}" for rank in first[:1] if run.log_of(rank).is_file()]
    if not first:
        lines.append(f"No rank left word in {run.ranks}: what ended the run stands above, or in the scheduler's log.")
    elif first[0] in notes:
        lines += [f"rank {first[0]} failed first, with {notes[first[0]]['kind']}:", notes[first[0]]["message"]]
    elif first[0] in ended:
        lines.append(f"rank {first[0]} failed first: it ended by {ended[first[0]]}.")
    else:
        lines.append(
            f"{ranks_in_words(first)} failed first, without a word: killed, for its memory or by hand, "
            "or its machine failed."
        )
    return "\n".join(lines)


def where_the_ranks_were(run: RunFolder, started: float) -> list[str]:
    """Say who left before which layer and who waited there, in one line; none before the first exchange."""
    sentence = whereabouts.in_words(positions.read(run.ranks, started))
    return [sentence] if sentence else []


def _first(notes: Mapping[int, Any], ended: Mapping[int, str], world_size: int) -> list[int]:
    """Find the first failure; several ranks, where those that left no word cannot be told apart."""
    own_fault = [rank for rank in notes if not notes[rank]["lost_peer"]]
    if own_fault:
        return [min(own_fault, key=lambda rank: notes[rank]["time"])]
    silent = [rank for rank in ended if rank not in notes]
    if silent:
        return silent[:1]
    if notes and (quiet := sorted(set(range(world_size)) - notes.keys())):
        return quiet
    return [min(notes, key=lambda rank: notes[rank]["time"])] if notes else sorted(ended)[:1]


def _notes(run: RunFolder) -> dict[int, Any]:
    found = {}
    for file in run.ranks.glob("rank*.error.json"):
        content = _read(file)
        if content is not None:
            found[int(file.name.removeprefix("rank").removesuffix(".error.json"))] = content
    return found


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _short_traceback(error: BaseException) -> str:
    """Keep the frames of code that a user can change, and the last: Lightning and torch add forty between them."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames[:-1] if not {"site-packages", "dist-packages"} & set(Path(frame.filename).parts)]
    left_out = len(frames) - len(own) - 1
    lines = ["Traceback (most recent call last):\n", *traceback.format_list([*own, frames[-1]])]
    lines += [f"  ({left_out} frames of installed packages left out)\n"] if left_out else []
    return "".join([*lines, *traceback.format_exception_only(error)]).rstrip()
