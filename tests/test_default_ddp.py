"""Running statistics are each rank's own under any construction of DDP, and pool to those of the joined data."""

import warnings

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from distnorm import GhostBatchNorm, SyncBatchNorm, collectives, convert, decide
from distnorm.norms import BatchRenorm
from tests import ranks
from tests.joined import Parent, logged, net, own_batches, pooled_of, reference, train

pytestmark = pytest.mark.unit

STEPS = 60


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(*arguments, **options)


def converted(options, sync_ranks=1):
    """`convert`, then DDP round that very model: the names reach, and nothing is sent."""
    model = net()
    world = collectives.world_size()
    convert(model, decide(16, world) if sync_ranks == 1 else decide(16, world, kind="sync", sync_ranks=sync_ranks))
    ddp = quietly(model, **options)
    _, said = logged(lambda: train(ddp, own_batches(STEPS)))
    return (*pooled_of(model, model[0]), model[0].momentum, said, "_sync_module_buffers" in vars(ddp))


OPTIONS = [
    {},
    {"broadcast_buffers": False},
    {"broadcast_buffers": True},
    {"forward_sync_buffers": False},
    {"forward_sync_buffers": True},
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"init_sync": False},
]


def check(found, sync_ranks=1, world=2, said=False):
    for mean, var, momentum, messages, *_ in found:
        truth = reference(STEPS, momentum, world, sync_ranks)
        assert (mean, var) == pytest.approx(truth, rel=1e-4)
        assert (len(messages) > 0) <= said
    assert [bool(messages) for _, _, _, messages, *_ in found] == [said and not rank for rank in range(world)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_convert_names_is_never_sent(options):
    known = DistributedDataParallel.__init__.__code__.co_varnames
    if not set(options) <= set(known):
        pytest.skip(f"torch {torch.__version__} has no {list(options)}")
    found = ranks.run(converted, options, world=2)
    check(found)
    assert not any(apart for *_, apart in found)


def test_300_steps_pool_to_mean_2_and_variance_5():
    for mean, var in ranks.run(as_filed, world=2):
        assert mean == pytest.approx(2, abs=0.1)
        assert var == pytest.approx(5, abs=0.2)


def as_filed():
    model = net()
    convert(model, decide(16, 2))
    train(DistributedDataParallel(model), own_batches(300))
    return pooled_of(model, model[0])


@pytest.mark.parametrize(("sync_ranks", "world"), [(1, 2), (2, 4)])
def test_groups_keep_statistics_of_their_own(sync_ranks, world):
    check(ranks.run(converted, {}, sync_ranks, world=world), sync_ranks, world)


def by_hand(kind, options):
    norm = {
        "sync": lambda: SyncBatchNorm(1, sync_ranks=1),
        "group": lambda: SyncBatchNorm(1, group_ranks=(collectives.rank(),)),
        "ghost": lambda: GhostBatchNorm(1, 4),
        "renorm": lambda: BatchRenorm(1, sync_ranks=1),
        "sync of 2": lambda: SyncBatchNorm(1, sync_ranks=2),
    }[kind]()
    model = net(norm)
    ddp = DistributedDataParallel(model, **options)
    _, said = logged(lambda: train(ddp, own_batches(STEPS)))
    return (*pooled_of(model, norm), norm.momentum, said)


@pytest.mark.parametrize("kind", ["sync", "group", "ghost", "renorm"])
def test_layers_built_by_hand_keep_theirs_and_it_is_said_once(kind):
    found = ranks.run(by_hand, kind, {}, world=2)
    check(found, said=True)
    (said,) = found[0][3]
    assert "running statistics of 1 layers" in said
    assert "Call distnorm.convert() on the very model that DDP wraps" in said
    assert "_buffers=False)" in said


def test_groups_built_by_hand_keep_theirs():
    check(ranks.run(by_hand, "sync of 2", {}, world=4), 2, 4, said=True)


def test_layers_that_all_ranks_share_are_left_to_ddp():
    for mean, var, momentum, said in ranks.run(by_hand, "sync of 2", {}, world=2):
        assert (mean, var) == pytest.approx(reference(STEPS, momentum, 2, 2), rel=1e-4)
        assert not said


def of_a_parent(kind, compiled):
    model = net()
    spec = {"batch": decide(16, 2), "ghost": decide(16, 2, kind="ghost")}[kind]
    convert(model, spec)
    parent = Parent(model)
    if compiled == "inside":
        ddp = DistributedDataParallel(torch.compile(parent, backend="aot_eager", fullgraph=True))
    else:
        ddp = DistributedDataParallel(parent)
    run = torch.compile(ddp, backend="aot_eager") if compiled == "outside" else ddp
    _, said = logged(lambda: train(run, own_batches(STEPS)))
    return (*pooled_of(model, model[0]), model[0].momentum, said)


@pytest.mark.parametrize("compiled", ["no", "inside", "outside"])
@pytest.mark.parametrize("kind", ["batch", "ghost"])
def test_a_parent_that_ddp_wraps_keeps_them_too(kind, compiled):
    check(ranks.run(of_a_parent, kind, compiled, world=2), said=True)


def compiled(order, kind):
    model = net()
    convert(model, decide(16, 2) if kind == "batch" else decide(16, 2, kind="ghost"))
    if order == "inside":
        ddp = run = DistributedDataParallel(torch.compile(model, backend="aot_eager", fullgraph=True))
    else:
        ddp = DistributedDataParallel(model)
        run = torch.compile(ddp, backend="aot_eager")
    _, said = logged(lambda: train(run, own_batches(STEPS)))
    return (*pooled_of(model, model[0]), model[0].momentum, said, "_sync_module_buffers" in vars(ddp))


@pytest.mark.parametrize("kind", ["batch", "ghost"])
@pytest.mark.parametrize("order", ["inside", "outside"])
def test_torch_compile_changes_names_and_nothing_else(order, kind):
    found = ranks.run(compiled, order, kind, world=2)
    check(found)
    assert not any(apart for *_, apart in found)
