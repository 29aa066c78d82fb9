"""Searches for tests: the real conductor over a cheap function instead of a training, in this process."""

import functools
import json
import math
import os
import signal
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distnorm.drift.record import Record
from distnorm.launch.run_dir import write_json
from distnorm.search import design
from distnorm.search.conduct import Conductor
from distnorm.search.folder import SearchFolder, open_search
from distnorm.search.plan import Plan
from distnorm.search.trials import run_trial
from distnorm.study.workers import CellError, in_words
from tests import ranks, runs

SPACE = {
    "optimizer.lr": {"low": 1e-3, "high": 1.0, "scale": "log"},
    "optimizer.momentum": {"low": 0.5, "high": 0.99, "scale": "one_minus_log"},
}


def asked(choice="random", **changes):
    """A design: that of conf/search, over `SPACE`, with some changes."""
    return design.read({**_node(choice), "space": SPACE, **changes})


@functools.cache
def _node(choice):
    with initialize_config_dir(str(runs.ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("train", [f"search={choice}"]).search)


@functools.cache
def base():
    return runs.composed("trainer=cpu")


def composer(settings):
    """Composes by setting keys, without Hydra, which takes 0.1 s a time."""

    def compose_with(changes):
        groups = {"optimizer": dict(settings.optimizer), "data": dict(settings.data)}
        for change in changes:
            path, value = change.split("=")
            group, key = path.split(".")
            groups[group][key] = json.loads(value)
        return settings.model_copy(update=groups)

    return compose_with


def loss_of(values):
    """Least at lr 0.1 and momentum 0.9, by their decades."""
    lr, momentum = values["optimizer.lr"], values.get("optimizer.momentum", 0.9)
    return math.log10(lr / 0.1) ** 2 + math.log10((1 - momentum) / 0.1) ** 2


def train(settings, ranks, run):
    """What stands for a training: leaves a line in `begun`, a record and a result."""
    with (run.path.parent.parent / "begun").open("a") as file:
        file.write(f"{run.path.name}\n")
    record = Record(run.record)
    loss = loss_of({f"optimizer.{key}": settings.optimizer[key] for key in ("lr", "momentum")})
    for step, extra in enumerate((0.5, 0.0, 0.25), 1):
        record.append(step, {"val/loss": loss + extra, "test/loss": -loss})
    record.close()
    write_json(run.result, {"metrics": {"test/accuracy": 1 - loss}})


class Here:
    """Does tasks in this process, where `Workers` would in others."""

    def __init__(self):
        self._done = []

    @property
    def free(self):
        return int(not self._done)

    def start(self, task):
        try:
            self._done.append((task, run_trial(task)))
        except BaseException as error:  # noqa: BLE001 — as in a worker
            self._done.append((task, CellError(in_words(error))))

    def ended(self, timeout_s=None):
        done, self._done = self._done, []
        return done


def conduct(folder, found, objective=train):
    """Run a search in this process; its folder."""
    settings = base().model_copy(update={"runs_dir": str(folder)})
    opened = open_search(found, settings, ["train.py"])
    conductor = Conductor(found, Plan(found), opened, composer(settings), Here(), objective, "train.py")
    with conductor.told_by(signal.SIGTERM):
        conductor.run()
    return SearchFolder(opened.path)


def in_process(body, *arguments):
    """Start `body` in a process of its own, forked from a warm one."""
    process = ranks.context.Process(target=body, args=arguments)
    process.start()
    return process


def ended(process):
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def begun(path):
    """Numbers of the trials that were begun, in order."""
    return [int(line) for line in (Path(path) / "begun").read_text().split()]


def die(settings, ranks, run):
    """The same, but the process is killed in the third trial, before it has left anything."""
    train(settings, ranks, run)
    if len(begun(run.path.parent.parent)) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
