"""The callback that evaluates with what was decided: precise statistics, constants late; the training unmoved."""

import dataclasses

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from distnorm import ConfigError, EvenLoader, collectives, convert, decide
from distnorm.callbacks import EvaluationStatistics
from distnorm.launch.trainer import make_ddp
from tests import ranks

pytestmark = pytest.mark.unit


class Task(pl.LightningModule):
    """A norm behind a learned layer, with dropout; each rank's inputs are its own, rank 1's around 4."""

    def __init__(self, samples=96):
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
        generator = torch.Generator().manual_seed(collectives.rank())
        self.x = torch.randn(samples, 3, generator=generator) + 4 * collectives.rank()
        self.losses, self.seen, self.modes, self.running = [], [], [], []

    def training_step(self, batch, batch_idx):
        self.modes.append(self.model[1].training)
        self.running.append(self.model[1].running_mean.clone())
        loss = (self.model(batch[0]).squeeze(1) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.train()  # as users do, and Lightning did

    def validation_step(self, batch, batch_idx):
        self.seen.append((self.model[1].running_mean.clone(), self.model[1].running_var.clone()))

    test_step = validation_step

    def truth(self):
        """Mean and variance, over this rank's samples, of what the norm is given with the weights of the moment."""
        with torch.no_grad():
            return self.model[0](self.x).double()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

    def data(self):
        return TensorDataset(self.x, self.x.sum(1))

    def train_dataloader(self):
        return DataLoader(self.data(), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data(), batch_size=96)

    test_dataloader = val_dataloader


class Truth(Callback):
    """What precise statistics have to be at each validation: over all samples of this rank."""

    def __init__(self):
        self.given = []

    def on_validation_start(self, trainer, module):
        if not trainer.sanity_checking:
            self.given.append(module.truth())


def spec_of(evaluation, frozen_last=0.0):
    spec = decide(16, collectives.world_size(), kind="batch")
    return dataclasses.replace(spec, evaluation=evaluation, frozen_last=frozen_last)


def fit(spec, task=None, *callbacks, ckpt_path=None, folder=None, batches=None, **options):
    task = Task() if task is None else task
    convert(task.model, spec)
    world = collectives.world_size()
    statistics = EvaluationStatistics(spec, batches, 96 * world)
    saving = [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, save_last=True)] if folder else []
    torch.manual_seed(7 + collectives.rank())
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": world,
            "strategy": make_ddp(60) if world > 1 else "auto",
            "plugins": [TorchElasticEnvironment() if world > 1 else LightningEnvironment()],
            "max_steps": 9,
            "val_check_interval": 2,
            "use_distributed_sampler": False,
            "callbacks": [*callbacks, statistics, *saving],
            "enable_checkpointing": bool(folder),
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    trainer.fit(task, ckpt_path=ckpt_path)
    return task, trainer


def losses_of(evaluation, **options):
    return fit(spec_of(evaluation), **options)[0].losses


LOADERS = {
    "shuffled": lambda task: DataLoader(task.data(), batch_size=16, shuffle=True),
    "own generators": lambda task: DataLoader(
        task.data(),
        batch_size=16,
        sampler=RandomSampler(task.data(), generator=torch.Generator().manual_seed(3)),
        generator=torch.Generator().manual_seed(4),
    ),
    "workers": lambda task: DataLoader(
        task.data(), batch_size=16, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "even": lambda task: EvenLoader(DataLoader(task.data(), batch_size=16, shuffle=True)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_precise_statistics_do_not_move_the_training_by_a_bit(name):
    """Two validations an epoch and dropout in the model: a stolen batch or random number would show."""
    found = {}
    for evaluation in ("running", "precise"):
        task = Task()
        task.train_dataloader = lambda task=task: LOADERS[name](task)
        found[evaluation] = fit(spec_of(evaluation), task)[0]
    assert found["running"].losses == found["precise"].losses
    assert len(found["running"].losses) == 9
    assert not torch.equal(found["running"].seen[-1][0], found["precise"].seen[-1][0])


def precise_everywhere(folder):
    truth = Truth()
    task, trainer = fit(spec_of("precise"), None, truth, folder=folder)
    return task.seen, truth.given, task.truth(), task.losses, task.running[-1], losses_of("pooled")


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_and_checkpoint_hold_precise_statistics_over_all_ranks(tmp_path, world):
    found = ranks.run(precise_everywhere, str(tmp_path), world=world)
    for step in range(4):  # the first that was seen is the sanity check's: what the model came with
        given = np.concatenate([truths[step].numpy() for _, truths, *_ in found])
        for seen, *_ in found:
            np.testing.assert_allclose(seen[step + 1][0], given.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(seen[step + 1][1], given.var(0, ddof=1), rtol=1e-5)
    assert all(torch.equal(seen[0][0], torch.zeros(4)) for seen, *_ in found)
    assert all(losses == pooled_losses for *_, losses, _, pooled_losses in found)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    at_end = np.concatenate([truth.numpy() for _, _, truth, *_ in found])
    np.testing.assert_allclose(stored["state_dict"]["model.1.running_mean"], at_end.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stored["state_dict"]["model.1.running_var"], at_end.var(0, ddof=1), rtol=1e-5)
    assert len(stored["distnorm"]["rank_statistics"]) == world
    own = stored["distnorm"]["rank_statistics"][-1]["model.1.running_mean"]
    assert not np.allclose(own, at_end.mean(0), rtol=1e-3), "the rank's own travel beside"


class Count(Callback):
    """How often the model ran, in training, evaluation and calibration."""

    def __init__(self):
        self.forwards = 0

    def on_fit_start(self, trainer, module):
        module.model[0].register_forward_hook(lambda *_: setattr(self, "forwards", self.forwards + 1))


def test_statistics_are_measured_once_a_step(tmp_path):
    """A validation and a checkpoint after every step share them, and the sanity check costs none."""
    count = Count()
    task, trainer = fit(spec_of("precise"), None, count, folder=tmp_path, val_check_interval=1, max_steps=5)
    assert count.forwards == 5 * (1 + 96 / 16)
    trainer.test(task, verbose=False)
    trained = task.seen[-1]  # measured anew, in another order
    trainer.test(task, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    torch.testing.assert_close(task.seen[-1], trained)
    assert count.forwards == 6 * 6 + 5, "a checkpoint is tested as it is"


def test_batches_of_the_users_own_are_measured():
    batches = [torch.full((8, 3), 2.0), torch.zeros(8, 3)]
    task, _ = fit(spec_of("precise"), batches=batches, max_steps=2)
    with torch.no_grad():
        expected = task.model[0](torch.cat(batches)).mean(0)
    torch.testing.assert_close(task.seen[-1][0], expected)


class Nothing(pl.LightningModule):
    """Neither a forward nor a model."""

    training_step = Task.training_step
    configure_optimizers = Task.configure_optimizers
    train_dataloader = Task.train_dataloader

    def __init__(self):
        super().__init__()
        self.net, self.x = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)), torch.zeros(96, 3)

    data = Task.data


def test_a_module_without_a_model_is_refused_at_the_start():
    task = Nothing()
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[EvaluationStatistics(spec_of("precise"))])
    with pytest.raises(ConfigError, match=r"Nothing has neither a forward nor a model\.\n.*norm\.evaluation=pooled"):
        trainer.fit(task)


def test_a_loader_that_cannot_be_copied_is_refused():
    task = Task()
    task.train_dataloader = lambda: {"a": DataLoader(task.data(), batch_size=16)}
    task.training_step = lambda batch, batch_idx: Task.training_step(task, batch["a"], batch_idx)
    with pytest.raises(ConfigError, match=r"training loader of type dict without disturbing it\.\n.*batches=…"):
        fit(spec_of("precise"), task)


def frozen(folder, evaluation, ckpt_path=None, steps=10, frozen_last=0.4):
    task, _ = fit(
        spec_of(evaluation, frozen_last),
        None,
        folder=folder,
        max_steps=steps,
        val_check_interval=3,
        ckpt_path=ckpt_path,
    )
    weight, norm = task.model[1].weight.detach().clone(), task.model[1]
    return (
        task.modes,
        task.running,
        task.seen,
        (norm.running_mean.clone(), norm.running_var.clone()),
        weight,
        norm.training,
    )


@pytest.mark.parametrize(
    ("evaluation", "world"), [("running", 1), ("pooled", 1), ("precise", 1), ("pooled", 2), ("precise", 2)]
)
def test_the_last_share_of_training_goes_on_with_constants(tmp_path, evaluation, world):
    found = ranks.run(frozen, str(tmp_path), evaluation, world=world)
    for modes, running, seen, (mean, var), _, training in found:
        assert modes == [True] * 6 + [False] * 4  # the last 0.4 of 10 steps, over epochs and validations
        assert all(torch.equal(value, mean) for value in running[6:])
        assert not torch.equal(running[5], mean)
        assert torch.equal(seen[-1][0], mean)
        assert torch.equal(mean, found[0][3][0]), "all ranks hold the same constants"
        assert torch.equal(var, found[0][3][1])
        assert training, "after training the layers follow the module's mode again"
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    before = torch.load(tmp_path / "epoch=1-step=7.ckpt", weights_only=True)
    assert stored["distnorm"]["frozen"] is True
    assert torch.equal(stored["state_dict"]["model.1.running_var"], found[0][3][1])
    assert not torch.equal(stored["state_dict"]["model.1.weight"], before["state_dict"]["model.1.weight"])


def test_training_resumes_frozen_with_the_same_constants(tmp_path):
    whole = ranks.run(frozen, str(tmp_path), "pooled", world=2)
    resumed = ranks.run(
        frozen, str(tmp_path / "on"), "pooled", str(tmp_path / "epoch=1-step=8.ckpt"), 20, world=2
    )  # of 20 steps the last 0.4 begin at 12: it stays frozen all the same
    for (_, _, _, constants, *_), (modes, running, *_) in zip(whole, resumed, strict=True):
        assert modes == [False] * 12
        assert all(torch.equal(value, constants[0]) for value in running)
    thawed = ranks.run(
        frozen, str(tmp_path / "thawed"), "pooled", str(tmp_path / "epoch=1-step=8.ckpt"), 10, 0.0, world=2
    )
    assert [modes for modes, *_ in thawed] == [[True, True]] * 2


def test_the_switch_is_logged_once(caplog):
    with caplog.at_level("INFO", "distnorm"):
        fit(spec_of("precise", 0.5), max_steps=4)
    assert caplog.text.count("Step 2: the statistics of the batch norms are constants from here on (precise).") == 1


def test_a_share_of_an_endless_training_is_refused():
    with pytest.raises(ConfigError, match=r"norm\.frozen_last=0\.2 is a share of all steps.*\n.*trainer\.max_steps"):
        fit(spec_of("pooled", 0.2), max_steps=-1, max_epochs=-1, max_time="00:00:01:00")
