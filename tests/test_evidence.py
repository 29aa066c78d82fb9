"""The evidence: the anchors of the penalty curve as published, the interpolation between, and nothing unproved."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distnorm import ConfigError, evidence

pytestmark = pytest.mark.unit

SIZES = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2)
WU_JOHNSON = (0.5, 0.5, 0.4, 0.2, 0.0, 0.2, 0.3, 1.1, 3.2, 9.3)
WU_HE = {32: 0.0, 16: 0.1, 8: 1.2, 4: 3.7, 2: 11.1}
FROZEN_LATE = {256: 1.2, 128: 1.2, 64: 1.0, 32: 1.1, 16: 0.7, 8: 1.0, 4: 1.1, 2: 2.0}


@pytest.mark.parametrize(("samples", "theirs"), [*zip(SIZES, WU_JOHNSON, strict=True)])
def test_the_curve_goes_through_the_middle_of_what_both_sources_lost(samples, theirs):
    both = [theirs, WU_HE[samples]] if samples in WU_HE else [theirs]
    assert evidence.penalty(samples) == pytest.approx(sum(both) / len(both), abs=0.005)


def test_the_sources_agree_where_the_policy_stands_on_them():
    for samples in (32, 16, 8):
        assert abs(WU_JOHNSON[SIZES.index(samples)] - WU_HE[samples]) <= 0.3


@pytest.mark.parametrize(("samples", "points"), FROZEN_LATE.items())
def test_late_frozen_statistics_have_their_own_curve(samples, points):
    assert evidence.penalty(samples, evidence.FROZEN_LATE_CURVE) == pytest.approx(points)


@given(st.integers(2, 10**6))
def test_between_the_anchors_the_penalty_is_linear_in_the_logarithm(samples):
    below = 2 ** int(math.log2(min(samples, 1024)))
    above = min(2 * below, 1024)
    low, high = evidence.penalty(below), evidence.penalty(above)
    share = math.log2(samples / below) if samples < 1024 else 0.0
    assert evidence.penalty(samples) == pytest.approx(low + share * (high - low), abs=0.006)


def test_nobody_measured_one_sample_and_a_curve_of_ones_own_counts():
    assert evidence.penalty(1) is None
    assert evidence.penalty(8, {4: 1.0, 16: 3.0}) == 2.0


def test_every_finding_has_a_source_a_number_and_a_mark_that_may_be_printed():
    assert set(evidence.MARKS) == {"V", "P", "D"}
    for finding in evidence.TABLE.values():
        assert finding.mark in evidence.MARKS
        assert str(finding) == f"{finding.source}: {finding.number}"
        assert any(letter.isdigit() for letter in finding.number) or finding.mark == "V"


def test_an_unknown_finding_is_refused_with_the_nearest():
    assert evidence.cite("ghost")[0].startswith("Composer")
    with pytest.raises(ConfigError, match=r"evidence 'gost' is not one of .*Did you mean 'ghost'\?"):
        evidence.cite("gost")
