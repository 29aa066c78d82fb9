"""Summaries of channels by layer against numpy's, one layer after the other."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm.drift.summary import share, summarize, total

pytestmark = pytest.mark.unit

numbers = st.one_of(st.floats(-1e6, 1e6), st.just(float("nan")), st.integers(-2, 2).map(float))
models = st.lists(st.lists(numbers, min_size=1, max_size=9), min_size=1, max_size=6)


@settings(deadline=None)
@given(models)
def test_each_layer_has_numpys_numbers(layers):
    found = summarize(torch.tensor([x for layer in layers for x in layer], dtype=torch.float64), [*map(len, layers)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # layers of nan alone
        truth = [(np.nanmedian(x), np.nanpercentile(x, 95), np.nanmax(x)) for x in layers]
        channels = [-1 if np.isnan(x).all() else np.nanargmax(x) for x in layers]
    for ours, theirs in zip(found[:3], zip(*truth, strict=True), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-9)
    assert found.channel.tolist() == channels


def test_several_measures_at_once_are_each_alone_and_the_input_is_left_as_it_was():
    values, channels = torch.randn(3, 12), (5, 1, 6)
    before = values.clone()
    together = summarize(values, channels)
    assert torch.equal(values, before)
    for row, measure in enumerate(values):
        assert all(torch.equal(a[row], b) for a, b in zip(together, summarize(measure, channels), strict=True))


def test_infinities_are_numbers():
    found = summarize(torch.tensor([torch.inf, 1.0, torch.inf, torch.inf, -torch.inf, 2.0]), (2, 2, 2))
    assert found.max.tolist() == [torch.inf, torch.inf, 2.0]
    assert found.median.tolist() == [torch.inf, torch.inf, -torch.inf]
    assert found.channel.tolist() == [0, 0, 1]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=5))
def test_shares_and_totals_are_counted_by_layer(layers):
    mask, channels = torch.tensor([x for layer in layers for x in layer], dtype=torch.bool), [*map(len, layers)]
    assert share(mask, channels).tolist() == [sum(layer) / len(layer) for layer in layers]
    assert total(mask.double(), channels).tolist() == [sum(layer) for layer in layers]
