"""Gradients over ranks, of the first and second order, and in every order DDP can ask for them (contract line 10)."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from distnorm import SyncBatchNorm, collectives
from tests import ranks

pytestmark = pytest.mark.unit


class Enter(torch.autograd.Function):
    """Take a value that all ranks hold; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return Leave.apply(grad)


class Leave(torch.autograd.Function):
    """Sum over the ranks; the adjoint of `Enter`."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        if collectives.world_size() > 1:
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return Enter.apply(grad)


def on_all_ranks(layer, sizes, mask, x, weight=None, bias=None):
    """The layer as a function of the joined batch: the same on every rank, so that gradcheck runs in lockstep."""
    first = sum(sizes[: collectives.rank()])
    own = slice(first, first + sizes[collectives.rank()])
    parameters = {key: Enter.apply(value) for key, value in (("weight", weight), ("bias", bias)) if value is not None}
    kept = {} if mask is None else {"mask": mask[own]}
    y = functional_call(layer, parameters, (Enter.apply(x)[own],), kept)
    before, after = (x.new_zeros(n, *x.shape[1:]) for n in (first, len(x) - own.stop))
    return Leave.apply(torch.cat((before, y, after)))


def check_gradients(sizes, shape, masked, affine):
    torch.manual_seed(0)
    layer = SyncBatchNorm(2, affine=affine, dtype=torch.float64)
    x = torch.randn(sum(sizes), 2, *shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(sum(sizes), *shape) < 0.7 if masked else None
    parameters = [torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(2 * affine)]
    function = functools.partial(on_all_ranks, layer, sizes, mask)
    first = torch.autograd.gradcheck(function, (x, *parameters))
    return first and torch.autograd.gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize(
    ("sizes", "shape", "masked", "affine"),
    [
        ([4], (2,), False, True),
        ([4], (2,), True, True),
        ([2, 3], (2,), False, True),
        ([2, 3], (), False, False),
        ([3, 3], (2,), True, True),
        ([0, 3], (1, 2), False, True),
    ],
)
def test_gradcheck_and_gradgradcheck_over_ranks(sizes, shape, masked, affine):
    assert ranks.run(check_gradients, sizes, shape, masked, affine, world=len(sizes)) == [True] * len(sizes)


def penalized(layer, x, v):
    """A gradient-penalty step; gradients of the loss and of the penalty."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad((y**3 * v).sum(), x, create_graph=True)
    (grad.square().sum() + (y * v).sum()).backward()
    return grad.detach(), x.grad, layer.weight.grad, layer.bias.grad


def penalized_on_ranks(x, v, cuts, weight, bias):
    own = slice(cuts[collectives.rank()], cuts[collectives.rank() + 1])
    layer = SyncBatchNorm(3, dtype=x.dtype)
    layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    return penalized(layer, x[own], v[own])


@pytest.mark.parametrize("cuts", [[0, 7], [0, 2, 7], [0, 0, 3, 4, 7]], ids=str)
def test_a_gradient_penalty_is_that_of_the_joined_batch(cuts):
    x, v = torch.randn(7, 3, 4, dtype=torch.float64) + 2, torch.randn(7, 3, 4, dtype=torch.float64)
    whole = nn.BatchNorm1d(3, dtype=torch.float64)
    with torch.no_grad():
        whole.weight.uniform_(0.5, 1.5), whole.bias.normal_()
    found = ranks.run(penalized_on_ranks, x, v, cuts, whole.weight.data, whole.bias.data, world=len(cuts) - 1)
    grad, dx, dweight, dbias = penalized(whole, x, v)
    torch.testing.assert_close(torch.cat([part[0] for part in found]), grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([part[1] for part in found]), dx, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sum(part[2] for part in found), dweight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sum(part[3] for part in found), dbias, rtol=1e-9, atol=1e-9)


def models(norm_options=None):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
    whole = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    whole.load_state_dict(ours.state_dict())
    return ours, whole


def assert_alike(ours, whole):
    for (name, value), truth in zip(ours.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(value.grad, truth.grad, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")
    for (name, value), truth in zip(ours.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")


def accumulate(options):
    """Body: three micro-batches a step, two steps; statistics are each forward's own."""
    rank = collectives.rank()
    ours, whole = models()
    wrapped = DistributedDataParallel(ours, **options)
    for step in range(2):
        batches = torch.randn(3, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        ours.zero_grad(), whole.zero_grad()
        for place, batch in enumerate(batches):
            own = batch[rank * 4 : rank * 4 + 4]
            if place < 2:
                with wrapped.no_sync():
                    wrapped(own).square().mean().backward()
            else:
                wrapped(own).square().mean().backward()
            whole(batch).square().mean().backward()
        assert_alike(ours, whole)
    assert int(ours[1].num_batches_tracked) == 6


def test_accumulation_sums_gradients_and_each_forward_has_its_own_statistics():
    ranks.run(accumulate, {}, world=2)
    ranks.run(accumulate, {"broadcast_buffers": False, "gradient_as_bucket_view": True}, world=2)


def step_under_ddp(options):
    rank = collectives.rank()
    ours, whole = models()
    wrapped = DistributedDataParallel(ours, **options)
    for step in range(3):
        batch = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        ours.zero_grad(), whole.zero_grad()
        wrapped(batch[rank * 4 : rank * 4 + 4]).square().mean().backward()
        whole(batch).square().mean().backward()
        assert_alike(ours, whole)


@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_ddp_in_all_its_ways_trains_as_one_process(options):
    ranks.run(step_under_ddp, options, world=2)


def two_forwards_one_backward(batches):
    rank = collectives.rank()
    layer, whole = SyncBatchNorm(3).double(), nn.BatchNorm1d(3).double()
    cut = [0, 2, 6]
    own = [batch[cut[rank] : cut[rank + 1]].clone().requires_grad_() for batch in batches]
    joined = [batch.clone().requires_grad_() for batch in batches]
    for inputs, norm in ((own, layer), (joined, whole)):
        first, second = (norm(x) for x in inputs)
        (first.square().sum() + second.sin().sum()).backward()
    for x, truth in zip(own, joined, strict=True):
        torch.testing.assert_close(x.grad, truth.grad[cut[rank] : cut[rank + 1]], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.running_var, whole.running_var)
    return layer.weight.grad, whole.weight.grad


def test_two_forwards_before_one_backward_keep_their_statistics():
    found = ranks.run(two_forwards_one_backward, torch.randn(2, 6, 3, dtype=torch.float64), world=2)
    torch.testing.assert_close(found[0][0] + found[1][0], found[0][1])


def gradient_on_one_rank_only(x, v, needs_grad_on, double):
    rank = collectives.rank()
    layer = SyncBatchNorm(3).double()
    own = x[rank].clone().requires_grad_(rank == needs_grad_on)
    y = layer(own)
    if double:
        grads = torch.autograd.grad((y**2 * v[rank]).sum(), list(layer.parameters()), create_graph=True)
        assert all(grad.requires_grad for grad in grads)
        return None
    (y**2 * v[rank]).sum().backward()
    return own.grad, layer.weight.grad


@pytest.mark.parametrize("needs_grad_on", [0, 1, None])
def test_an_input_that_needs_no_gradient_on_one_rank_hangs_nobody(needs_grad_on):
    x, v = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    found = ranks.run(gradient_on_one_rank_only, x, v, needs_grad_on, False, world=2)
    whole = nn.BatchNorm1d(3).double()
    joined = x.flatten(0, 1).requires_grad_()
    (whole(joined) ** 2 * v.flatten(0, 1)).sum().backward()
    torch.testing.assert_close(found[0][1] + found[1][1], whole.weight.grad)
    for rank, (dx, _) in enumerate(found):
        assert (dx is not None) == (rank == needs_grad_on)
        if dx is not None:
            torch.testing.assert_close(dx, joined.grad.view_as(x)[rank])


def frozen_parameters(x, v):
    """Body: weight and bias frozen on all ranks; and copies, that share nothing."""
    rank = collectives.rank()
    layer = SyncBatchNorm(3).double().requires_grad_(False)
    own = x[rank].clone().requires_grad_()
    (copy.deepcopy(layer)(own) ** 2 * v[rank]).sum().backward()
    return own.grad, layer.weight.grad


def test_frozen_weights_get_no_gradient_and_the_input_the_right_one():
    x, v = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    joined = x.flatten(0, 1).requires_grad_()
    (nn.BatchNorm1d(3).double()(joined) ** 2 * v.flatten(0, 1)).sum().backward()
    for rank, (dx, dweight) in enumerate(ranks.run(frozen_parameters, x, v, world=2)):
        torch.testing.assert_close(dx, joined.grad.view_as(x)[rank])
        assert dweight is None
