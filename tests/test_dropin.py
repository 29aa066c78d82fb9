"""In the place of torch's own layers: same arguments, conversion and behaviour under every option and wrapper."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distnorm import (
    ConfigError,
    GroupError,
    NormSpec,
    ShapeError,
    SyncBatchNorm,
    check_ranks,
    collectives,
    convert,
)
from tests import ranks, reference, steps

pytestmark = pytest.mark.unit

OPTIONS = [
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.1},
    {"momentum": 0.0},
    {"track_running_stats": False},
    {"affine": False},
    {"bias": False},
    {"affine": False, "track_running_stats": False},
]


def test_the_constructor_takes_torchs_arguments_by_position():
    torchs = list(inspect.signature(nn.SyncBatchNorm).parameters.values())
    ours = inspect.signature(SyncBatchNorm).parameters
    positional = [p for p in torchs if p.kind is not p.KEYWORD_ONLY]
    assert list(ours)[: len(positional)] == [p.name for p in positional]
    for parameter in torchs:
        assert ours[parameter.name].default == parameter.default
        assert ours[parameter.name].kind is parameter.kind
    layer = SyncBatchNorm(3, 0.1, 0.2, True, True, None, "cpu", torch.float64)
    assert (layer.eps, layer.momentum, layer.weight.dtype) == (0.1, 0.2, torch.float64)


def train_with(options, x, frozen):
    """Body: three steps and an evaluation of ours on this rank's shard, and of torch's on the joined batch."""
    rank, world = collectives.rank(), collectives.world_size()
    ours = SyncBatchNorm(3, dtype=torch.float64, **options)
    theirs = nn.BatchNorm1d(3, dtype=torch.float64, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    per_rank = x.shape[1] // world
    own_part = slice(rank * per_rank, (rank + 1) * per_rank)
    for step, batch in enumerate((*x, x[0])):
        training = step < len(x) and not (frozen and step)
        ours.train(training), theirs.train(training)
        own, joined = batch[own_part].clone().requires_grad_(), batch.clone().requires_grad_()
        if not training and not options.get("track_running_stats", True):
            joined = own.detach().clone().requires_grad_()  # evaluation is each rank's own
        y, truth = ours(own), theirs(joined)
        y.square().sin().sum().backward(), truth.square().sin().sum().backward()
        own_truth = slice(None) if len(joined) == len(own) else own_part
        torch.testing.assert_close(y, truth[own_truth], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own.grad, joined.grad[own_truth], rtol=1e-10, atol=1e-10)
        for (name, value), found in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")
    return True


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_torchs(options, frozen, world):
    x = torch.randn(3, 6, 3, 4, dtype=torch.float64) * 3 + 2
    assert ranks.run(train_with, options, x, frozen, world=world) == [True] * world


def small_model():
    shared = nn.BatchNorm1d(4)
    return nn.Sequential(nn.Linear(3, 4), shared, nn.ReLU(), shared, nn.Linear(4, 2)).double()


def converted_with_subsets(x, dy, weight, bias, subsets):
    """Body: groups made by the user; every rank makes all of them, and gives the one that it is in, or its first."""
    rank = collectives.rank()
    groups = [dist.new_group(list(subset)) for subset in subsets]
    mine = next((g for g, subset in zip(groups, subsets, strict=True) if rank in subset), groups[0])
    found = []
    for way in ("convert", "constructor"):
        if way == "convert":
            layer = SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3, dtype=torch.float64), mine)
        else:
            layer = SyncBatchNorm(3, 1e-5, 0.1, True, True, mine, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(weight), layer.bias.copy_(bias)
        own = x[rank].clone().requires_grad_()
        y = layer(own)
        y.backward(dy[rank])
        found.append((steps.results(layer, own, y), pickle.loads(pickle.dumps(layer)).group_ranks))
    return found


@pytest.mark.parametrize("subsets", [((0, 1), (2, 3)), ((0, 3), (1, 2)), ((1, 2, 3),)], ids=str)
def test_process_groups_of_the_user_pool_and_the_others_stay_alone(subsets):
    x, dy, weight, bias = steps.shards([2, 3, 4, 5], (4,), 1.0)
    found = ranks.run(converted_with_subsets, x, dy, weight, bias, subsets, world=4)
    alone = [(rank,) for rank in range(4) if not any(rank in subset for subset in subsets)]
    for subset in (*subsets, *alone):
        truth = reference.batch_norm(
            torch.cat([x[r] for r in subset]), torch.cat([dy[r] for r in subset]), weight, bias
        )
        for way in range(2):
            assert all(found[rank][way][1] == subset for rank in subset)
            for key, value in steps.joined([found[rank][way][0] for rank in subset]).items():
                torch.testing.assert_close(value, truth[key], rtol=1e-10, atol=1e-10)


def the_users_group_and_ours_of_the_same_ranks():
    """Body: a layer with the user's group of two ranks, one of our own with the same two, then blocks of two."""
    rank, group = collectives.rank(), dist.new_group([0, 3])
    layers = [
        SyncBatchNorm(3, process_group=group),
        SyncBatchNorm(3, group_ranks=(0, 3)),
        SyncBatchNorm(3, sync_ranks=2),
    ]
    x = torch.full((2, 3), float(rank)).requires_grad_()
    sum(layer(x) for layer in layers).sum().backward()
    dist.barrier(dist.new_group())  # torch names groups by their number: all ranks must have made as many
    return [round(10 * float(layer.running_mean[0]), 5) for layer in layers]


def test_a_group_of_the_user_and_one_by_number_of_the_same_ranks_go_together():
    found = ranks.run(the_users_group_and_ours_of_the_same_ranks, world=4)
    assert found == [[1.5, 1.5, 0.5], [1, 1, 0.5], [2, 2, 2.5], [1.5, 1.5, 2.5]]


def convert_and_train(x):
    """Body: an optimizer and a hook from before the conversion still work on the layer, in place."""
    rank = collectives.rank()
    torch.manual_seed(0)
    model, whole = small_model(), small_model()
    whole.load_state_dict(model.state_dict())
    seen, keys, norm = [], list(model.state_dict()), model[1]
    hook = norm.register_forward_hook(lambda *_: seen.append(1))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, whole)]
    assert SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert model[1] is model[3] is norm
    assert type(norm) is SyncBatchNorm
    assert list(model.state_dict()) == keys
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        for optimizer, run, batch in zip(optimizers, (wrapped, whole), (x[rank * 4 : rank * 4 + 4], x), strict=True):
            optimizer.zero_grad()
            run(batch).square().mean().backward()
            optimizer.step()
    for value, truth in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10)
    assert len(seen) == 4
    hook.remove()  # a local function does not pickle
    with pytest.raises(
        ConfigError, match=r"got a DistributedDataParallel model\. Convert before wrapping, or pass model\.mod"
    ):
        SyncBatchNorm.convert_sync_batchnorm(wrapped)
    buffer = io.BytesIO()
    torch.save(wrapped, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False).module
    clones = [loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    outputs = [clone(x[:4] + rank).detach() for clone in (*clones, model)]
    assert all(torch.equal(y, outputs[-1]) for y in outputs)
    assert all(clone[1].running_mean is not norm.running_mean for clone in clones)
    return True


def test_a_converted_model_trains_copies_and_loads():
    assert ranks.run(convert_and_train, torch.randn(8, 3, dtype=torch.float64), world=2) == [True] * 2


def test_a_model_without_batch_norms_is_given_back_as_torch_does():
    model = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4))
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert SyncBatchNorm.convert_sync_batchnorm(model) is model


def fully_sharded(policy):
    """Body: three SGD steps, sharded and under DDP."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(ours)
    options = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if policy else {}
    fully_shard(twin, mesh=init_device_mesh("cpu", (2,)), **options)
    wrapped = DistributedDataParallel(ours)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, twin)]
    torch.manual_seed(collectives.rank() + 1)
    for _ in range(3):
        x = torch.randn(4, 3, dtype=torch.float64)
        for optimizer, model in zip(optimizers, (wrapped, twin), strict=True):
            optimizer.zero_grad()
            model(x).double().square().mean().backward()
            optimizer.step()
    tolerance = 0.05 if policy else 1e-10
    for one, other in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.full_tensor(), one.data, rtol=tolerance, atol=tolerance)
    for one, other in zip(ours.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)
    return True


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_fully_sharded_it_trains_as_under_ddp(mixed_precision):
    assert ranks.run(fully_sharded, mixed_precision, world=2) == [True] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_ranks": 0}, "sync_ranks=0 must be at least 1. Give a number of ranks, or None for all."),
        ({"sync_ranks": "4"}, "sync_ranks='4' must be at least 1"),
        ({"sync_ranks": 2, "group_ranks": (0, 1)}, "got sync_ranks=2 and group_ranks=(0, 1), that each name its ranks"),
        ({"process_group": "nccl"}, "process_group='nccl' is no process group. Give it what torch.distributed.new_gro"),
    ],
)
def test_ranks_that_are_none_are_refused_when_the_layer_is_made(options, message):
    with pytest.raises(ConfigError) as caught:
        SyncBatchNorm(4, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("model", [None, nn.BatchNorm2d, [nn.BatchNorm1d(3)]])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ConfigError, match=r"is no module\. Give it the model"):
        SyncBatchNorm.convert_sync_batchnorm(model)


def test_integers_are_refused_before_anything_moves():
    layer = SyncBatchNorm(3)
    with pytest.raises(ShapeError, match=r"an input of torch\.int64; .*Give it input\.float\(\)"):
        layer(torch.zeros(4, 3, dtype=torch.long))
    assert int(layer.num_batches_tracked) == 0


def test_a_trained_layer_that_becomes_another_can_be_copied():
    model = nn.Sequential(SyncBatchNorm(4))
    model(torch.randn(5, 4, requires_grad=True)).sum().backward()
    convert(model, NormSpec(kind="group", normalization_batch=1))
    assert type(copy.deepcopy(model)[0]) is nn.GroupNorm


def groups_of_both_kinds(debug):
    rank = collectives.rank()
    group = dist.new_group([0, 1])
    of_the_user, in_blocks = SyncBatchNorm(3, process_group=group), SyncBatchNorm(3, sync_ranks=2)
    model = nn.Sequential(of_the_user, in_blocks)
    try:
        check_ranks(model, debug=debug)
        if debug and rank == 1:
            model = nn.Sequential(in_blocks, of_the_user)
        model(torch.randn(4, 3) + rank)
    except GroupError as error:
        return str(error)
    finally:
        collectives.set_debug(False)
    return [float(layer.running_mean.sum()) for layer in (of_the_user, in_blocks)]


def test_a_group_of_the_users_and_one_of_ours_of_the_same_ranks_do_not_mix():
    found = ranks.run(groups_of_both_kinds, False, world=4)
    assert found[0] == found[1]
    assert found[2][0] != found[3][0]  # outside the user's group they are alone
    assert found[2][1] == found[3][1]


def test_debug_sees_a_group_of_the_users():
    found = ranks.run(groups_of_both_kinds, True, world=4)
    assert "rank 0 is at 0 forward" in found[0]
    assert found[0] == found[1]
