"""How far a run is: a bar on a terminal, plain lines elsewhere; and how many samples a second it trains."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, RichProgressBar

from distnorm.lightning_names import EitherName

_WARMUP_STEPS = 3


class Throughput(EitherName, Callback):
    """Count training samples a second over all ranks, the first steps and all evaluation left out.

    Args:
        samples_a_step: over all ranks, in a full step.
    """

    def __init__(self, samples_a_step: int) -> None:
        self._samples_a_step = samples_a_step
        self._started = 0.0
        self._seconds: list[float] = []

    @property
    def samples_per_s(self) -> float | None:
        """Samples a second; `None` before enough steps were made."""
        timed = self._seconds[_WARMUP_STEPS:]
        return self._samples_a_step * len(timed) / sum(timed) if timed else None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock, loading included from the second step of an epoch on."""
        if batch_idx == 0 or not self._started:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step's time."""
        now = time.perf_counter()
        self._seconds.append(now - self._started)
        self._started = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep evaluation out of the next step's time."""
        self._started = 0.0


class PlainProgress(EitherName, Callback):
    """Print one line every few seconds with step, loss, accuracy, samples a second and the time left.

    Args:
        every_s: seconds between lines.
        throughput: counts the samples.
    """

    def __init__(self, every_s: float, throughput: Throughput) -> None:
        self._every_s, self._throughput = every_s, throughput
        self._last = self._start = time.monotonic()
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print, when it is time."""
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            self._print(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the end."""
        self._print(trainer)

    def _print(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        step, steps = trainer.global_step, int(trainer.estimated_stepping_batches)
        metrics = {name: float(value) for name, value in trainer.progress_bar_metrics.items() if name != "v_num"}
        elapsed = time.monotonic() - self._start
        left = elapsed / max(1, step - self._first_step) * (steps - step)
        parts = [f"step {step}/{steps}", f"epoch {trainer.current_epoch}"]
        parts += [f"{name} {value:.4f}" for name, value in metrics.items()]
        speed = self._throughput.samples_per_s
        parts += [f"{speed:.0f} samples/s"] if speed else []
        print("  ".join([*parts, f"{duration(left)} left"]), flush=True)


def duration(seconds: float) -> str:
    """Write a time as one reads it: `8 s`, `2:05 min`, `3:04 h`.

    Args:
        seconds: 0 or more; fractions are rounded.
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h"


def make_progress(every_s: float, throughput: Throughput) -> Callback:
    """Choose a bar for a terminal, lines for a file."""
    return RichProgressBar() if sys.stdout.isatty() else PlainProgress(every_s, throughput)
