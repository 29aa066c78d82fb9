"""Tasks as srun starts them: real processes with the environment that it leaves, without a cluster."""

import os
import socket
import subprocess
import sys

from tests.runs import ROOT


def free_port():
    """A port that nothing has."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def environment(rank, world=2, **more):
    """What a task of a step of `world` tasks on one node finds."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "distnorm",
        "SLURM_NTASKS": str(world),
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_STEP_TASKS_PER_NODE": str(world),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        **more,
    }


def srun(*command, of=None, world=2, timeout_s=120):
    """Run python on `world` tasks, `of(rank)` added to a task's environment; the finished processes."""
    port = str(free_port())
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    tasks = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**inherited, **environment(rank, world), "MASTER_PORT": port, **(of(rank) if of else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]
    said = [task.communicate(timeout=timeout_s) for task in tasks]
    return [
        subprocess.CompletedProcess(task.args, task.returncode, *words) for task, words in zip(tasks, said, strict=True)
    ]
