"""Running averages against simulations whose truth is known; health of channels against the rules in words."""

import numpy as np
import pytest
import torch

from distnorm.drift.averages import (
    estimator_samples,
    estimator_sd,
    lag,
    rank_spread,
    variance_ratio,
    variance_ratio_sd,
)
from distnorm.drift.health import affine_drift, dead_channels, dead_relus, non_finite
from distnorm.moments import Moments
from tests import reference

pytestmark = pytest.mark.unit


def gaps_of(batch_means_TC, momentum, every=1):
    """Gaps between batch means and their running average before, in σ = 1; and the average's own, at the end."""
    running_C, gaps = batch_means_TC[0] * 0, []
    for step, mean_C in enumerate(batch_means_TC):
        if step > 5 / momentum and step % every == 0:
            gaps.append(mean_C - running_C)
        running_C = running_C + momentum * (mean_C - running_C)
    return Moments.of(torch.from_numpy(np.array(gaps))), running_C


@pytest.mark.parametrize("momentum", [0.1, 0.3])
def test_the_lag_of_a_rising_mean_is_what_is_missing_from_its_average(momentum):
    slope, steps, channels = 0.02, 600, 400
    truth_T1 = slope * np.arange(steps)[:, None]
    noise_TC = np.random.default_rng(0).standard_normal((steps, channels)) / 32**0.5
    gaps, running_C = gaps_of(truth_T1 + noise_TC, momentum)
    found = float(lag(gaps, momentum).mean())
    assert found == pytest.approx(slope * (1 - momentum) / momentum, rel=0.02)
    assert found == pytest.approx(float(truth_T1[-1, 0] - running_C.mean()), rel=0.1)
    assert float(lag(gaps, None).mean()) == pytest.approx(found / (1 - momentum))


def test_noise_is_no_lag():
    noise_TC = np.random.default_rng(0).standard_normal((550, 400)) / 4
    gaps, _ = gaps_of(noise_TC, 0.1, every=10)
    assert 0.6 < float((lag(gaps, 0.1) == 0).double().mean()) < 0.8  # a normal mean is within its error in 68 %
    behind = lag(Moments(gaps.count, gaps.mean + 0.5, gaps.m2), 0.1)
    assert float(behind.mean()) == pytest.approx(0.45, rel=0.02)
    assert lag(Moments.of(torch.zeros(1, 2)), 0.1).isnan().all()


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_the_noise_of_a_running_mean_is_what_chains_scatter_by(momentum):
    _, running_C = gaps_of(np.random.default_rng(0).standard_normal((90, 20000)) / 32**0.5, momentum)
    ours = float(estimator_sd(torch.tensor(32.0), momentum))
    assert ours == pytest.approx(running_C.std(), rel=0.02)
    held = float(estimator_samples(torch.tensor(32.0), momentum))
    assert held == pytest.approx(running_C.var() ** -1, rel=0.04)


def test_a_running_average_of_32_at_a_tenth_holds_608():
    assert float(estimator_samples(torch.tensor(32.0), 0.1)) == pytest.approx(608)
    assert float(estimator_samples(torch.tensor(32.0), 0.0)) == float("inf")


def test_the_variance_ratio_scatters_as_foretold():
    generator = np.random.default_rng(0)
    running, precise = (torch.from_numpy(generator.chisquare(n - 1, 40000) / (n - 1)) for n in (608, 2000))
    scatter = float(variance_ratio(running, precise).std())
    foretold = variance_ratio_sd(torch.tensor(608.0), torch.tensor(2000.0))
    assert float(foretold) == pytest.approx(scatter, rel=0.03)
    assert variance_ratio(torch.tensor(3.0), torch.tensor(2.0)) == 1.5


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_the_rank_furthest_from_all_together_is_found(num_ranks):
    generator = np.random.default_rng(num_ranks)
    means_KC, variances_KC = generator.normal(size=(num_ranks, 6)), generator.uniform(0.1, 3, (num_ranks, 6))
    mean_C, var_C = reference.pooled(means_KC, variances_KC)
    expected = reference.jeffreys(means_KC, variances_KC, mean_C, var_C).max(0)
    found = rank_spread(torch.from_numpy(means_KC), torch.from_numpy(variances_KC))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_dead_channels_have_next_to_no_weight_or_no_variance():
    weight, var = torch.tensor([1.0, -1.0, 1e-4, -1e-4, 2e-3, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 5e-5])
    assert dead_channels(weight, var, 1e-5, torch.tensor(1.0)).tolist() == [False, False, True, True, False, True]
    zero = torch.zeros(3)  # an identity at the start, as of a residual branch's last norm
    assert not dead_channels(zero, torch.ones(3), 1e-5, torch.tensor(0.0)).any()


def test_a_dead_relu_gives_nothing_for_normal_values():
    weight, bias = torch.tensor([1.0, -1.0, 1.0, 0.0]), torch.tensor([-2.9, -3.1, 3.0, -0.1])
    dead = dead_relus(weight, bias)
    assert dead.tolist() == [False, True, False, True]
    alive = (torch.randn(200_000, 4) * weight + bias > 0).float().mean(0)
    assert torch.equal(alive < 0.00135, dead)


def test_weights_and_biases_drift_relative_to_the_weights_layer_by_layer():
    generator = np.random.default_rng(0)
    now, before = generator.normal(size=(2, 2, 7))
    found = affine_drift(tuple(torch.from_numpy(now)), tuple(torch.from_numpy(before)), (3, 4))
    for layer, part in enumerate((slice(3), slice(3, 7))):
        norm = np.linalg.norm(before[0][part])
        assert float(found[0][layer]) == pytest.approx(np.linalg.norm((now - before)[0][part]) / norm)
        assert float(found[1][layer]) == pytest.approx(np.linalg.norm((now - before)[1][part]) / norm)


def test_statistics_that_are_no_numbers_or_no_variance_are_found():
    mean = torch.tensor([0.0, torch.nan, torch.inf, 0.0, 0.0, 0.0])
    var = torch.tensor([0.0, 1.0, 1.0, -1e-9, torch.nan, torch.inf])
    assert non_finite(mean, var).tolist() == [False, True, True, True, True, True]
