"""The run folder: one for all ranks of a run, never shared by two runs, readable after a kill."""

import dataclasses
import datetime as dt
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import distnorm
from distnorm import collectives
from distnorm.errors import ConfigError
from distnorm.launch.ranks import INTERACTIVE, Ranks
from distnorm.settings import Settings, from_yaml

RUN_DIR = "DISTNORM_RUN_DIR"
"""Environment variable that tells a rank we started its run folder, and thereby its configuration."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it leaves.

    ```
    config.yaml  decision.txt  checkpoints/{best,last,previous}.ckpt  record.jsonl  wandb/  ranks/  result.json
    ```
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of `best.ckpt` and `last.ckpt`."""
        return self.path / "checkpoints"

    @property
    def record(self) -> Path:
        """File of all that was logged, one JSON object a line."""
        return self.path / "record.jsonl"

    @property
    def result(self) -> Path:
        """File of the final metrics and what led to them."""
        return self.path / "result.json"

    @property
    def ranks(self) -> Path:
        """Folder of what each rank leaves: its output, its position, the exception that ended it."""
        return self.path / "ranks"

    @property
    def stop(self) -> Path:
        """File that asks the run to save and end, whoever makes it: `touch <run>/stop`."""
        return self.path / "stop"

    def log_of(self, rank: int) -> Path:
        """File of what a rank prints, rank 0 apart, whose output is the console's."""
        return self.ranks / f"rank{rank}.log"

    def error_of(self, rank: int) -> Path:
        """File of the exception that ended a rank."""
        return self.ranks / f"rank{rank}.error.json"

    def write_settings(self, settings: Settings) -> None:
        """Keep the resolved configuration: the ranks read it, and so does whoever repeats the run."""
        write_whole(self.path / "config.yaml", settings.to_yaml())

    def read_settings(self) -> Settings:
        """Read what `write_settings` wrote."""
        return from_yaml((self.path / "config.yaml").read_text())


def locate(settings: Settings, ranks: Ranks, environ: Mapping[str, str] = os.environ) -> RunFolder:
    """Say which folder this run has, alike on all ranks, and alike when SLURM or torchrun start it again; make nothing.

    A job step of SLURM gives its numbers: `slurm-<job>[_<array task>]-<step>`, under torchrun too where its `--rdzv-id`
    is the job's. A run that a batch script starts without srun is told from others of the job by its settings. Anywhere
    else the name is the time and a random ending; under torchrun it is the first rank's, through torchrun's own store.

    Args:
        settings: as they were composed.
        ranks: who takes part.
        environ: where srun, sbatch and torchrun leave their marks.

    Collective: under torchrun, rank 0 writes into its store and all read; no training collective.
    """
    runs = Path(settings.runs_dir).resolve()
    in_step = ranks.started_by == "slurm" or (
        ranks.started_by == "torchrun" and environ.get("TORCHELASTIC_RUN_ID") == environ.get("SLURM_JOB_ID")
    )
    if in_step:
        return RunFolder(runs / f"{job_name(environ)}-{environ.get('SLURM_STEP_ID', '0')}")
    name = f"{dt.datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(3)}"
    if "SLURM_JOB_ID" in environ and environ.get("SLURM_JOB_NAME") not in INTERACTIVE:
        of_job = f"{job_name(environ)}-{hashlib.sha256(settings.to_yaml().encode()).hexdigest()[:6]}"
        taken = _restarts(environ) == 0 and (runs / of_job).exists()
        name = name if taken else of_job  # the same run once more is another run
    if ranks.started_by == "torchrun":
        key = f"distnorm/run/{environ['TORCHELASTIC_RUN_ID']}"  # the store outlives a restart
        address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        name = collectives.agreed_through_launcher(name, key=key, rank=ranks.rank, address=address, port=port)
    return RunFolder(runs / name)


def job_name(environ: Mapping[str, str] = os.environ) -> str:
    """Name what all runs of a SLURM job, or of one task of an array, begin with."""
    array = f"_{environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in environ else ""
    return f"slurm-{environ.get('SLURM_ARRAY_JOB_ID', environ['SLURM_JOB_ID'])}{array}"


def has_restarted(run: RunFolder, environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a requeued SLURM job, or ranks that torchrun starts again, go on in this folder."""
    return _restarts(environ) > 0 and (run.path / "config.yaml").is_file()


def _restarts(environ: Mapping[str, str]) -> int:
    return sum(int(environ.get(count, "0")) for count in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def open_run(settings: Settings, ranks: Ranks, run: RunFolder, *, again: bool = False) -> None:
    """Make the run's folder, or enter the one that the first rank has made; what killed saves left there goes.

    Args:
        settings: what the first rank writes down.
        ranks: who takes part.
        run: the folder, from `locate`.
        again: go on in a folder that may exist.

    Raises:
        ConfigError: the folder cannot be written, or is another run's: a cluster that was set up anew counts its jobs
            from 1.
    """
    if ranks.is_first and not again and (run.path / "config.yaml").exists():
        raise ConfigError(
            f"{str(run.path)!r} is the folder of another run already, and runs never share one. "
            "Move it away, or give another place, e.g. runs_dir=runs2."
        )
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.ranks.mkdir(exist_ok=True)
        run.error_of(ranks.rank).unlink(missing_ok=True)
        if ranks.is_first:
            run.stop.unlink(missing_ok=True)
            for killed in _half_saved(run):
                killed.unlink(missing_ok=True)
            run.write_settings(settings)
    except OSError as error:
        raise ConfigError(
            f"runs_dir={settings.runs_dir!r} takes no run folder: {error.strerror}. "
            "Give a folder that every rank can write, e.g. runs_dir=/scratch/me/runs.",
        ) from None


def _half_saved(run: RunFolder) -> list[Path]:
    """Find what killed saves have left beside the checkpoints, each as large as one: `.last.ckpt.<process>`."""
    partial = re.compile(r"\.(best|last|previous)\.ckpt\.\d+|best\.ckpt\.partial")
    return [file for file in run.checkpoints.iterdir() if partial.fullmatch(file.name)]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, and a kill, find the old one or the new one, never half."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON in one piece."""
    write_whole(path, json.dumps(values, indent=2, default=str) + "\n")


def versions() -> dict[str, str]:
    """Name the versions a result depends on."""
    names = ("distnorm", "torch", "lightning", "torchmetrics", "hydra-core", "wandb", "numpy")
    return {name: metadata.version(name) if name != "distnorm" else distnorm.__version__ for name in names}


def code_hash() -> str:
    """Hash distnorm's own source: two results of one hash come from the same code."""
    digest = hashlib.sha256()
    root = Path(distnorm.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
