"""The synchronized layer against torch's own on the joined batch (design: contract lines 1 to 6 and 8)."""

import copy
import io
import os
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm import ConfigError, GhostBatchNorm, GroupError, ShapeError, SyncBatchNorm, collectives
from tests import ranks, reference

pytestmark = pytest.mark.unit

SHARDS = [[4, 4], [3, 5], [0, 5, 2, 1], [1, 4, 2, 1]]
POSITIONS = {2: (), 3: (5,), 4: (3, 4), 5: (2, 3, 2)}


def shards_of(sizes, dimensions, offset, dtype=torch.float64, channels=3):
    generator = torch.Generator().manual_seed(7)
    shape = POSITIONS[dimensions]
    make = lambda n: torch.randn(n, channels, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = [(make(n) * 2 + offset).to(dtype) for n in sizes]
    dy = [make(n).to(dtype) for n in sizes]
    weight = (torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64).to(dtype)
    return x, dy, weight, bias


def train_one_step(x, dy, weight, bias, **options):
    """Body: this rank's shard through a fresh layer, forward and backward."""
    rank = collectives.rank()
    layer = SyncBatchNorm(weight.numel(), dtype=weight.dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    own = x[rank].clone().requires_grad_()
    y = layer(own)
    y.backward(dy[rank])
    return {
        "y": y.detach(),
        "dx": own.grad,
        "dweight": layer.weight.grad,
        "dbias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "tracked": int(layer.num_batches_tracked),
    }


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("sizes", SHARDS, ids=str)
def test_sharded_equals_whole(sizes, offset, dimensions):
    x, dy, weight, bias = shards_of(sizes, dimensions, offset)
    whole = reference.batch_norm_on_joined(x, dy, weight, bias)
    found = ranks.run(train_one_step, x, dy, weight, bias, world=len(sizes))
    for rank, own in enumerate(found):
        for key in ("y", "dx"):
            torch.testing.assert_close(own[key], whole[key][rank], rtol=1e-10, atol=1e-10)
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(own[key], whole[key], rtol=1e-10, atol=1e-10)
            assert torch.equal(own[key], found[0][key])
        assert own["tracked"] == 1
    for key in ("dweight", "dbias"):
        torch.testing.assert_close(sum(own[key] for own in found), whole[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_float32_errs_little(offset):
    x, dy, weight, bias = shards_of([6, 10], 4, offset, torch.float32)
    exact = reference.batch_norm_on_joined(
        *([t.double() for t in part] for part in (x, dy)), weight.double(), bias.double()
    )
    torchs = reference.batch_norm_on_joined(x, dy, weight, bias)
    found = ranks.run(train_one_step, x, dy, weight, bias, world=2)
    for key in ("y", "dx"):
        truth = torch.cat(exact[key])
        error = (torch.cat([own[key] for own in found]).double() - truth).abs().max() / truth.abs().max()
        torch_error = (torch.cat(torchs[key]).double() - truth).abs().max() / truth.abs().max()
        assert error <= (1e-5 if offset == 0 else max(1e-5, 2 * float(torch_error)))


@pytest.mark.parametrize("sync_ranks", [1, 2, 4])
def test_blocks_of_consecutive_ranks_share(sync_ranks):
    x, dy, weight, bias = shards_of([2, 3, 4, 5], 4, 1.0)

    found = ranks.run(train_blocks, x, dy, weight, bias, sync_ranks, world=4)
    for first in range(0, 4, sync_ranks):
        block = slice(first, first + sync_ranks)
        whole = reference.batch_norm_on_joined(x[block], dy[block], weight, bias)
        for rank in range(first, first + sync_ranks):
            torch.testing.assert_close(found[rank]["y"], whole["y"][rank - first], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found[rank]["running_var"], whole["running_var"], rtol=1e-10, atol=1e-10)


def train_blocks(x, dy, weight, bias, sync_ranks):
    return train_one_step(x, dy, weight, bias, sync_ranks=sync_ranks)


def train_subset(x, dy, weight, bias, group_ranks):
    return train_one_step(x, dy, weight, bias, group_ranks=group_ranks)


def test_an_arbitrary_subset_shares_and_the_others_stay_alone():
    x, dy, weight, bias = shards_of([2, 3, 4, 5], 3, 1.0)
    found = ranks.run(train_subset, x, dy, weight, bias, (0, 3), world=4)
    whole = reference.batch_norm_on_joined([x[0], x[3]], [dy[0], dy[3]], weight, bias)
    torch.testing.assert_close(found[3]["y"], whole["y"][1], rtol=1e-10, atol=1e-10)
    alone = reference.batch_norm_on_joined([x[1]], [dy[1]], weight, bias)
    torch.testing.assert_close(found[1]["dx"], alone["dx"][0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_a_group_it_is_torchs_layer(dimensions, momentum):
    x, dy, _, _ = shards_of([6], dimensions, 5.0)
    ours = SyncBatchNorm(3, momentum=momentum, dtype=torch.float64)
    torchs = reference.BATCH_NORMS[dimensions](3, momentum=momentum, dtype=torch.float64)
    for _ in range(3):
        a, b = x[0].clone().requires_grad_(), x[0].clone().requires_grad_()
        ours(a).backward(dy[0])
        torchs(b).backward(dy[0])
        torch.testing.assert_close(a.grad, b.grad)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for key, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    ours.eval(), torchs.eval()
    torch.testing.assert_close(ours(x[0]), torchs(x[0]))


def cumulative(x, dy, weight, bias):
    layer = SyncBatchNorm(3, momentum=None, dtype=torch.float64)
    for step in range(3):
        layer(x[collectives.rank()] * (step + 1))
    return layer.running_var


def test_momentum_none_averages_all_batches():
    x, dy, weight, bias = shards_of([4, 4], 4, 0.0)
    joined = torch.cat(x)
    expected = sum((joined * (step + 1)).transpose(0, 1).flatten(1).var(1) for step in range(3)) / 3
    torch.testing.assert_close(ranks.run(cumulative, x, dy, weight, bias, world=2)[0], expected)


def count_collectives(train):
    """Body: how many exchanges of how many numbers one step makes."""
    calls = []
    originals = collectives.gather, collectives.start_sum

    def gather(values, group, what):
        calls.append(("gather", values.numel(), what))
        return originals[0](values, group, what)

    def start_sum(values, group, what):
        calls.append(("sum", values.numel(), what))
        return originals[1](values, group, what)

    collectives.gather, collectives.start_sum = gather, start_sum
    try:
        layer = SyncBatchNorm(3).train(train)
        layer.layer_name = "layer4.0.bn1"
        layer(torch.randn(4, 3, 2, 2, requires_grad=True)).sum().backward()
    finally:
        collectives.gather, collectives.start_sum = originals
    return calls


def test_one_gather_forward_and_one_sum_backward():
    expected = [("gather", 7, "layer4.0.bn1 forward"), ("sum", 6, "layer4.0.bn1 backward")]
    assert ranks.run(count_collectives, True, world=2) == [expected] * 2


def evaluate_alone():
    layer = SyncBatchNorm(3)
    layer(torch.randn(4, 3))
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    if collectives.rank() == 1:  # the other rank is not there
        layer(torch.randn(4, 3))
    return all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_eval_is_silent():
    assert ranks.run(count_collectives, False, world=2) == [[]] * 2
    assert ranks.run(evaluate_alone, world=2) == [True, True]


def all_empty():
    layer = SyncBatchNorm(3)
    x = torch.zeros(0, 3, 2, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    return y.shape, layer.running_var, int(layer.num_batches_tracked), layer.weight.grad, x.grad.shape


def test_a_step_without_samples_moves_nothing():
    for shape, var, tracked, dweight, dx_shape in ranks.run(all_empty, world=2):
        assert shape == dx_shape == (0, 3, 2)
        assert torch.equal(var, torch.ones(3))
        assert tracked == 0
        assert torch.equal(dweight, torch.zeros(3))


def one_value(rank_with_it):
    layer = SyncBatchNorm(3)
    layer.layer_name = "head.bn"
    with pytest.raises(ShapeError) as caught:
        layer(torch.randn(1 if collectives.rank() == rank_with_it else 0, 3))
    return str(caught.value), torch.equal(layer.running_var, torch.ones(3))


def test_one_value_a_channel_is_refused_on_every_rank_alike():
    for message, unmoved in ranks.run(one_value, 1, world=2):
        assert "head.bn has 1 value per channel over its whole group of 2 ranks" in message
        assert "norm=group" in message
        assert unmoved


@pytest.mark.parametrize("shape", [(4, 5), (4,), (4, 2, 3)])
def test_another_number_of_channels_is_refused(shape):
    layer = SyncBatchNorm(3)
    with pytest.raises(ShapeError, match=r"shape \(4.*normalizes \[N, 3, \*\]"):
        layer(torch.randn(*shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_ranks": 3}, "sync_ranks=3 does not divide world_size=4. Use 1, 2 or 4."),
        ({"sync_ranks": 0}, "sync_ranks=0 must be at least 1"),
        ({"group_ranks": (0, 4)}, "group_ranks=(0, 4) must be different ranks below world_size=4"),
        ({"group_ranks": (0, 5)}, "group_ranks=(0, 5)"),
    ],
)
def test_ranks_that_cannot_be_grouped_are_refused_on_every_rank(options, message):
    assert all(text.startswith(message) for text in ranks.run(refused, options, world=4))


def refused(options):
    with pytest.raises(ConfigError) as caught:
        SyncBatchNorm(3, **options)(torch.randn(4, 3))
    return str(caught.value)


def copies_work():
    layer = SyncBatchNorm(3, sync_ranks=2)
    layer(torch.randn(4, 3))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    clones = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    assert layer.rank_moments is not None
    assert all(clone.rank_moments is None for clone in clones)
    x = torch.randn(4, 3)
    return [torch.equal(clone(x), layer(x)) and clone.sync_ranks == 2 for clone in clones]


def test_copies_after_training_work():
    assert ranks.run(copies_work, world=2) == [[True] * 3] * 2


def under_ddp():
    rank = collectives.rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), nn.Linear(4, 2)).double()
    whole = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    whole.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, dtype=torch.float64)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
    whole(x).square().mean().backward()
    return max(
        float((a.grad - b.grad).abs().max()) for a, b in zip(model.parameters(), whole.parameters(), strict=True)
    )


def test_ddp_on_the_cpu_trains_as_one_process_would():
    assert max(ranks.run(under_ddp, world=2)) < 1e-12


def test_it_is_a_batch_norm_and_not_torchs_synchronized_one():
    assert isinstance(SyncBatchNorm(2), _BatchNorm)
    assert not isinstance(SyncBatchNorm(2), nn.SyncBatchNorm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_measures_in_float32(dtype):
    x, dy, weight, bias = shards_of([40, 60], 4, 0.0, torch.float32)
    whole = reference.batch_norm_on_joined(x, dy, weight, bias)
    found = ranks.run(train_half, [t.to(dtype) for t in x], world=2)
    for rank, (y, running_var) in enumerate(found):
        assert y.dtype == dtype
        exact = (whole["y"][rank] - bias[:, None, None]) / weight[:, None, None]
        torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.03)
        torch.testing.assert_close(running_var, whole["running_var"], rtol=0.01, atol=0)


def train_half(x):
    layer = SyncBatchNorm(3)
    return layer(x[collectives.rank()]).detach(), layer.running_var


def waits_for_a_dead_rank(rank, store, messages):
    collectives.start_ranks(rank=rank, world_size=2, store_path=store, timeout_s=30)
    layer = SyncBatchNorm(3)
    layer.layer_name = "layer2.bn"
    layer(torch.randn(4, 3))
    if rank == 1:
        os._exit(1)
    try:
        layer(torch.randn(4, 3))
    except GroupError as error:
        messages.send(str(error))


def test_a_rank_that_is_gone_is_reported_with_layer_and_ranks(tmp_path):
    ours, theirs = ranks.context.Pipe()
    store = str(tmp_path / "store")
    processes = [ranks.context.Process(target=waits_for_a_dead_rank, args=(rank, store, theirs)) for rank in (0, 1)]
    for process in processes:
        process.start()
    assert ours.poll(60), "rank 0 still waits"
    message = ours.recv()
    for process in processes:
        process.join(10)
        process.kill()
    assert "rank 0 waited in layer2.bn forward for ranks 0, 1; one of them failed or never came" in message
    assert "Does every rank run the same model" in message


def test_a_ghost_normalizes_alone_and_the_running_statistics_are_pooled():
    x, dy, _, _ = shards_of([8], 4, 3.0)
    ghost = GhostBatchNorm(3, ghost_batch=4, dtype=torch.float64)
    y = ghost(x[0])
    for half in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(y[half], nn.BatchNorm2d(3, dtype=torch.float64)(x[0][half]))
    whole = nn.BatchNorm2d(3, dtype=torch.float64)
    whole(x[0])
    torch.testing.assert_close(ghost.running_var, whole.running_var)
    torch.testing.assert_close(ghost.running_mean, whole.running_mean)
    assert GhostBatchNorm(3, 4)(torch.zeros(0, 3)).requires_grad
