"""The monitor where a gap is not alarming, and where there is nothing to compare with; intervals that are none."""

import pytest
import torch
from torch import nn

from distnorm import ConfigError
from distnorm.drift.events import Alarm, Measurement
from distnorm.drift.monitor import DriftMonitor
from distnorm.norms import FrozenBatchNorm
from tests.test_monitor import Task, fit

pytestmark = pytest.mark.unit


class Certain(Task):
    """Its loss depends on the statistics, and what it predicts does not."""

    def probe_loss(self, model, batch):
        values = model(batch[0])
        return values.square().mean(), torch.stack((torch.ones(len(values)), torch.zeros(len(values))), 1)


def test_a_gap_without_other_predictions_is_measured_and_not_alarming():
    task = Certain(momentum=1e-4, last=nn.Identity)
    nn.init.constant_(task.model[3].bias, 50.0)
    memory = fit(DriftMonitor("full", 1000, gap_interval=1), task, steps=4)
    gaps = [row for _, row in memory.rows if "drift/model/gap_relative" in row]
    assert min(row["drift/model/gap_relative"] for row in gaps) > 3
    assert {row["drift/model/flip_rate"] for row in gaps} == {0}
    assert not [alarm for alarm in memory.of(Alarm) if alarm.measure == "gap_relative"]


class Frozen(Task):
    """Norms that no training moves."""

    def __init__(self):
        super().__init__()
        for place in (1, 4):
            self.model[place] = FrozenBatchNorm(6)


def test_constants_and_norms_of_samples_train_to_the_end_under_full():
    memory = fit(DriftMonitor("full", 2, gap_interval=3), Frozen(), steps=20)
    assert memory.steps == 20
    assert not any("precise_ratio" in event.values for event in memory.of(Measurement))
    assert all(row["drift/model/gap"] == 0 for _, row in memory.rows if "drift/model/gap" in row)


@pytest.mark.parametrize("options", [{"gap_interval": 0}, {"probe_interval": -1}])
def test_intervals_are_whole_numbers(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=rf"drift.{name}={value} must be a whole number of at least 1. Use e.g. 100"):
        DriftMonitor("full", **options)


def test_a_glob_that_names_no_layer_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match=r"drift.include='nosuch' matches no watched layer: there are 1, 4, 6\."):
        DriftMonitor("light", include=["nosuch"]).check(Task().model)
    DriftMonitor("light", include=["[14]"]).check(Task().model)
    DriftMonitor("none", include=["nosuch"]).check(Task().model)
