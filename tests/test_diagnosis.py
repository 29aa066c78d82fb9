"""The callback in Lightning's own trainer: ranks that differ end alike, before DDP and before the first step."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn

from distnorm import ConfigError, NormSpec, SyncBatchNorm, collectives, convert, positions
from distnorm.diagnosis import RankDiagnosis
from tests import ranks
from tests.test_agreement import plain

pytestmark = pytest.mark.unit


class Task(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(fault, folder):
    model = plain()
    conversion = convert(model, NormSpec("sync", 4, sync_ranks=2, device_batch=2, world_size=2))
    task = Task(model)
    me = collectives.rank()
    if fault == "channels" and me == 1:
        model[0], model[1], model[2][0] = nn.Linear(4, 5), SyncBatchNorm(5), SyncBatchNorm(5)
    if fault == "frozen" and me == 1:
        task.on_train_epoch_start = lambda: None
        task.on_fit_start = model[2][0].eval
    if fault == "replaced" and me == 1:
        model[1] = nn.BatchNorm1d(8)
    options = {"sync_batchnorm": True} if fault == "sync_batchnorm" else {}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RankDiagnosis(conversion, folder)],
        **options,
    )
    try:
        trainer.fit(task)
    except ConfigError as error:
        return str(error)
    finally:
        positions.stop()
    return {rank: (found.step, found.trail[-1].what) for rank, found in positions.read(folder).items()}


@pytest.mark.parametrize(
    ("fault", "difference"),
    [
        ("channels", "1 has 8 channels on rank 0 and 5 on rank 1."),
        ("frozen", "2.0 is in training mode on rank 0 and evaluation on rank 1."),
        ("replaced", "1 is a distnorm.SyncBatchNorm on rank 0 and torch.BatchNorm1d on rank 1."),
        ("sync_batchnorm", "Trainer(sync_batchnorm=True) would replace 1, a SyncBatchNorm of distnorm's"),
    ],
)
def test_lightnings_ranks_that_differ_end_alike_before_the_first_step(tmp_path, fault, difference):
    messages = ranks.run(fit, fault, str(tmp_path), world=2)
    assert messages[0] == messages[1]
    assert messages[0].startswith(difference)
    assert len(messages[0].splitlines()) <= 3


def test_lightnings_steps_are_in_the_positions(tmp_path):
    assert ranks.run(fit, "", str(tmp_path), world=2)[0] == {0: (1, "1 backward"), 1: (1, "1 backward")}


def test_the_layer_plugin_that_is_refused_is_lightnings():
    strategy = type("Strategy", (), {"_layer_sync": TorchSyncBatchNorm()})()
    trainer = type("Trainer", (), {"strategy": strategy})()
    callback = RankDiagnosis()
    with pytest.raises(ConfigError, match="Leave sync_batchnorm out"):
        callback.setup(trainer, Task(nn.Sequential(SyncBatchNorm(3))), "fit")
    callback.setup(trainer, Task(nn.Sequential(SyncBatchNorm(3))), "test")
    callback.setup(trainer, Task(nn.Sequential(nn.BatchNorm1d(3))), "fit")
