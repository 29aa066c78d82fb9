"""Who runs a trial: claims that several processes, on several machines, take from one another only when they are dead.

Claims are files `claim.0`, `claim.1`, … in the trial's folder, one an attempt; the last one holds. A file is made whole
and only where there is none (a hard link), and never changed or deleted: two that find the same claim dead both try
to make the next, and one of them does.
"""

import dataclasses
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trial that this process runs.

    Attributes:
        attempt: how often it was begun before.
        file: the claim.
    """

    attempt: int
    file: Path

    @property
    def holds(self) -> bool:
        """Whether nobody has taken the trial over."""
        return not self.file.with_name(f"claim.{self.attempt + 1}").exists()

    def move(self) -> None:
        """Show other machines that this process is alive."""
        os.utime(self.file)


class Claims:
    """Takes trials for this process.

    Args:
        stale_s: a claim of another machine that has not moved for so long is dead.
    """

    def __init__(self, stale_s: float) -> None:
        self._stale_s = stale_s
        self._seen: dict[Path, tuple[float, float]] = {}
        self._jobs: dict[str, tuple[float, bool]] = {}

    def take(self, folder: Path) -> Claim | None:
        """Claim the trial of a folder, unless somebody alive has it.

        On this machine a process that is gone is dead; on others one whose SLURM job is gone, or whose claim has not
        moved for `stale_s` since this process first saw it: by one clock, so that the machines' need not agree.
        """
        attempts = [int(file.suffix[1:]) for file in folder.glob("claim.*")]
        last = max(attempts, default=-1)
        if last >= 0 and self._is_alive(folder / f"claim.{last}"):
            return None
        file, partial = folder / f"claim.{last + 1}", folder / f".claim.{secrets.token_hex(8)}"
        partial.write_text(json.dumps(_myself()))
        try:
            os.link(partial, file)
        except FileExistsError:
            return None
        finally:
            partial.unlink()
        return Claim(last + 1, file)

    def _is_alive(self, file: Path) -> bool:
        owner, mine = json.loads(file.read_text()), _myself()
        if owner["machine"] == mine["machine"]:
            return bool(_started(owner["pid"]) == owner["started"])
        if owner["job"] is not None and (
            _is_earlier(owner, mine) or (owner["job"] != mine["job"] and self._job_is_gone(owner["job"]))
        ):
            return False
        moved, now = file.stat().st_mtime, time.monotonic()
        before, since = self._seen.get(file, (moved, now))
        self._seen[file] = (moved, since if before == moved else now)
        return now - self._seen[file][1] < self._stale_s

    def _job_is_gone(self, job: str) -> bool:
        """Ask SLURM, at most twice a minute; where it does not answer, the job is not said to be gone."""
        asked, gone = self._jobs.get(job, (-30.0, False))
        if time.monotonic() - asked > 30 and shutil.which("squeue"):
            command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
            try:
                answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            except (OSError, subprocess.TimeoutExpired):
                return False
            gone = "Invalid job id" in answer.stderr or (answer.returncode == 0 and not answer.stdout.strip())
            self._jobs[job] = (time.monotonic(), gone)
        return gone


def _myself() -> dict[str, Any]:
    return {
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "time": time.time(),
    }


def _machine() -> str:
    """Name what process ids are unique in: a machine since its start, and a container on it."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    if boot.exists() and processes.is_symlink():  # Linux
        parts += [boot.read_text().strip(), str(processes.readlink())]
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """Say when a process was started, which tells it from a later one of its number; `None` where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        return _answers(pid)
    return None if fields[0] in "ZX" else fields[19]


def _answers(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _is_earlier(owner: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Tell whether an owner was this job before it was requeued."""
    return bool(owner["job"] == mine["job"] and owner["restarts"] < mine["restarts"])
