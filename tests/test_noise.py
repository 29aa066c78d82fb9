"""Noise measures against numpy, scipy and simulations whose truth is known."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm.drift.noise import (
    between_rank_ratio,
    cv_mean,
    cv_var,
    design_effect,
    effective_samples,
    f_median,
    f_statistic,
    intraclass_correlation,
    ratio_by_chance,
)
from distnorm.moments import Moments
from tests import reference_drift

pytestmark = pytest.mark.unit


def over_time(values_TC):
    return Moments.of(torch.as_tensor(np.asarray(values_TC, dtype=np.float64)))


def by_rank(parts, *, scalar=False):
    """Moments of K parts [n_k, C], with a count a rank and channel (or one for all ranks)."""
    each = [over_time(part) for part in parts]
    count = torch.stack([part.count for part in each]).unsqueeze(-1)
    mean, m2 = (torch.stack([getattr(part, name) for part in each]) for name in ("mean", "m2"))
    return Moments(count[0, 0] if scalar else count.expand(mean.shape), mean, m2)


@pytest.mark.parametrize("denominator", [8, 20, 96, 400])
@pytest.mark.parametrize("numerator", [1, 3, 7, 31])
def test_the_median_of_f_is_scipys(numerator, denominator):
    truth = scipy.stats.f.median(numerator, denominator)
    ours = float(f_median(torch.tensor(numerator), torch.tensor(denominator)))
    assert ours == pytest.approx(truth, rel=0.05 if numerator == 1 else 0.01)


@pytest.mark.parametrize(("times", "tolerance"), [((5, 5), 0.05), ((25, 9), 0.05), ((9, 9, 9, 9), 0.01)])
def test_the_between_rank_ratio_is_an_f_statistic_over_its_median(times, tolerance):
    parts = [np.random.default_rng(k).standard_normal((n, 6)) + 0.1 * k for k, n in enumerate(times)]
    expected = reference_drift.between_rank_ratio(parts)
    found = between_rank_ratio(by_rank(parts)).numpy()
    np.testing.assert_allclose(found, expected, rtol=tolerance)
    np.testing.assert_allclose(found / expected, (found / expected)[0])  # the same divisor for every channel
    if len(set(times)) == 1:
        np.testing.assert_array_equal(between_rank_ratio(by_rank(parts, scalar=True)), found)


def test_a_rank_with_one_measurement_or_none_does_not_count():
    parts = [np.random.default_rng(k).standard_normal((n, 3)) for k, n in enumerate((6, 1, 7, 0))]
    np.testing.assert_allclose(between_rank_ratio(by_rank(parts)), between_rank_ratio(by_rank([parts[0], parts[2]])))
    assert between_rank_ratio(by_rank(parts[:2])).isnan().all()


def test_ranks_that_draw_alike_have_a_ratio_near_one_and_shifted_ones_more():
    means_KTC = np.random.default_rng(2).standard_normal((4, 25, 2000))
    assert 0.9 < between_rank_ratio(by_rank(means_KTC)).median() < 1.1
    shifts_K11 = np.array([-0.5, -0.25, 0.25, 0.5])[:, None, None]
    assert between_rank_ratio(by_rank(means_KTC + shifts_K11)).median() > 4


def test_layers_one_after_the_other_are_those_layers():
    parts = [np.random.default_rng(k).standard_normal((n, 2)) for k, n in enumerate((6, 8, 5, 9))]
    first, second = by_rank(parts[:2]), by_rank(parts[2:])
    flat = Moments(*(torch.cat((getattr(first, n), getattr(second, n)), 1) for n in ("count", "mean", "m2")))
    for measure in (between_rank_ratio, f_statistic, intraclass_correlation):
        np.testing.assert_allclose(measure(flat), torch.cat((measure(first), measure(second))))


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_f_and_icc_are_those_of_the_analysis_of_variance(sizes, seed):
    generator = np.random.default_rng(seed)
    parts = [generator.normal(generator.normal(), 1, (size, 3)) for size in sizes]
    f, icc = f_statistic(by_rank(parts)), intraclass_correlation(by_rank(parts))
    there = [part for part in parts if len(part)]
    if len(there) < 2 or sum(sizes) == len(there):
        assert f.isnan().all()
        assert icc.isnan().all()
        return
    for channel in range(3):
        groups = [part[:, channel] for part in there]
        assert float(f[channel]) == pytest.approx(scipy.stats.f_oneway(*groups).statistic, rel=1e-9)
        assert float(icc[channel]) == pytest.approx(reference_drift.intraclass_correlation(groups), rel=1e-9, abs=1e-9)


def test_icc_is_the_share_of_the_variance_between_ranks():
    generator = np.random.default_rng(0)
    parts = generator.normal(size=(100, 1, 100)) * 0.5 + generator.normal(size=(100, 30, 100)) * 0.75**0.5
    assert float(intraclass_correlation(by_rank(parts)).mean()) == pytest.approx(0.25, rel=0.05)
    assert float(intraclass_correlation(by_rank(parts * 0 + np.arange(100)[:, None, None])).mean()) == 1


@pytest.mark.parametrize("momentum", [None, 0.1, 0.5])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_correlated_positions_count_for_less(momentum, correlation):
    """Samples of 9 positions, each correlated with the others: n_eff = 9n / (1 + 8ρ), whatever the running average."""
    generator, samples, times, channels = np.random.default_rng(1), 4, 400, 60
    alone = generator.standard_normal((times, channels, samples, 9))
    shared = generator.standard_normal((times, channels, samples, 1))
    x = correlation**0.5 * shared + (1 - correlation) ** 0.5 * alone
    means_TC, running_C, gaps_TC = x.mean((2, 3)), np.zeros(channels), []
    for step, mean_C in enumerate(means_TC):
        gaps_TC.append(mean_C - running_C)
        running_C = running_C + (momentum or 1 / (step + 1)) * (mean_C - running_C)
    found = effective_samples(over_time(gaps_TC[40:]), momentum)
    truth = samples * 9 / (1 + 8 * correlation)
    assert float(found.mean()) == pytest.approx(truth, rel=0.06)
    assert float(design_effect(samples * 9, found).mean()) == pytest.approx(1 + 8 * correlation, rel=0.06)
    np.testing.assert_allclose(cv_mean(found), found.numpy() ** -0.5)


def test_a_lag_is_no_noise():
    gaps_TC = np.random.default_rng(3).standard_normal((300, 40)) / 4
    shifted = effective_samples(over_time(gaps_TC + 7), 0.1)
    np.testing.assert_allclose(shifted, effective_samples(over_time(gaps_TC), 0.1))
    np.testing.assert_allclose(shifted, (1 + 0.1 / 1.9) / gaps_TC.var(0, ddof=1))


def test_the_noise_of_the_variance_is_that_of_gaussian_samples():
    variances_TC = np.random.default_rng(4).standard_normal((500, 30, 32)).var(2)
    found = cv_var(over_time(variances_TC))
    np.testing.assert_allclose(found, variances_TC.std(0, ddof=1) / variances_TC.mean(0))
    assert float(found.mean()) == pytest.approx((2 / 31) ** 0.5, rel=0.03)


def test_one_measurement_has_no_noise_yet_and_a_constant_channel_is_worth_any_number():
    assert effective_samples(over_time([[1.0]])).isnan().all()
    assert cv_var(over_time([[1.0]])).isnan().all()
    assert effective_samples(over_time([[1.0], [1.0]])).tolist() == [float("inf")]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("times", [10, 50])
def test_what_the_ratio_reaches_by_chance_is_scipys_tail(num_ranks, times):
    f = scipy.stats.f(num_ranks - 1, (num_ranks - 1) * (times - 1))
    assert ratio_by_chance(num_ranks, times) == pytest.approx(f.isf(1e-3) / f.median(), rel=0.06)


def test_what_moves_all_ranks_together_hides_nothing_once_it_is_removed():
    generator = np.random.default_rng(3)
    common_TC = generator.standard_normal((25, 1000)).cumsum(0)
    means_KTC = 0.1 * generator.standard_normal((4, 25, 1000)) + common_TC
    residual_KTC = means_KTC - means_KTC.mean(0)
    shifted_KTC = residual_KTC + np.array([-0.15, 0, 0, 0.15])[:, None, None]
    assert between_rank_ratio(by_rank(means_KTC)).median() < 0.1
    assert 0.9 < between_rank_ratio(by_rank(residual_KTC), common_removed=True).median() < 1.1
    assert between_rank_ratio(by_rank(shifted_KTC), common_removed=True).median() > 4
