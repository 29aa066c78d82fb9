"""What else overwrites or averages statistics: Accelerate, Lightning, weight averaging, FSDP2, and a load on rank 0."""

import dataclasses
import warnings
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader

from distnorm import GhostBatchNorm, NormSpec, collectives, convert, decide, evaluation_statistics, population
from distnorm.callbacks import EvaluationStatistics
from distnorm.layer_sync import LayerSync
from distnorm.norms import FrozenBatchNorm
from tests import ranks
from tests.joined import Parent, batches, logged, net, own_batches, pooled_of, reference, train

pytestmark = pytest.mark.unit

STEPS = 40


class DistributedDataParallelKwargs:
    """Accelerate's defaults of DDP's arguments, that it always passes."""

    def to_kwargs(self):
        return {
            "dim": 0,
            "broadcast_buffers": True,
            "bucket_cap_mb": 25,
            "find_unused_parameters": False,
            "check_reduction": False,
            "gradient_as_bucket_view": False,
        }


def prepare(model, kwargs=None):
    """`Accelerator.prepare_model` on several CPU processes, without mixed precision: what it does to the model."""
    model._is_accelerate_prepared = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch 2.13: broadcast_buffers
        model = DistributedDataParallel(model, **(kwargs.to_kwargs() if kwargs else {}))
    model._is_accelerate_prepared = True
    return model


def prepared(kind):
    model = net()
    convert(model, decide(16, 2))
    kwargs = DistributedDataParallelKwargs() if kind == "kwargs" else None
    ddp = prepare(Parent(model) if kind == "parent" else model, kwargs)
    if kind == "dynamo":
        ddp = torch.compile(ddp, backend="aot_eager")
    train(ddp, own_batches(STEPS))
    return *pooled_of(model, model[0]), model[0].momentum


@pytest.mark.parametrize("kind", ["plain", "kwargs", "dynamo", "parent"])
def test_accelerates_prepare(kind):
    for mean, var, momentum in ranks.run(prepared, kind, world=2):
        assert (mean, var) == pytest.approx(reference(STEPS, momentum), rel=1e-4)


def with_fabric(kind):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[TorchElasticEnvironment()])
    fabric.launch()
    model = net()
    convert(model, decide(16, 2))
    wrapped = fabric.setup(Parent(model) if kind == "parent" else model)
    for x in own_batches(STEPS):
        fabric.backward(wrapped(x).sum())
    return *pooled_of(model, model[0]), model[0].momentum


@pytest.mark.parametrize("kind", ["model", "parent"])
def test_lightnings_fabric(kind):
    for mean, var, momentum in ranks.run(with_fabric, kind, world=2):
        assert (mean, var) == pytest.approx(reference(STEPS, momentum), rel=1e-4)


class Task(pl.LightningModule):
    """A norm right on the input of each rank."""

    def __init__(self):
        super().__init__()
        self.model, self.seen = net(), None

    def training_step(self, batch, batch_idx):
        return self.model(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.seen = self.model[0].running_mean.item(), self.model[0].running_var.item()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

    def train_dataloader(self):
        return DataLoader(own_batches(STEPS), batch_size=None)

    def val_dataloader(self):
        return DataLoader(own_batches(1), batch_size=None)


class Counts(Callback):
    """Which buffers DDP sends in the end."""

    def on_train_end(self, trainer, module):
        self.sent = len(trainer.strategy.model.modules_buffers)


def fitted(how):
    task, spec, counts = Task(), decide(16, 2), Counts()
    plugins = [TorchElasticEnvironment()]
    if how == "LayerSync":
        plugins.append(LayerSync(spec))
    elif how == "convert":
        convert(task.model, spec)
    elif how == "the task":
        convert(task, spec)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)),
        plugins=plugins,
        max_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[EvaluationStatistics(dataclasses.replace(spec, evaluation="pooled")), counts],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    _, said = logged(lambda: trainer.fit(task))
    return *task.seen, spec.momentum if how in {"convert", "the task", "LayerSync"} else 0.1, said, counts.sent


@pytest.mark.parametrize(("how", "fast"), [("convert", False), ("the task", True), ("LayerSync", True), ("no", False)])
def test_lightnings_default_ddp_with_the_callback(how, fast):
    found = ranks.run(fitted, how, world=2)
    for mean, var, momentum, _, sent in found:
        assert (mean, var) == pytest.approx(reference(STEPS, momentum), rel=1e-4)
        assert sent == (0 if fast else 3)
    assert [len(said) for *_, said, _ in found] == [0 if fast else 1, 0]


def averaged(use_buffers, wrapped, norm):
    model = net() if norm == "kept" else net(GhostBatchNorm(1, 4))
    convert(model, NormSpec("batch", 16, world_size=2)) if norm == "kept" else None
    ddp = DistributedDataParallel(model)
    mean = AveragedModel(ddp if wrapped else model, use_buffers=use_buffers)
    copied = mean.module.module[0] if wrapped else mean.module[0]
    own, values = [], own_batches(STEPS)
    for x in values:
        train(ddp, [x])
        mean.update_parameters(ddp if wrapped else model)
        own.append((model[0].running_mean.item(), model[0].running_var.item()))
    expected = torch.tensor(own).double().mean(0) if use_buffers else torch.tensor(own[-1])
    found = copied.running_mean.item(), copied.running_var.item()
    update_bn(values, mean)
    return found, expected.tolist(), pooled_of(mean, copied)


@pytest.mark.parametrize("norm", ["kept", "ours"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_of_the_model_are_each_ranks_own(use_buffers, wrapped, norm):
    values = torch.cat([torch.cat(batches(rank, STEPS)) for rank in range(2)]).double()
    for found, expected, (mean, var) in ranks.run(averaged, use_buffers, wrapped, norm, world=2):
        assert found == pytest.approx(expected, rel=1e-4)
        assert mean == pytest.approx(values.mean().item(), rel=1e-4), "update_bn, then pooled: one pass over all data"
        assert var == pytest.approx(values.var().item(), rel=2e-2)


def sharded():
    model = net()
    convert(model, decide(16, 2))
    model = fully_shard(model)
    train(model, own_batches(STEPS))
    return *pooled_of(model, model[0]), model[0].momentum


def test_fsdp2_sends_no_buffers():
    for mean, var, momentum in ranks.run(sharded, world=2):
        assert (mean, var) == pytest.approx(reference(STEPS, momentum), rel=1e-4)


def loaded_on_rank_0(everywhere, steps):
    population._said = False
    model = nn.Sequential(FrozenBatchNorm(1), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1))
    if everywhere or collectives.rank() == 0:
        model[0].running_mean.fill_(7)
        model[1].running_mean.fill_(7)
        model[1].num_batches_tracked.fill_(5000)
        nn.init.constant_(model[2].weight, 3)
    convert(model, NormSpec("batch", 16, world_size=2))
    ddp = DistributedDataParallel(model)
    constants = model[0].running_mean.item(), model[2].weight.item()
    own = steps[collectives.rank()]
    train(model, own_batches(own - 1))  # a rank's own number of batches
    train(ddp, own_batches(1))

    def twice():
        for _ in range(2):
            with evaluation_statistics(model):
                pass

    return constants, logged(twice)[1]


def test_constants_and_weights_that_rank_0_alone_loaded_reach_all():
    for constants, _ in ranks.run(loaded_on_rank_0, False, (1, 1), world=2):
        assert constants == (7, 3)


def test_statistics_that_rank_0_alone_loaded_are_said_once():
    (_, (said,)), (_, none) = ranks.run(loaded_on_rank_0, False, (10, 10), world=2)
    assert "layer '1' saw 10 batches on rank 1" in said
    assert "load it on every rank" in said
    assert len(said.splitlines()) <= 3
    assert not none


@pytest.mark.parametrize(("everywhere", "steps"), [(True, (10, 3)), (False, (200, 200))])
def test_a_load_on_every_rank_or_one_that_is_forgotten_is_no_matter(everywhere, steps):
    for _, said in ranks.run(loaded_on_rank_0, everywhere, steps, world=2):
        assert not said


def uneven(steps):
    population._said = False
    model = net()
    convert(model, NormSpec("batch", 16, world_size=2))
    train(model, own_batches(steps[collectives.rank()]))
    return logged(lambda: pooled_of(model, model[0]))[1]


@pytest.mark.parametrize("steps", [(1, 1), (0, 400), (1, 9), (25, 200), (40, 400), (3, 290)])
def test_loaders_of_uneven_length_are_not_taken_for_it(steps):
    assert ranks.run(uneven, steps, world=2) == [[], []]
