"""Where the names do not reach: DDP of a parent keeps the ranks' own statistics apart, and respects what is written."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distnorm import GhostBatchNorm, NormSpec, SyncBatchNorm, collectives, convert, decide, evaluation_statistics
from distnorm.population import swap_in
from tests import ranks
from tests.joined import OtherNames, Parent, logged, net, own_batches, pooled_of, reference, train

pytestmark = pytest.mark.unit

STEPS, MOMENTUM = 40, 0.1


def make(kind, **options):
    """DDP of a parent, and the norm in it: one that stays torch's, or one with code of ours."""
    model = net() if kind == "kept" else net(GhostBatchNorm(1, 4))
    if kind == "kept":
        convert(model, NormSpec("batch", 16, world_size=collectives.world_size()))
    return DistributedDataParallel(Parent(model), **options), model[0]


def of(ddp, norm, said=()):
    return (*pooled_of(ddp.module, norm), list(said))


def is_right(found, steps=STEPS, **options):
    for mean, var, *_ in found:
        assert (mean, var) == pytest.approx(reference(steps, MOMENTUM, **options), rel=1e-4)


KINDS = pytest.mark.parametrize("kind", ["kept", "ours"])


def accumulating(kind):
    ddp, norm = make(kind)
    inputs = own_batches(STEPS)
    for start in range(0, STEPS, 4):
        with ddp.no_sync():
            train(ddp, inputs[start : start + 3])
        train(ddp, inputs[start + 3 : start + 4])
    return of(ddp, norm)


@KINDS
def test_gradient_accumulation(kind):
    is_right(ranks.run(accumulating, kind, world=2))


def evaluating(kind):
    """An eval forward through DDP sends buffers too, and so does one without gradients."""
    ddp, norm = make(kind)
    inputs, seen = own_batches(STEPS), []
    for x in inputs:
        train(ddp, [x])
        before = norm.running_mean.clone()
        ddp.eval()
        ddp(x)
        with torch.no_grad(), evaluation_statistics(ddp.module):
            ddp(x)
            seen.append(norm.running_mean.item())
        ddp.train()
        assert torch.equal(norm.running_mean, before)
    return (*of(ddp, norm), seen[-1])


@KINDS
def test_evaluation_between_steps(kind):
    found = ranks.run(evaluating, kind, world=2)
    is_right(found)
    assert [last for *_, last in found] == [mean for mean, *_ in found]


def writing(kind, how):
    """Write other values on each rank after some steps, and make one more step."""
    ddp, norm = make(kind)
    x = own_batches(1)[0]
    train(ddp, [x] * 3)
    value = torch.full((1,), 10.0 + collectives.rank())
    expected = 0.9 * (0 if how == "reset" else value.item()) + 0.1 * x.mean().item()
    if how == "load":
        ddp.load_state_dict({**ddp.state_dict(), "module.inner.0.running_mean": value})
    elif how == "partial":
        norm.load_state_dict({"running_mean": value}, strict=False)
    elif how == "assign":
        norm.load_state_dict({**norm.state_dict(), "running_mean": value}, assign=True)
    elif how == "in place":
        norm.running_mean.copy_(value)
    elif how == "replaced":
        norm.running_mean = value
    else:
        norm.reset_running_stats()
    train(ddp, [x])
    return norm.running_mean.item(), expected


@KINDS
@pytest.mark.parametrize("how", ["load", "partial", "assign", "in place", "replaced", "reset"])
def test_what_is_written_between_steps_stays(kind, how):
    for mean, expected in ranks.run(writing, kind, how, world=2):
        assert mean == pytest.approx(expected, rel=1e-5)


def resuming(kind, how):
    """Load what each rank had before it stopped, once DDP is there; DDP's first forward sends rank 0's."""
    ddp, norm = make(kind)
    x = own_batches(1)[0]
    value = torch.full((1,), 10.0 + collectives.rank())
    state = {**ddp.state_dict(), "module.inner.0.running_mean": value}
    if how == "swap_in":
        swap_in(ddp.module, {"inner.0.running_mean": value})
    else:
        ddp.load_state_dict(state)
    if how == "evaluated":
        ddp.eval()
        ddp(x)
        ddp.train()
    if how == "edited":
        norm.running_mean.fill_(20)
        value = torch.full((1,), 20.0)
    train(ddp, [x])
    return norm.running_mean.item(), 0.9 * value.item() + 0.1 * x.mean().item()


@KINDS
@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 counts its sending as a write of the user's")
@pytest.mark.parametrize("how", ["loaded", "swap_in", "evaluated", "edited"])
def test_what_each_rank_loads_before_the_first_step_stays(kind, how):
    for mean, expected in ranks.run(resuming, kind, how, world=2):
        assert mean == pytest.approx(expected, rel=1e-5)


def copying(kind, how):
    ddp, norm = make(kind)
    inputs = own_batches(STEPS)
    train(ddp, inputs[: STEPS // 2])
    if how == "deepcopy":
        ddp = copy.deepcopy(ddp)
    elif how == "pickle":
        ddp = pickle.loads(pickle.dumps(ddp))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(ddp, file)
        file.seek(0)
        ddp = torch.load(file, weights_only=False)
    else:
        ddp.double()
        inputs = [x.double() for x in inputs]
    copied = ddp.module.inner[0]
    assert (copied is norm) == (how == "double")
    train(ddp, inputs[STEPS // 2 :])
    return of(ddp, copied)


@KINDS
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "double"])
def test_copies_keep_theirs_apart_too(kind, how):
    is_right(ranks.run(copying, kind, how, world=2))


class Checkpointed(Parent):
    def forward(self, x):
        return self.own(checkpoint(self.inner, x, use_reentrant=False).mean((2, 3)))


def recomputing():
    model = net(GhostBatchNorm(1, 4))
    ddp = DistributedDataParallel(Checkpointed(model))
    train(ddp, [x.requires_grad_() for x in own_batches(STEPS)])
    return of(ddp, model[0])


def test_activation_checkpointing():
    is_right(ranks.run(recomputing, world=2))


def joining(kind):
    """Rank 0 runs out first; the end of `join` sends the last rank's buffers to all."""
    ddp, norm = make(kind) if kind != "named" else (None, None)
    if kind == "named":
        model = net()
        convert(model, NormSpec("batch", 16, world_size=2))
        ddp, norm = DistributedDataParallel(model), model[0]
    own = STEPS if collectives.rank() else STEPS // 2
    with Join([ddp]):
        train(ddp, own_batches(own))
    return norm.running_mean.item(), norm.running_var.item()


@pytest.mark.parametrize("kind", ["kept", "ours", "named"])
def test_join_ends_with_each_ranks_own(kind):
    for rank, (mean, var) in enumerate(ranks.run(joining, kind, world=2)):
        steps = STEPS if rank else STEPS // 2
        both, _ = reference(steps, MOMENTUM)
        assert mean == pytest.approx(2 * both if rank else 0, abs=0.2)
        assert var == pytest.approx(1, abs=0.1)


def nothing_yet(kind):
    """Rank 1 has no batch at all: its DDP was never looked at, and must stay in step."""
    ddp, norm = make(kind)
    with Join([ddp]):
        train(ddp, own_batches(0 if collectives.rank() else STEPS))
    return norm.running_mean.item(), norm.num_batches_tracked.item()


@KINDS
def test_a_rank_without_any_batch_stays_in_step(kind):
    (mean, count), _ = ranks.run(nothing_yet, kind, world=2)
    assert mean == pytest.approx(0, abs=0.1)
    assert count == STEPS


def reverting(wrap):
    model = net()
    conversion = convert(model, decide(16, 2))
    ddp = DistributedDataParallel(Parent(model))
    train(ddp, own_batches(10))
    apart = model[0].running_mean.item()
    conversion.revert()
    if wrap != "still":
        del ddp
        gc.collect()  # whose gradient hooks would take the parameters for its own
        ddp = DistributedDataParallel(model if wrap == "the model" else Parent(model))
    train(ddp, own_batches(30))
    ddp.eval()
    ddp(own_batches(1)[0])
    return apart, model[0].running_mean.item()


@pytest.mark.parametrize("wrap", ["still", "the model", "a parent"])
def test_after_revert_ddp_sends_again(wrap):
    (apart, sent), (other, received) = ranks.run(reverting, wrap, world=2)
    assert apart != pytest.approx(other, abs=0.2)
    assert sent == received


def converting_late():
    """DDP read the names before there were any."""
    model = net()
    ddp = DistributedDataParallel(model)
    train(ddp, own_batches(2))
    convert(model, NormSpec("ghost", 4, ghost_batch=4, world_size=2))
    model[0].reset_running_stats()
    _, said = logged(lambda: train(ddp, own_batches(STEPS)))
    return (*pooled_of(model, model[0]), said)


def test_a_model_that_ddp_wraps_already():
    found = ranks.run(converting_late, world=2)
    for mean, *_ in found:
        assert mean == pytest.approx(2, abs=0.1)
    assert [len(said) for *_, said in found] == [1, 0]


def twice():
    """Two DDPs in one process, compiled: the code of the first is guarded, and the second is looked at too."""
    found = []
    for _ in range(2):
        model = net(SyncBatchNorm(1, sync_ranks=1))
        ddp = DistributedDataParallel(Parent(model))
        train(torch.compile(ddp, backend="aot_eager"), own_batches(STEPS))
        found.append(of(ddp, model[0]))
    return found


def test_compiled_code_is_not_taken_for_another_ddp():
    for found in ranks.run(twice, world=2):
        is_right(found)


def with_other_names():
    ddp, _ = make("ours")
    ddp.__class__ = OtherNames
    ddp.__dict__["_sync_buffers"] = lambda: None
    return logged(lambda: train(ddp, own_batches(3)))[1]


def test_a_torch_with_other_names_is_left_alone_and_it_is_said():
    (said,), others = ranks.run(with_other_names, world=2)
    assert "with this torch they cannot be kept apart" in said
    assert "_buffers=False)" in said
    assert not others
