"""Positions of ranks in files, and what is said of a hang: a rank that skips, branches, stalls, dies."""

import os
import re
import time

import pytest
import torch
from torch import nn

from distnorm import GroupError, SyncBatchNorm, check_ranks, collectives, positions, whereabouts
from distnorm.positions import Exchange, Position
from tests import ranks

ALL = (0, 1, 2, 3)


def position(rank, *exchanges, step=17, world=4, host=None):
    """A position whose exchanges are `(what, number)` or `(what, number, waiting)` of all ranks."""
    import platform

    trail = tuple(Exchange(e[0], ALL, e[1], step, len(e) > 2) for e in exchanges)
    return Position(rank, world, host or platform.node(), step, len(trail), trail)


A, B = ("conv1.bn forward", 1), ("layer4.0.bn1 forward", 2)
WAITS = (*B, True)


@pytest.mark.unit
def test_who_left_before_what_and_who_waits():
    found = {r: position(r, A, WAITS) for r in (0, 1, 3)} | {2: position(2, A)}
    assert whereabouts.in_words(found) == (
        "rank 2 left before layer4.0.bn1 (step 17); ranks 0, 1, 3 wait in its forward; "
        "rank 2 was past conv1.bn forward (step 17)"
    )


@pytest.mark.unit
def test_other_endings_in_words():
    words = whereabouts.in_words
    backward = ("bn backward", 2, True)
    found = {0: position(0, A, backward), 1: position(1, A), 2: position(2, A, step=16), 3: position(3, A, backward)}
    assert words(found) == (
        "ranks 1, 2 left before bn's backward (step 17); ranks 0, 3 wait in it; "
        "rank 1 was past conv1.bn forward (step 17), rank 2 was past conv1.bn forward (step 16)"
    )
    found = {r: position(r, A) for r in (0, 1, 2)} | {3: position(3, A, B)}
    assert words(found) == (
        "no rank waits in an exchange of a layer: ranks 0, 1, 2 were past conv1.bn forward (step 17), "
        "rank 3 was past layer4.0.bn1 forward (step 17)"
    )
    found = {r: position(r, A, WAITS) for r in (0, 1, 3)}
    assert words(found) == (
        "ranks 0, 1, 3 wait in layer4.0.bn1 forward (step 17) for rank 2; nothing to be read from rank 2"
    )
    found = {r: position(r, A, B) for r in (0, 1, 2)} | {3: position(3, A, WAITS)}
    assert words(found) == "rank 3 waits in layer4.0.bn1 forward (step 17), that ranks 0, 1, 2 left"
    found = {r: position(r, A, WAITS) for r in ALL}
    assert "all of its group: one ended in it" in words(found)
    found = {r: position(r, A, host="elsewhere" if r == 2 else None) for r in ALL}
    assert words(found).endswith("rank 2 ran on other hosts, whose last writes may not have arrived here")
    assert words({r: position(r) for r in ALL}) == words({}) == ""


@pytest.mark.unit
def test_a_parting_is_found_also_where_the_ranks_went_on():
    other, last = ("layer4.1.bn1 forward", 2), ("layer4.2.bn1 forward", 3, True)
    found = {r: position(r, A, B, last) for r in (0, 1, 3)} | {2: position(2, A, other)}
    assert whereabouts.in_words(found) == (
        "rank 2 went to layer4.1.bn1 forward where ranks 0, 1, 3 went to layer4.0.bn1 forward (step 17)"
    )


@pytest.mark.unit
def test_positions_come_back_from_the_file_and_the_ring_turns(tmp_path):
    assert positions.enter("a", ALL) == 0
    positions.leave(0)
    positions.keep(tmp_path / "new", 2, 4, run=100.0)
    try:
        for step in range(3000):
            positions.at_step(step)
            positions.leave(positions.enter(f"layer{step % 7}.bn forward", ALL))
        positions.enter("mean of (0, 2)", (0, 2))
        (found,) = positions.read(tmp_path / "new").values()
        assert (found.rank, found.world_size, found.step, found.count) == (2, 4, 2999, 3001)
        assert found.trail[-2:] == (
            Exchange("layer3.bn forward", ALL, 3000, 2999, False),
            Exchange("mean of (0, 2)", (0, 2), 1, 2999, True),
        )
        assert len(found.trail) == 1024
    finally:
        positions.stop()
    assert positions.enter("a", ALL) == 0


@pytest.mark.unit
def test_old_torn_and_foreign_files_are_not_read(tmp_path):
    for rank, run in ((0, 50.0), (1, 100.0), (2, 100.0), (3, 100.0)):
        positions.keep(tmp_path, rank, 4, run=run)
    positions.stop()
    torn = tmp_path / "rank2.position"
    torn.write_bytes(torn.read_bytes()[:5000])
    (tmp_path / "rank3.position").write_bytes(os.urandom(5000))
    (tmp_path / "rankX.position").write_bytes(b"")
    (tmp_path / "rank7.position").write_bytes((tmp_path / "rank1.position").read_bytes())
    assert list(positions.read(tmp_path, since=100.0)) == [1]
    assert list(positions.read(tmp_path)) == [0, 1]


@pytest.mark.unit
def test_keeping_costs_microseconds(tmp_path):
    def cost():
        start = time.perf_counter()
        for _ in range(1000):
            positions.leave(positions.enter("layer4.0.bn1 forward", ALL))
        return (time.perf_counter() - start) / 1000

    positions.keep(tmp_path, 0, 4)
    try:
        assert min(cost() for _ in range(20)) < 20e-6  # 0.4e-6 on an idle machine
    finally:
        positions.stop()


class Net(nn.Module):
    """Three layers of equal width; one rank may go another way."""

    def __init__(self, odd_rank=-1, way=""):
        super().__init__()
        self.first, self.second, self.third = (SyncBatchNorm(3) for _ in range(3))
        self.odd, self.way = collectives.rank() == odd_rank, way

    def forward(self, x, step=0):
        odd = self.odd and step == 2
        if odd and self.way == "dies":
            os._exit(1)
        if odd and self.way == "stalls":
            time.sleep(30)
        x = self.first(x)
        if odd and self.way == "turns":
            return self.second(self.third(x))
        if not (odd and self.way == "skips"):
            x = self.second(x)
        return self.third(x)


def train(model):
    for step in range(4):
        positions.at_step(step)
        model(torch.randn(4, 3), step).square().mean().backward()


def with_debug(way, sync_ranks):
    model = Net(2, way)
    for layer in (model.first, model.second, model.third):
        layer.sync_ranks = sync_ranks
    check_ranks(model, debug=True)
    if model.odd and model.way == "other mode":
        model.second.eval()
    try:
        train(model)
    except GroupError as error:
        return str(error)
    finally:
        collectives.set_debug(False)
    return None


@pytest.mark.unit
@pytest.mark.parametrize(
    ("way", "where"),
    [
        ("skips", "rank 2 is at third forward, ranks 0, 1, 3 are at second forward"),
        ("turns", "rank 2 is at third forward, ranks 0, 1, 3 are at second forward"),
        ("other mode", "rank 2 is at third forward, ranks 0, 1, 3 are at second forward"),
    ],
)
def test_debug_names_who_is_where_on_every_rank_at_once(way, where):
    started = time.monotonic()
    messages = ranks.run(with_debug, way, None, world=4)
    assert time.monotonic() - started < ranks.GROUP_TIMEOUT_S
    assert len(set(messages)) == 1
    assert messages[0].startswith(where)
    assert "Every rank must run the same layers" in messages[0]
    assert len(messages[0].splitlines()) <= 3


@pytest.mark.unit
def test_debug_speaks_within_the_group_and_lets_equal_ranks_train():
    messages = ranks.run(with_debug, "skips", 2, world=4)
    assert messages[:2] == [None, None]
    assert messages[2] == messages[3]
    assert messages[2].startswith("rank 2 is at third forward, rank 3 is at second forward")
    assert ranks.run(with_debug, "", 2, world=4) == [None] * 4


def debug_other_lengths():
    collectives.set_debug(True)
    positions_here = tuple(range(collectives.world_size()))
    try:
        collectives.gather(torch.zeros(3 + (collectives.rank() == 1)), positions_here, "layer3.bn forward")
    except GroupError as error:
        return str(error)
    finally:
        collectives.set_debug(False)


@pytest.mark.unit
def test_debug_stops_an_exchange_of_different_lengths():
    messages = ranks.run(debug_other_lengths, world=2)
    assert messages[0] == messages[1]
    assert "rank 0 is at layer3.bn forward with 3 numbers, rank 1 is at layer3.bn forward with 4" in messages[0]


def goes_astray(rank, world, store, way, folder, debug, messages):
    torch.set_num_threads(1)
    collectives.start_ranks(rank=rank, world_size=world, store_path=store, timeout_s=4)
    model = Net(2, way)
    check_ranks(model, folder=folder, debug=debug)
    try:
        train(model)
    except GroupError as error:
        messages.put((rank, str(error)))
        messages.close()
        messages.join_thread()
        time.sleep(1)  # the others time out by themselves, not for want of a peer
    os._exit(0)


def astray(way, tmp_path, *, debug, world=3):
    """Run ranks of their own, of which rank 2 goes astray; messages by rank, and what the files say afterwards."""
    messages = ranks.context.Queue()
    arguments = (world, str(tmp_path / "store"), way, str(tmp_path / "ranks"), debug, messages)
    processes = [ranks.context.Process(target=goes_astray, args=(rank, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    found = {}
    for _ in range(world if way == "skips" else world - 1):  # who skips a layer waits in the end, too
        rank, message = messages.get(timeout=60)
        found[rank] = message
    for process in processes:
        process.kill()
        process.join()
    return found, whereabouts.in_words(positions.read(tmp_path / "ranks"))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("way", "debug", "sentence"),
    [
        (
            "dies",
            False,
            r"rank 2 left before first \(step 2\); ranks 0, 1 wait in its forward; rank 2 was past first bac",
        ),
        ("stalls", True, r"rank 2 left before first \(step 2\); ranks 0, 1 wait in its forward"),
    ],
)
def test_a_timeout_says_who_left_before_what_and_so_do_the_files(tmp_path, way, debug, sentence):
    found, afterwards = astray(way, tmp_path, debug=debug)
    assert re.search(sentence, afterwards)
    for rank in (0, 1):
        assert f"rank {rank} waited in" in found[rank]
        assert re.search(sentence[1:], found[rank])
        assert len(found[rank].splitlines()) <= 3


@pytest.mark.unit
def test_a_skipped_layer_is_an_error_on_every_rank_and_the_files_say_it_too(tmp_path):
    found, afterwards = astray("skips", tmp_path, debug=False)
    assert re.search(r"rank 2 went to third forward where ranks 0, 1 went to second forward \(step 2\)", afterwards)
    for rank in range(3):
        assert found[rank].startswith("rank 2 is at third forward, ranks 0, 1 are at second forward (step 2).")
        assert len(found[rank].splitlines()) <= 3
