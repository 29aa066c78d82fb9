"""Which ranks this run has: started by torchrun or srun and found here, or still to be started on this machine."""

import dataclasses
import os
import re
from collections.abc import Mapping, MutableMapping
from typing import Literal

import torch

from distnorm.errors import ConfigError
from distnorm.settings import TrainerSettings

INTERACTIVE = ("bash", "interactive")
"""Names of SLURM jobs in which a person types: commands there start runs of their own."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks of a run, and this process's place among them.

    Attributes:
        world_size: all ranks.
        per_node: ranks on one machine.
        num_nodes: machines.
        rank: this process among all ranks.
        local_rank: this process among its machine's.
        started_by: who starts them; `nobody` for a run in this one process.
        accelerator: what each rank computes on.
    """

    world_size: int
    per_node: int
    num_nodes: int
    rank: int
    local_rank: int
    started_by: Literal["nobody", "distnorm", "torchrun", "slurm"]
    accelerator: Literal["cpu", "gpu"]

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0


def find(trainer: TrainerSettings, environ: Mapping[str, str] = os.environ) -> Ranks:
    """Find the ranks that the environment holds, or name those to be started.

    Args:
        trainer: what was asked for.
        environ: where torchrun and srun leave their marks.

    Raises:
        ConfigError: what was asked for and what is there disagree.
    """
    accelerator = _accelerator(trainer)
    source = trainer.ranks_from
    if source in ("auto", "torchrun") and "TORCHELASTIC_RUN_ID" in environ and "RANK" in environ:
        return _given(
            trainer, accelerator, "torchrun", environ, ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")
        )
    if source == "slurm" or (source == "auto" and _in_srun_step(environ)):
        return _from_slurm(trainer, accelerator, environ)
    if source == "torchrun":
        raise ConfigError(
            "trainer.ranks_from=torchrun found no ranks: RANK is not set. Start with: torchrun train.py …"
        )
    if trainer.num_nodes not in ("auto", 1):
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes} needs ranks on other machines, and none were started there.\n"
            "Use sbatch --nodes=… slurm/train.sbatch, or torchrun --nnodes=… on each node.",
        )
    devices = _local_devices(trainer, accelerator)
    if source == "auto":
        _check_alone(devices, environ)
    return Ranks(devices, devices, 1, 0, 0, "distnorm" if devices > 1 else "nobody", accelerator)


def is_task(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether torchrun or srun have started this process, with others or alone."""
    return "TORCHELASTIC_RUN_ID" in environ or "SLURM_STEP_ID" in environ


def _accelerator(trainer: TrainerSettings) -> Literal["cpu", "gpu"]:
    available = torch.cuda.is_available()
    if trainer.accelerator == "gpu" and not available:
        raise ConfigError(
            "trainer.accelerator=gpu, and torch finds no GPU on this machine. Use trainer=cpu or trainer=cpu_ddp."
        )
    return "gpu" if available and trainer.accelerator != "cpu" else "cpu"


def _local_devices(trainer: TrainerSettings, accelerator: str) -> int:
    if accelerator == "cpu":
        return 1 if trainer.devices == "auto" else trainer.devices
    found = torch.cuda.device_count()
    devices = found if trainer.devices == "auto" else trainer.devices
    if devices > found:
        raise ConfigError(
            f"trainer.devices={devices}, and this machine has {found} GPU{'s' if found > 1 else ''}. Use fewer."
        )
    return devices


def meeting_place(environ: MutableMapping[str, str]) -> tuple[str, int]:
    """Find the address and the port where the ranks meet, and write them down for Lightning to find the same.

    Args:
        environ: MASTER_ADDR and MASTER_PORT count where they are set. srun leaves them open: the first node of its list
            is taken, and a port that follows from job and step.

    Raises:
        ConfigError: MASTER_PORT is no port.
    """
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "localhost"))
    job, step = (int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    address = environ.setdefault("MASTER_ADDR", first_host(nodes))
    port = environ.setdefault("MASTER_PORT", str(15000 + (job + 31 * step) % 10000))
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"MASTER_PORT={port!r} is no port: it must be a whole number from 1 to 65535. "
            "Use e.g. export MASTER_PORT=29500"
        )
    return address, int(port)


def first_host(nodes: str) -> str:
    """Name the first of a list as SLURM writes it: `n[5-9,12],m1` begins with `n5`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    """Tell whether srun has started this process as one of several; a shell that it gave a person is none of them."""
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", 1)))
    return "SLURM_STEP_ID" in environ and tasks > 1 and "SLURM_PTY_PORT" not in environ


def _check_alone(devices: int, environ: Mapping[str, str]) -> None:
    """Refuse to start ranks inside a SLURM job whose tasks were meant to be them; a person's shell is free to."""
    if environ.get("SLURM_JOB_NAME") in INTERACTIVE or "SLURM_PTY_PORT" in environ:
        return
    if "SLURM_STEP_ID" in environ and devices > 1:
        raise ConfigError(
            f"trainer.devices={devices}, and srun started 1 task: each rank is a task of its own.\n"
            f"Start with: srun --ntasks-per-node={devices} python train.py … "
            f"(or trainer.ranks_from=local: {devices} ranks inside this task)",
        )
    tasks, nodes = environ.get("SLURM_NTASKS", "1"), environ.get("SLURM_JOB_NUM_NODES", "1")
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ and (tasks, nodes) != ("1", "1"):
        what = f"{tasks} tasks" if tasks != "1" else f"{nodes} nodes"
        raise ConfigError(
            f"SLURM job {environ['SLURM_JOB_ID']} has {what}, and python was started without srun: once, not on all.\n"
            "Start with: srun python train.py trainer=slurm …   or submit: sbatch slurm/train.sbatch "
            "(or trainer.ranks_from=local: on this node alone)",
        )


def _from_slurm(trainer: TrainerSettings, accelerator: Literal["cpu", "gpu"], environ: Mapping[str, str]) -> Ranks:
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        raise ConfigError(
            "trainer=slurm found no task of srun: SLURM_STEP_ID is not set.\n"
            "Submit slurm/train.sbatch, or start with: srun --ntasks-per-node=… python train.py trainer=slurm …",
        )
    layout = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_NTASKS_PER_NODE", "1"))
    even = re.fullmatch(r"(\d+)(\(x\d+\))?", layout)  # "4(x2)": 4 on each of 2 nodes; "1,3": 1 on one, 3 on another
    if even is None:
        raise ConfigError(
            f"slurm started {layout} ranks on its nodes, and each node must have as many.\n"
            "Use --ntasks-per-node=… instead of --ntasks=…, for as many on each.",
        )
    world = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    values = {"WORLD": world, "LOCAL": even.group(1), "RANK": environ["SLURM_PROCID"]}
    values["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
    return _given(trainer, accelerator, "slurm", values, ("WORLD", "LOCAL", "RANK", "LOCAL_RANK"))


def _given(
    trainer: TrainerSettings,
    accelerator: Literal["cpu", "gpu"],
    started_by: Literal["torchrun", "slurm"],
    values: Mapping[str, str],
    keys: tuple[str, str, str, str],
) -> Ranks:
    """Take ranks that exist, and refuse where they are not those that were asked for: a sampler would drop data."""
    world, per_node, rank, local_rank = (int(values[key]) for key in keys)
    nodes = max(1, world // per_node)
    flag = "--nproc-per-node" if started_by == "torchrun" else "--ntasks-per-node"
    if trainer.devices not in ("auto", 1, per_node):
        raise ConfigError(
            f"trainer.devices={trainer.devices}, but {started_by} started {per_node} on this node.\n"
            f"Use {flag}={trainer.devices}, or trainer.devices={per_node}.",
        )
    if trainer.num_nodes not in ("auto", 1, nodes) or per_node * nodes != world:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes}, but {started_by} started {world} ranks, {per_node} on this node.\n"
            f"Start as many on each node, and leave trainer.num_nodes=auto.",
        )
    return Ranks(world, per_node, nodes, rank, local_rank, started_by, accelerator)
