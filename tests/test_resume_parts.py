"""What a resume puts back, piece by piece: random streams, metrics of ranks, a loader that cannot begin late."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric

from distnorm import random_state, resume

pytestmark = pytest.mark.unit


def draw():
    return torch.randn(3), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()


@pytest.mark.parametrize("drawn_before", [0, 1])  # an odd number of normal ones leaves one over, in two of the streams
def test_streams_come_back_through_a_file(tmp_path, drawn_before):
    random_state.seed_rank(3, 1)
    for _ in range(drawn_before):
        draw()
    torch.save(random_state.take(), tmp_path / "state")
    expected = draw()
    random_state.seed_weights(0)
    random_state.put(torch.load(tmp_path / "state", weights_only=True))
    found = draw()
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


def test_new_streams_differ_by_rank_and_step():
    firsts = set()
    for rank, step in ((0, 0), (1, 0), (0, 7), (1, 7), (0, 8)):
        random_state.seed_rank(0, rank, step)
        firsts.add((torch.rand(()).item(), np.random.rand(), random.random()))
    assert len(firsts) == 5


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.all, self.unused = MeanMetric(), CatMetric(), MeanMetric()


def counted(*values):
    module = Counting()
    for value in values:
        module.mean.update(value)
        module.all.update(value)
    return module


def test_metrics_go_on_from_one_rank_or_several(tmp_path):
    torch.save([resume._metrics_of(counted(*own)) for own in ((1.0, 2.5), (4.0,))], tmp_path / "states")
    states = torch.load(tmp_path / "states", weights_only=True)
    assert "unused" not in states[0]
    for taken, values in ((states[:1], (1.0, 2.5)), (states, (1.0, 2.5, 4.0))):
        module = Counting()
        module.mean.update(100.0)  # what stood there is replaced
        resume._load_metrics(module, taken)
        assert module.mean.update_count == len(values)
        for metric in (module.mean, module.all):
            metric.update(9.0)
        assert module.mean.compute() == pytest.approx(np.mean([*values, 9.0]))
        assert sorted(module.all.compute().tolist()) == [*values, 9.0]


@pytest.mark.parametrize("with_state", [False, True])
def test_a_loader_that_cannot_begin_late_is_named(caplog, with_state):
    loader = DataLoader([0] * 8)
    if with_state:  # as a loader of torchdata's has: Lightning resumes it
        loader.state_dict = dict
    resume._go_to(SimpleNamespace(train_dataloader=loader, is_global_zero=True), epoch=2, step=5, global_batch=1)
    told = "Epoch 2 goes on after its step 5, with the batches of its beginning: the training loader's sampler has no "
    assert (told in caplog.text) is not with_state
    assert ("GlobalBatchSampler, or a loader with a state_dict" in caplog.text) is not with_state
