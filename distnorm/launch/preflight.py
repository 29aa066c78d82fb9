"""What is checked at the start of every run, before any training collective.

A run that would hang, or silently train on other data, code or settings than was meant, is refused on all ranks alike:
each says what it is, rank 0 compares, and all hear its verdict.
"""

import contextlib
import errno
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import distnorm
from distnorm.collectives import come_together
from distnorm.errors import DistNormError, GroupError
from distnorm.launch import failures
from distnorm.launch.comparison import Answer, Finding, compare, in_words_by_host
from distnorm.launch.endings import RefusedError
from distnorm.launch.ranks import Ranks, meeting_place
from distnorm.launch.run_dir import RunFolder, code_hash, write_whole
from distnorm.settings import Settings

_ROOM_BYTES = 16 * 2**20
_SEEN_WITHIN_S = 5  # a network disk may show another node's new file late


class Preflight:
    """The ranks of a run come together, prepare, and compare; what one of them finds wrong, all raise.

    ```
    with Preflight(ranks, timeout_s=300) as preflight:
        run = open_run(settings, ranks)       # a rank that raises here ends the others too
        preflight.check(settings, run)
    ```

    Args:
        ranks: who takes part; those that are still to be started are not waited for.
        timeout_s: how long they wait for each other, in seconds.
        environ: where the launcher has left the meeting place; completed for Lightning, that meets there too.

    Collective: the ranks share a store; no training collective.

    Raises:
        ConfigError: there is no way to the meeting place.
    """

    def __init__(self, ranks: Ranks, timeout_s: float, environ: MutableMapping[str, str] = os.environ) -> None:
        here = ranks.world_size if ranks.started_by in ("torchrun", "slurm") else 1
        self._ranks, self._world_size, self._timeout_s = ranks, here, timeout_s
        address, port = meeting_place(environ) if here > 1 else ("", 0)
        self._meeting = come_together(
            ranks.rank,
            here,
            address=address,
            port=port,
            hosts=environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            name=f"preflight/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
            timeout_s=timeout_s,
        )
        self._spoken = False

    def __enter__(self) -> "Preflight":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others what this rank has raised before it could compare; theirs is the same verdict then."""
        if self._spoken or self._world_size == 1 or not isinstance(error, Exception):
            return
        with contextlib.suppress(GroupError):  # nobody is left to be told
            try:
                _refuse(self._ask({"start": str(error)}, {}), self._ranks)
            except RefusedError:
                self._meeting.leave()
                if isinstance(error, DistNormError):
                    raise

    def agree(self, name: str) -> str:
        """Give all ranks rank 0's word, for a folder that has no name of its own."""
        return str(self._meeting.ask("name", name, lambda names: names[0]))

    def leave(self) -> None:
        """End the meeting, where the process ends with it."""
        self._meeting.leave()

    def check(self, settings: Settings, run: RunFolder) -> None:
        """Compare the ranks, and refuse the run where it would go wrong.

        Args:
            settings: resolved; they must be alike on all ranks.
            run: its folder must be every rank's.

        Collective: 2 questions over the store.

        Raises:
            RefusedError: on all ranks alike; the first says it.
        """
        findings = self.look(settings, run)
        try:
            _refuse(findings, self._ranks)
        except RefusedError:
            self._meeting.leave()
            raise
        if self._world_size > 1 and self._ranks.is_first:
            failures.note_start(run, self._world_size, findings[0].words)

    def look(self, settings: Settings, run: RunFolder) -> list[Finding]:
        """Compare the ranks, and say what was found; see `check`."""
        problems = _problems(self._ranks, run)
        token, seal = secrets.token_hex(8), run.ranks / "preflight"
        if self._ranks.is_first and "run folder" not in problems:
            write_whole(seal, token)
        self._spoken = True
        findings = self._ask(problems, _flat(settings.model_dump()))
        if _failure(findings) is None:
            findings.append(self._ask_for(seal, token, run))
        if self._ranks.is_first:
            with contextlib.suppress(OSError):  # then it was never written
                seal.unlink(missing_ok=True)
        return findings

    def _ask(self, problems: dict[str, str], settings: dict[str, Any]) -> list[Finding]:
        own = Answer(
            host=socket.gethostname(),
            problems=problems,
            code={"hash": code_hash(), "place": str(Path(distnorm.__file__).parent)},
            versions={"python": ".".join(platform.python_version_tuple()[:2]), "torch": torch.__version__},
            accelerator=self._ranks.accelerator,
            device="" if "devices" in problems else _device(self._ranks),
            settings=settings,
        )
        verdict = self._meeting.ask("ranks", own, lambda answers: compare(answers, self._world_size, self._timeout_s))
        return [Finding(*finding) for finding in verdict]

    def _ask_for(self, seal: Path, token: str, run: RunFolder) -> Finding:
        """See whether the run folder is the same one everywhere: all find what rank 0 has written there."""
        token = str(self._meeting.ask("seal", token, lambda tokens: tokens[0]))
        own = None if _reads(seal, token) else socket.gethostname()
        free = shutil.disk_usage(run.path).free
        found = f"{run.path}, seen and written by all ranks, {free / 2**30:.1f} GB left"

        def judge(blind: Mapping[int, str | None]) -> Finding:
            where = {rank: host for rank, host in sorted(blind.items()) if host is not None}
            if not where:
                return Finding("run folder", "ok", found)
            return Finding(
                "run folder",
                "failure",
                f"{in_words_by_host(where)} cannot see in {run.path} what rank 0 wrote there: it is a folder of that "
                "machine's own.\nGive a folder on a disk that all nodes share, e.g. runs_dir=/scratch/me/runs.",
            )

        return Finding(*self._meeting.ask("run folder", own, judge))


def _refuse(findings: list[Finding], ranks: Ranks) -> None:
    failure = _failure(findings)
    if failure is not None:
        raise RefusedError(failure.words, aloud=ranks.is_first)


def _failure(findings: list[Finding]) -> Finding | None:
    return next((finding for finding in findings if finding.verdict == "failure"), None)


def _problems(ranks: Ranks, run: RunFolder) -> dict[str, str]:
    """Find what is wrong with this rank, whatever the others are."""
    found = {"run folder": _folder_problem(ranks, run), "devices": _device_problem(ranks)}
    return {check: words for check, words in found.items() if words}


def _folder_problem(ranks: Ranks, run: RunFolder) -> str:
    try:
        probe = run.ranks / f".preflight-{ranks.rank}"
        try:
            probe.write_bytes(bytes(2**20 if ranks.is_first else 2**12))
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(run.path).free
    except OSError as error:
        remedy = "Free some room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Make it writable"
        return f"{run.path} cannot be written: {error.strerror}.\n{remedy}, or give another: runs_dir=/scratch/me/runs."
    if free < _ROOM_BYTES:
        return (
            f"{run.path} is on a disk with {free / 2**20:.0f} MB left, and a run writes at least "
            f"{_ROOM_BYTES / 2**20:.0f} MB.\nFree some room there, or give another: runs_dir=/scratch/me/runs."
        )
    return ""


def _device_problem(ranks: Ranks) -> str:
    if ranks.accelerator == "cpu" or ranks.started_by in ("nobody", "distnorm"):
        return ""
    count = torch.cuda.device_count()
    if count <= ranks.local_rank:
        return (
            f"{ranks.per_node} ranks were started on this node, and this one sees {count} GPU{'s' * (count != 1)}.\n"
            f"Ask for --gpus-per-node={ranks.per_node}, and leave out --gpus-per-task and --gpu-bind."
        )
    if ranks.world_size > 1 and not torch.distributed.is_nccl_available():
        return f"torch {torch.__version__} has no nccl, that GPUs talk over. Install a CUDA build, or use trainer=cpu."
    return ""


def _device(ranks: Ranks) -> str:
    """Name this rank's GPU; nothing on the CPU."""
    if ranks.accelerator == "cpu":
        return ""
    properties = torch.cuda.get_device_properties(ranks.local_rank)
    return f"GPU {getattr(properties, 'uuid', ranks.local_rank)} ({properties.name})"


def _reads(file: Path, token: str) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while True:
        if file.is_file() and file.read_text() == token:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Write nested values down by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        found |= _flat(value, f"{before}{key}.") if inner else {f"{before}{key}": value}
    return found
