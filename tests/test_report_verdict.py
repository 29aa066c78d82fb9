"""The headline of a report, and the worst values that it names."""

import dataclasses
import math

import numpy as np
import pytest

from distnorm.drift.alarms import measures
from distnorm.drift.events import Alarm
from distnorm.drift.report.render import render
from distnorm.drift.report.verdict import number, verdict
from distnorm.drift.report.worst import constant, is_healthy, layers_beyond, worst
from tests.histories import history

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7.926, "7.93"),
        (24.0, "24"),
        (1234, "1\u2009230"),
        (0.01234, "0.0123"),
        (-0.5, "−0.5"),
        (1.234e-7, "1.23·10⁻⁷"),
        (-2e9, "−2·10⁹"),
        (math.nan, "–"),
        (math.inf, "∞"),
    ],
)
def test_numbers_in_words(value, text):
    assert number(value) == text


def with_values(key, rows, alarms=()):
    """A run with one measure, a row a layer."""
    values = np.array(rows, dtype=float)
    base = history(layers=len(values), steps=20 * values.shape[1])
    return dataclasses.replace(base, values={key: values}, worst_channels={}, alarms=tuple(alarms))


def limit_of(key):
    return measures(8)[key].limit


def alarm(key, layer, value, state="raised", step=60):
    return Alarm(step, key, layer, value, limit_of(key).at, state, "…")


def test_the_verdict_of_an_alarm_names_count_worst_layer_value_and_limit():
    limit = limit_of("between_ranks")
    far = 4 * limit.at
    few, enough = [1.5 * limit.at] * (limit.times - 1), [1.5 * limit.at] * limit.times
    rows = [[1, 1, *few], [1, *enough], [far, *enough]]  # the first was beyond too briefly: no alarm of its own
    run = with_values("between_ranks", rows, [alarm("between_ranks", "layers.0.bn3", far)])
    found = verdict(run)
    assert found.state == "alarm"
    assert found.measure == "between_ranks"
    assert found.sentence == (
        f"Shards differ by rank: between-rank ratio above {number(limit.at)} in 2 of 3 layers, "
        f"worst {number(far)} in layers.0.bn3"
    )


def test_the_verdict_knows_limits_from_below():
    limit = limit_of("effective_samples")
    low = limit.at / 2
    rows = [[10 * limit.at, *[low] * limit.times], [10 * limit.at] * (limit.times + 1)]
    run = with_values("effective_samples", rows, [alarm("effective_samples", "layers.0.bn1", low)])
    beyond = f"samples a batch is worth below {number(limit.at)} in 1 of 2 layers"
    assert f"{beyond}, worst {number(low)} in layers.0.bn1" in verdict(run).sentence


def test_the_verdict_leads_with_what_is_furthest_beyond_its_limit():
    lag, ratio = limit_of("lag").at, limit_of("between_ranks").at
    alarms = [alarm("lag", "layers.0.bn1", 1.2 * lag), alarm("between_ranks", "layers.0.bn1", 8 * ratio)]
    run = with_values("lag", [[1.2 * lag] * 6], alarms)
    assert verdict(run).sentence.startswith("Shards differ by rank")
    assert verdict(run).sentence.endswith("; 1 more alarm")


def test_the_verdict_of_the_whole_model_names_no_layer():
    run = dataclasses.replace(
        with_values("lag", [[0.1] * 4]), alarms=(Alarm(40, "gap_relative", "", 1.7, 1.0, "raised", "…"),)
    )
    assert verdict(run).sentence == (
        "The model evaluates with other statistics than it trains with: "
        "train/eval gap / loss with batch statistics above 1, worst 1.7"
    )


def test_a_cleared_alarm_is_a_recovery_even_when_the_worst_layer_changed():
    at = limit_of("lag").at
    rows = [[3 * at, 3 * at, 0.1 * at, 0.1 * at], [0.1 * at] * 4]
    alarms = [alarm("lag", "layers.0.bn1", 3 * at), alarm("lag", "layers.0.bn2", 0.1 * at, "cleared", 80)]
    run = with_values("lag", rows, alarms)
    assert verdict(run).state == "recovered"
    assert verdict(run).sentence == (
        f"Recovered: lag of the running mean was above {number(at)} (worst {number(3 * at)} in layers.0.bn1), "
        "and keeps its limit since step 80"
    )


def test_a_cleared_alarm_ends_its_measure_whatever_layers_it_was_raised_in():
    at = limit_of("lag").at
    told = [("layers.0.bn1", "raised", 20), ("layers.0.bn2", "raised", 40), ("layers.0.bn2", "cleared", 60)]
    alarms = [alarm("lag", layer, 2 * at, state, step) for layer, state, step in told]
    assert verdict(with_values("lag", [[at] * 4] * 2, alarms)).state == "recovered"


def test_a_healthy_run_names_what_came_nearest():
    run = with_values("between_ranks", [[1.0, 1.2], [1.1, 1.4]])
    assert verdict(run).sentence == (
        "Healthy: no alarm in 40 steps; nearest to its limit came between-rank ratio, 1.4 in layers.0.bn2 "
        f"(limit {number(limit_of('between_ranks').at)})"
    )
    brief = with_values("lag", [[0.0, 2 * limit_of("lag").at]])
    assert "too briefly beyond its limit for one was" in verdict(brief).sentence


def test_without_measurements_there_is_no_verdict(tmp_path):
    empty = dataclasses.replace(
        history(layers=0, keys=[]), steps=np.zeros(0, dtype=np.int64), snapshots=(), scalars={}, about={}
    )
    assert verdict(empty).state == "unknown"
    assert "Nothing was measured" in render([empty], tmp_path / "page.html").read_text()


def test_beyond_counts_measurements_in_a_row_and_skips_those_not_made():
    limit = dataclasses.replace(limit_of("between_ranks"), at=2.0, times=3)
    rows = np.array([[3, 3, 1, 3, 3], [3, np.nan, 3, np.nan, 3], [1, 1, 3, 3, 3]])
    assert layers_beyond(rows, limit).tolist() == [False, True, True]


def test_a_ratio_is_bad_on_either_side():
    run = with_values("precise_ratio", [[1.5, 1.2], [0.5, np.nan]])
    assert worst(run, "precise_ratio") == (0.5, 1, 0)
    assert worst(with_values("effective_samples", [[8.0, 3.0], [np.nan, 5.0]]), "effective_samples") == (3.0, 0, 1)
    assert worst(with_values("lag", [[np.nan, np.nan]]), "lag") is None


def test_what_is_healthy_is_known_on_either_side():
    known = measures(8)
    assert is_healthy(-0.3, known["jeffreys"])
    assert not is_healthy(0.2, known["jeffreys"])
    assert is_healthy(9000, known["effective_samples"])  # the more the better
    assert not is_healthy(9, known["effective_samples"])
    assert [is_healthy(ratio, known["precise_ratio"]) for ratio in (0.5, 1.001, 1.5)] == [False, True, False]


def test_a_constant_is_one_to_three_digits():
    assert constant(np.array([[999.9, 1000.0], [np.nan, 999.8]])) == 999.9
    assert constant(np.array([[0.0, np.nan]])) == 0
    for values in ([1.0, 1.01], [np.nan, np.nan], [np.inf, np.inf]):
        assert constant(np.array([values])) is None
