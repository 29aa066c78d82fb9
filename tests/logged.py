"""A process that logs as a run does, through the record and wandb."""

import os
import subprocess
import sys
from pathlib import Path

from distnorm.drift import wandb_file
from tests.runs import wait_for

LOGGING = """
import pathlib, sys, time
from distnorm.launch import console
console.quiet_libraries()
from distnorm.launch.run_dir import RunFolder
from distnorm.tracking import make_loggers
from tests import told
from tests.runs import composed

folder, mode, rows, then = sys.argv[1:]
run = RunFolder(pathlib.Path(folder))
run.path.mkdir()
names = ["logger.name=mine", "logger.group=ours", "logger.project=theirs"]
settings = composed(f"logger.mode={mode}", "norm=sync", *names).with_batches(2)
layers = [{"name": "bn1", "was": "BatchNorm2d", "normalization_batch": None}]
config = {**settings.model_dump(), "decision": settings.decide(2, 2).to_dict(), "decision_layers": layers}
made = make_loggers(settings.logger, run, config, is_first=True)
events = [told.watched("bn1", "bn2")]
events += [told.measured(step) for step in range(10, 10 * int(rows) + 1, 10)]
for event in events:
    for logger in made:
        logger.take(event)
        if event.step:
            logger.log_metrics({"train/loss": 1 / event.step, "epoch": 0}, step=event.step)
print("logged", "matplotlib.backends.backend_agg" in sys.modules, flush=True)
if then == "hang":
    time.sleep(60)
for event in (told.alarm(event.step), told.snapshot(event.step)):
    for logger in made:
        logger.take(event)
for logger in made:
    logger.finalize("success")
"""


def start(folder, mode, rows=3, then="end"):
    """Log in a process of its own; HOME is empty and has no key."""
    home = folder / "home"
    home.mkdir()
    environ = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_") and key != "NETRC"}
    return subprocess.Popen(
        [sys.executable, "-c", LOGGING, folder / "run", mode, str(rows), then],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=environ | {"HOME": str(home), "PYTHONPATH": "."},
    )


def finish(logger):
    """Finish wandb's run here, and wait for its file: wandb returns before the last rows are in it."""
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    [path] = folder.glob("*.wandb")
    wait_for(lambda: wandb_file.read(path).has_ended, 30)
