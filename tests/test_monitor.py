"""The drift monitor inside Lightning, on one and two ranks: who is told what, and what evaluation makes of it."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from distnorm import collectives
from distnorm.callbacks import EvaluationStatistics
from distnorm.drift.events import Alarm, Measurement, Snapshot, Watched
from distnorm.drift.monitor import DriftMonitor
from distnorm.launch.trainer import make_ddp
from distnorm.spec import NormSpec
from tests import ranks

pytestmark = pytest.mark.unit


class Memory(DummyLogger):
    """A logger that remembers numbers, and events."""

    def __init__(self):
        super().__init__()
        self.rows, self.events = [], []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))

    def take(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


class Numbers(DummyLogger):
    """A logger that takes no events."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


class Task(pl.LightningModule):
    """A classifier of vectors with three watched layers."""

    def __init__(self, momentum=0.1, last=nn.GroupNorm):
        super().__init__()
        layers = [nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum), nn.ReLU(), nn.Linear(6, 6)]
        layers += [nn.BatchNorm1d(6, momentum=momentum), nn.Linear(6, 5), last(1, 5)]
        self.model, self.fail_at = nn.Sequential(*layers), None

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.fail_at:
            raise RuntimeError("told to")
        return self.probe_loss(self.model, batch)[0]

    def validation_step(self, batch, batch_idx):
        self.model(batch[0])

    test_step = validation_step

    def probe_loss(self, model, batch):
        logits = model(batch[0])
        return functional.cross_entropy(logits, batch[1]), logits

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Unprobed(Task):
    """A task of somebody's own."""

    probe_loss = None

    def training_step(self, batch, batch_idx):
        return self.model(batch[0]).square().mean()


def data(samples, shift=0.0, seed=0):
    torch.manual_seed(seed + collectives.rank())
    x = torch.randn(samples, 4)
    return TensorDataset(x + shift, (x.sum(1) > 0).long())


def fit(monitor, task=None, steps=6, batch=8, shift=0.0, val_shift=0.0, evaluation="running", test=False, **options):
    """Train, and give what a logger was told."""
    task, world = task or Task(), collectives.world_size()
    several = {"strategy": make_ddp(60), "plugins": [TorchElasticEnvironment()]} if world > 1 else {}
    memory, numbers = Memory(), Numbers()
    spec = NormSpec("batch", 8, evaluation=evaluation)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, max_steps=steps, logger=[memory, numbers],
        callbacks=[EvaluationStatistics(spec, num_samples=32), monitor], use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        num_sanity_val_steps=1, **several, **options,
    )  # fmt: skip
    training = data(steps * batch * options.get("accumulate_grad_batches", 1), shift * collectives.rank())
    loaders = [DataLoader(training, batch), DataLoader(data(4 * batch, val_shift, seed=9), batch)]
    try:
        trainer.fit(task, *loaders)
        if test:
            trainer.test(task, loaders[1], verbose=False)
    except RuntimeError as error:
        if "told to" not in str(error):
            raise
    memory.numbers, memory.task, memory.steps = numbers.rows, task, trainer.global_step
    return memory


def test_loggers_that_take_events_get_them_and_all_get_numbers():
    monitor = DriftMonitor("light", 2, worst_layers=2)
    memory = fit(monitor)
    (watched,) = memory.of(Watched)
    assert [layer.name for layer in watched.layers] == ["1", "4", "6"]
    assert [event.step for event in memory.of(Measurement)] == [2, 4, 6]
    assert [event.step for event in memory.of(Snapshot)] == [2, 4, 6]
    rows = [row for row in memory.rows if any("drift" in key for key in row[1])]
    assert [step for step, _ in rows] == [2, 4, 6]
    assert rows == [row for row in memory.numbers if any("drift" in key for key in row[1])]
    event, (_, row) = memory.of(Measurement)[-1], rows[-1]
    assert row["drift/worst/jeffreys"] == max(event.values["jeffreys"][:2])
    layers = {key.split("/")[1] for key in row} - {"worst"}
    assert layers <= {"1", "4", "6"}
    assert 1 <= len(layers) <= 2
    for layer in layers & {"1", "4"}:
        assert row[f"drift/{layer}/jeffreys"] == event.values["jeffreys"][("1", "4").index(layer)]
    means = [sum(e.values["jeffreys"][place] for e in memory.of(Measurement)) / 3 for place in (0, 1)]
    assert (monitor.worst.value, monitor.worst.layer) == (pytest.approx(max(means)), "14"[means.index(max(means))])
    assert not any(layer._forward_pre_hooks for layer in memory.task.model)


def test_nothing_is_done_where_nothing_is_asked_for():
    monitor = DriftMonitor("none")
    memory = fit(monitor)
    assert (memory.events, monitor.worst, monitor.alarms, monitor.has_stopped) == ([], None, (), False)


@pytest.mark.parametrize("interval", [1, 2])
def test_accumulated_batches_are_measured_once_an_optimizer_step(interval):
    memory = fit(DriftMonitor("light", interval), accumulate_grad_batches=2)
    assert [event.step for event in memory.of(Measurement)] == list(range(interval, 7, interval))


def test_the_hooks_are_gone_after_a_training_that_failed_and_its_last_snapshot_is_told():
    task = Task()
    task.fail_at = 4
    memory = fit(DriftMonitor("light", 1), task)
    assert [event.step for event in memory.of(Measurement)] == [1, 2, 3]
    assert memory.of(Snapshot)[-1].step == 3
    assert not any(layer._forward_pre_hooks for layer in task.model)


def test_full_measures_the_gap_the_shift_and_precise_statistics():
    memory = fit(DriftMonitor("full", 2, gap_interval=3), Task(momentum=0.5))
    gaps = {step: row for step, row in memory.rows if "drift/model/gap" in row}
    assert sorted(gaps) == [3, 6]
    for row in gaps.values():
        assert row["drift/model/gap_relative"] == pytest.approx(row["drift/model/gap"] / loss_before(row))
        assert 0 <= row["drift/model/flip_rate"] <= 1
    shifts = [event for event in memory.of(Measurement) if "shift" in event.values]
    assert len(shifts) == 1
    assert [math.isnan(value) for value in shifts[0].values["shift"]] == [False, False, True]
    (precise,) = [event for event in memory.of(Measurement) if "precise_ratio" in event.values]
    assert precise.step == 6
    assert [math.isnan(value) for value in precise.values["precise_ratio"]] == [False, False, True]


def loss_before(row):
    """The loss with batch statistics, that gap and relative gap imply."""
    return row["drift/model/gap"] / row["drift/model/gap_relative"]


def test_a_shift_of_the_evaluation_data_is_measured_and_alarming_in_the_first_layer():
    monitor = DriftMonitor("full", 100)
    memory = fit(monitor, steps=60, val_shift=4.0, val_check_interval=15)
    (alarm,) = [alarm for alarm in memory.of(Alarm) if alarm.measure == "shift"]
    assert alarm.layer in {"1", "4"}
    assert "distnorm calibrate" in alarm.message
    assert monitor.alarms == (alarm.message,)
    like_training = fit(DriftMonitor("full", 100), steps=60)
    assert not [alarm for alarm in like_training.of(Alarm) if alarm.measure == "shift"]


def test_a_running_average_that_is_still_its_start_is_not_compared():
    memory = fit(DriftMonitor("full", 100), Task(momentum=1e-3), steps=20, val_shift=4.0)
    assert not any("shift" in event.values for event in memory.of(Measurement))


def test_test_data_are_looked_at_too():
    memory = fit(DriftMonitor("full", 2), steps=40, test=True)
    assert sum("shift" in event.values for event in memory.of(Measurement)) == 2


def test_a_stale_layer_is_named_when_the_gap_is_alarming():
    task = Task(momentum=1e-4, last=nn.Identity)  # running statistics stay what they began with: 0 and 1
    nn.init.constant_(task.model[3].bias, 50.0)
    monitor = DriftMonitor("full", 1000, gap_interval=1)
    memory = fit(monitor, task, steps=3)
    (alarm,) = [alarm for alarm in memory.of(Alarm) if alarm.measure == "gap_relative"]
    (shares,) = [event for event in memory.of(Measurement) if "gap_share" in event.values]
    assert shares.values["gap_share"][1] > abs(shares.values["gap_share"][0])
    assert (alarm.step, alarm.layer) == (2, "4")
    assert alarm.message.endswith("Most of it comes from 4.")


def test_a_task_without_a_loss_to_ask_for_has_no_gap_and_is_told_so_once(caplog):
    with caplog.at_level("INFO", "distnorm"):
        memory = fit(DriftMonitor("full", 2, gap_interval=1), Unprobed())
    assert not any("drift/model/gap" in row for _, row in memory.rows)
    assert [record.message for record in caplog.records if "probe_loss" in record.message] == [
        "Unprobed has no probe_loss(model, batch): no train/eval gap is measured."
    ]


def test_probes_are_made_where_they_are_asked_for():
    memory = fit(DriftMonitor("light", 2, probe_interval=3))
    probes = {step: row for step, row in memory.rows if "drift/model/smoothness" in row}
    assert sorted(probes) == [3, 6]
    assert all(
        row["drift/model/loss_range"] > 0 and row["drift/model/gradient_predictiveness"] > 0 for row in probes.values()
    )
    shifts = [event for event in memory.of(Measurement) if "covariate_shift" in event.values]
    assert [event.step for event in shifts] == [3, 6]
    assert all(value > 0 for value in shifts[0].values["covariate_shift"][1:])


def alarms_of(evaluation, momentum, bias):
    """Body: which alarms are raised."""
    task = Task(momentum)
    nn.init.constant_(task.model[0].bias, bias)
    monitor = DriftMonitor("full", 1, evaluation=evaluation, gap_interval=10**6)
    return {alarm.measure for alarm in fit(monitor, task, 20, 8, evaluation=evaluation).of(Alarm)}


def test_running_averages_that_evaluation_does_not_use_raise_no_alarm():
    assert "lag" in alarms_of("running", 1e-3, 3.0)
    assert "lag" not in alarms_of("precise", 1e-3, 3.0)


def on_ranks(kind, on_alarm, shift):
    """Body: the events' kinds and steps, the numbers' keys, the steps made, and whether an alarm ended it."""
    monitor = DriftMonitor(kind, 2, on_alarm=on_alarm, gap_interval=5)
    memory = fit(monitor, steps=40, shift=shift, val_shift=0.0)
    told = [(type(event).__name__, event.step) for event in memory.events]
    keys = {key for _, row in memory.rows for key in row if "drift" in key}
    return told, keys, memory.steps, monitor.has_stopped, [alarm.measure for alarm in memory.of(Alarm)]


def test_two_ranks_are_compared_and_only_the_first_tells():
    (told, keys, steps, stopped, _), (nothing, no_keys, *_) = ranks.run(on_ranks, "full", "warn", 0.0, world=2)
    assert {"drift/worst/between_ranks", "drift/worst/f", "drift/model/gap"} <= keys
    assert [step for name, step in told if name == "Watched"] == [2]
    assert (steps, stopped) == (40, False)
    assert (nothing, no_keys) == ([], set())


def test_an_alarm_ends_the_training_of_all_ranks_where_that_is_asked_for():
    found = ranks.run(on_ranks, "light", "stop", 4.0, world=2)
    assert [stopped for *_, stopped, _ in found] == [True, True]
    assert found[0][2] == found[1][2] < 40
    assert "between_ranks" in found[0][4] or "rank_spread" in found[0][4]
