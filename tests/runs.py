"""Runs for tests: `train.py` in processes of its own, or its `train` in the warm rank pool."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from hydra import compose, initialize_config_dir

from distnorm import settings
from distnorm.launch import ranks as launch_ranks
from distnorm.launch.run_dir import RunFolder
from tests import ranks

ROOT = Path(__file__).parent.parent
QUICK = (
    "logger.mode=disabled",
    "trainer.max_steps=3",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "norm.calibration_samples=64",  # 1024 at 2 a forward cost more than all the rest of such a run
)


def composed(*overrides):
    """The settings that a command line composes, checked."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return settings.check(compose("train", list(overrides)))


def in_pool(folder, world, *overrides):
    """Run `train` on `world` warm ranks; returns rank 0's result and console."""
    complete = composed(*QUICK, f"trainer.devices={world}", *overrides).with_batches(world)
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    return ranks.run(_train, complete, run, world=world)[0]


def _train(complete, run):
    import contextlib
    import io

    import train

    console = io.StringIO()
    with contextlib.redirect_stdout(console):
        result = train.train(complete, launch_ranks.find(complete.trainer), run)
    return result, console.getvalue()


def train_py(*overrides, folder, check=True, timeout_s=200):
    """Run train.py as a user would; returns the finished process and the run folder, if there is one."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides, f"runs_dir={folder}"]
    done = _run(command, timeout_s)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    found = sorted(Path(folder).iterdir()) if Path(folder).exists() else []
    return done, (RunFolder(found[-1]) if found else None)


def type_in(overrides, folder):
    """Run train.py as `train_py` does, in a process of its own that has torch and Lightning loaded already.

    For command lines that end before a rank starts: there a fresh interpreter's seconds show nothing more.
    """
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    output, errors = (Path(folder).parent / f"{name}.txt" for name in ("output", "errors"))
    process = ranks.context.Process(target=_type_in, args=([*overrides, f"runs_dir={folder}"], output, errors))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    found = sorted(Path(folder).iterdir()) if Path(folder).exists() else []
    done = subprocess.CompletedProcess(overrides, process.exitcode, output.read_text(), errors.read_text())
    return done, (RunFolder(found[-1]) if found else None)


def _type_in(arguments, *outputs):
    for descriptor, file in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), descriptor)
    os.chdir(ROOT)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _run(command, timeout_s, tries=3):
    """Run a command; where the system cannot even start it, which a loaded machine did once, try again."""
    for left in reversed(range(tries)):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, check=False)
        except OSError:
            if not left:
                raise
            time.sleep(1)
    raise AssertionError("tries must be at least 1")


def start(*overrides, folder):
    """Start train.py with a mark in its environment, that all it starts inherits: so what it leaves behind is found."""
    return start_command([sys.executable, str(ROOT / "train.py"), *overrides, f"runs_dir={folder}"])


def start_command(command):
    """Start a command with such a mark, in the project."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DISTNORM_TEST_MARK": mark},
    )
    process.mark = mark
    return process


def descendants(process):
    """Living processes that carry a started run's mark, with their environment; zombies are dead."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if state not in "ZX" and f"DISTNORM_TEST_MARK={process.mark}" in environment:
                found[int(entry.name)] = environment
    return found


def rank_process(process, rank):
    """The process of one rank: the first of those that carry its number, for what it starts inherits it."""
    return min(pid for pid, environment in descendants(process).items() if f"RANK={rank}" in environment)


def rows(run):
    """What the record holds."""
    lines = [json.loads(line) for line in run.record.read_text().splitlines()[1:]]
    return [line for line in lines if "step" in line]


def wait_for(condition, timeout_s=90):
    """Poll until `condition()` holds; its value."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{condition} did not come true within {timeout_s} s")


def kill(pid):
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)
