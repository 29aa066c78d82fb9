"""The names that `convert` gives to DDP: statistics and no constants, beside a user's own; `revert` undoes it."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distnorm import NormSpec, SyncBatchNorm, collectives, convert, decide
from distnorm.norms import FrozenBatchNorm
from distnorm.norms.apart import has_hook
from distnorm.unsent import IGNORED, OURS
from tests import ranks

pytestmark = pytest.mark.unit

LOCAL = NormSpec("batch", 16)
FULL = {"backend": "aot_eager", "fullgraph": True}
ALL = NormSpec("sync", 32, sync_ranks=2, world_size=2)


def stats(*layers):
    """The names of the statistics of some layers, with and without what wraps a model."""
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    wraps = ("", "_orig_mod.", "_checkpoint_wrapped_module.")
    return {f"{wrap}{layer}.{kind}" for layer in layers for kind in kinds for wrap in wraps}


def net(users=None):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    if users is not None:
        setattr(model, IGNORED, users)
    return model


def test_statistics_are_named_under_every_name_and_nothing_else_is():
    model = net()
    model.alias = model[1]
    convert(model, LOCAL)
    assert set(getattr(model, IGNORED)) == stats("1", "2.1", "alias")
    assert isinstance(getattr(model, IGNORED), list)


def test_what_a_user_put_there_stays_and_comes_back():
    users = {"0.weight", "1.running_mean"}
    model = net(users)
    conversion = convert(model, LOCAL)
    assert set(getattr(model, IGNORED)) == stats("1", "2.1") | users
    conversion.revert()
    assert getattr(model, IGNORED) is users
    assert users == {"0.weight", "1.running_mean"}
    assert not hasattr(model, OURS)


def test_nothing_is_left_where_there_was_nothing():
    model = net()
    before = dict(vars(model))
    convert(model, LOCAL).revert()
    assert vars(model) == before


def test_a_list_of_the_class_is_kept_and_not_changed():
    class Listed(nn.Sequential):
        _ddp_params_and_buffers_to_ignore = ["0.weight"]  # noqa: RUF012 — as users write it

    model = Listed(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    conversion = convert(model, LOCAL)
    assert set(getattr(model, IGNORED)) == stats("1") | {"0.weight"}
    conversion.revert()
    assert getattr(model, IGNORED) is Listed.__dict__[IGNORED]
    assert getattr(model, IGNORED) == ["0.weight"]


def test_a_second_conversion_names_what_is_right_now_and_both_are_undone():
    model = net(["0.weight"])
    users = getattr(model, IGNORED)
    first = convert(model, LOCAL)
    second = convert(model, ALL)
    assert getattr(model, IGNORED) == ["0.weight"], "all ranks share: DDP may send them"
    third = convert(model, NormSpec("ghost", 4, ghost_batch=4, world_size=2), include=["2.*"])
    assert set(getattr(model, IGNORED)) == stats("2.1") | {"0.weight"}
    third.revert()
    assert getattr(model, IGNORED) == ["0.weight"]
    second.revert()
    assert set(getattr(model, IGNORED)) == stats("1", "2.1") | {"0.weight"}
    first.revert()
    assert getattr(model, IGNORED) is users


@settings(deadline=None, max_examples=50)
@given(
    users=st.none() | st.sets(st.sampled_from(["0.weight", "1.running_mean", "2.1.bias", "9.gone"])),
    kinds=st.lists(
        st.sampled_from([LOCAL, ALL, NormSpec("ghost", 4, ghost_batch=4), NormSpec("group", 1)]), max_size=3
    ),
    later=st.sets(st.sampled_from(["0.bias", "2.0.weight"])),
)
def test_any_conversions_in_order_leave_the_users_names(users, kinds, later):
    model, done = net(users), []
    for spec in kinds:
        done.append(convert(model, spec))
        if spec.kind == "group":  # it cannot be converted again
            break
    if later:
        setattr(model, IGNORED, [*getattr(model, IGNORED, ()), *later])
    for conversion in reversed(done):
        conversion.revert()
    assert set(getattr(model, IGNORED, ())) == (users or set()) | later
    assert not hasattr(model, OURS)
    if not later and users is not None:
        assert getattr(model, IGNORED) is users


def test_constants_are_not_named():
    """DDP's construction sends them: who loads weights on rank 0 alone relies on it."""
    model = nn.Sequential(
        FrozenBatchNorm(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.0), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    )
    model[3].eval()
    convert(model, NormSpec("batch", 16, layers={"4": {"kind": "frozen"}}))
    assert set(getattr(model, IGNORED)) == stats("1")


@pytest.mark.parametrize("spec", [ALL, NormSpec("group", 1), NormSpec("frozen", 1)])
def test_no_name_is_given_where_nothing_differs(spec):
    model = net()
    convert(model, spec)
    assert not hasattr(model, IGNORED)


def test_norms_that_convert_leaves_are_named_too():
    model = net()
    convert(model, ALL, exclude=["1"])
    assert set(getattr(model, IGNORED)) == stats("1")


def test_layers_of_some_ranks_are_named_and_those_of_all_are_not():
    model = nn.Sequential(SyncBatchNorm(3, sync_ranks=2), SyncBatchNorm(3, sync_ranks=4), nn.BatchNorm2d(3))
    convert(model, NormSpec("sync", 32, sync_ranks=4, world_size=4), include=["2"])
    assert set(getattr(model, IGNORED)) == stats("0")


def test_copies_carry_the_names():
    model = net()
    convert(model, LOCAL)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert getattr(copied, IGNORED) == getattr(model, IGNORED)


def hooks_of_ranks():
    """A norm that stays torch's has no code of ours: a hook watches."""
    model = net()
    first = convert(model, decide(16, collectives.world_size()))
    found = [[has_hook(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]]
    second = convert(model, decide(4, collectives.world_size(), kind="ghost"))
    found.append([has_hook(m) for m in model.modules()])
    second.revert()
    found.append([has_hook(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    found.append([has_hook(m) for m in copied.modules() if isinstance(m, nn.BatchNorm2d)])
    traced = torch.fx.symbolic_trace(model)
    found.append([node.target for node in traced.graph.nodes if node.op == "call_module"])
    x = torch.randn(8, 3, 2, 2)
    for made in (torch.jit.script, lambda model: torch.jit.trace(model, x), lambda model: torch.compile(model, **FULL)):
        torch.testing.assert_close(made(copy.deepcopy(model))(x), copy.deepcopy(model)(x))
    first.revert()
    found.append([has_hook(m) for m in model.modules()])
    return found


def test_norms_that_stay_torchs_are_hooked_where_there_are_several_ranks():
    kept, ghosts, back, copied, traced, undone = ranks.run(hooks_of_ranks, world=2)[0]
    assert kept == back == copied == [True, True]
    assert not any(ghosts)
    assert not any(undone)
    assert traced == ["0", "1", "2.0", "2.1"]


def test_alone_nothing_is_hooked():
    model = net()
    convert(model, decide(16, 1))
    assert not any(map(has_hook, model.modules()))
