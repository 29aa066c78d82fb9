"""Lightning under its other name, `pytorch_lightning`: what works, and what is refused with the import to change."""

import importlib
import inspect
import pkgutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import distnorm
from distnorm import ConfigError, NormSpec, collectives
from distnorm.callbacks import EvaluationStatistics
from distnorm.diagnosis import RankDiagnosis
from distnorm.drift.monitor import DriftMonitor
from distnorm.layer_sync import LayerSync
from distnorm.lightning_names import EitherName
from distnorm.progress import PlainProgress, Throughput
from distnorm.resume import ExactResume
from tests import ranks

pytestmark = pytest.mark.unit

DDP = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
SPEC = NormSpec(kind="sync", normalization_batch=8, sync_ranks=2, world_size=2, evaluation="precise")


@pytest.fixture(scope="module")
def other_ranks():
    """Ranks that no other test gets: they load both packages."""
    warm = ranks._pools.pop(2, None)
    yield ranks
    ranks._pools.pop(2).stop()
    if warm is not None:
        ranks._pools[2] = warm


def make_trainer(pl, folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, max_steps=6, **quiet, **options)


def make_task(pl):
    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10))
            self.model[3].initialize_parameters(torch.zeros(2, 4 * 100))

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.log("loss", self.training_step(batch, index), sync_dist=True)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Task()


def trained(name, folder):
    """Body: fit and validate with everything that a Trainer of one's own is given, and save."""
    from distnorm.data.digits import DigitsData

    assert "pytorch_lightning" not in sys.modules  # never loaded for us
    pl = importlib.import_module(name)
    torch.manual_seed(0)
    task = make_task(pl)
    throughput = Throughput(8)
    callbacks = [EvaluationStatistics(SPEC, num_samples=64), RankDiagnosis(), DriftMonitor("full", interval=2)]
    callbacks += [throughput, PlainProgress(60, throughput), ExactResume(0, 8)]
    trainer = make_trainer(pl, folder, callbacks=callbacks, plugins=[LayerSync(SPEC)], **DDP)
    data = DigitsData(device_batch=4)
    trainer.fit(task, datamodule=data)
    steps = trainer.global_step
    (validated,) = trainer.validate(task, datamodule=data, verbose=False)
    trainer.save_checkpoint(f"{folder}/{name}.ckpt")
    saved = torch.load(f"{folder}/{name}.ckpt", weights_only=True)
    return type(trainer).__module__, steps, validated, saved["state_dict"], sorted(saved["distnorm"])


def test_training_is_the_same_under_either_name(other_ranks, tmp_path):
    ours = other_ranks.run(trained, "lightning.pytorch", str(tmp_path), world=2)
    others = other_ranks.run(trained, "pytorch_lightning", str(tmp_path), world=2)
    for own, other in zip(ours, others, strict=True):
        assert (own[0].partition(".")[0], other[0].partition(".")[0]) == ("lightning", "pytorch_lightning")
        assert own[1:3] == other[1:3]
        assert own[1] == 6
        assert own[4] == other[4]
        assert own[3].keys() == other[3].keys()
        for name, value in own[3].items():
            torch.testing.assert_close(other[3][name], value, rtol=0, atol=0)


def averaged(name, folder):
    """Body: fit with an average and statistics of its own, resume, and validate what is left."""
    from distnorm.averaging import WeightAverage
    from distnorm.data.digits import DigitsData

    pl = importlib.import_module(name)
    torch.manual_seed(0)
    data, path = DigitsData(device_batch=4), f"{folder}/{name}-average.ckpt"

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            """Save where there is an average and what it is of."""
            if trainer.global_step == 3:
                trainer.save_checkpoint(path)

    def run(resumed=None):
        task, callbacks = make_task(pl), [WeightAverage(0.5), EvaluationStatistics(SPEC, num_samples=64), Saves()]
        trainer = make_trainer(pl, folder, callbacks=callbacks, plugins=[LayerSync(SPEC)], **DDP)
        trainer.fit(task, datamodule=data, ckpt_path=resumed)
        (validated,) = trainer.validate(task, datamodule=data, verbose=False)
        return validated["loss"], *(p.detach().clone() for p in task.parameters())

    whole = run()
    saved = torch.load(path, weights_only=True)
    states = [saved[key]["model.3.weight"] for key in ("state_dict", "current_model_state")]
    return [whole, states, run(path)]


def test_averaging_is_the_same_under_either_name(other_ranks, tmp_path):
    ours = other_ranks.run(averaged, "lightning.pytorch", str(tmp_path), world=2)
    others = other_ranks.run(averaged, "pytorch_lightning", str(tmp_path), world=2)
    for own, other in zip(ours, others, strict=True):
        assert not torch.equal(*other[1]), "the average, and what it is of"
        for values, other_values in zip(own, other, strict=True):
            for one, two in zip(values, other_values, strict=True):
                torch.testing.assert_close(two, one, rtol=0, atol=0)


def refused(folder):
    """Body: what a Trainer of the other package is refused with; nothing is trained."""
    import functools

    import pytorch_lightning as pl

    from distnorm.data.digits import DigitsData
    from distnorm.models.convnet import ConvNet
    from distnorm.tasks.classification import Classification

    said = []
    task = Classification(ConvNet(), functools.partial(torch.optim.SGD, lr=0.1), 10)
    own = type("Own", (pl.Trainer,), {"__module__": "users"})
    try:
        make_trainer(SimpleNamespace(Trainer=own), folder, devices=1).fit(task, datamodule=DigitsData(device_batch=4))
    except ConfigError as error:
        said.append(str(error))
    weights_only = pl.callbacks.ModelCheckpoint(save_weights_only=True)
    callbacks = [EvaluationStatistics(SPEC), weights_only]
    try:
        make_trainer(pl, folder, devices=1, callbacks=callbacks).fit(
            make_task(pl), datamodule=DigitsData(device_batch=4)
        )
    except ConfigError as error:
        said.append(str(error))
    return said if collectives.rank() == 0 else None


def test_what_cannot_work_is_refused_before_the_first_step(other_ranks, tmp_path):
    module, weights_only = other_ranks.run(refused, str(tmp_path), world=2)[0]
    assert "Classification is made of lightning.pytorch, and this Trainer is pytorch_lightning's" in module
    assert module.endswith("import lightning.pytorch as pl")
    assert weights_only.startswith("ModelCheckpoint(save_weights_only=True) would save rank 0's own statistics")


def shipped(name):
    """Body: what of Lightning's demo classes, and of its base classes, counts as overridden."""
    from distnorm.replay import has_training_loader, model_of

    pl, demos = (importlib.import_module(module) for module in (name, f"{name}.demos.boring_classes"))
    data = torch.utils.data.TensorDataset(torch.zeros(2, 1))
    loaded = pl.LightningDataModule.from_datasets(data)
    modules = [demos.BoringModel(), pl.LightningModule(), make_task(pl)]
    found = [has_training_loader(SimpleNamespace(lightning_module=one)) for one in modules]
    sources = [demos.BoringDataModule(), loaded, pl.LightningDataModule()]
    found += [has_training_loader(SimpleNamespace(datamodule=one)) for one in sources]
    return found, [model_of(one) is one for one in (modules[0], modules[2])]


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_what_lightning_ships_overrides_as_a_users_class_does(other_ranks, name):
    for loaders, models in other_ranks.run(shipped, name, world=2):
        assert loaders == [True, False, False, True, True, False]
        assert models == [True, False]


def lightning_classes():
    """Every class of the package that subclasses one of Lightning's."""
    for module in pkgutil.walk_packages(distnorm.__path__, "distnorm."):
        for _, one in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if one.__module__ == module.name and any(b.__module__.startswith("lightning.") for b in one.__mro__):
                yield one


def test_every_lightning_class_takes_either_name_unless_train_py_alone_makes_it():
    made_by_train_py = {"AtomicCheckpointIO", "BestCheckpoint", "FoundRanks", "LastCheckpoint", "Preemption", "Rungs"}
    assert {one.__name__ for one in lightning_classes() if not issubclass(one, EitherName)} == made_by_train_py
