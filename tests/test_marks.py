"""Two layers, one exchange: what travels says whose it is, and ranks at different layers raise, all of them."""

import copy
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distnorm import GroupError, NormSpec, SyncBatchNorm, check_ranks, collectives, convert
from distnorm.collectives import late, marks
from distnorm.norms import pooling
from distnorm.norms.renorm import BatchRenorm
from distnorm.norms.weight_norm import weight_normalize
from tests import ranks

pytestmark = pytest.mark.unit


def two(made, width=4, **options):
    """Two layers a and b of one width: converted, so that they have names, or built by hand."""
    cls = {"renorm": BatchRenorm}.get(made, SyncBatchNorm)
    if made != "converted":
        return nn.ModuleDict({name: cls(width, **options) for name in "ab"})
    net = nn.ModuleDict({name: nn.BatchNorm2d(width) for name in "ab"})
    world = collectives.world_size()
    convert(net, NormSpec(kind="sync", normalization_batch=2, sync_ranks=options.get("sync_ranks", world)))
    return net


def heads_in_another_order(net, x, rank):
    for name in "ab" if rank == 0 else "ba":
        net[name](x)


def a_norm_per_domain(net, x, rank):
    net["ab"[rank]](x)


def a_branch_on_the_data(net, x, rank):
    if x.mean() < 2:
        net["a"](x)
    net["b"](x)


def a_loss_of_one_head(net, x, rank):
    outputs = [net["a"](x), net["b"](x)]
    outputs[rank].sum().backward()


WAYS = [heads_in_another_order, a_norm_per_domain, a_branch_on_the_data, a_loss_of_one_head]


def parts(way, made, up_to, compiled):
    """Body: two steps that go well, one that parts, and again one that goes well."""
    rank, kept, pooling.GATHER_UP_TO = collectives.rank(), pooling.GATHER_UP_TO, up_to
    try:
        net, x = two(made), torch.randn(3, 4, 2, 2, requires_grad=True)
        if made == "checked":
            check_ranks(net)
        if compiled:
            net = nn.ModuleDict({name: torch.compile(net[name], backend="aot_eager", fullgraph=True) for name in "ab"})
        for _ in range(2):
            (net["a"](x) + net["b"](x)).sum().backward()
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(GroupError) as raised:
            way(net, x.detach().add(4 * rank).requires_grad_(), rank)
        moved = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
        net["a"](x).sum().backward()
        return str(raised.value), moved
    finally:
        pooling.GATHER_UP_TO = kept


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("made", ["converted", "by hand", "checked", "renorm"])
@pytest.mark.parametrize("up_to", [16, 1], ids=["gathered", "summed"])
def test_ranks_at_different_layers_raise_on_all_and_pool_nothing(way, made, up_to):
    found = ranks.run(parts, way, made, up_to, False, world=2)
    kind = "backward" if way is a_loss_of_one_head else "forward"
    cls = "BatchRenorm" if made == "renorm" else "SyncBatchNorm"
    names = ("a", "b") if made in {"converted", "checked"} else (f"{cls}(4)", f"{cls}(4)")
    if way is a_loss_of_one_head or way is a_norm_per_domain or way is heads_in_another_order:
        assert all(f"rank 0 is at {names[0]} {kind}" in text for text, _ in found)
        assert all(f"rank 1 is at {names[1]} {kind}" in text for text, _ in found)
    else:
        assert all(f"rank 1 is at {names[1]} {kind}" in text for text, _ in found)
    assert found[0][0] == found[1][0]
    assert len(found[0][0].splitlines()) <= 3
    assert ("check_ranks(model)" in found[0][0]) == (names[0] == names[1])
    if way is not a_loss_of_one_head:
        assert [moved for _, moved in found] == [[], []]


def test_a_compiled_layer_carries_its_mark_too():
    found = ranks.run(parts, a_norm_per_domain, "converted", 16, True, world=2)
    assert found[0][0].startswith("rank 0 is at a forward, rank 1 is at b forward.")


def one_group_parts():
    """Body: of two groups of two ranks, one parts; the other trains on."""
    net, rank = two("converted", sync_ranks=2), collectives.rank()
    x = torch.randn(3, 4, 2, 2)
    try:
        net["b" if rank == 3 else "a"](x)
    except GroupError as error:
        return str(error).split(" (step")[0].split(".")[0]  # ranks that other tests used may know of a step
    return net["a"].num_batches_tracked.item()


def test_only_the_group_that_parted_raises():
    text = "rank 2 is at a forward, rank 3 is at b forward"
    assert ranks.run(one_group_parts, world=4) == [1, 1, text, text]


class ByData(nn.Module):
    """Which of its layers runs depends on the data."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.low(x) if x.mean() < 2 else self.high(x)


def initialized_by_data():
    with pytest.raises(GroupError) as raised:
        weight_normalize(ByData(), torch.randn(8, 3) + 4 * collectives.rank())
    return str(raised.value).split(" (step")[0].split(".")[0]


def test_weight_norm_does_not_pool_two_layers_either():
    text = "rank 0 is at low initialization, rank 1 is at high initialization"
    assert ranks.run(initialized_by_data, world=2) == [text, text]


def different_widths(rank, folder, messages):
    torch.set_num_threads(1)
    collectives.start_ranks(rank=rank, world_size=2, store_path=f"{folder}/store", timeout_s=20)
    net = nn.ModuleDict({"narrow": nn.BatchNorm1d(3), "wide": nn.BatchNorm1d(40)})
    convert(net, NormSpec(kind="sync", normalization_batch=2, sync_ranks=2))
    try:
        y = net["wide" if rank else "narrow"](torch.randn(5, 40 if rank else 3))
        messages.put((rank, f"went on with {y.shape}"))
    except GroupError as error:
        messages.put((rank, str(error)))
    messages.close()
    messages.join_thread()
    os._exit(0)


def test_layers_of_different_widths_are_never_pooled_either(tmp_path):
    """gloo ends the rank that receives more than it expects; the other one must not go on with what it got."""
    messages = ranks.context.Queue()
    processes = [ranks.context.Process(target=different_widths, args=(r, tmp_path, messages)) for r in range(2)]
    for process in processes:
        process.start()
    rank, text = messages.get(timeout=60)
    for process in processes:
        process.join(60)
    assert rank == 1
    assert "wide forward" in text
    assert "went on" not in text
    assert processes[0].exitcode != 0


def places(layers, kind="forward"):
    return [marks.place_of(name, order, kind) for name, order in layers]


NAMES = st.sampled_from(["a", "layer1.0.bn", "layer1.1.bn", "SyncBatchNorm(64)", "Größe"])


LAYERS = st.one_of(st.tuples(NAMES, st.integers(-3, -1)), st.tuples(NAMES.map("{} of four".format), st.integers(0, 3)))


@given(st.lists(LAYERS, min_size=2, max_size=16), st.sampled_from(["gather", "sum"]))
def test_marks_are_alike_where_the_layers_are(layers, how):
    """Against the plain question whether all are the same."""
    marks._made.update({(0, name): 4 for name, _ in layers if not marks._made[0, name]})
    found, group = places(layers), tuple(range(len(layers)))
    marks.forget_places(marks._world)
    same = len(set(layers)) == 1
    if how == "gather":
        packed = [float(place.next_mark(group)) for place in found]
        if same:  # one object here for what is one on each rank
            packed = packed[:1] * len(packed)
        assert marks.Gathered(group, found[0]).alike(packed) == same
    else:
        for dtype in (torch.float32, torch.float64):
            summed = [place.marked_sum(group, torch.zeros(1, dtype=dtype)) for place in found]
            total = torch.stack([mark.tensor for mark in summed]).sum(0).tolist()
            assert {mark.alike(total) for mark in summed} == {same}


def test_another_call_of_the_same_layer_is_not_the_same():
    group, (place,) = (0, 1), places([("calls", -1)])
    first, second = place.next_mark(group), place.next_mark(group)
    gathered = marks.Gathered(group, place)
    assert gathered.alike([first, first])
    assert not gathered.alike([first, second])
    assert gathered.describe([first, second]).startswith("rank 0 is at calls forward, call 1, rank 1 is at calls for")


@pytest.mark.parametrize("number", [2, 16, 17, 256, 1024, 5000])
def test_one_stranger_among_many_ranks_is_seen_by_all_of_them(number):
    group = tuple(range(number))
    for dtype in (torch.float32, torch.float64):
        for pair in range(40):
            one, other = (
                place.marked_sum(group, torch.zeros(1, dtype=dtype))
                for place in places([(f"{pair}", -1), (f"{pair}'", -2)])
            )
            if one._expected == other._expected:
                continue  # few bits are left for many ranks: two layers may have one number
            total = ((number - 1) * one.tensor + other.tensor).tolist()
            assert not one.alike(total)
            assert not other.alike(total)


class Arrival:
    """Stands for a CUDA event: numbers that are on the way, or there."""

    there = False

    def query(self):
        return self.there


def test_on_an_accelerator_marks_are_looked_at_when_they_have_arrived():
    group, (one, other) = (0, 1), places([("late.a", -1), ("late.b", -1)])
    arrival = Arrival()
    late._on_their_way.append(
        (torch.tensor([one.next_mark(group), other.next_mark(group)]).double(), arrival, marks.Gathered(group, one))
    )
    late.look_at_arrived()  # it has not arrived: nothing to say
    arrival.there = True
    with pytest.raises(GroupError, match=r"rank 0 is at late.a forward, rank 1 is at late.b forward(.|\n)*earlier"):
        late.look_at_arrived()
    late.look_at_arrived()
