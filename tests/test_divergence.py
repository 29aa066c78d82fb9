"""Divergences against integrals of the densities; their floors against integrals over χ² and simulation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm.drift import divergence
from distnorm.drift.divergence import FEWEST_SAMPLES, KINDS, excess, floors
from tests import reference_drift

pytestmark = pytest.mark.unit

means, variances = st.floats(-20, 20), st.floats(0.05, 50)


@settings(deadline=None, max_examples=60)
@given(means, variances, means, variances)
def test_divergences_are_those_of_the_densities(mean_p, var_p, mean_q, var_q):
    truth = reference_drift.integrated(mean_p, var_p, mean_q, var_q)
    for kind in KINDS:
        ours = getattr(divergence, kind)(*torch.tensor([mean_p, var_p, mean_q, var_q], dtype=torch.float64))
        assert float(ours) == pytest.approx(truth[kind], rel=1e-7, abs=1e-9), kind


@pytest.mark.parametrize("kind", KINDS)
def test_close_variances_keep_their_digits_and_equal_ones_do_not_diverge(kind):
    one, apart = torch.ones(1, dtype=torch.float64), 1e-5
    exact = {"kl": 0.25, "jeffreys": 0.5, "wasserstein": 0.25, "bhattacharyya": 0.0625}[kind] * apart**2
    measure = getattr(divergence, kind)
    assert float(measure(one, one + apart, one, one)) == pytest.approx(exact, rel=1e-4)
    assert float(measure(one, one, one, one)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [4, 5, 8, 33, 250, 5000])
def test_the_floor_is_the_expectation_over_chi_squared(kind, samples):
    assert float(floors(samples)[kind]) == pytest.approx(reference_drift.expected(kind, samples), rel=1e-6)


@pytest.mark.parametrize("samples", [8, 16, 32, 64, 256, 1024])
def test_data_without_drift_have_no_excess_and_would_seem_to_drift_without_the_floor(samples):
    generator, momentum, draws = np.random.default_rng(samples), 0.1, min(100_000, 4_000_000 // samples)
    x = generator.standard_normal((draws, samples))
    batch = torch.from_numpy(x.mean(1)), torch.from_numpy(x.var(1))
    running = tuple(torch.from_numpy(t) for t in reference_drift.running(generator, samples, momentum, draws))
    found = excess(batch, running, samples, momentum)
    assert list(found) == list(KINDS)
    for kind, value in found.items():
        error = float(value.std()) / draws**0.5
        assert abs(float(value.mean())) < 4 * error, kind
        assert float(getattr(divergence, kind)(*batch, *running).mean()) > 20 * error, kind


@pytest.mark.parametrize(("samples", "momentum"), [(8, 0.3), (16, 0.5), (6, 1.0)])
def test_the_floor_counts_the_noise_of_the_running_average(samples, momentum):
    generator, chains = np.random.default_rng(0), 300_000
    mean, var = reference_drift.running(generator, samples, momentum, chains)
    batch_mean = generator.standard_normal(chains) / samples**0.5
    drawn = reference_drift.textbook((batch_mean - mean) ** 2, generator.chisquare(samples - 1, chains) / samples, var)
    for kind in KINDS:
        error = drawn[kind].std() / chains**0.5
        assert abs(float(floors(samples, momentum)[kind]) - drawn[kind].mean()) < 4 * error, kind
        assert abs(float(floors(samples)[kind]) - drawn[kind].mean()) > 20 * error, kind


def test_floors_of_many_channels_are_those_of_each():
    samples, momentum = torch.tensor([4.0, 8.0, 1e6, 64.0]), torch.tensor([0.1, 0.0, 0.3, 1.0])
    together = floors(samples, momentum)
    for kind in KINDS:
        alone = [float(floors(n, a)[kind]) for n, a in zip(samples.tolist(), momentum.tolist(), strict=True)]
        np.testing.assert_allclose(together[kind], alone, rtol=1e-6)
        assert together[kind].dtype == torch.float64
    assert list(floors(8, 0.1, ("kl",))) == ["kl"]


def test_under_four_samples_there_is_no_floor():
    assert FEWEST_SAMPLES == 4
    samples = torch.tensor([3.9, 4.0, 5.0])
    ones = torch.ones(3, dtype=torch.float64)
    for found in (floors(samples), excess((ones, ones), (ones, ones), samples)):
        assert all(value.isnan().tolist() == [True, False, False] for value in found.values())
