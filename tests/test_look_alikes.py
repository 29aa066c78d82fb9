"""Layers that look alike are told apart by when they were made, and right programs raise no false alarm."""

import copy
import gc
import pickle
import re

import pytest
import torch
from torch import nn

from distnorm import GroupError, SyncBatchNorm, check_ranks, collectives
from distnorm.collectives import marks
from distnorm.norms import pooling
from tests import ranks
from tests.test_marks import two

pytestmark = pytest.mark.unit


def clones(width=4):
    layer = SyncBatchNorm(width)
    return [copy.deepcopy(layer) for _ in range(2)]


def a_student_and_its_copy():
    student = two("converted")["a"]
    return [student, copy.deepcopy(student)]


def one_built_after_the_others_forward():
    first = SyncBatchNorm(4)
    first(torch.randn(3, 4))
    return [first, SyncBatchNorm(4)]


def two_models_checked_one_by_one():
    models = [nn.Sequential(SyncBatchNorm(4)) for _ in range(2)]
    for model in models:
        check_ranks(model)
    return models


def one_pickled():
    layer = SyncBatchNorm(4)
    return [layer, pickle.loads(pickle.dumps(layer))]


MADE = [clones, a_student_and_its_copy, one_built_after_the_others_forward, two_models_checked_one_by_one, one_pickled]


def changes_places(make, up_to):
    """Body: rank 0 runs the first of two layers that look alike, rank 1 the second."""
    kept, pooling.GATHER_UP_TO = pooling.GATHER_UP_TO, up_to
    try:
        layers = make()
        for layer in layers:
            layer(torch.randn(3, 4))
        with pytest.raises(GroupError) as raised:
            layers[collectives.rank()](torch.randn(3, 4))
        return str(raised.value)
    finally:
        pooling.GATHER_UP_TO = kept


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("up_to", [16, 1], ids=["gathered", "summed"])
def test_layers_that_look_alike_are_told_apart(make, up_to):
    said = ranks.run(changes_places, make, up_to, world=2)
    assert said[0] == said[1]
    assert len(said[0].splitlines()) <= 3
    first = said[0].splitlines()[0]
    assert re.match(
        r"rank 0 is at .*( of layer \d+| of one layer) of that name, rank 1 is at .* of (layer|another)", first
    )
    assert "check_ranks(model)" in said[0]


def trains_on(way):
    """Body: right programs, whose ranks have done different things besides."""
    rank = collectives.rank()
    if way == "a subset trains in between":
        some = SyncBatchNorm(6, group_ranks=(0, 1))
        some(torch.randn(3, 6))
        layer = SyncBatchNorm(6)
        some(torch.randn(3, 6))
        SyncBatchNorm(6)
    elif way == "all load what rank 0 has pickled":
        data = [pickle.dumps(SyncBatchNorm(8)) if rank == 0 else None]
        torch.distributed.broadcast_object_list(data)
        layer = pickle.loads(data[0])
        SyncBatchNorm(8)(torch.randn(4, 8))
        layer(torch.randn(4, 8))
    elif way == "rank 0 copies after each step":
        layer = SyncBatchNorm(5)
        for _ in range(3):
            layer(torch.randn(4, 5))
            if rank == 0:
                copy.deepcopy(layer)
        other = SyncBatchNorm(5)
        other(torch.randn(4, 5))
    layer(torch.randn(4, layer.num_features))


@pytest.mark.parametrize(
    "way", ["a subset trains in between", "all load what rank 0 has pickled", "rank 0 copies after each step"]
)
def test_ranks_that_do_other_things_besides_train_on(way):
    ranks.run(trains_on, way, world=4)


def summed_after_a_past():
    """Body: in a group that sums, rank 0 has built a model before the first step and builds another after it."""
    kept, pooling.GATHER_UP_TO = pooling.GATHER_UP_TO, 1
    try:
        if collectives.rank() == 0:
            two("by hand")
        net, x = two("by hand"), torch.randn(3, 4, requires_grad=True)
        for _ in range(2):
            (net["a"](x) + net["b"](x)).sum().backward()
            if collectives.rank() == 0:
                two("by hand")
    finally:
        pooling.GATHER_UP_TO = kept


def test_a_group_that_sums_raises_no_false_alarm():
    ranks.run(summed_after_a_past, world=2)


def test_a_layer_that_is_gone_leaves_no_place():
    gc.collect()  # what other tests have left
    before = len(marks._places)
    layers = [SyncBatchNorm(3) for _ in range(20)]
    for layer in layers:
        marks.place_of(*layer.whose(), "forward")
    assert len(marks._places) == before + 20
    del layers, layer
    gc.collect()
    assert len(marks._places) == before


def other_pasts(way):
    """Body: rank 0 has built other layers, which the others have not; then all train the same two."""
    rank = collectives.rank()
    if way == "before" and rank == 0:
        two("by hand")
    net = two("by hand")
    if way == "after" and rank == 0:
        two("by hand")
    if way == "copied" and rank == 0:
        net = copy.deepcopy(net)
    if way == "around" and rank == 0:
        two("by hand")
        net = two("by hand")
        two("by hand")
        check_ranks(net)
    elif way == "around":
        check_ranks(net)
    x = torch.randn(3, 4, 2, 2, requires_grad=True)
    for _ in range(3):
        (net["a"](x) + net["b"](x)).sum().backward()
    return net["a"].running_mean


@pytest.mark.parametrize("way", ["before", "after", "copied", "around"])
def test_a_rank_that_built_other_models_besides_trains_on(way):
    found = ranks.run(other_pasts, way, world=2)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
