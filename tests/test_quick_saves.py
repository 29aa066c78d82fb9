"""A checkpoint saved quickly has pooled statistics: what is tested, or loaded, is not taken for precise ones."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from distnorm.callbacks import EvaluationStatistics
from tests import ranks
from tests.test_callbacks import Task, fit, spec_of

pytestmark = pytest.mark.unit

STEPS = 4


class QuickSave(Callback):
    """Saves quickly after the last step, as a run does that is told to stop."""

    def __init__(self, path):
        self._path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Is it the last?"""
        if trainer.global_step == STEPS:
            [statistics] = [each for each in trainer.callbacks if isinstance(each, EvaluationStatistics)]
            with statistics.quick_saves():
                trainer.save_checkpoint(self._path)


def quickly_saved(path):
    fit(spec_of("precise"), None, QuickSave(path), max_steps=STEPS, val_check_interval=6)


def a_test_of(path, way):
    """Test the checkpoint as `way` says; what the norm was given and had."""
    quickly_saved(path)
    task = Task()
    more = {"nothing left": STEPS, "after more steps": STEPS + 2}.get(way)
    resumed = None if more is None else path
    steps = 0 if more is None else more  # 0: a trainer that tests alone
    _, trainer = fit(spec_of("precise"), task, ckpt_path=resumed, max_steps=steps, val_check_interval=6)
    trainer.test(task, ckpt_path=path, verbose=False)
    return task.seen[-1], task.truth()


@pytest.mark.parametrize(
    ("way", "world"), [("nothing left", 1), ("nothing left", 2), ("after more steps", 1), ("alone", 2)]
)
def test_precise_statistics_are_measured_for_the_test(tmp_path, way, world):
    found = ranks.run(a_test_of, str(tmp_path / "quick.ckpt"), way, world=world)
    truth = np.concatenate([own.numpy() for _, own in found])
    stored = torch.load(tmp_path / "quick.ckpt", weights_only=True)
    assert stored["distnorm"]["evaluated"] is False
    assert not np.allclose(stored["state_dict"]["model.1.running_mean"], truth.mean(0), rtol=1e-2)
    for (mean, var), _ in found:
        np.testing.assert_allclose(mean, truth.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(var, truth.var(0, ddof=1), rtol=1e-5)


def test_without_training_batches_it_is_said(tmp_path, caplog):
    quickly_saved(tmp_path / "quick.ckpt")
    task = Task()
    _, trainer = fit(spec_of("precise"), task, max_steps=0)
    stored = torch.load(tmp_path / "quick.ckpt", weights_only=True)
    for way, said in (("module", 0), ("loader", 1)):
        caplog.clear()
        data = DataLoader(task.data(), batch_size=96)
        if way == "loader":
            task.train_dataloader = super(Task, task).train_dataloader
        trainer.test(task, data, ckpt_path=tmp_path / "quick.ckpt", verbose=False)
        assert caplog.text.count("no training batches to measure them over. Give EvaluationStatistics(spec, ba") == said
    assert torch.equal(task.seen[-1][0], stored["state_dict"]["model.1.running_mean"])
