"""The plug of Lightning's Trainer: any model is converted for the fit, and is what it was afterwards."""

import datetime as dt

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from distnorm import ConfigError, NormSpec
from distnorm.layer_sync import LayerSync
from tests import ranks

pytestmark = pytest.mark.unit


class Model(pl.LightningModule):
    """Somebody's module, that knows nothing of distnorm; one layer is frozen."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4).eval())
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append([type(self.net[i]).__name__ for i in (1, 3)])
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(plugins, folder):
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    torch.manual_seed(0)
    model = Model().double()
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, dtype=torch.float64))
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(timeout=dt.timedelta(seconds=60)),
        plugins=[*plugins, TorchElasticEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    return model.seen, [type(model.net[i]).__name__ for i in (1, 3)], model.net[3].training, model.net[1].running_var


def test_a_trainers_model_is_synchronized_for_the_fit(tmp_path):
    for seen, after, frozen_trains, running_var in ranks.run(fit, [LayerSync()], str(tmp_path), world=2):
        assert seen == [["SyncBatchNorm", "SyncBatchNorm"]]
        assert after == ["BatchNorm1d", "BatchNorm1d"]
        assert not frozen_trains
        torch.manual_seed(0)
        joined = Model().double()
        data = torch.randn(8, 3, dtype=torch.float64)
        joined.net(data)
        torch.testing.assert_close(running_var, joined.net[1].running_var, rtol=1e-10, atol=1e-10)


def test_the_decision_is_made_when_the_ranks_are_known():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    plugin = LayerSync(device_batch=2)
    assert plugin.apply(model) is model
    assert type(model[1]) is nn.GroupNorm  # alone, 2 samples are too few for batch norm
    assert type(plugin.revert(model)[1]) is nn.BatchNorm1d
    LayerSync(NormSpec(kind="ghost", normalization_batch=2, ghost_batch=2)).apply(model)
    assert model[1].ghost_batch == 2


def test_a_decision_and_its_ground_are_one_too_many():
    with pytest.raises(ConfigError, match=r"device_batch=8\. Give the decision"):
        LayerSync(NormSpec(kind="batch", normalization_batch=8), device_batch=8)
