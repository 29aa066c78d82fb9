"""Somebody's own Trainer and module: hooks are respected, ranks agree, and what would be wrong is refused early."""

import dataclasses
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from distnorm import ConfigError, NormSpec, SyncBatchNorm, collectives, decide
from distnorm.callbacks import EvaluationStatistics
from distnorm.freezing import first_frozen_step
from distnorm.launch.trainer import make_ddp
from distnorm.norms.apart import shares_one_set
from distnorm.trainer_checks import check_buffers_stay
from tests import ranks
from tests.joined import OtherNames
from tests.test_callbacks import Nothing, Task, Truth, fit, spec_of

pytestmark = pytest.mark.unit


class Hooked(Task):
    """Its hooks of the batch transfer take the whole batch, and double the inputs in two steps."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return x * 4, y

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return x / 2, y

    def truth(self):
        with torch.no_grad():
            return self.model[0](2 * self.x).double()


def test_precise_inputs_go_through_the_modules_transfer_hooks():
    truth = Truth()
    task, _ = fit(spec_of("precise"), Hooked(), truth, max_steps=3)
    torch.testing.assert_close(task.seen[-1][0].double(), truth.given[-1].mean(0), rtol=1e-5, atol=1e-6)


def running(folder, frozen_last=0.0, steps=6, ckpt_path=None):
    task, _ = fit(spec_of("running", frozen_last), folder=folder, max_steps=steps, ckpt_path=ckpt_path)
    return task.seen, task.running, task.model[1].running_mean.clone()


def test_running_statistics_that_differ_are_rank_0s_in_evaluation_and_each_ranks_in_training(tmp_path):
    found = ranks.run(running, str(tmp_path), world=2)
    (seen, _, first), (other_seen, _, second) = found
    assert all(torch.equal(a[0], b[0]) for a, b in zip(seen, other_seen, strict=True))
    assert torch.equal(seen[-1][0], first)
    assert not torch.allclose(first, second, rtol=0.1)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(stored["state_dict"]["model.1.running_mean"], first)
    own = [statistics["model.1.running_mean"] for statistics in stored["distnorm"]["rank_statistics"]]
    assert torch.equal(own[0], first)
    assert torch.equal(own[1], second)
    resumed = ranks.run(running, str(tmp_path / "on"), 0.0, 7, str(tmp_path / "last.ckpt"), world=2)
    for (_, went_on, _), mean in zip(resumed, own, strict=True):
        assert torch.equal(went_on[0], mean), "training goes on with the rank's own"


def test_running_statistics_that_differ_freeze_as_rank_0s(tmp_path):
    first, second = ranks.run(running, str(tmp_path), 0.5, world=2)
    assert not torch.equal(first[1][2], second[1][2])
    assert all(torch.equal(a, b) for a, b in zip(first[1][3:], second[1][3:], strict=True))
    assert torch.equal(first[2], second[2])


class Stub:
    """What `EvaluationStatistics` asks of a trainer between two steps."""

    def __init__(self, loader):
        self.state = SimpleNamespace(fn=pl.trainer.states.TrainerFn.FITTING)
        self.global_step, self.train_dataloader, self.callbacks = 0, loader, []
        self.precision_plugin = pl.plugins.precision.Precision()
        self.strategy = SimpleNamespace(batch_to_device=lambda batch: batch, root_device=torch.device("cpu"))


def one_rank_has_no_batch(evaluation):
    """Rank 1's batches have ended: it is not told of rank 0's step, and both validate."""
    task = Task()
    trainer = Stub(DataLoader(task.data(), batch_size=16))
    callback = EvaluationStatistics(spec_of(evaluation), [task.x])
    callback.on_validation_start(trainer, task)
    callback.on_validation_end(trainer, task)
    if collectives.rank() == 0:
        task.model[1](torch.randn(4, 4))
        callback.on_train_batch_start(trainer, task, None, 0)
    callback.on_validation_start(trainer, task)
    return task.model[1].running_mean.clone(), task.truth()


@pytest.mark.parametrize("evaluation", ["running", "pooled", "precise"])
def test_ranks_agree_on_whether_a_step_was_made(evaluation):
    (first, truth), (second, other_truth) = ranks.run(one_rank_has_no_batch, evaluation, world=2, timeout_s=40)
    assert torch.equal(first, second)
    assert first.abs().sum() > 0
    if evaluation == "precise":
        torch.testing.assert_close(first.double(), torch.cat((truth, other_truth)).mean(0), rtol=1e-5, atol=1e-5)


class Kept(Task):
    """A task whose ranks have other data; it keeps what its norm ends with."""

    def statistics(self):
        return self.model[1].running_mean.clone()


def with_default_ddp(evaluation, shared, strategy=None):
    spec = decide(16, 2, kind="sync") if shared else spec_of(evaluation)
    spec = dataclasses.replace(spec, evaluation=evaluation)
    strategy = strategy or DDPStrategy(process_group_backend="gloo")
    try:
        task, _ = fit(spec, Kept(), strategy=strategy, max_steps=6)
    except ConfigError as error:
        return str(error)
    return len(task.losses), task.statistics()


@pytest.mark.parametrize("evaluation", ["pooled", "precise"])
def test_ranks_keep_their_own_statistics_under_a_ddp_that_sends_rank_0s_buffers(evaluation):
    sent = ranks.run(with_default_ddp, evaluation, False, world=2)
    apart = ranks.run(without_sending, evaluation, world=2)
    assert not torch.equal(sent[0][1], sent[1][1])
    for (steps, mean), (_, expected) in zip(sent, apart, strict=True):
        assert steps == 6
        torch.testing.assert_close(mean, expected, rtol=0, atol=0)


def without_sending(evaluation):
    return with_default_ddp(evaluation, False, make_ddp(60))


def unknown_ddp():
    task = Task()
    trainer = SimpleNamespace(strategy=SimpleNamespace(model=OtherNames(task)))
    with pytest.raises(ConfigError) as error:
        check_buffers_stay(trainer, task)
    task.model[1] = SyncBatchNorm(4)
    check_buffers_stay(trainer, task)
    return str(error.value)


def test_a_ddp_that_cannot_be_kept_from_it_is_refused():
    for message in ranks.run(unknown_ddp, world=2):
        assert "DDP sends rank 0's buffers to all ranks before each forward: layer 'model.1'" in message
        assert "DDPStrategy(forward_sync_buffers=False)" in message
        assert len(message.splitlines()) <= 3


def test_layers_of_one_set_and_rank_0s_statistics_are_left_to_ddp():
    assert [steps for steps, _ in ranks.run(with_default_ddp, "pooled", True, world=2)] == [6, 6]
    assert [steps for steps, _ in ranks.run(with_default_ddp, "running", False, world=2)] == [6, 6]


def shared_by():
    half = SyncBatchNorm(3, group_ranks=(0,))
    layers = [nn.BatchNorm1d(3), SyncBatchNorm(3), SyncBatchNorm(3, sync_ranks=2), SyncBatchNorm(3, sync_ranks=1), half]
    return [shares_one_set(layer) for layer in (*layers, nn.SyncBatchNorm(3))]


def test_statistics_are_alike_where_all_ranks_pool():
    assert ranks.run(shared_by, world=2) == [[False, True, True, False, False, True]] * 2


def test_checkpoints_of_weights_only_are_refused(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ConfigError, match=r"save_weights_only=True\) would save rank 0's.*\n.*save_weights_only=False"):
        fit(spec_of("pooled"), None, saving, enable_checkpointing=True)


class NoValidation(Callback):
    """Fails the test if training goes as far as a validation."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        raise AssertionError("a step was made")


def test_a_loader_that_cannot_be_copied_is_refused_before_the_first_step():
    task = Task()
    task.train_dataloader = lambda: {"a": DataLoader(task.data(), batch_size=16)}
    with pytest.raises(ConfigError, match=r"training loader of type dict"):
        fit(spec_of("precise"), task, NoValidation())


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 1), nn.BatchNorm1d(1, track_running_stats=False)])
def test_a_model_without_running_statistics_needs_no_precise_ones(norm, tmp_path):
    task = Nothing()
    task.net[1], task.losses, task.modes, task.running = norm, [], [], []
    task.training_step = lambda batch, *_: task.net(batch[0]).square().mean()
    task.validation_step = lambda *_, **__: task.losses.append(1)
    task.val_dataloader = lambda: DataLoader(task.data(), batch_size=96)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        val_check_interval=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            EvaluationStatistics(NormSpec("group", 1, evaluation="precise")),
            ModelCheckpoint(tmp_path, every_n_train_steps=1),
        ],
    )
    trainer.fit(task)
    assert task.losses


class TwoOptimizers(Task):
    """Steps two optimizers a batch, by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 0.05) for layer in (self.model[0], self.model[1:])]


def test_the_steps_of_several_optimizers_are_no_share_of_epochs():
    with pytest.raises(ConfigError, match=r"steps of 2 optimizers in max_epochs=2 ep.*\n.*trainer\.max_steps alone"):
        fit(spec_of("pooled", 0.5), TwoOptimizers(), max_epochs=2, max_steps=-1)
    task, _ = fit(spec_of("pooled", 0.5), TwoOptimizers(), max_steps=8)
    assert task.modes == [True] * 4 + [False] * 4


def test_no_share_needs_no_end():
    assert first_frozen_step(None, 0.0) == float("inf")


def exchanges(evaluation, shared):
    """What is exchanged by a validation after a step, and by a second one without a step between."""
    task = Task()
    task.model[1] = SyncBatchNorm(4) if shared else task.model[1]
    trainer = Stub(DataLoader(task.data(), batch_size=16))
    callback = EvaluationStatistics(spec_of(evaluation), [task.x])
    callback.on_train_batch_start(trainer, task, None, 0)
    heard, originals = [], (collectives.agree, collectives.gather)
    collectives.agree = lambda value, what, **rest: heard.append("agree") or originals[0](value, what, **rest)
    collectives.gather = lambda value, group, what: heard.append("gather") or originals[1](value, group, what)
    try:
        for _ in range(2):
            callback.on_validation_start(trainer, task)
            callback.on_validation_end(trainer, task)
            heard.append("|")
    finally:
        collectives.agree, collectives.gather = originals
    return " ".join(heard)


@pytest.mark.parametrize(
    ("evaluation", "shared", "expected"),
    [("running", True, "| |"), ("pooled", True, "| |"), ("running", False, "agree gather | agree |")],
)
def test_what_is_exchanged_is_what_the_docstring_says(evaluation, shared, expected):
    assert ranks.run(exchanges, evaluation, shared, world=2) == [expected] * 2
