"""Interrupt a training of two nodes on a real SLURM, again and again, and compare it with the one left alone.

    python -m tests.campaign --times 10

usr1: a signal some time before the limit; rank 1 is a second late for three steps just then.
grace: a job of higher priority comes, PreemptMode=REQUEUE with a time of grace; rank 1 is late likewise.
kill: SIGKILL for one rank, at any step; the job fails, is requeued by hand, and goes on from its last checkpoint.

Each time the final weights, optimizer and metrics must be those of the training left alone, bit for bit.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import tempfile
import time
from pathlib import Path

import torch

from distnorm.conversion import aligned
from distnorm.launch.run_dir import RunFolder
from tests import runs
from tests.cluster import Cluster

KINDS = ("usr1", "grace", "kill")
STEPS = 240
NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--exclusive")
JOB = (
    "trainer.accelerator=cpu",
    "data.device_batch=16",
    "model._target_=tests.faulty.SlowOnRank1",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=1",
    "logger.mode=disabled",
    "trainer.checkpoint_every_s=1",
    "trainer.timeout_s=60",
)
_PATIENCE_S = 400  # for a training on a loaded machine
SAVED_WITHIN_S, FAILED_WITHIN_S = 10, 60


@dataclasses.dataclass
class Trial:
    """One interruption: when it came, what was saved, how long that took, whether the end is the same."""

    kind: str
    rank: str
    told_at: int
    saved_at: int
    seconds: float
    is_equal: bool
    wrong: str = ""

    @property
    def row(self):
        lost = self.told_at - self.saved_at if self.kind == "kill" else 0
        told = (self.kind, self.rank, str(self.told_at), str(self.saved_at), str(max(0, lost)), f"{self.seconds:.1f}")
        return (*told, "yes" if self.is_equal else "NO", self.wrong)


HEADER = ("kind", "rank", "at step", "saved step", "steps lost", "seconds", "equal", "wrong")


class Campaign:
    """Trains once undisturbed, then interrupts.

    Args:
        slurm: the cluster.
        folder: takes the runs.
        steps: of a training.
    """

    def __init__(self, slurm, folder, steps=STEPS):
        self._slurm, self._folder, self._steps = slurm, Path(folder), steps
        job, run = self._submit()
        assert slurm.wait(job, "COMPLETED", timeout_s=_PATIENCE_S), slurm.output(job)
        self.alone = run
        self._end = end_of(run)

    def interrupt(self, kind, at, rank=0):
        """Interrupt one training when rank 0 has logged step `at`, let it go on, and compare; `rank` is for `kill`."""
        late = {} if kind == "kill" else {"DISTNORM_TEST_SLOW_FROM": str(at)}
        job, run = self._submit(**late)
        runs.wait_for(lambda: steps_of(run) >= at, _PATIENCE_S)
        told_at, told = steps_of(run), time.time()
        problems = getattr(self, f"_{kind}")(job, run, rank, told)
        seconds = (time.time() if kind == "kill" else (run.checkpoints / "last.ckpt").stat().st_mtime) - told
        limit = FAILED_WITHIN_S if kind == "kill" else SAVED_WITHIN_S
        problems += [f"took {seconds:.1f} s"] if seconds > limit else []
        saved_at = torch.load(run.checkpoints / "last.ckpt", weights_only=True)["global_step"]
        problems += [] if 0 < saved_at < self._steps else [f"saved at step {saved_at}"]
        self._slurm.start_now(job)
        ended = self._slurm.wait(job, "COMPLETED", timeout_s=_PATIENCE_S)
        problems += [] if ended else [f"ended {self._slurm.state(job)}"]
        is_equal = ended and end_of(run) == self._end
        problems += [] if steps_logged(run) == steps_logged(self.alone) else ["the record differs"]
        named = str(rank) if kind == "kill" else "all"
        return Trial(kind, named, told_at, saved_at, seconds, is_equal, ", ".join(problems))

    def _submit(self, **environ):
        job = self._slurm.submit(
            "slurm/train.sbatch",
            *JOB,
            f"trainer.max_steps={self._steps}",
            f"runs_dir={self._folder}",
            options=NODES,
            **environ,
        )
        run = RunFolder(self._folder / f"slurm-{job}-0")
        runs.wait_for(run.record.exists, _PATIENCE_S)
        return job, run

    def _usr1(self, job, run, _rank, _told):
        self._slurm.call("scancel", "--signal=USR1", job)
        return self._requeued(job)

    def _grace(self, job, run, _rank, told):
        script = "#!/usr/bin/env bash\nsleep 1\n"
        other = self._slurm.submit(script, options=["--partition=high", "--nodes=2", "--exclusive"])
        problems = self._requeued(job)
        self._slurm.wait(other, "COMPLETED")
        return problems

    def _requeued(self, job):
        runs.wait_for(lambda: self._slurm.restarts(job) == 1, 60)
        return (
            [] if re.search(r"Stopped by SIG\w+ after step \d+", self._slurm.output(job)) else ["no word of the stop"]
        )

    def _kill(self, job, run, rank, _told):
        os.kill(process_of(job, rank), signal.SIGKILL)
        failed = self._slurm.wait(job, "FAILED", timeout_s=2 * FAILED_WITHIN_S)
        problems = [] if failed else [f"ended {self._slurm.state(job)}"]
        last = "\n".join(self._slurm.output(job).splitlines()[-12:])
        problems += [] if re.search(rf"rank {rank} failed first", last) else [f"the dead rank is not named:\n{last}\n"]
        self._slurm.call("scontrol", "requeue", job)
        return problems


def steps_of(run):
    """How many steps the first rank has logged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return max((row["step"] for row in runs.rows(run) if "train/loss" in row), default=0)
    return 0


def steps_logged(run):
    """What was logged of every step, the last word on each."""
    return {row["step"]: row["train/loss"] for row in runs.rows(run) if "train/loss" in row}


def end_of(run):
    """What a training ended with, as one comparable text: weights, statistics, optimizer, metrics."""
    stored = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    metrics = json.loads(run.result.read_text())["metrics"]
    torch.set_printoptions(profile="full", precision=20)
    rest = (stored["global_step"], stored["epoch"], sorted(metrics.items()))
    return bytes_of((stored["state_dict"], stored["optimizer_states"], stored["distnorm"]["rank_statistics"])), rest


def bytes_of(value):
    """The bits of nested tensors and numbers."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return tuple((key, bytes_of(item)) for key, item in value.items())
    return tuple(map(bytes_of, value)) if isinstance(value, list | tuple) else value


def process_of(job, rank):
    """The process of a job's rank on this machine; the batch script's srun has rank 0's number too."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command, environment = (
                    set((entry / file).read_bytes().split(b"\0")) for file in ("cmdline", "environ")
                )
                if b"train.py" in command and b"srun" not in command and wanted <= environment:
                    found.append(int(entry.name))
    return min(found)


def _at_least_one(typed):
    if not typed.isdigit() or not int(typed):
        raise argparse.ArgumentTypeError(f"{typed!r} must be a whole number of at least 1, e.g. 10")
    return int(typed)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=_at_least_one, default=10, help="interruptions of each kind (10)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", help="keeps the runs; else they go when all is told")
    parser.add_argument("--seed", type=int, default=0, help="of the steps and ranks that are chosen (0)")
    asked = parser.parse_args(arguments)
    chosen = random.Random(asked.seed)
    trials = []
    with contextlib.closing(Cluster()) as slurm, tempfile.TemporaryDirectory() as scratch:
        campaign = Campaign(slurm, asked.folder or scratch)
        for kind in asked.kinds:
            for number in range(asked.times):
                trial = campaign.interrupt(kind, chosen.randrange(10, STEPS - 40), chosen.randrange(2))
                trials.append(trial)
                print(f"{number + 1}/{asked.times}", *trial.row, sep="  ", flush=True)
    print("", aligned([HEADER, *(trial.row for trial in trials)]), "", sep="\n")
    for kind in asked.kinds:
        of_kind = [trial for trial in trials if trial.kind == kind]
        good = sum(trial.is_equal and not trial.wrong for trial in of_kind)
        print(f"{kind}: {good} of {len(of_kind)} good, at most {max(trial.seconds for trial in of_kind):.1f} s")
    if any(trial.wrong or not trial.is_equal for trial in trials):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
