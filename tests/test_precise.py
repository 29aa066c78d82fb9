"""Running against precise statistics: equals numpy, and i.i.d. data differ by chance alone."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from distnorm import ConfigError, collectives
from distnorm.drift.precise import against_precise, expected_jeffreys
from tests import ranks

pytestmark = pytest.mark.unit


def data(samples, rank=0, channels=3):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(samples, channels, generator=generator, dtype=torch.float64) * (2 + rank) + 5 * rank


def normed(channels=3, momentum=0.1, rank=0):
    layer = nn.BatchNorm1d(channels, momentum=momentum).double()
    layer.running_mean += 0.3 + rank
    layer.running_var *= 1.7 + rank
    return nn.Sequential(layer, nn.ReLU())


def expected(layer, values, noise):
    """In numpy: the divergence with its floor off, and the ratio with its error."""
    u, p, q = noise
    mean, var = values.mean(0), values.var(0, ddof=1) + layer.eps
    own_mean, own_var = layer.running_mean.numpy(), layer.running_var.numpy() + layer.eps
    gap = (mean - own_mean) ** 2
    divergence = (own_var + gap) / (2 * var) + (var + gap) / (2 * own_var) - 1
    floor = (1 + u) * (1 / (1 - 2 * p) + 1 / (1 - 2 * q)) / 2 - 1
    return divergence - floor, own_var / var, own_var / var * np.sqrt(2 * p + 2 * q)


def compared(sizes):
    rank = collectives.rank()
    parts = list(data(sizes[rank], rank).split(4))
    return against_precise(normed(rank=rank), parts, 1000, normalization_batch=16)


@pytest.mark.parametrize("sizes", [(12,), (12, 8), (8, 0, 4, 12)], ids=str)
def test_equals_numpy_on_the_joined_data(sizes):
    values = np.concatenate([data(n, rank).numpy() for rank, n in enumerate(sizes)])
    weight = 0.1 / 1.9
    noise = weight / 16 + 1 / len(values), weight / 15, 1 / (len(values) - 1)
    for rank, found in enumerate(ranks.run(compared, sizes, world=len(sizes))):
        assert list(found) == ["0"]
        measured = found["0"].jeffreys, found["0"].ratio, found["0"].error
        for value, reference in zip(measured, expected(normed(rank=rank)[0], values, noise), strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-9)


@pytest.mark.parametrize(("samples", "batch", "momentum"), [(24, 8, 0.1), (200, 32, 0.1), (16, 8, 0.3), (64, 2, 0.05)])
def test_the_floor_and_the_error_are_those_of_simulated_averages(samples, batch, momentum):
    """100,000 running averages of batches of a standard Gaussian, against as many calibrations."""
    random, trials = np.random.default_rng(0), 100_000
    mean, var, left = np.zeros(trials), np.zeros(trials), 1.0
    while left > 1e-4:
        mean = (1 - momentum) * mean + momentum * random.standard_normal(trials) / math.sqrt(batch)
        var = (1 - momentum) * var + momentum * random.chisquare(batch - 1, trials) / (batch - 1)
        left *= 1 - momentum
    var /= 1 - left
    other_mean = random.standard_normal(trials) / math.sqrt(samples)
    other_var = random.chisquare(samples - 1, trials) / (samples - 1)
    gap = (mean - other_mean) ** 2
    divergence = (var + gap) / (2 * other_var) + (other_var + gap) / (2 * var) - 1
    weight = momentum / (2 - momentum)
    p, q = weight / (batch - 1), 1 / (samples - 1)
    assert expected_jeffreys(weight / batch + 1 / samples, p, q) == pytest.approx(divergence.mean(), rel=0.03)
    spread = np.log(var / other_var).std()  # the error is relative to the ratio
    assert math.sqrt(2 * p + 2 * q) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("n", [4, 5, 10, 100])
def test_the_floor_against_the_truth_is_the_known_one(n):
    assert expected_jeffreys(1 / n, 0.0, 1 / (n - 1)) == pytest.approx(2 * (n - 1) / (n * (n - 3)))
    precision = stats.chi2(n - 1).expect(lambda c: (n - 1) / c, lb=1e-9) if n > 4 else 3.0
    assert expected_jeffreys(0.0, 0.0, 1 / (n - 1)) == pytest.approx((1 + precision) / 2 - 1, rel=1e-6)


def test_data_that_do_not_drift_differ_by_chance_alone():
    """Over 4000 channels the mean excess is 0 within its error, where the bare divergence is far from it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4000, momentum=0.2))
    for _ in range(60):
        model(torch.randn(16, 4000))
    found = against_precise(model, torch.randn(64, 4000).split(16), 64, normalization_batch=16)["0"]
    error = found.jeffreys.std() / math.sqrt(4000)
    assert abs(found.jeffreys.mean()) < 4 * error
    weight = 0.2 / 1.8
    floor = expected_jeffreys(weight / 16 + 1 / 64, weight / 15, 1 / 63)
    assert floor > 20 * error
    within = ((found.ratio - 1).abs() < 2 * found.error).double().mean()
    assert 0.9 < within < 0.98


def test_a_lagging_variance_stands_out_with_its_sign():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    for layer, factor in zip(model, (4.0, 0.25), strict=True):
        layer.running_var *= factor
    found = against_precise(model, [torch.randn(512, 3)], 512)
    assert (found["0"].ratio > 1 + 6 * found["0"].error).all()
    assert (found["1"].ratio < 1 - 6 * found["1"].error).all()
    assert (found["0"].jeffreys > 0.5).all()


def test_the_noise_is_that_of_each_layers_average():
    """A cumulative average of 10 batches counts as 10 of them; momentum 0 has no noise; batches go by layer."""
    batch = data(40)
    model = nn.Sequential(*[normed(momentum=momentum)[0] for momentum in (None, 0.0, 0.1)])
    model[0].num_batches_tracked.fill_(10)
    found = against_precise(model, [batch], normalization_batch={"0": 8, "2": 4})
    noise = {"0": 1 / 10 / 7, "1": 0.0, "2": 0.1 / 1.9 / 3}
    for name, own in noise.items():
        relative = (found[name].error / found[name].ratio).tolist()
        assert relative == pytest.approx([math.sqrt(2 * own + 2 / 39)] * 3)


def test_too_few_samples_tell_nothing():
    few = against_precise(normed(), [data(3)], 3)["0"]
    assert few.jeffreys.isnan().all()
    alone = against_precise(normed(), [data(40)], 40, normalization_batch=1)["0"]
    assert alone.jeffreys.isnan().all()
    assert alone.error.isinf().all()


def test_a_dead_channel_is_no_drift():
    model = normed(1)
    model[0].running_mean.fill_(7)
    model[0].running_var.zero_()
    found = against_precise(model, [torch.full((40, 1), 7.0).double()], 40)["0"]
    assert found.ratio.item() == pytest.approx(1)
    assert found.jeffreys.item() < 0


@pytest.mark.parametrize("batch", [0, {"0": -2}, 2.5])
def test_a_normalization_batch_is_a_number_of_samples(batch):
    with pytest.raises(
        ConfigError, match=r"normalization_batch=(0|-2 for layer '0'|2.5); at .*\nGive the number .* 32"
    ):
        against_precise(normed(), [data(8)], normalization_batch=batch)
