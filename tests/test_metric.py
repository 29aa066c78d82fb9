"""The torchmetrics against numpy on the joined data, on 1, 2 and 4 ranks with shards of any size."""

import copy
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from distnorm import collectives
from distnorm.drift.metric import BetweenRanks, Divergence, NoiseScale, RunningAverage
from distnorm.errors import ShapeError
from distnorm.moments import Moments
from tests import ranks, reference, reference_drift

pytestmark = pytest.mark.unit

MEAN, VAR = np.array([0.3, -0.2]), np.array([1.5, 0.7])
METRICS = {
    "divergence": lambda: Divergence(2, momentum=None, eps=0.0),
    "noise": lambda: NoiseScale(2, momentum=0.2),
    "ranks": lambda: BetweenRanks(2),
    "average": lambda: RunningAverage(2, momentum=0.2),
}


def make_shards(generator, sizes_KT, masked):
    """Batches [n, 2, 3] and masks of K ranks at T times; some masks leave nothing."""
    shards = [[generator.normal(k * 0.5, 1, (n, 2, 3)) for n in sizes] for k, sizes in enumerate(sizes_KT)]
    masks = [[generator.random((len(x), 3)) < (0.6 if masked else 2) for x in row] for row in shards]
    return shards, masks


def feed(metric, batches, masks, masked=True):
    for x, mask in zip(batches, masks, strict=True):
        options = {"mask": torch.from_numpy(mask)} if masked else {}
        statistics = {} if isinstance(metric, BetweenRanks) else {"mean": torch.tensor(MEAN), "var": torch.tensor(VAR)}
        metric.update(torch.from_numpy(x), **statistics, **options)
    return metric


def measure(name, shards, masks, masked):
    """Body: what this rank computes from all ranks, how many gathers that took, and its own state afterwards."""
    gathers, original = [], collectives.gather
    metric = METRICS[name]()
    metric._update_count = 1  # a rank without a batch computes too, with no warning
    feed(metric, shards[collectives.rank()], masks[collectives.rank()], masked)
    before = {key: value.clone() for key, value in metric.metric_state.items()}
    collectives.gather = lambda *a: gathers.append(a[0].numel()) or original(*a)
    try:
        found = metric.compute()
    finally:
        collectives.gather = original
    assert all(torch.equal(before[key], value) for key, value in metric.metric_state.items())
    return {key: value.numpy() for key, value in found.items()}, gathers


def kept(x, mask):
    """The values [n, 2] that a mask keeps."""
    return x.transpose(0, 2, 1)[mask]


def pairs(shards, masks):
    """By rank, each batch with its mask."""
    return [list(zip(row, rows, strict=True)) for row, rows in zip(shards, masks, strict=True)]


def kept_batches(shards, masks):
    """Of all ranks, those with anything kept."""
    return [kept(x, m) for rank in pairs(shards, masks) for x, m in rank if m.any()]


def divergence_truth(shards, masks):
    samples = sum(m.any(1).sum() for rows in masks for m in rows)
    if samples < 4:
        return dict.fromkeys(("kl", "jeffreys", "wasserstein", "bhattacharyya"), np.full(2, np.nan))
    joined = np.concatenate(kept_batches(shards, masks))
    raw = reference_drift.textbook((joined.mean(0) - MEAN) ** 2, joined.var(0), VAR)
    return {kind: value - reference_drift.expected(kind, int(samples)) for kind, value in raw.items()}


def noise_truth(shards, masks):
    batches = kept_batches(shards, masks)
    if len(batches) < 2:
        return dict.fromkeys(("effective_samples", "cv_mean", "cv_var", "design_effect"), np.full(2, np.nan))
    gaps, variances = np.array([(b.mean(0) - MEAN) / VAR**0.5 for b in batches]), np.array([b.var(0) for b in batches])
    effective = (1 + 0.2 / 1.8) / gaps.var(0, ddof=1)
    return {
        "effective_samples": effective,
        "cv_mean": effective**-0.5,
        "cv_var": variances.std(0, ddof=1) / variances.mean(0),
        "design_effect": np.mean([len(b) for b in batches]) / effective,
    }


def average_truth(shards, masks):
    truth = noise_truth(shards, masks)
    effective = truth["effective_samples"]
    batches = kept_batches(shards, masks)
    gap = np.mean([(b.mean(0) - MEAN) / VAR**0.5 for b in batches], 0) if len(batches) > 1 else np.full(2, np.nan)
    return {
        "lag": 0.8 * np.sqrt(np.maximum(0, gap**2 - (1 + 0.2 / 1.8) / effective / len(batches))),
        "estimator_sd": np.sqrt(0.2 / 1.8 / effective),
        "estimator_samples": effective * 9,
    }


def ranks_truth(shards, masks):
    """From the mean of each sample's kept positions; R_p up to the approximate median of F."""
    nan = np.full(2, np.nan)
    images, means = [], []
    for rank in pairs(shards, masks):
        of_samples = [sample[:, m].mean(1) for x, mask in rank for sample, m in zip(x, mask, strict=True) if m.any()]
        images.append(np.reshape(of_samples, (-1, 2)))
        means.append(np.reshape([kept(x, m).mean(0) for x, m in rank if m.any()], (-1, 2)))
    there = [part for part in images if len(part)]
    means = [part for part in means if len(part) > 1]
    compared = len(there) > 1 and sum(map(len, there)) > len(there)
    return {
        "between_ranks": reference_drift.between_rank_ratio(means) if len(means) > 1 else nan,
        "f": scipy.stats.f_oneway(*there).statistic if compared else nan,
        "icc": np.array([reference_drift.intraclass_correlation([p[:, c] for p in there]) for c in (0, 1)])
        if compared
        else nan,
    }


TRUTHS = {"divergence": divergence_truth, "noise": noise_truth, "ranks": ranks_truth, "average": average_truth}
NUMBERS = {"divergence": 11, "noise": 13, "ranks": 10, "average": 5}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_ranks_together_equal_numpy_on_the_joined_data(name, world, data):
    sizes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=world, max_size=world))
    masked = data.draw(st.booleans())
    shards, masks = make_shards(np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))), sizes, masked)
    alone = world == 1
    found = (
        [measure(name, shards, masks, masked)]
        if alone
        else ranks.run(measure, name, shards, masks, masked, world=world)
    )
    truth = TRUTHS[name](shards, masks)
    for values, gathers in found:
        assert gathers == ([] if alone else [NUMBERS[name]])
        assert values.keys() == truth.keys()
        for key, value in values.items():
            np.testing.assert_allclose(value, truth[key], rtol=0.05 if key == "between_ranks" else 1e-6, atol=1e-8)


def measure_in_group(shards, masks):
    """Body: what a metric of ranks 0 and 3, or of 1 and 2, computes here."""
    groups = [torch.distributed.new_group(members) for members in ((0, 3), (1, 2))]
    metric = NoiseScale(2, 0.2, process_group=groups[collectives.rank() in (1, 2)])
    return feed(metric, shards[collectives.rank()], masks[collectives.rank()]).compute()


def test_a_process_group_is_joined_alone():
    shards, masks = make_shards(np.random.default_rng(0), [[3], [4, 5], [2], [3, 3]], masked=True)
    found = ranks.run(measure_in_group, shards, masks, world=4)
    for rank, members in enumerate(((0, 3), (1, 2), (1, 2), (0, 3))):
        truth = noise_truth([shards[k] for k in members], [masks[k] for k in members])
        for key, value in truth.items():
            np.testing.assert_allclose(found[rank][key], value, rtol=1e-9)


def test_references_that_differ_count_as_their_mixture():
    means, variances = np.array([[0.0, 1.0], [2.0, -1.0]]), np.array([[1.0, 0.5], [2.0, 3.0]])
    metric, x = Divergence(2, momentum=None, eps=0.0), torch.randn(12, 2, dtype=torch.float64)
    for half, mean, var in zip(x.chunk(2), means, variances, strict=True):
        metric.update(half, torch.from_numpy(mean), torch.from_numpy(var))
    mean, var = reference.pooled(means, variances)
    raw = reference.jeffreys(x.mean(0).numpy(), x.var(0, correction=0).numpy(), mean, var)
    np.testing.assert_allclose(metric.compute()["jeffreys"], raw - 2 / (12 - 3))


def test_moments_are_taken_in_place_of_values():
    x = torch.randn(8, 2, 5)
    statistics = torch.zeros(2), torch.ones(2)
    for make in (METRICS["divergence"], METRICS["noise"], METRICS["average"]):
        values, moments = make(), make()
        options = {"samples": 8} if isinstance(values, Divergence) else {}
        for part in x.chunk(2):
            values.update(part, *statistics)
            moments.update(Moments.of(part), *statistics, **({"samples": 4} if options else {}))
        for key, value in values.compute().items():
            torch.testing.assert_close(moments.compute()[key], value)


@pytest.mark.parametrize("name", METRICS)
def test_what_torchmetrics_offers_works(name):
    shards, masks = make_shards(np.random.default_rng(0), [[6, 4, 5], [3, 6]], masked=True)
    metric = feed(METRICS[name](), shards[0], masks[0])
    expected = metric.compute()
    for copied in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.to("cpu")):
        torch.testing.assert_close(copied.compute(), expected, equal_nan=True)
    assert metric.state_dict() == {}
    metric.persistent(True)
    loaded = METRICS[name]()
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    loaded._update_count = 3
    torch.testing.assert_close(loaded.compute(), expected, equal_nan=True)
    metric.reset()
    assert all(not state.any() for state in metric.metric_state.values())
    torch.testing.assert_close(feed(metric, shards[0], masks[0]).compute(), expected, equal_nan=True)


def test_one_metric_takes_in_another():
    shards, masks = make_shards(np.random.default_rng(0), [[6, 4, 5], [3, 6]], masked=False)
    first, second = (feed(NoiseScale(2, 0.2), row, rows) for row, rows in zip(shards, masks, strict=True))
    first.merge_state(second)
    for key, value in noise_truth(shards, masks).items():
        np.testing.assert_allclose(first.compute()[key], value)


def test_a_collection_measures_all_at_once_and_forward_gives_this_batchs_own():
    collection = MetricCollection([make() for make in METRICS.values()])
    alone = [make() for make in METRICS.values()]
    statistics = {"mean": torch.zeros(2), "var": torch.ones(2)}
    for _ in range(4):
        x = torch.randn(7, 2, 3)
        own = collection(batch=x, **statistics)
        fresh = Divergence(2, momentum=None, eps=0.0)
        fresh.update(x, **statistics)
        torch.testing.assert_close(own["jeffreys"], fresh.compute()["jeffreys"])
        for metric in alone:
            metric.update(x, **({} if isinstance(metric, BetweenRanks) else statistics))
    expected = {key: value for metric in alone for key, value in metric.compute().items()}
    torch.testing.assert_close(collection.compute(), expected, equal_nan=True)


@pytest.mark.parametrize("name", METRICS)
def test_other_channels_are_refused(name):
    statistics = () if name == "ranks" else (torch.zeros(3), torch.ones(3))
    with pytest.raises(ShapeError, match=r"num_features=2\) got values of shape \(4, 3\).*num_features=3"):
        METRICS[name]().update(torch.randn(4, 3), *statistics)
    with pytest.raises(ShapeError, match=r"num_features=2\) got values of shape \(4,\).*Give it \[N, 2, \*\]"):
        METRICS[name]().update(torch.randn(4), *statistics)
