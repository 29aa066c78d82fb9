"""Trainings that stop in the middle, as a preempted one does: saved together at a step, then an exception in the loop.

stopped, console = in_pool(folder, 2, "trainer.max_epochs=3", stop_at=5)
"""

import multiprocessing

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from distnorm import ConfigError
from distnorm.data.sampler import GlobalBatchSampler
from distnorm.launch import checkpoints, resumption
from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.ranks import Ranks
from distnorm.launch.run_dir import RunFolder
from distnorm.loop_state import is_between_steps
from distnorm.models import ConvNet
from tests import ranks, runs

SMALL = (
    "trainer.max_steps=-1",
    "trainer.max_epochs=3",
    "data.split=50-10-40",
    "model=convnet",
    "model._target_=tests.interrupted.ForgetfulNet",
    "model.widths=[4,8]",
    "model.strides=[2,2]",
    "drift.interval=2",
)
"""Three epochs of a few steps, of a net that draws random numbers."""


class ForgetfulNet(ConvNet):
    """A ConvNet with dropout: one wrong random number gives other weights."""

    def forward(self, x_NCHW):
        """Compute the logits of what is left."""
        features_NCHW = nn.functional.dropout(self.features(x_NCHW), 0.3, self.training)
        return self.head(features_NCHW.mean((2, 3)))


class Stop(Callback):
    """Save, and raise, after some step; or at the first chance from then on; or some batches later, as a kill would."""

    def __init__(self, last, step, dies_after=0):
        self._last, self._step, self._dies_after, self._saved_at = last, step, dies_after, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Stop here?"""
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if self._saved_at is None and batches >= self._step and is_between_steps(trainer):
            assert self._last.save_quickly(trainer) is None
            self._saved_at = batches
        if self._saved_at is not None and batches >= self._saved_at + self._dies_after:
            raise RunInterruptedError("stopped by the test")


def in_pool(folder, world, *overrides, **stop):
    """Train on warm ranks; returns whether the training was stopped, and rank 0's console, or what refused."""
    return in_pool_drawing(folder, world, *overrides, **stop)[:2]


def in_pool_drawing(folder, world, *overrides, stop_at=None, dies_after=0):
    """The same, and the (epoch, sample) pairs that each rank drew; with loader workers that is more than it trained."""
    complete = settled(world, *overrides)
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    results = ranks.run(_train, complete, run, stop_at, dies_after, world=world)
    return *results[0][:2], [drawn for *_, drawn in results]


def settled(world, *overrides):
    """The settings that ranks get from a command line, those of a resume too."""
    complete = runs.composed(*runs.QUICK, f"trainer.devices={world}", *SMALL, *overrides)
    if complete.ckpt_path is None:
        return complete.with_batches(world)
    return resumption.prepare(complete, Ranks(world, world, 1, 0, 0, "distnorm", "cpu"))


def _train(complete, run, stop_at, dies_after):
    from distnorm.launch import trainer as launch_trainer

    drawn, plain = [], GlobalBatchSampler.__iter__

    def drawing(sampler):
        for batch in plain(sampler):
            drawn.extend(batch)
            yield batch

    def with_stop(*arguments):
        made = checkpoints.checkpoint_callbacks(*arguments)
        last = next(callback for callback in made if isinstance(callback, checkpoints.LastCheckpoint))
        return made if stop_at is None else [*made, Stop(last, stop_at, dies_after)]

    multiprocessing.current_process()._config["daemon"] = False  # ranks of the pool may have loader workers too
    launch_trainer.checkpoint_callbacks, before = with_stop, launch_trainer.checkpoint_callbacks
    GlobalBatchSampler.__iter__ = drawing
    try:
        return False, runs._train(complete, run)[1], drawn
    except RunInterruptedError:
        return True, "", drawn
    except ConfigError as error:  # alike on all ranks: the pool can go on
        return False, f"ConfigError: {error}", drawn
    finally:
        launch_trainer.checkpoint_callbacks = before
        GlobalBatchSampler.__iter__ = plain


def last(folder):
    """The last checkpoint's file."""
    return folder / "checkpoints" / "last.ckpt"


def stored(folder):
    """What the last checkpoint holds, without what names its folder and its time."""
    found = torch.load(last(folder), weights_only=True)
    del found["distnorm"]["saved_at_s"]
    for state in found["callbacks"].values():
        for key in ("dirpath", "best_model_path", "best_k_models", "kth_best_model_path", "last_model_path"):
            state.pop(key, None)
    return found


def differences(one, other):
    """The places at which two checkpoints differ in a single bit."""
    left, right = dict(_leaves(one)), dict(_leaves(other))
    return [path for path in sorted(left.keys() | right.keys()) if left.get(path) != right.get(path)]


def _leaves(value, path=""):
    """Every value with its path, as text that tells bits apart: nan too."""
    if isinstance(value, torch.Tensor):
        yield path, (value.dtype, value.shape, value.cpu().contiguous().numpy().tobytes())
    elif isinstance(value, dict | list | tuple):
        yield path, (type(value), len(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{path}/{key}")
    else:
        yield path, repr(value)
