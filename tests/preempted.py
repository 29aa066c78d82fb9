"""Runs that are told to stop: a model that does it to itself, and bodies for the warm rank pool."""

import contextlib
import io
import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from distnorm import collectives
from distnorm.launch.endings import RunInterruptedError
from distnorm.models import ResNet


class Told(ResNet):
    """In a training forward does something to its rank, as a scheduler or a person would from outside.

    Args:
        at: which training forward of this process, from 1.
        rank: of which rank; -1: of all.
        what: names of signals, `touch <file>`, `stall <seconds>`; several with `+`.
        slow: the rank that is late by a second in each of the two forwards before.
        resnet: the network's own arguments.
    """

    def __init__(self, at: int = 0, rank: int = 0, what: str = "", slow: int | None = None, **resnet: Any) -> None:
        super().__init__(**resnet)
        self.at, self.rank, self.what, self.slow = at, rank, what, slow
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, and misbehave."""
        self.calls += self.training
        if self.training and collectives.rank() == self.slow and self.at - 2 <= self.calls < self.at:
            time.sleep(1)
        if self.training and self.calls == self.at and self.rank in (-1, collectives.rank()):
            for deed in self.what.split("+"):
                _do(*deed.split())
        return super().forward(x)


def _do(what: str, argument: str = "") -> None:
    if what == "touch":
        Path(argument).touch()
    elif what == "stall":
        time.sleep(float(argument))
    else:
        os.kill(os.getpid(), signal.Signals[what])


def train(complete, run):
    """Body: train until told to stop; how that ended, when, and the handlers before and after."""
    import train as script
    from distnorm.launch import ranks

    before = handlers()
    console = io.StringIO()
    with contextlib.redirect_stdout(console):
        try:
            script.train(complete, ranks.find(complete.trainer), run)
            ended = None
        except RunInterruptedError as error:
            ended = error
    return {
        "message": str(ended or ""),
        "exit_code": ended and ended.exit_code,
        "wants_requeue": ended and ended.wants_requeue,
        "time": time.monotonic(),
        "handlers": handlers() == before,
        "console": console.getvalue(),
    }


def handlers():
    """Who handles the signals."""
    return [signal.getsignal(told) for told in (signal.SIGUSR1, signal.SIGTERM)]
