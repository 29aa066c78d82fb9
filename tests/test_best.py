"""The best checkpoint is the best of those that were saved: a score whose file the disk refused counts for nothing."""

import resource

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback

from distnorm import collectives
from distnorm.launch.checkpoint_files import AtomicCheckpointIO
from distnorm.launch.checkpoints import BestCheckpoint, LastCheckpoint
from distnorm.launch.run_dir import RunFolder
from tests import ranks
from tests.test_callbacks import Task, fit, spec_of

pytestmark = pytest.mark.unit


class Graded(Task):
    """Its validations, one every 2 steps, have losses that were given."""

    def __init__(self, losses):
        super().__init__()
        self._losses = losses

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self._losses[self.trainer.global_step // 2 - 1])


class Refuse(Callback):
    """The disk takes no more than 100 bytes a file after some validation of an epoch, on the rank that writes."""

    def __init__(self, number):
        self._number, self._before = number, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_validation_start(self, trainer, pl_module):
        """Is it this one?"""
        soft, hard = self._before
        refuses = trainer.is_global_zero and trainer.global_step // 2 - 1 == self._number
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if refuses else soft, hard))

    def on_train_epoch_end(self, trainer, pl_module):
        """The last checkpoint finds room."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


def trained(folder, losses, refused):
    """Train; the best checkpoint's score, path and candidates in the end, on this rank."""
    run, refuse = RunFolder(folder), Refuse(refused)
    best = BestCheckpoint(run, None)
    environment = TorchElasticEnvironment() if collectives.world_size() > 1 else LightningEnvironment()
    options = {"enable_checkpointing": True, "plugins": [environment, AtomicCheckpointIO()]}
    steps = 2 * len(losses)
    fit(spec_of("pooled"), Graded(losses), refuse, best, LastCheckpoint(run), max_steps=steps, **options)
    refuse.on_train_epoch_end(None, None)
    score = None if best.best_model_score is None else best.best_model_score.item()
    return score, best.best_model_path, set(best.best_k_models)


@pytest.mark.parametrize(
    ("losses", "refused", "kept"),
    [([4, 2, 3, 5], 1, 2), ([2, 3, 4, 5], 0, 1), ([4, 3, 2], 2, 1), ([4, 2, 5], None, 1)],
    ids=["a worse one later", "the first", "none later", "a good disk"],
)
def test_the_best_that_was_saved_is_kept_on_all_ranks(tmp_path, losses, refused, kept):
    found = ranks.run(trained, tmp_path, [float(loss) for loss in losses], refused, world=2)
    path = tmp_path / "checkpoints" / "best.ckpt"
    assert [(score, paths) for score, *paths in found] == [(losses[kept], [str(path), {str(path)}])] * 2
    assert torch.load(path, weights_only=True)["global_step"] == 2 * (kept + 1)
    last = torch.load(path.with_name("last.ckpt"), weights_only=True)["callbacks"]
    [score] = [state["best_model_score"] for name, state in last.items() if name.startswith("BestCheckpoint")]
    assert score == losses[kept]


def test_where_none_could_be_saved_there_is_no_best(tmp_path):
    [found] = ranks.run(trained, tmp_path, [2.0], 0, world=1)
    assert found == (None, "", set())
