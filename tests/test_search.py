"""What a search draws: scales against formulas, grids, zooms, tiers; and what it refuses, with value and remedy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench import search as bench
from distnorm.errors import ConfigError
from distnorm.search import design, scales
from distnorm.search.folder import Outcome
from distnorm.search.plan import Plan, Result, best_of
from tests.searches import SPACE, asked, loss_of

pytestmark = pytest.mark.unit

LR = {"low": 1e-4, "high": 10.0, "scale": "log"}


def message_of(call, *arguments):
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    assert str(error.value).count("\n") <= 2
    return str(error.value)


def spaced(low, high, scale, number):
    """Evenly spaced values by numpy, with both ends."""
    if scale == "linear":
        return np.linspace(low, high, number)
    if scale == "log":
        return np.geomspace(low, high, number)
    return 1 - np.geomspace(1 - low, 1 - high, number)


@given(
    st.sampled_from(scales.SCALES), st.floats(0.001, 0.9), st.floats(0.001, 0.9), st.integers(2, 30), st.floats(0, 1)
)
def test_a_scale_is_evenly_spaced_by_its_formula_and_has_an_inverse(scale, one, other, number, unit):
    low, high = min(one, other), max(one, other)
    if high - low < 1e-3:
        return
    made = scales.read("k", {"low": low, "high": high, "scale": scale})
    np.testing.assert_allclose(made.grid(number), spaced(low, high, scale, number), rtol=1e-9)
    assert low <= made.value(unit) <= high
    assert made.unit(made.value(unit)) == pytest.approx(unit, abs=1e-6)
    assert (made.value(0), made.value(1)) == (pytest.approx(low, rel=1e-11), pytest.approx(high, rel=1e-11))


@given(st.sampled_from(["linear", "log"]), st.integers(1, 20), st.integers(1, 30), st.integers(1, 5))
def test_whole_numbers_and_steps_hit_every_value_and_no_other(scale, low, more, step):
    if step > more or (scale == "log" and low <= step / 2):
        return
    made = scales.read("k", {"low": low, "high": low + more, "scale": scale, "integer": True, "step": step})
    expected = list(range(low, low + more + 1, step))
    found = {made.value(unit) for unit in np.linspace(0, 1, 5000)}
    assert found == set(expected)
    assert all(isinstance(value, int) for value in found)
    assert made.grid(1000) == expected
    assert all(made.value(made.unit(value)) == value for value in expected)


def test_whole_numbers_are_equally_likely():
    made = scales.read("k", {"low": 1, "high": 4, "integer": True})
    counts = np.bincount([made.value(unit) for unit in np.linspace(0, 1, 4001)])
    np.testing.assert_allclose(counts[1:] / 4001, 0.25, atol=0.001)


def test_a_step_that_is_no_whole_number_keeps_to_its_values():
    made = scales.read("k", {"low": 0.1, "high": 0.75, "step": 0.1})
    assert made.grid(100) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert made.value(1) == pytest.approx(0.7)


def test_choices_are_taken_in_order_and_alike():
    made = scales.read("model.widths", {"choices": [[8, 16], [16, 32], [32, 64]]})
    assert [made.value(unit) for unit in (0, 0.34, 0.99, 1)] == [[8, 16], [16, 32], [32, 64], [32, 64]]
    assert made.unit([16, 32]) == 0.5
    assert made.grid(2) == [[8, 16], [32, 64]]
    assert made.grid(9) == [[8, 16], [16, 32], [32, 64]]


@pytest.mark.parametrize(
    ("node", "value", "remedy"),
    [
        (0.1, "search.space.k=0.1", "Write e.g. k: {low: 0.01"),
        ({"lo": 1, "high": 2}, "search.space.k.lo", "Did you mean 'low'?"),
        ({"low": 2, "high": 1}, "low=2 is not below high=1", "Exchange them"),
        ({"low": 1, "high": 1}, "low=1 is not below high=1", "Exchange them"),
        ({"low": 1}, "search.space.k.high=None", "Give low and high, or choices"),
        ({"low": "a", "high": 1}, "search.space.k.low='a'", "Give low and high"),
        ({"low": 1, "high": 2, "scale": "lg"}, "scale='lg' is not one of", "Did you mean 'log'?"),
        ({"low": 0, "high": 1, "scale": "log"}, "low=0 has no logarithm", "scale: linear"),
        ({"low": 0.5, "high": 4, "scale": "log", "step": 1}, "low=0.5, less half a step,", "scale: linear"),
        ({"low": 0.5, "high": 1, "scale": "one_minus_log"}, "is 0.5 to 1", "high: 0.999"),
        ({"low": 0, "high": 0.9, "scale": "one_minus_log"}, "is 0 to 0.9", "low: 0.5"),
        ({"low": 0.5, "high": 0.9, "scale": "one_minus_log", "step": 0.1}, "step=0.1", "choices"),
        ({"low": 1, "high": 2, "step": 0}, "step=0", "Leave it out"),
        ({"low": 1, "high": 2, "step": 3}, "step=3 must be above 0 and at most high - low = 1", "Leave it out"),
        ({"low": 1.5, "high": 4, "integer": True}, "low=1.5", "Leave integer out"),
        ({"low": 1, "high": 4, "integer": "yes"}, "integer='yes'", "Leave it out"),
        ({"choices": []}, "choices=[]", "Give a list of values"),
        ({"choices": [1, 2], "low": 1}, "choices=[1, 2], and low besides", "or low and high"),
    ],
)
def test_a_range_that_is_wrong_is_refused_with_the_value_and_the_remedy(node, value, remedy):
    text = message_of(scales.read, "k", node)
    assert value in text
    assert remedy in text


@pytest.mark.parametrize(
    ("changes", "value", "remedy"),
    [
        ({"trials": 0}, "search.trials=0 must be a whole number of at least 1", "search.trials=8"),
        ({"kind": "gird"}, "search.kind='gird'", "Did you mean 'grid'?"),
        ({"trails": 5}, "search.trails=5: there is no such key", "Did you mean 'trials'?"),
        ({"metric": "test/loss"}, "search.metric='test/loss'", "search.metric=val/loss"),
        ({"shrink": 0}, "search.shrink=0", "search.shrink=0.4"),
        ({"name": "a/b"}, "search.name='a/b'", "search.name=lr"),
        ({"tiers": [["optimizer.lrr"]]}, "'optimizer.lrr', and there is no range", "Did you mean 'optimizer.lr'?"),
        ({"tiers": [["optimizer.lr"]]}, "optimizer.momentum is in no tier", "[[optimizer.lr,optimizer.momentum]]"),
        ({"tiers": [[*SPACE], ["optimizer.lr"]]}, "has optimizer.lr twice", "each key once"),
        ({"space": None, "tiers": [["optimizer.lr"], []]}, "empty tier", "Name at least one key"),
        ({"space": {}}, "empty space", "Name at least one key"),
    ],
)
def test_a_search_that_is_wrong_is_refused_with_the_value_and_the_remedy(changes, value, remedy):
    text = message_of(lambda: asked(**changes))
    assert value in text
    assert remedy in text


def test_a_key_that_is_searched_and_set_is_refused():
    text = message_of(design.check_free, asked(), ["data.device_batch=8", "optimizer.lr=0.1"])
    assert "optimizer.lr=0.1: optimizer.lr is searched" in text
    assert "Leave optimizer.lr=0.1 out" in text
    design.check_free(asked(), ["optimizer.nesterov=false", "search.space={optimizer.lr: {low: 1, high: 2}}"])


@pytest.mark.parametrize(
    ("kind", "changes", "value", "remedy"),
    [
        ("coarse_to_fine", {"trials": 2}, "search.trials=2 is less than one a round", "Use at least 3"),
        ("grid", {"trials": 3}, "has 4 trials, and search.trials=3 leaves 3", "Use more trials"),
        (
            "grid",
            {"trials": 8, "points": 3},
            "3 points a key over optimizer.lr, optimizer.momentum has 9",
            "more trials",
        ),
    ],
)
def test_too_few_trials_are_refused(kind, changes, value, remedy):
    text = message_of(Plan, asked(kind, **changes))
    assert value in text
    assert remedy in text


def test_a_grid_has_all_combinations_once_and_as_many_as_fit():
    plan = Plan(asked("grid", trials=26))
    trials = plan.trials(plan.rounds[0], {})
    found = sorted((t.values["optimizer.lr"], t.values["optimizer.momentum"]) for t in trials)
    expected = [(a, b) for a in spaced(1e-3, 1, "log", 5) for b in spaced(0.5, 0.99, "one_minus_log", 5)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert plan.total == 25
    assert [t.values for t in trials] != [
        dict(zip(SPACE, pair, strict=True)) for pair in found
    ]  # spread from the start
    assert Plan(asked("grid", trials=26, points=3)).total == 9


def test_random_draws_are_uniform_on_their_scales_and_independent():
    plan = Plan(asked(trials=2000))
    trials = plan.trials(plan.rounds[0], {})
    log_lr = [math.log10(t.values["optimizer.lr"]) for t in trials]
    log_rest = [math.log10(1 - t.values["optimizer.momentum"]) for t in trials]
    low = math.log10(0.01)
    assert stats.kstest(log_lr, stats.uniform(-3, 3).cdf).pvalue > 0.01
    assert stats.kstest(log_rest, stats.uniform(low, math.log10(0.5) - low).cdf).pvalue > 0.01
    assert abs(np.corrcoef(log_lr, log_rest)[0, 1]) < 0.06


def test_a_trial_depends_on_seed_and_number_alone():
    few, many = Plan(asked(trials=10)), Plan(asked(trials=30))
    assert many.trials(many.rounds[0], {})[:10] == few.trials(few.rounds[0], {})
    other = Plan(asked(trials=10, seed=1))
    assert not {t.values["optimizer.lr"] for t in other.trials(other.rounds[0], {})} & {
        t.values["optimizer.lr"] for t in few.trials(few.rounds[0], {})
    }
    one_key = Plan(asked(trials=10, space={"optimizer.lr": SPACE["optimizer.lr"]}))
    lone = [t.values["optimizer.lr"] for t in one_key.trials(one_key.rounds[0], {})]
    assert lone == [t.values["optimizer.lr"] for t in few.trials(few.rounds[0], {})]


def finished(plan, loss=loss_of):
    results = {}
    for of in plan.rounds:
        results |= {t.number: Result(t.values, loss(t.values)) for t in plan.trials(of, results)}
    return results


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_coarse_to_fine_draws_round_the_best_in_ever_smaller_boxes(seed):
    plan = Plan(asked("coarse_to_fine", trials=25, seed=seed))
    results = finished(plan)
    assert [len(of.numbers) for of in plan.rounds] == [9, 8, 8]
    for of, width in zip(plan.rounds, (1, 0.4, 0.16), strict=True):
        best = best_of({n: r for n, r in results.items() if n < of.numbers.start})
        middle = math.log10(best.values["optimizer.lr"]) if best else -1.5
        found = [math.log10(results[n].values["optimizer.lr"]) for n in of.numbers]
        assert max(found) <= min(0, middle + 1.5 * width) + 1e-9
        assert min(found) >= max(-3, middle - 1.5 * width) - 1e-9
        low, high = max(-3, middle - 1.5 * width), min(0, middle + 1.5 * width)
        slices = np.floor((np.array(found) - low) / (high - low) * len(found) - 1e-9)
        assert sorted(slices) == list(range(len(found)))  # one trial in each slice
    assert best_of(results).score <= best_of({n: results[n] for n in plan.rounds[0].numbers}).score


def test_coarse_to_fine_comes_nearer_to_the_best_than_random():
    losses = {
        kind: [best_of(finished(Plan(asked(kind, seed=seed)))).score for seed in range(20)]
        for kind in ("coarse_to_fine", "random")
    }
    assert np.median(losses["coarse_to_fine"]) < 0.5 * np.median(losses["random"])


def test_a_round_after_failures_alone_draws_from_the_whole_range():
    plan = Plan(asked("coarse_to_fine"))
    failed = {n: Result({"optimizer.lr": 0.5}, None) for n in plan.rounds[0].numbers}
    assert set(plan.boxes(plan.rounds[1], failed).values()) == {(0.0, 1.0)}
    failed[3] = Result({"optimizer.lr": 1.0, "optimizer.momentum": 0.99}, 7.0)
    boxes = plan.boxes(plan.rounds[1], failed)
    assert boxes["optimizer.lr"] == (pytest.approx(0.8), 1.0)  # clipped to the first


@pytest.mark.parametrize("kind", ["grid", "random", "coarse_to_fine", "asha"])
def test_a_tier_joins_when_the_one_before_is_done(kind):
    tiers = [["optimizer.lr"], ["optimizer.momentum"]]
    plan = Plan(asked(kind, trials=12, tiers=tiers))
    results = finished(plan)
    half = 6
    assert all(results[n].values.keys() == {"optimizer.lr"} for n in range(half))
    assert all(results[n].values.keys() == {*SPACE} for n in range(half, 12))
    best = best_of({n: results[n] for n in range(half)}).values["optimizer.lr"]
    later = [abs(math.log10(results[n].values["optimizer.lr"] / best)) for n in range(half, 12)]
    assert max(later) == 0 if kind == "grid" else 0 < max(later) <= 3 * 0.4 / 2 + 1e-9


def test_the_standard_search_begins_with_the_learning_rate():
    found = asked(space=None)
    assert [dimension.key for dimension in found.ladder[0]] == ["optimizer.lr"]
    assert "optimizer.momentum" in [dimension.key for dimension in found.ladder[1]]
    assert "optimizer.weight_decay" in [dimension.key for dimension in found.ladder[2]]
    assert asked(space=None, tiers=[["optimizer.momentum"]]).keys == ["optimizer.momentum"]


def test_the_comparison_counts_the_first_trials_and_takes_their_test_accuracy():
    values = [3.0, None, 2.0, 2.5, 2.1, 1.0, 0.5]
    outcomes = {
        n: Outcome(n, 0, dict.fromkeys(SPACE, 0.5), "complete", value, {"test/accuracy": n / 10})
        for n, value in enumerate(values)
    }
    assert [bench.best_after(outcomes, n) for n in (1, 2, 5, 6, 25)] == [
        (3.0, 0.0), (3.0, 0.0), (2.0, 0.2), (1.0, 0.5), (0.5, 0.6),
    ]  # fmt: skip
    assert bench.curve(outcomes) == [3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 0.5]
    other = {0: Outcome(0, 0, dict.fromkeys(SPACE, 0.5), "complete", 1.0, {"test/accuracy": 0.4})}
    text = bench.markdown({("random", 0): outcomes, ("random", 1): other})
    error = np.std([2.0, 1.0], ddof=1) / np.sqrt(2)
    assert f"| random | 5 | 1.500 ± {error:.3f} | 30.0 ± 10.0 |" in text
    assert "| random | 0 | 6 | 0.5 | 0.500 | 0.500 | 60.0 |" in text
