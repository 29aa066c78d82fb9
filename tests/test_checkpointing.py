"""Activation checkpointing repeats a forward: nothing moves and nothing is exchanged again (contract line 9)."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distnorm import GhostBatchNorm, SyncBatchNorm, collectives
from distnorm.norms import BatchRenorm
from tests import ranks

pytestmark = pytest.mark.unit

LAYERS = {
    "sync": lambda: SyncBatchNorm(4),
    "ghost": lambda: GhostBatchNorm(4, ghost_batch=2),
    "renorm": lambda: BatchRenorm(4, warmup=0, ramp=2),
}


def norms_of(model):
    return [module for module in model if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def backward_once(run, x, _):
    run(x).square().sum().backward()


def two_forwards(run, x, other):
    (run(x).square().sum() + run(other).sin().sum()).backward()


def pipeline(run, x, other):
    first, second = run(x).square().sum(), run(other).sin().sum()
    first.backward()
    second.backward()


def stack(run, x, other):
    first, second = run(x).square().sum(), run(other).sin().sum()
    second.backward()
    first.backward()


def retained(run, x, other):
    loss = run(x).square().sum() + run(other).sin().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def beside_one_that_is_not(run, x, other):
    first, second = run(x).square().sum(), getattr(run, "direct", run)(other).sin().sum()
    second.backward(retain_graph=True)
    first.backward()


def through_itself(run, x, _):
    run(run(x).square()).square().sum().backward()


SCENARIOS = [backward_once, two_forwards, pipeline, stack, retained, beside_one_that_is_not, through_itself]


def count_gathers(calls):
    original = collectives.gather

    def gather(values, group, what):
        calls.append(what)
        return original(values, group, what)

    collectives.gather = gather
    return original


def compare(scenario, layer, mode, same_on_this_rank):
    """Body: three steps of a model and its checkpointed twin, that must stay equal."""
    rank = collectives.rank()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), LAYERS[layer](), nn.Tanh(), nn.Linear(4, 4), LAYERS[layer]()).double()
    twin = copy.deepcopy(plain)
    reentrant = mode == "reentrant"

    def again(x):
        if mode == "nested":
            inner = lambda x: checkpoint(twin[:2], x, use_reentrant=False)  # noqa: E731
            return checkpoint(lambda x: twin[2:](inner(x)), x, use_reentrant=False)
        return checkpoint(twin, x, use_reentrant=reentrant)

    again.direct = twin
    torch.manual_seed(rank + 1)
    gathers = []
    for _ in range(3):
        x = torch.randn(4 + rank, 4, dtype=torch.float64)
        other = x.clone() if rank in same_on_this_rank else torch.randn(4 + rank, 4, dtype=torch.float64)
        calls = []
        for run in (plain, again):
            calls.append([])
            inputs = [t.clone().requires_grad_() for t in (x, other)]
            original = count_gathers(calls[-1])
            try:
                scenario(run, *inputs)
            finally:
                collectives.gather = original
            calls[-1] = (len(calls[-1]), [t.grad for t in inputs])
        (num, grads), (num_again, grads_again) = calls
        gathers.append((num, num_again))
        for grad, found in zip(grads, grads_again, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-12, atol=1e-12)
        for (name, value), found in zip(plain.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.equal(found, value), name
        for one, found in zip(plain.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found.grad, one.grad, rtol=1e-12, atol=1e-12)
    assert all(one == other for one, other in gathers), gathers
    return gathers[-1][0]


@pytest.mark.parametrize("mode", ["reentrant", "saved", "nested"])
@pytest.mark.parametrize(("layer", "world"), [("sync", 1), ("sync", 2), ("ghost", 1), ("renorm", 2)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_checkpointed_model_learns_and_moves_as_without(scenario, layer, world, mode):
    forwards = 1 if scenario is backward_once else 2
    gathers = forwards * 2 if layer != "ghost" else 0
    assert ranks.run(compare, scenario, layer, mode, (), world=world) == [gathers] * world


@pytest.mark.parametrize("mode", ["reentrant", "saved"])
@pytest.mark.parametrize("scenario", [two_forwards, retained, stack, beside_one_that_is_not])
def test_a_rank_that_sees_the_same_batch_twice_knows_the_passes_apart(scenario, mode):
    ranks.run(compare, scenario, "sync", mode, (1,), world=2)


def forward_in_hook(layer, where):
    """Body: train on x; when its gradient comes by, train on something else; in the end, what of that was wrong."""
    torch.manual_seed(collectives.rank())
    ours = LAYERS[layer]().double()
    expected = copy.deepcopy(ours)
    x, other = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    expected(x)
    truth = expected(other)
    found = []
    own = x.requires_grad_()
    y = ours(own)
    (y if where == "before" else own).register_hook(lambda _: found.append(ours(other).detach()))
    y.square().sum().backward()
    torch.testing.assert_close(found[0], truth)
    for (name, value), own_value in zip(expected.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(own_value, value, msg=name)


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(("layer", "world"), [("sync", 1), ("sync", 2), ("ghost", 1)])
def test_a_forward_inside_a_backward_hook_has_statistics_of_its_own(layer, world, where):
    ranks.run(forward_in_hook, layer, where, world=world)


def passes_left(layer, mode):
    """Body: how many passes a layer holds after 100 steps, the last of them done."""
    ours = LAYERS[layer]()
    for _ in range(100):
        x = torch.randn(4, 4, requires_grad=True)
        if mode == "forward":
            ours(x)
        elif mode == "no_grad":
            with torch.no_grad():
                ours(x)
        else:
            y = ours(x) if mode == "plain" else checkpoint(ours, x, use_reentrant=mode == "reentrant")
            y.sum().backward()
    gc.collect()
    alive = {id(found) for ref in ours._passes._living if (found := ref()) is not None}
    return len(alive), len(ours._passes._living), len(ours._passes._without_graph)


@pytest.mark.parametrize("mode", ["plain", "saved", "reentrant", "forward", "no_grad"])
@pytest.mark.parametrize(("layer", "world"), [("sync", 1), ("sync", 2), ("ghost", 1)])
def test_passes_do_not_pile_up(layer, world, mode):
    for alive, kept, without_graph in ranks.run(passes_left, layer, mode, world=world):
        most = 64 if mode == "no_grad" else 2
        assert alive <= most
        assert kept <= most + 2
        assert without_graph <= (most if mode == "no_grad" else 1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", [SyncBatchNorm(4, affine=False), GhostBatchNorm(4, 2, affine=False)], ids=repr)
def test_a_norm_without_a_graph_of_its_own_moves_once(layer, reentrant):
    before = int(layer.num_batches_tracked)  # an input normalizer: nothing before it, and nothing in it, is learned
    x = torch.randn(6, 4, requires_grad=reentrant)
    checkpoint(nn.Sequential(layer, nn.Linear(4, 2)), x, use_reentrant=reentrant).sum().backward()
    assert int(layer.num_batches_tracked) == before + 1
