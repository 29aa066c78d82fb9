"""Votes beside the training: what everybody hears, what they cost in collectives, and who is named when one fails."""

import time

import pytest
import torch
import torch.distributed as dist

from distnorm import GroupError, collectives, positions
from distnorm.collectives import groups
from tests import ranks

pytestmark = pytest.mark.unit


def most_wanted(wishes):
    """Body: three votes, each heard one later, and another exchange of the control group between."""
    rank = collectives.rank()
    votes = [collectives.start_vote(torch.tensor(wishes[rank][0], dtype=torch.int32), "a vote")]
    outcomes, others = [], []
    for own in wishes[rank][1:]:
        others.append(collectives.agree(rank, "another exchange"))
        started = collectives.start_vote(torch.tensor(own, dtype=torch.int32), "a vote")
        outcomes.append(votes.pop().wait().tolist())
        votes.append(started)
    return [*outcomes, votes.pop().wait().tolist()], others


def test_everybody_hears_the_most_that_anybody_wants_one_vote_later():
    wishes = [[[0, 0], [0, 1], [3, 0]], [[0, 0], [2, 0], [0, 0]]]
    for outcomes, others in ranks.run(most_wanted, wishes, world=2):
        assert outcomes == [[0, 0], [2, 1], [3, 0]]
        assert others == [[0, 1], [0, 1]]


def collectives_of_votes(number):
    """Body: which collectives torch is asked for, and over which group."""
    asked = []
    names = [
        name for name in vars(dist) if name.startswith(("all_", "broadcast", "reduce", "gather", "barrier", "send"))
    ]
    before = {name: getattr(dist, name) for name in names}

    def counting(name):
        def counted(*arguments, **options):
            asked.append((name, options.get("group") is groups.control_group()))
            return before[name](*arguments, **options)

        return counted

    collectives.agree(None, "the group is made")
    for name in names:
        setattr(dist, name, counting(name))
    try:
        for _ in range(number):
            collectives.start_vote(torch.tensor([0, 1]), "a vote").wait()
    finally:
        for name in names:
            setattr(dist, name, before[name])
    return asked


@pytest.mark.parametrize(("world", "expected"), [(1, []), (2, [("all_reduce", True)] * 3)])
def test_a_vote_is_one_maximum_over_the_control_group(world, expected):
    assert ranks.run(collectives_of_votes, 3, world=world) == [expected] * world


def test_without_a_process_group_the_own_wish_counts():
    assert collectives.start_vote(torch.tensor([2, 0]), "a vote").wait().tolist() == [2, 0]


def one_is_missing(late):
    """Body: rank `late` comes when the others have given up; what they say, and after how long."""
    collectives.agree(None, "the group is made")
    if collectives.rank() == late:
        time.sleep(1.5)
        return None
    vote = collectives.start_vote(torch.tensor([4]), "the vote on lunch")
    started = time.monotonic()
    with pytest.raises(GroupError) as caught:
        vote.wait(0.5)
    time.sleep(1)  # rank 0 holds the store
    return str(caught.value), time.monotonic() - started - 1


def test_who_did_not_come_in_time_is_named():
    positions.stop()
    results = ranks.run(one_is_missing, 1, world=3)
    for words, seconds in (results[0], results[2]):
        assert words.startswith("rank 1 never came to the vote on lunch; ranks 0, 2 did.")
        assert "Look at the log of rank 1" in words
        assert seconds < 1.5
    ranks._pools.pop(3).stop()  # its group is broken
