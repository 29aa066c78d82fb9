"""Averages of converted models in loops of one's own: torch's AveragedModel, timm's ModelEmaV3, torch's update_bn."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from distnorm import ConfigError, SyncBatchNorm, calibrate, collectives, convert, decide, evaluation_statistics
from distnorm.population import pool_running_stats
from tests import ranks
from tests.nasty import KINDS

pytestmark = pytest.mark.unit

DECAY, STEPS = 0.8, 6


class ModelEmaV3(nn.Module):
    """What timm 1.0.31's does with its defaults: a copy in eval mode; floating state averaged, all other copied."""

    def __init__(self, model, decay=0.9999):
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update(self, model):
        """Average."""
        for mine, its in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(its, 1 - self.decay)
            else:
                mine.copy_(its)

    def forward(self, x):
        """Run the average."""
        return self.module(x)


def averaged(buffers):
    return lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=buffers)


AVERAGES = {
    "AveragedModel": (averaged(False), AveragedModel.update_parameters),
    "AveragedModel with buffers": (averaged(True), AveragedModel.update_parameters),
    "ModelEmaV3": (lambda model: ModelEmaV3(model, DECAY), ModelEmaV3.update),
}


def trained(name, kind):
    """Six steps of weights that are alike on all ranks, over data that are not; what the average makes of them."""
    make, update = AVERAGES[name]
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    convert(net, decide(16, collectives.world_size(), kind=kind))
    average = make(net)
    steps, data = torch.Generator().manual_seed(5), torch.Generator().manual_seed(collectives.rank())
    batches = [torch.randn(16, 3, generator=data) + 4 * collectives.rank() for _ in range(STEPS)]
    weights, statistics = [], []
    for batch in batches:
        net(batch)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=steps), alpha=0.3)
        update(average, net)
        weights.append([p.detach().double().clone() for p in net.parameters()])
        statistics.append([net[1].running_mean.double().clone(), net[1].running_var.double().clone()])
    before = copy.deepcopy(average.state_dict())
    precise, pooled = calibrate(average, batches, 10_000), pool_running_stats(average)
    own = calibrate(average.module, batches, 10_000)
    with evaluation_statistics(average, precise), torch.no_grad():
        seen = average.module[1].running_mean.clone()
        output = average.eval()(batches[0])
    with evaluation_statistics(average):
        seen_pooled = average.module[1].running_var.clone()
    assert all(torch.equal(value, average.state_dict()[key]) for key, value in before.items())
    return weights, statistics, torch.cat(batches).double(), precise, own, pooled, (seen, seen_pooled, output)


def ema_of(values, first):
    """AveragedModel starts from the weights after the first step, ModelEmaV3 from those that it copied."""
    found = values[0] if first is None else DECAY * first + (1 - DECAY) * values[0]
    for value in values[1:]:
        found = DECAY * found + (1 - DECAY) * value
    return found


@pytest.mark.parametrize("kind", ["batch", "sync"])
@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_has_statistics_of_its_own(name, kind):
    found = ranks.run(trained, name, kind, world=2)
    torch.manual_seed(3)
    start = nn.Linear(3, 4)
    first = (start.weight.detach().double(), start.bias.detach().double()) if name == "ModelEmaV3" else (None, None)
    weights = found[0][0]
    weight, bias = (ema_of([step[i] for step in weights], first[i]) for i in (0, 1))
    given = torch.cat([x for _, _, x, *_ in found]) @ weight.T + bias
    held = []
    for _, statistics, *_ in found:
        starts = (torch.zeros(4), torch.ones(4)) if name == "ModelEmaV3" else (None, None)
        of = [[step[i] for step in statistics] for i in (0, 1)]
        held.append(
            [each[-1] if name == "AveragedModel" else ema_of(each, s) for each, s in zip(of, starts, strict=True)]
        )
    means, variances = (torch.stack([own[i] for own in held]) for i in (0, 1))
    pooled_mean, pooled_var = means.mean(0), (variances + (means - means.mean(0)).square()).mean(0)
    for _, _, _, precise, own, pooled, (seen, seen_pooled, output) in found:
        torch.testing.assert_close(precise["module.1.running_mean"].double(), given.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(precise["module.1.running_var"].double(), given.var(0), rtol=1e-5, atol=1e-5)
        assert {f"module.{key}" for key in own} == set(precise)
        assert all(torch.equal(value, precise[f"module.{key}"]) for key, value in own.items())
        torch.testing.assert_close(pooled["module.1.running_mean"].double(), pooled_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled["module.1.running_var"].double(), pooled_var, rtol=1e-4, atol=1e-5)
        assert torch.equal(seen, precise["module.1.running_mean"])
        assert torch.equal(seen_pooled, pooled["module.1.running_var"])
        assert output.shape == (16, 2)
        assert all(torch.equal(value, found[0][3][key]) for key, value in precise.items()), "alike on all ranks"


def test_statistics_of_the_wrapper_for_the_model_within_are_refused_with_the_way():
    net = nn.Sequential(nn.BatchNorm1d(2))
    statistics = calibrate(AveragedModel(net), [torch.randn(8, 2)], 8)
    with pytest.raises(
        ConfigError, match=re.escape("They are of a wrapper round it, e.g. an AveragedModel: calibrate(wrap")
    ):
        evaluation_statistics(net, statistics).__enter__()


@pytest.mark.parametrize("kind", ["batch", "sync", "ghost", "renorm"])
def test_update_bn_does_with_ours_what_it_does_with_torchs(kind):
    """It averages what each batch of one rank has, without the variance between batches, which calibrate measures."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Linear(4, 2), nn.BatchNorm1d(2, momentum=0.3)
    )
    reference = copy.deepcopy(net).double()
    if kind == "sync":
        SyncBatchNorm.convert_sync_batchnorm(net)
    else:
        convert(net, KINDS[kind])
    momentum = [net[1].momentum, net[3].momentum]
    batches = [torch.randn(8, 3) + i for i in range(5)]
    average = AveragedModel(net)
    average.update_parameters(net)
    update_bn(batches, average)
    update_bn([batch.double() for batch in batches], reference)
    for index in (1,) if kind == "ghost" else (1, 3):  # what is given to the second depends on the ghosts of the first
        ours, theirs = average.module[index], reference[index]
        torch.testing.assert_close(ours.running_mean.double(), theirs.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.running_var.double(), theirs.running_var, rtol=1e-4, atol=1e-5)
    assert [average.module[1].momentum, average.module[3].momentum] == momentum
