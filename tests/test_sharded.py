"""DTensor inputs: a shard of the samples or positions is this rank's part of the joined batch; others are refused."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

from distnorm import GhostBatchNorm, ShapeError, SyncBatchNorm, collectives
from distnorm.norms import (
    BatchRenorm,
    FilterResponseNorm,
    FrozenBatchNorm,
    RecurrentBatchNorm,
    ThresholdedLinearUnit,
)
from tests import ranks

pytestmark = pytest.mark.unit

DOUBLE = {"dtype": torch.float64}
LAYERS = {
    "sync": lambda **options: SyncBatchNorm(3, **DOUBLE, **options),
    "renorm": lambda **options: BatchRenorm(3, warmup=10**6, **DOUBLE, **options),
    "ghost": lambda **options: GhostBatchNorm(3, 2, **DOUBLE, **options),
    "frozen": lambda **options: FrozenBatchNorm(3, **DOUBLE, **options),
    "recurrent": lambda **options: RecurrentBatchNorm(3, 2, **DOUBLE, **options),
    "response": lambda **options: FilterResponseNorm(3, **DOUBLE, **options),
    "threshold": lambda **options: ThresholdedLinearUnit(3, **DOUBLE, **options),
}


def batch(n=4):
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(n, 3, 6, 4, generator=generator, **DOUBLE) * 3 + 1 for _ in range(2))
    return x, dy


def step(layer, x, dy, mask=None):
    """One training step and an evaluation, with everything as whole plain tensors."""
    rest = () if mask is None else (mask,)
    y = layer.train()(x, *rest)
    y.backward(dy)
    evaluated = layer.eval()(x.detach())
    whole = [y, x.grad, layer.weight.grad, layer.bias.grad, evaluated, layer.running_mean, layer.running_var]
    return [value.full_tensor().detach() if isinstance(value, DTensor) else value.detach() for value in whole]


def laid_out(x, layout):
    """Distributing a tensor makes its parts contiguous."""
    part, whole = x.to_local().contiguous(memory_format=layout), torch.empty(x.shape).contiguous(memory_format=layout)
    return DTensor.from_local(
        part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=whole.stride()
    ).detach()


def on_a_mesh(kind, shape, placements, distributed, layout, n, masked):
    """Body: a step of a layer with a DTensor, and how its result lies."""
    mesh, (x, dy) = init_device_mesh("cpu", shape), batch(n)
    layer = LAYERS[kind]()
    if distributed:
        distribute_module(layer, mesh)
    x, dy = (t.contiguous(memory_format=layout) for t in (x, dy))
    own, own_dy = (laid_out(distribute_tensor(t, mesh, placements), layout) for t in (x, dy))
    own.requires_grad_()
    mask = distribute_tensor((x[:, 0] > -2), mesh, [Shard(p.dim and p.dim - 1) for p in placements]) if masked else None
    found = step(layer, own, own_dy, mask)
    if not distributed:  # then each rank has its own share of the gradient, as with a plain tensor
        for place in (2, 3):
            shares = collectives.gather(found[place], tuple(range(collectives.world_size())), "the test")
            found[place] = shares.sum(0)
    y = layer.eval()(own)
    local = y.to_local()
    assert y.placements == own.placements
    assert local.is_contiguous(memory_format=layout)
    assert y.is_contiguous(memory_format=layout)
    kept = [isinstance(value, DTensor) for value in (*layer.parameters(), *layer.buffers())]
    assert kept == [distributed] * len(kept)
    return found


@pytest.mark.parametrize(
    ("shape", "placements", "n"),
    [
        ((2,), [Shard(0)], 4),
        ((2,), [Shard(0)], 3),  # uneven
        ((2,), [Shard(2)], 4),
        ((2,), [Shard(-1)], 4),
        ((2, 2), [Shard(0), Shard(2)], 4),
        ((2, 2), [Shard(0), Shard(0)], 5),
        ((1, 2), [Replicate(), Shard(0)], 4),  # along one rank nothing is replicated
    ],
    ids=str,
)
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("kind", ["sync", "renorm"])
def test_a_sharded_batch_is_normalized_as_the_whole(kind, distributed, shape, placements, n):
    x, dy = batch(n)
    truth = step(nn.BatchNorm2d(3, **DOUBLE), x.requires_grad_(), dy)
    world = torch.Size(shape).numel()
    for found in ranks.run(
        on_a_mesh, kind, shape, placements, distributed, torch.contiguous_format, n, False, world=world
    ):
        for name, own, whole in zip(("y", "dx", "dw", "db", "eval", "mean", "var"), found, truth, strict=True):
            torch.testing.assert_close(own, whole, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(2)]], ids=str)
def test_masks_and_layouts_are_sharded_too(placements):
    (plain, *_), (last, *_) = (
        ranks.run(on_a_mesh, "sync", (2,), placements, True, layout, 4, True, world=2)
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    x, dy = batch()
    alone = step(SyncBatchNorm(3, **DOUBLE), x.requires_grad_(), dy, x[:, 0].detach() > -2)
    for found in (plain, last):
        for own, whole in zip(found, alone, strict=True):
            torch.testing.assert_close(own, whole, rtol=1e-9, atol=1e-9)


def other_layers(kind, placements):
    mesh, (x, _) = init_device_mesh("cpu", (2,)), batch()
    layer, time = LAYERS[kind](), (0,) if kind == "recurrent" else ()
    y = layer(distribute_tensor(x, mesh, placements), *time)
    return y.full_tensor().detach(), layer(x, *time).detach() if kind != "recurrent" else None


@pytest.mark.parametrize("kind", ["ghost", "frozen", "recurrent", "response", "threshold"])
def test_other_layers_take_a_shard_of_the_samples(kind):
    x, _ = batch()
    truth = LAYERS[kind]()(x, 0).detach() if kind == "recurrent" else None
    for y, alone in ranks.run(other_layers, kind, [Shard(0)], world=2):
        whole = alone if truth is None else truth
        torch.testing.assert_close(y, whole, rtol=1e-9, atol=1e-9)  # of ghosts of 2 the shards of 2 are whole ones


def refused(kind, placements, options, training, weight):
    mesh, rank = init_device_mesh("cpu", (collectives.world_size(),)), collectives.rank()
    layer, (x, _) = LAYERS[kind](**options), batch()
    layer.layer_name = "head.bn"
    if weight is not None:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, weight))
    if placements == [Partial()]:
        own = DTensor.from_local(x, mesh, placements, run_check=False)
    else:
        own = distribute_tensor(x, mesh, placements)
    with pytest.raises(ShapeError) as caught:
        layer.train(training)(own, *([0] if kind == "recurrent" else []))
    assert getattr(layer, "num_batches_tracked", torch.zeros(())).sum() == 0
    fresh = SyncBatchNorm(3)  # and the ranks are still in step
    fresh(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) + rank)
    return str(caught.value), float(fresh.running_mean.sum())


@pytest.mark.parametrize(
    ("placements", "options", "weight", "rule", "remedy"),
    [
        ([Replicate()], {}, None, "cut along its samples or positions, where each rank holds values", "x.to_local()"),
        ([Partial()], {}, None, "cut along its samples or positions, where each rank holds values", "x.to_local()"),
        ([Shard(1)], {}, None, "it normalizes all 3 channels on each rank", "x.to_local()"),
        ([Shard(0)], {"sync_ranks": 1}, None, "the mesh has ranks 0, 1, and the layer pools over rank", "x.to_local()"),
        ([Shard(0)], {}, [Shard(0)], "its weight is (Shard(dim=0),) itself", "weight.redistribute(placements=[Replic"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["sync", "renorm", "recurrent"])
def test_other_placements_are_refused_alike_before_any_exchange(kind, placements, options, weight, rule, remedy):
    found = ranks.run(refused, kind, placements, options, True, weight, world=2)
    for message, mean in found:
        assert message.startswith("head.bn got a DTensor of (4, 3, 6, 4) with (")
        assert rule in message
        assert remedy in message
        assert message.count("\n") <= 2
        assert mean == found[0][1]


@pytest.mark.parametrize("kind", ["ghost", "frozen", "sync"])
@pytest.mark.parametrize("placements", [[Replicate()], [Shard(1)]], ids=str)
def test_evaluation_and_constants_refuse_them_too(kind, placements):
    for message, _ in ranks.run(refused, kind, placements, {}, False, None, world=2):
        assert "x.to_local()" in message


@pytest.mark.parametrize("kind", ["ghost", "response"])
def test_some_layers_take_whole_samples_alone(kind):
    for message, _ in ranks.run(refused, kind, [Shard(2)], {}, True, None, world=2):
        assert "its statistics are those of whole samples on one device" in message
        assert "x.redistribute(placements=[Shard(0)])" in message
