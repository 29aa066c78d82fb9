"""The run folder: one for all ranks of a run, never shared by two runs, readable after a kill."""

import dataclasses
import datetime as dt
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import distnorm
from distnorm import collectives
from distnorm.errors import ConfigError
from distnorm.launch.ranks import Ranks
from distnorm.settings import Settings, from_yaml

RUN_DIR = "DISTNORM_RUN_DIR"
"""Environment variable that tells a rank we started its run folder, and thereby its configuration."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it leaves.

    ```
    config.yaml  decision.txt  checkpoints/{best,last}.ckpt  record.jsonl  wandb/  ranks/  result.json
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


def open_run(
    settings: Settings, ranks: Ranks, environ: Mapping[str, str] = os.environ, *, place: RunFolder | None = None
) -> RunFolder:
    """Make the run's folder, or find the one the first rank has made.

    Runs that start in the same second differ in their random ending. A SLURM job's folder is named after its id, so
    that all its tasks agree without a word; under torchrun the first rank's choice goes through torchrun's own store.

    Args:
        settings: kept in the folder.
        ranks: who takes part.
        environ: where SLURM and torchrun leave their marks.
        place: the folder where that is settled, as a sweep's job's is; else one is made in `settings.runs_dir`.
    """
    run = place or RunFolder((Path(settings.runs_dir) / _name(ranks, environ)).resolve())
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.error_of(0).parent.mkdir(exist_ok=True)
        if ranks.is_first:
            run.write_settings(settings)
    except OSError as error:
        raise ConfigError(
            f"runs_dir={settings.runs_dir!r} takes no run folder: {error.strerror}. "
            "Give a folder that every rank can write, e.g. runs_dir=/scratch/me/runs.",
        ) from None
    return run


def _name(ranks: Ranks, environ: Mapping[str, str]) -> str:
    """Name a run's folder, alike on all its ranks."""
    name = f"{dt.datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(3)}"
    if ranks.started_by == "slurm":
        array = f"_{environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in environ else ""
        job = environ.get("SLURM_ARRAY_JOB_ID", environ["SLURM_JOB_ID"])
        restarts = f"-r{environ['SLURM_RESTART_COUNT']}" if environ.get("SLURM_RESTART_COUNT", "0") != "0" else ""
        name = f"slurm-{job}{array}-{environ.get('SLURM_STEP_ID', '0')}{restarts}"
    elif ranks.started_by == "torchrun" and ranks.world_size > 1:
        address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        key = f"distnorm/run/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # the store outlives a restart
        name = collectives.agreed_through_launcher(name, key=key, rank=ranks.rank, address=address, port=port)
    return name


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
