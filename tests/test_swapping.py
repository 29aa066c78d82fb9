"""Statistics swapped in for an evaluation that changes some of them itself: the rank's own come back all the same."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distnorm import collectives
from distnorm.population import own_running_stats, pool_running_stats
from distnorm.swapping import SwappedStatistics
from tests import ranks
from tests.averaged import DECAY, ORDERS, Averaged, fit

pytestmark = pytest.mark.unit


def two_norms():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    for norm in model:
        norm.running_mean.fill_(4.0 * collectives.rank())
    return model


def changed_during(noted):
    """Body: one of two layers is in training mode while pooled statistics are in the model."""
    model, swapped = two_norms(), SwappedStatistics()
    swapped.put(model, pool_running_stats(model))
    model[1].train()(torch.randn(8, 4))
    if noted:
        swapped.note_end()
    within = swapped.own_of(model)["0.running_mean"]
    swapped.take_out()
    return within, *(norm.running_mean for norm in model)


@pytest.mark.parametrize("noted", [True, False])
def test_a_layer_that_changed_keeps_no_other_from_coming_back(noted):
    for rank, means in enumerate(ranks.run(changed_during, noted, world=2)):
        for mean in means if noted else means[:2]:
            assert torch.equal(mean, torch.full((4,), 4.0 * rank))


def test_what_somebody_else_put_there_stays():
    model, swapped = two_norms(), SwappedStatistics()
    swapped.put(model, {"0.running_mean": torch.ones(4), "1.running_mean": torch.ones(4)})
    swapped.note_end()
    model[1].running_mean.fill_(7)
    swapped.take_out()
    assert (model[0].running_mean[0], model[1].running_mean[0]) == (0, 7)
    model[0].running_mean.fill_(1.0)
    swapped.forget()
    assert model[0].running_mean[0] == 0, "a state that was saved while they were in came back"


class Adapts(Averaged):
    """Its validation adapts the norm to the data."""

    def __init__(self, adapts):
        super().__init__()
        self._adapts = adapts

    def validation_step(self, batch, batch_idx):
        """Run the norm in training mode."""
        super().validation_step(batch, batch_idx)
        if self._adapts:
            self.model[1].train()(self.model[0](self.x))
            self.model[1].eval()


def adapting(adapts, order):
    task, average = Adapts(adapts), EMAWeightAveraging(decay=DECAY) if order else None
    fit("pooled", average, order, task, max_steps=8)
    return task.steps, own_running_stats(task.model)


@pytest.mark.parametrize("order", [None, *ORDERS])
def test_an_evaluation_that_adapts_moves_no_training(order):
    plain, adapted = (ranks.run(adapting, adapts, order, world=2) for adapts in (False, True))
    for (steps, left), (others, others_left) in zip(plain, adapted, strict=True):
        for (weights, statistics), (other_weights, other_statistics) in zip(steps, others, strict=True):
            assert torch.equal(weights, other_weights)
            assert all(torch.equal(value, other_statistics[key]) for key, value in statistics.items())
        assert all(torch.equal(value, others_left[key]) for key, value in left.items())


class Reads(TorchDispatchMode):
    """Counts what a device would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count the reads of single numbers; a list reads each, from the host."""
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_device_is_read_once_for_all_tensors():
    model, swapped = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(8))), SwappedStatistics()
    swapped.put(model, {"0.running_mean": torch.full((4,), float("nan"))})
    with Reads() as reads:
        assert swapped.is_in(model), "nan is what was put in"
    assert reads.count <= 1
    model[7].running_mean += 1
    assert not swapped.is_in(model)
