"""Which rank gets which samples: against numpy and counting."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm.data import EvaluationBatchSampler, GlobalBatchSampler
from distnorm.errors import ConfigError

pytestmark = pytest.mark.unit

counts = st.integers(1, 200)
batches = st.integers(1, 9)
worlds = st.integers(1, 6)
seeds = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=60)


def dealt(num_samples, device_batch, world_size, *, epoch=0, **options):
    """What each rank gets: [rank][step] -> list of pairs."""
    everyone = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(
            num_samples=num_samples, device_batch=device_batch, rank=rank, world_size=world_size, **options
        )
        sampler.set_epoch(epoch)
        everyone.append(list(sampler))
        assert len(sampler) == len(everyone[-1])
    return everyone


def flat(batches):
    return [pair for batch in batches for pair in batch]


def indices(pairs):
    return [index for _, index in pairs]


@quick
@given(counts, batches, worlds, seeds, st.booleans())
def test_kept_epoch_has_every_sample_once_in_chunks_as_even_as_possible(n, b, world, seed, shuffle):
    epoch = seed % 1000
    ranks = dealt(n, b, world, seed=seed, epoch=epoch, shuffle=shuffle, last_batch="keep")
    assert Counter(pair for rank in ranks for batch in rank for pair in batch) == Counter((epoch, i) for i in range(n))
    for step, shares in enumerate(zip(*ranks, strict=True)):
        whole = [pair for share in shares for pair in share]
        assert [len(share) for share in shares] == [len(part) for part in np.array_split(whole, world)]
        sampler = GlobalBatchSampler(num_samples=n, device_batch=b, rank=0, world_size=world, seed=0, last_batch="keep")
        assert sampler.global_count(step) == len(whole)
        assert sampler.left_out == 0


@quick
@given(counts, batches, worlds, seeds, st.integers(0, 1000))
def test_dropped_epoch_leaves_out_what_it_says(n, b, world, seed, epoch):
    if n < b * world:
        with pytest.raises(ConfigError):
            dealt(n, b, world, seed=seed)
        return
    ranks = dealt(n, b, world, seed=seed, epoch=epoch)
    seen = [pair for rank in ranks for batch in rank for pair in batch]
    sampler = GlobalBatchSampler(num_samples=n, device_batch=b, rank=0, world_size=world, seed=seed)
    assert len(seen) == len(set(seen)) == n - sampler.left_out
    assert sampler.left_out < b * world
    assert {len(batch) for rank in ranks for batch in rank} == {b}
    assert {len(rank) for rank in ranks} == {n // (b * world)}


@quick
@given(counts, st.sampled_from([(12, 1), (6, 2), (4, 3), (3, 4), (1, 12)]), seeds, st.sampled_from(["drop", "keep"]))
def test_global_batches_do_not_depend_on_the_number_of_ranks(n, split, seed, last_batch):
    n += 12
    b, world = split
    one = dealt(n, 12, 1, seed=seed, last_batch=last_batch)[0]
    many = dealt(n, b, world, seed=seed, last_batch=last_batch)
    assert [[pair for share in shares for pair in share] for shares in zip(*many, strict=True)] == one


def test_order_is_uniform_new_each_epoch_and_the_same_for_the_same_seed():
    orders = [flat(dealt(20, 20, 1, seed=7, epoch=epoch)[0]) for epoch in range(400)]
    assert len({tuple(indices(order)) for order in orders}) == 400
    assert orders[3] == flat(dealt(20, 20, 1, seed=7, epoch=3)[0])
    assert indices(orders[3]) != indices(flat(dealt(20, 20, 1, seed=8, epoch=3)[0]))
    mean_position = np.mean([np.argsort(indices(order)) for order in orders], axis=0)
    assert np.abs(mean_position - 9.5).max() < 5 * np.sqrt((20**2 - 1) / 12 / 400)


def test_samples_left_out_change_from_epoch_to_epoch():
    left_out = {frozenset(range(35)) - set(indices(flat(dealt(35, 8, 1, seed=0, epoch=e)[0]))) for e in range(5)}
    assert {len(indices) for indices in left_out} == {3}
    assert len(left_out) == 5


@quick
@given(st.integers(0, 60), batches, worlds)
def test_evaluation_deals_every_sample_once_and_no_rank_is_without_a_batch(n, b, world):
    samplers = [
        EvaluationBatchSampler(num_samples=n, device_batch=b, rank=rank, world_size=world) for rank in range(world)
    ]
    ranks = [list(sampler) for sampler in samplers]
    assert [indices(flat(rank)) for rank in ranks] == [part.tolist() for part in np.array_split(range(n), world)]
    assert [len(rank) for rank in ranks] == [len(sampler) for sampler in samplers]
    assert all(rank == [[]] or all(1 <= len(batch) <= b for batch in rank) for rank in ranks)
    assert all(len(batch) == b for rank in ranks for batch in rank[:-1])


def test_a_step_beyond_the_epoch_has_no_count():
    sampler = GlobalBatchSampler(num_samples=10, device_batch=4, rank=0, world_size=1, seed=0)
    with pytest.raises(IndexError, match=r"batch_index=2 .* 0\.\.1"):
        sampler.global_count(2)


def message_of(call, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        call(*arguments, **options)
    text = str(error.value)
    assert text.count("\n") <= 2
    return text


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank):
    for sampler, options in ((GlobalBatchSampler, {"seed": 0}), (EvaluationBatchSampler, {})):
        text = message_of(sampler, num_samples=9, device_batch=1, rank=rank, world_size=2, **options)
        assert f"rank={rank}" in text
        assert "world_size=2" in text


@quick
@given(st.integers(12, 120), batches, st.integers(1, 4), seeds, st.sampled_from(["drop", "keep"]))
def test_sorted_shards_keep_each_rank_to_its_part_of_the_classes(n, b, world, seed, last_batch):
    n += b * world
    classes = np.random.default_rng(seed).integers(0, 5, n)
    ranks = dealt(n, b, world, seed=seed, epoch=2, last_batch=last_batch, classes=classes.tolist())
    parts = np.array_split(np.argsort(classes, kind="stable"), world)
    for rank, part in zip(ranks, parts, strict=True):
        drawn = indices(flat(rank))
        assert len(drawn) == len(set(drawn))
        assert set(drawn) <= set(part.tolist())
        if last_batch == "keep":
            assert set(drawn) == set(part.tolist())
        assert all(len(batch) == b for batch in rank[: n // (b * world)])
    assert len({len(rank) for rank in ranks}) == 1, "as many steps on every rank"


def test_sorted_shards_are_in_another_order_each_epoch():
    orders = [indices(flat(dealt(24, 4, 2, seed=1, epoch=e, classes=[0] * 12 + [1] * 12)[1])) for e in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12, 24))
    assert orders[0] != orders[1]
