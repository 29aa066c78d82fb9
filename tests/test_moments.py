"""Moments against numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distnorm import Moments
from tests import reference

pytestmark = pytest.mark.unit


@st.composite
def parts(draw):
    """Up to 5 parts of [N, 2, 3] values, some of them empty, some far from zero."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    offset = draw(st.sampled_from([0.0, 1e3, -1e6]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [generator.normal(size=(size, 2, 3)) + offset for size in sizes]


@given(parts())
def test_merged_parts_equal_numpy_on_the_joined_values(arrays):
    joined = np.concatenate(arrays)
    measured = [Moments.of(torch.from_numpy(array)) for array in arrays]
    packed = torch.stack([part.pack() for part in measured])
    one_by_one = sum(measured[1:], measured[0])
    for merged in (Moments.unpack(packed).merged(), one_by_one):
        if not len(joined):
            assert float(merged.count) == 0
            assert torch.equal(merged.mean, torch.zeros(2, dtype=torch.float64))
            continue
        count, mean, m2 = reference.moments(joined)
        assert float(merged.count) == count
        np.testing.assert_allclose(merged.mean.numpy(), mean, rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(merged.m2.numpy(), m2, rtol=1e-7, atol=1e-9)


def test_variances_and_their_divisors():
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    moments = Moments.of(x)
    values = x.transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(moments.var, values.var(1), rtol=1e-12)
    np.testing.assert_allclose(moments.unbiased_var, values.var(1, ddof=1), rtol=1e-12)
    empty = Moments.of(x[:0])
    assert torch.equal(empty.var, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(empty.unbiased_var, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(6,), (6, 5), (1, 5)])
def test_a_mask_counts_only_what_it_keeps(shape):
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    mask = torch.rand(shape) > 0.4
    mask[0] = True
    keep = (mask if mask.dim() == 2 else mask[:, None]).expand(6, 5).numpy()
    masked = Moments.of(x, mask if mask.dim() == 2 else mask[:, None])
    for channel in range(3):
        values = x[:, channel].numpy()[keep]
        assert float(masked.count) == values.size
        np.testing.assert_allclose(masked.mean[channel], values.mean(), rtol=1e-12)
        np.testing.assert_allclose(masked.var[channel], values.var(), rtol=1e-12)


def test_float32_keeps_its_variance_far_from_zero():
    x = torch.randn(4096, 1, dtype=torch.float64) * 0.1 + 1e3
    exact = reference.moments(x.numpy())[2] / 4096
    np.testing.assert_allclose(Moments.of(x.float()).var, exact, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_measured_in_float32(dtype):
    x = torch.full((70000, 1), 1.0, dtype=dtype)
    moments = Moments.of(x)
    assert moments.mean.dtype == torch.float64  # deviations in float32, sums of means in float64
    assert float(moments.count) == 70000
