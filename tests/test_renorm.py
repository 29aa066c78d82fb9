"""Batch renormalization against its paper's formulas, alone and over ranks, and every contract line it claims."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from distnorm import ConfigError, ShapeError, collectives
from distnorm.norms import BatchRenorm
from distnorm.norms.surgery import become
from tests import ranks, reference, reference_norms, steps

pytestmark = pytest.mark.unit

RUNNING = (np.array([0.8, -0.4, 1.1]), np.array([2.0, 9.0, 0.5]))


def layer_with(weight, bias, tracked=0, **options):
    layer = BatchRenorm(len(weight), dtype=weight.dtype, **options)
    mean, var = (torch.from_numpy(values).to(weight.dtype) for values in RUNNING)
    found = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    layer.load_state_dict(found | {"num_batches_tracked": torch.tensor(tracked)})
    return layer


def train(x, dy, weight, bias, num_steps, options):
    """Body: this rank's shard through a fresh layer, again and again; the results of each step."""
    rank, found = collectives.rank(), []
    layer = layer_with(weight, bias, **options)
    for _ in range(num_steps):
        layer.zero_grad()
        own = x[rank].clone().requires_grad_()
        y = layer(own)
        y.backward(dy[rank])
        found.append(copy.deepcopy(steps.results(layer, own, y)))
    return found


def limits_of(t, warmup, ramp, r_max, d_max):
    """The schedule, step by step: closed, opening in equal parts, open."""
    if t < warmup:
        return 1.0, 0.0
    if t >= warmup + ramp:
        return r_max, d_max
    part = (t + 1 - warmup) / (ramp + 1)
    return 1 + part * (r_max - 1), part * d_max


SCHEDULES = [
    {"warmup": 0, "ramp": 0, "r_max": 100.0, "d_max": 100.0},  # nothing is clipped: as in evaluation
    {"warmup": 0, "ramp": 0, "r_max": 1.2, "d_max": 0.3},  # all is clipped, one channel at the least
    {"warmup": 1, "ramp": 2, "r_max": 3.0, "d_max": 5.0},
    {"warmup": 9, "ramp": 9},
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
@pytest.mark.parametrize("sizes", [[6], [3, 5], [0, 6], [0, 5, 2, 1]], ids=str)
def test_every_step_is_the_papers_on_the_joined_batch(sizes, dimensions, options):
    x, dy, weight, bias = steps.shards(sizes, steps.POSITIONS[dimensions], 1.0)
    found = ranks.run(train, x, dy, weight, bias, 5, options, world=len(sizes))
    joined = [torch.cat(parts).numpy() for parts in (x, dy)]
    running = RUNNING
    for t in range(5):
        limits = limits_of(t, **({"r_max": 3.0, "d_max": 5.0} | options))
        truth = reference_norms.batch_renorm(*joined, weight.numpy(), bias.numpy(), *running, *limits)
        running = truth["running_mean"], truth["running_var"]
        whole = steps.joined([own[t] for own in found])
        for key, value in whole.items():
            torch.testing.assert_close(
                value, torch.from_numpy(truth[key]), rtol=1e-10, atol=1e-10, msg=lambda m: f"step {t}, {key}: {m}"
            )
        assert all(own[t]["tracked"] == t + 1 for own in found)


def test_unclipped_it_trains_on_what_evaluation_will_give():
    x, _, weight, bias = steps.shards([6], (4,), 1.0)
    layer = layer_with(weight, bias, r_max=100.0, d_max=100.0, warmup=0, ramp=0)
    twin = copy.deepcopy(layer).eval()
    torch.testing.assert_close(layer(x[0]), twin(x[0]), rtol=1e-10, atol=1e-10)


def test_in_the_warmup_it_is_batch_norm():
    x, _, weight, bias = steps.shards([6], (4,), 1.0)
    layer, whole = layer_with(weight, bias, tracked=199), nn.BatchNorm1d(3, dtype=torch.float64)
    whole.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x[0]), whole(x[0]), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(layer(x[0]), whole(x[0]), atol=1e-3)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["affine", "no_bias", "plain"])
def test_parameters_may_be_left_out(kind, momentum):
    x, dy, _, _ = steps.shards([6], (4,), 1.0)
    options = {"affine": kind != "plain", "bias": kind == "affine", "momentum": momentum}
    layer = BatchRenorm(3, dtype=torch.float64, warmup=0, ramp=0, **options)
    y = layer(x[0].requires_grad_())
    y.backward(dy[0])
    numbers = [np.ones(3), np.zeros(3), np.zeros(3), np.ones(3), 3.0, 5.0]
    truth = reference_norms.batch_renorm(
        x[0].detach().numpy(), dy[0].numpy(), *numbers, momentum=1.0 if momentum is None else momentum
    )
    found = {"y": y, "dx": x[0].grad, "running_mean": layer.running_mean, "running_var": layer.running_var}
    for key, value in found.items():
        torch.testing.assert_close(value, torch.from_numpy(truth[key]), rtol=1e-10, atol=1e-10)
    assert (layer.bias is None) == (kind != "affine")


def test_without_running_statistics_it_is_batch_norm():
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    layer = BatchRenorm(3, track_running_stats=False, dtype=torch.float64, warmup=0, ramp=0)
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), nn.BatchNorm1d(3, dtype=torch.float64)(x))


@pytest.mark.parametrize("clipped", [True, False])
def test_gradcheck_of_both_orders_where_r_and_d_are_constants(clipped):
    limits = {"r_max": 1.01, "d_max": 0.01, "warmup": 0} if clipped else {"warmup": 10**6}
    torch.manual_seed(0)  # far from the corners of the clipping
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.rand(3, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(2))
    layer = layer_with(weight.detach(), bias.detach(), ramp=0, **limits)
    start = copy.deepcopy(layer.state_dict())

    def function(x, weight, bias):
        layer.load_state_dict(start)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize(("offset", "allowed"), [(0.0, 1e-5), (1e3, 1e-3)])
def test_float32_errs_little(offset, allowed):
    x, dy, weight, bias = steps.shards([6, 10], (3, 4), offset, torch.float32)
    found = ranks.run(train, x, dy, weight, bias, 1, {"warmup": 0, "ramp": 0}, world=2)
    numbers = [torch.cat(parts).double().numpy() for parts in (x, dy)] + [
        weight.double().numpy(),
        bias.double().numpy(),
    ]
    truth = reference_norms.batch_renorm(
        *numbers, *(values.astype(np.float32).astype(float) for values in RUNNING), 3, 5
    )
    for key, value in steps.joined([own[0] for own in found]).items():
        error = reference.relative_error(value, torch.from_numpy(truth[key]))
        assert error <= allowed, (key, error)


def padded(x, masks, fill):
    """Body: a padded step, with this in the padding and with that."""
    rank, found = collectives.rank(), []
    mask = masks[rank]
    for values in (torch.where(mask[:, None], x[rank], fill), x[rank]):
        own = values.clone().requires_grad_()
        layer = layer_with(torch.ones(3).double(), torch.zeros(3).double(), warmup=0, ramp=0)
        y = layer(own, mask=mask)
        y.sin().sum().backward()
        found.append((y.detach(), own.grad, layer.running_var))
    return found


def test_padding_has_no_part():
    x, _, _, _ = steps.shards([4, 3], (5,), 1.0)
    masks = [torch.rand(len(part), 5, generator=torch.Generator().manual_seed(3)) < 0.7 for part in x]
    found = ranks.run(padded, x, masks, 1e9, world=2)
    kept = torch.cat([part.transpose(1, 2)[mask] for part, mask in zip(x, masks, strict=True)])
    ones, zeros = np.ones(3), np.zeros(3)
    truth = reference_norms.batch_renorm(kept.numpy(), np.zeros_like(kept), ones, zeros, *RUNNING, 3, 5)
    for filled, plain in found:
        assert all(torch.equal(one, other) for one, other in zip(filled, plain, strict=True))
    y = torch.cat([own[0][0].transpose(1, 2)[mask] for own, mask in zip(found, masks, strict=True)])
    torch.testing.assert_close(y, torch.from_numpy(truth["y"]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[0][0][2], torch.from_numpy(truth["running_var"]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"sync_ranks": 2}, [(0, 1), (2, 3)]),
        ({"group_ranks": (0, 3)}, [(0, 3), (1,), (2,)]),
        ({"sync_ranks": 1}, [(2,)]),
    ],
    ids=str,
)
def test_blocks_and_subsets_of_ranks_share(options, groups):
    x, dy, weight, bias = steps.shards([2, 3, 4, 5], (4,), 1.0)
    found = ranks.run(train, x, dy, weight, bias, 1, options | {"warmup": 0, "ramp": 0}, world=4)
    for group in groups:
        shard, grad = (torch.cat([parts[rank] for rank in group]).numpy() for parts in (x, dy))
        truth = reference_norms.batch_renorm(shard, grad, weight.numpy(), bias.numpy(), *RUNNING, 3, 5)
        for key in ("y", "dx"):
            whole = torch.cat([found[rank][0][key] for rank in group])
            torch.testing.assert_close(whole, torch.from_numpy(truth[key]), rtol=1e-10, atol=1e-10)


def half_step(x, dy, mode):
    """Body: a step in half precision or under autocast, channels last."""
    rank, dtype = collectives.rank(), x[0].dtype
    layer = layer_with(torch.ones(3), torch.zeros(3), warmup=0, ramp=0)
    if mode == "module":
        layer.to(dtype)
    own = steps.channels_last(x[rank]).detach().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=mode == "autocast"):
        y = layer(own)
    y.backward(dy[rank])
    kept = all(t.stride() == own.stride() for t in (y, own.grad))
    return steps.results(layer, own, y), kept, layer.running_var.dtype


@pytest.mark.parametrize("mode", ["module", "input", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_corrected_in_float32_and_stays_channels_last(dtype, mode):
    x, dy, _, _ = steps.shards([3, 5], (6, 7), 1.0, dtype)
    running = [torch.from_numpy(values).to(dtype if mode == "module" else torch.float32).double() for values in RUNNING]
    truth = reference_norms.batch_renorm(
        *(torch.cat(parts).double().numpy() for parts in (x, dy)),
        np.ones(3),
        np.zeros(3),
        *(values.numpy() for values in running),
        3,
        5,
    )
    found = ranks.run(half_step, x, dy, mode, world=2)
    whole, unit = steps.joined([results for results, _, _ in found]), torch.finfo(dtype).eps
    for key in ("y", "dx"):
        assert whole[key].dtype == dtype
        torch.testing.assert_close(whole[key].double(), torch.from_numpy(truth[key]), rtol=unit, atol=unit / 4)
    for _, kept, running_dtype in found:
        assert kept
        assert running_dtype == (dtype if mode == "module" else torch.float32)


def compiled(backend):
    """Body: steps through the opening limits, in training and evaluation."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv1d(3, 4, 1), BatchRenorm(4, warmup=1, ramp=1), nn.Tanh()).double()
    twin = copy.deepcopy(eager)
    step = torch.compile(twin, fullgraph=True, backend=backend)
    torch.manual_seed(collectives.rank() + 1)
    for training in (True, True, True, False):
        eager.train(training), twin.train(training)
        x = torch.randn(4, 3, 5, dtype=torch.float64) * 3 + collectives.rank()
        for run in (eager, step):
            run(x).square().sum().backward()
        for one, found in zip(eager.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(found, one, rtol=1e-10, atol=1e-10)
    for one, found in zip(eager.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, one.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("world", [1, 2])
def test_a_compiled_layer_trains_as_in_eager_mode(world):
    ranks.run(compiled, "aot_eager", world=world)


def checkpointed(reentrant):
    """Body: a repeated pass has the r and d of the pass that it repeats, though the running statistics have moved."""
    torch.manual_seed(collectives.rank())
    x = torch.randn(4, 3, 5, dtype=torch.float64) * 3 + 1
    plain = layer_with(torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), warmup=0, ramp=2)
    twin = copy.deepcopy(plain)
    for _ in range(3):
        one, other = (x.clone().requires_grad_() for _ in range(2))
        plain(one).sin().sum().backward()
        checkpoint(lambda x: twin(x).sin(), other, use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-12, atol=1e-12)
        for value, found in zip(plain.state_dict().values(), twin.state_dict().values(), strict=True):
            assert torch.equal(found, value)
    torch.testing.assert_close(twin.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_a_repeated_pass_corrects_as_the_first_did(world, reentrant):
    ranks.run(checkpointed, reentrant, world=world)


def counted():
    """Body: what training exchanges, and evaluation; and that evaluation on one rank alone changes nothing."""
    calls, originals = [], (collectives.gather, collectives.start_sum)
    collectives.gather = lambda values, *rest: calls.append(("gather", values.numel())) or originals[0](values, *rest)
    collectives.start_sum = lambda values, *rest: calls.append(("sum", values.numel())) or originals[1](values, *rest)
    try:
        layer = BatchRenorm(3, warmup=0)
        layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
        before = copy.deepcopy(layer.state_dict())
        if collectives.rank() == 0:
            layer.eval()(torch.randn(4, 3))
    finally:
        collectives.gather, collectives.start_sum = originals
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    return calls


def test_one_gather_forward_one_sum_backward_and_evaluation_is_silent():
    assert ranks.run(counted, world=2) == [[("gather", 7), ("sum", 6)]] * 2


def all_empty():
    layer = BatchRenorm(3, warmup=0, ramp=0)
    layer(torch.randn(0, 3, 2, requires_grad=True)).sum().backward()
    return [float(layer.weight.grad.abs().sum()), layer.running_mean.tolist(), int(layer.num_batches_tracked)]


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_without_samples_moves_nothing(world):
    assert ranks.run(all_empty, world=world) == [[0.0, [0.0] * 3, 0]] * world


def test_copies_train_alike():
    x = torch.randn(5, 3, 4)
    layer = BatchRenorm(3, warmup=0, ramp=1, r_max=2.0, sync_ranks=1)
    layer(x.requires_grad_()).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        again = copy.deepcopy(layer)
        for _ in range(2):
            assert torch.equal(twin(x), again(x))
        assert repr(twin) == repr(layer)
    assert "sync_ranks=1, r_max=2.0, d_max=5.0, warmup=0, ramp=1" in repr(layer)
    assert isinstance(layer, _BatchNorm)
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_max": 0.5}, "r_max=0.5 must be at least 1"),
        ({"r_max": float("nan")}, "r_max=nan must be at least 1"),
        ({"d_max": -1}, "d_max=-1 must be at least 0"),
        ({"warmup": -1}, "warmup=-1 must be at least 0"),
        ({"ramp": -1}, "ramp=-1 must be at least 0"),
    ],
    ids=str,
)
def test_limits_that_limit_nothing_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        BatchRenorm(3, **options)
    assert message in str(caught.value)
    assert "r_max=1 and d_max=0 correct nothing, warmup=0 and ramp=0 correct from the first step" in str(caught.value)


def test_ranks_named_twice_and_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"BatchRenorm got sync_ranks=2 and group_ranks=\(0, 1\).*Give one of them"):
        BatchRenorm(3, sync_ranks=2, group_ranks=(0, 1))
    with pytest.raises(ShapeError, match=r"BatchRenorm\(3\) got an input of shape \(4, 5\).*\n.*3 channels"):
        BatchRenorm(3)(torch.randn(4, 5))


def test_a_batch_norm_that_becomes_one_starts_with_what_it_counted():
    torch.manual_seed(0)
    source, x = nn.BatchNorm1d(3, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64) * 2 + 1
    source(x * 3)
    source.num_batches_tracked.fill_(10**6)
    mean, var = (value.numpy().copy() for value in (source.running_mean, source.running_var))
    become(source, BatchRenorm, sync_ranks=1, group_ranks=None)
    truth = reference_norms.batch_renorm(x.numpy(), np.zeros(x.shape), np.ones(3), np.zeros(3), mean, var, 3.0, 5.0)
    torch.testing.assert_close(source(x), torch.from_numpy(truth["y"]), rtol=1e-10, atol=1e-10)
