"""Runs that are told to stop: a model that does it to itself, and a body for the warm rank pool."""

import contextlib
import functools
import io
import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from distnorm import collectives
from distnorm.launch import checkpoints, preemption
from distnorm.launch.endings import RunInterruptedError
from distnorm.models import ResNet

LATER: dict[str, list[str]] = {}
"""What is to be done on another occasion than in a training forward: `while saving`, `while validating`."""


class Told(ResNet):
    """In a training forward does something to its rank, as a scheduler or a person would from outside.

    Args:
        at: which training forward of this process, from 1; 0: when it is built.
        rank: of which rank; -1: of all.
        what: deeds with `+` between: a signal's name, `stall <seconds>`, `write <file> [text]`; each may end in
            `while saving`, `while checking` (before the first step) or `while validating`, or in `on <rank>`.
        slow: the rank that is a second late in each of the two forwards before.
        resnet: the network's own arguments.
    """

    def __init__(self, at: int = 0, rank: int = 0, what: str = "", slow: int | None = None, **resnet: Any) -> None:
        super().__init__(**resnet)
        self.at, self.rank, self.what, self.slow = at, rank, what, slow
        self.calls = 0
        if at == 0:
            self._act()

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, and misbehave."""
        self.calls += self.training
        if self.training and collectives.rank() == self.slow and self.at - 2 <= self.calls < self.at:
            time.sleep(1)
        if self.training and self.calls == self.at:
            self._act()
        if not self.training:
            now("validating" if self.calls else "checking")
        return super().forward(x)

    def _act(self) -> None:
        for deed in self.what.split("+") if self.rank in (-1, collectives.rank()) else ():
            what, _, when = deed.partition(" while ")
            what, _, rank = what.partition(" on ")
            if not rank or int(rank) == collectives.rank():
                LATER.setdefault(when, []).append(what)
        now("")


def now(occasion):
    """Do what was to be done on this occasion."""
    for deed in LATER.pop(occasion, []):
        _do(*deed.split())


def _do(what, argument="", text=""):
    if what == "stall":
        time.sleep(float(argument))
    elif what == "write":
        Path(argument).write_text(text)
    else:
        os.kill(os.getpid(), signal.Signals[what])


def train(complete, run, patience_s):
    """Body: train until told to stop; how that ended, the steps saved at, and whether the handlers are back."""
    import train as script
    from distnorm.launch import ranks
    from distnorm.launch import trainer as launch_trainer

    saved_at, before = [], handlers()
    save = checkpoints.LastCheckpoint.save

    def saving(self, trainer):
        now("saving")
        saved_at.append(trainer.global_step)
        return save(self, trainer)

    LATER.clear()
    checkpoints.LastCheckpoint.save = saving
    launch_trainer.Preemption = functools.partial(preemption.Preemption, patience_s=patience_s)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            script.train(complete, ranks.find(complete.trainer), run)
        ended = None
    except RunInterruptedError as error:
        ended = error
    finally:
        checkpoints.LastCheckpoint.save = save
        launch_trainer.Preemption = preemption.Preemption
    return {
        "message": str(ended or ""),
        "exit_code": ended and ended.exit_code,
        "wants_requeue": ended and ended.wants_requeue,
        "handlers": handlers() == before,
        "saved_at": saved_at,
    }


def handlers():
    """Who handles the signals."""
    return [signal.getsignal(told) for told in (signal.SIGUSR1, signal.SIGTERM)]
