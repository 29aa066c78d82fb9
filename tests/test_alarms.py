"""Alarms: raised after the limit's own patience, told once, cleared with hysteresis, and worded with a remedy."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm.drift.alarms import Alarms, measures
from distnorm.drift.catalogue import BY_KEY, MEASURES, OF_THE_MODEL
from distnorm.drift.events import Measurement

pytestmark = pytest.mark.unit

LAYERS = ["conv1.norm", "layer4.0.bn1", "layer4.0.bn2"]
LIMITED = [measure for measure in MEASURES if measure.limit]


def told(key, rows, layers=LAYERS, **options):
    """What the alarms tell of rows of values, as (number of the row, alarm)."""
    alarms = Alarms(layers, **options)
    return [(step, alarm) for step, row in enumerate(rows) for alarm in alarms.check(Measurement(step, {key: row}))]


def around(limit):
    """Values well beyond the limit, between it and the end of the alarm, and well on the healthy side."""
    away = max(abs(limit.at - limit.clear), 0.1 * abs(limit.at), 0.01)
    out = 1 if limit.side == "above" else -1
    return limit.at + out * away, (limit.at + limit.clear) / 2, limit.clear - out * away


@pytest.mark.parametrize("measure", LIMITED, ids=lambda m: m.key)
def test_an_alarm_is_raised_after_enough_measurements_in_a_row_and_cleared_beyond_its_end(measure):
    limit = measure.limit
    beyond, between, healthy = around(limit)
    bad, good = [healthy, beyond, beyond + (beyond - limit.at) / 2], [healthy] * 3
    rows = [bad] * limit.times + [bad, [healthy, between, between]] * 2 + [good, bad]
    (raised_at, raised), (cleared_at, cleared), *rest = told(measure.key, rows)
    if limit.at == limit.clear:  # no hysteresis: what is not beyond it is healthy
        assert (raised_at, raised.state) == (limit.times - 1, "raised")
        return
    assert (raised_at, raised.state, raised.layer) == (limit.times - 1, "raised", "layer4.0.bn2")
    assert (cleared_at, cleared.state) == (limit.times + 4, "cleared")
    assert len(rest) == (limit.times == 1)  # the last row raises it again only where one is enough
    assert (raised.measure, raised.limit, raised.step) == (measure.key, limit.at, raised_at)


@pytest.mark.parametrize("measure", LIMITED, ids=lambda m: m.key)
def test_a_message_has_the_layer_the_value_the_limit_the_meaning_and_the_remedy(measure):
    limit = measure.limit
    beyond, _, healthy = around(limit)
    (_, alarm), *_ = told(measure.key, [[healthy, beyond, beyond]] * limit.times)
    for part in (
        measure.title,
        f"{beyond:.3g}",
        "in layer4.0.bn1",
        f"limit {limit.at:.3g}",
        limit.meaning,
        limit.remedy,
    ):
        assert part in alarm.message


def test_the_issue_names_this_message():
    (_, alarm), *_ = told("between_ranks", [[1.0, 7.9, 3.0]] * 3)
    assert alarm.message == (
        "between-rank ratio 7.9 in layer4.0.bn1 (limit 2, beyond it in 2 layers): shards differ by rank. "
        "Shuffle before sharding (data.shards=shuffled), or use norm=sync."
    )


def test_an_interruption_starts_the_count_again_and_what_was_not_measured_does_not():
    high, low, none = [9.0, 9.0, 9.0], [1.0, 1.0, 1.0], [math.nan] * 3
    assert told("between_ranks", [high, high, low, high, high]) == []
    ((step, _),) = told("between_ranks", [high, none, high, none, high])
    assert step == 4
    assert told("between_ranks", [high] * 3 + [none] * 9)[1:] == []


@pytest.mark.parametrize(("num_ranks", "at"), [(1, 2.0), (2, 46.2), (4, 9.0), (8, 4.44), (64, 2.0)])
def test_what_chance_alone_may_do_is_not_alarming(num_ranks, at):
    measure = measures(num_ranks)["between_ranks"]
    limit = measure.limit
    assert measure.span == pytest.approx(5 * at, rel=0.01)
    assert (limit.at, limit.clear) == (pytest.approx(at, rel=0.01), pytest.approx(0.75 * at, rel=0.01))
    assert told("between_ranks", [[0.99 * at] * 3] * 5, num_ranks=num_ranks) == []
    ((step, alarm),) = told("between_ranks", [[1.01 * at] * 3] * 5, num_ranks=num_ranks)
    assert (step, alarm.limit) == (2, limit.at)
    assert [*measures(num_ranks)] == [*BY_KEY]


def test_the_layer_that_stayed_beyond_is_named_and_not_one_that_passed_by():
    ((_, alarm),) = told("between_ranks", [[3.0, 1.0, 1.0]] * 2 + [[3.0, 9.0, 1.0]])
    assert (alarm.layer, alarm.value) == ("conv1.norm", 3.0)


def test_silent_measures_and_unknown_ones_raise_nothing():
    assert told("lag", [[9.0] * 3] * 9, silent=("lag",)) == []
    assert told("of somebody else", [[9.0] * 3] * 9) == []


def test_a_measure_of_the_model_needs_no_layer():
    alarms = Alarms(LAYERS)
    changes = [alarms.check_model(step, {"gap_relative": value}) for step, value in enumerate([4.0, 4.0, 2.0, 0.1])]
    (raised,), (cleared,) = changes[1], changes[3]
    assert (changes[0], changes[2]) == ([], [])
    assert (raised.state, raised.layer, cleared.state) == ("raised", "", "cleared")
    assert "norm.evaluation=precise" in raised.message


def test_what_stands_is_known():
    alarms = Alarms(LAYERS)
    assert alarms.raised == ()
    for step in range(3):
        alarms.check(Measurement(step, {"between_ranks": [9.0] * 3}))
    (standing,) = alarms.raised
    assert (standing.measure, standing.step) == ("between_ranks", 2)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.sampled_from([0.5, 1.7, 2.5, math.nan]), min_size=3, max_size=3), max_size=30))
def test_states_alternate_and_each_is_justified_by_its_row(rows):
    limit = BY_KEY["between_ranks"].limit
    changes = told("between_ranks", rows)
    assert [alarm.state for _, alarm in changes] == (["raised", "cleared"] * len(rows))[: len(changes)]
    for step, alarm in changes:
        row = [value for value in rows[step] if not math.isnan(value)]
        if alarm.state == "raised":
            assert alarm.value == max(row) > limit.at
        else:
            assert max(row) <= limit.clear


def test_every_limit_ends_on_its_healthy_side_and_says_what_to_type():
    for measure in (*LIMITED, *(m for m in OF_THE_MODEL if m.limit)):
        limit = measure.limit
        assert limit.clear <= limit.at if limit.side == "above" else limit.clear >= limit.at
        assert limit.remedy.endswith(".")
        assert limit.meaning[0].islower()
