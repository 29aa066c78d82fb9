"""Ranks whose data differ, N(0, 1) and N(4, 1), …: what they feed, and what their running statistics should pool to."""

import logging

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distnorm import collectives, evaluation_statistics

SIZE = (16, 1, 4, 4)


def batches(rank, steps):
    """The inputs of one rank, step by step."""
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(SIZE, generator=generator) + 4 * rank for _ in range(steps)]


def reference(steps, momentum, world=2, sync_ranks=1, moved=1.0):
    """Mean and variance of the ranks' running averages as one population: float64 formulas, and no code of ours."""
    means, variances = [], []
    for first in range(0, world, sync_ranks):
        mean, var = 0.0, 1.0
        for together in zip(*[batches(rank, steps) for rank in range(first, first + sync_ranks)], strict=True):
            values = torch.cat(together).double().flatten() * moved
            mean = (1 - momentum) * mean + momentum * float(values.mean())
            var = (1 - momentum) * var + momentum * float(values.var())
        means.append(mean)
        variances.append(var)
    mean = sum(means) / len(means)
    var = sum(v + (m - mean) ** 2 for m, v in zip(means, variances, strict=True)) / len(means)
    return mean, var


def net(norm=None):
    """A norm right on the input, so that its statistics are the data's, and weights that learn."""
    return nn.Sequential(norm or nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1))


def train(model, inputs):
    """Run training forwards and backwards; the optimizer's steps do not matter here."""
    for x in inputs:
        model(x).sum().backward()


def pooled_of(model, norm):
    """What evaluation would normalize with: mean and variance of one norm."""
    with evaluation_statistics(model):
        return norm.running_mean.item(), norm.running_var.item()


def own_batches(steps):
    """The inputs of this rank."""
    return batches(collectives.rank(), steps)


def logged(body):
    """Run something, and collect what distnorm warns of meanwhile."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("distnorm")
    logger.addHandler(handler)
    try:
        return body(), said
    finally:
        logger.removeHandler(handler)


class Parent(nn.Module):
    """Holds what was converted, and is what DDP wraps."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.own = model, nn.Linear(1, 1)

    def forward(self, x):
        return self.own(self.inner(x).mean((2, 3)))


class OtherNames(DistributedDataParallel):
    """DDP of a torch that calls what it sends otherwise."""

    def __getattribute__(self, name):
        if name == "named_module_buffers":
            raise AttributeError(name)
        return super().__getattribute__(name)
