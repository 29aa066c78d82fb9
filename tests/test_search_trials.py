"""Trials on disk: kills, several processes at once, failures, and the tables at the end."""

import csv
import json
import math
import os
import signal
import time

import pytest

from distnorm.errors import ConfigError
from distnorm.launch import signals
from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.run_dir import RunFolder
from distnorm.search import conduct, figure
from distnorm.search.plan import Plan
from distnorm.search.trials import read_value
from tests import runs, searches
from tests.searches import asked, begun, ended, in_process

pytestmark = pytest.mark.unit


def conducted(folder, choice="random", objective=searches.train, **changes):
    searches.conduct(folder, asked(choice, **changes), objective)


def test_a_search_runs_every_trial_once_and_sorts_what_it_found(tmp_path):
    found = asked(trials=9)
    folder = searches.conduct(tmp_path, found)
    plan = Plan(found)
    assert begun(folder.path) == list(range(9))
    rows = list(csv.DictReader((folder.path / "results.csv").open()))
    values = [float(row["val/loss"]) for row in rows]
    assert values == sorted(values)
    for row in rows:
        planned = plan.trials(plan.rounds[0], {})[int(row["trial"])].values
        assert float(row["optimizer.lr"]) == planned["optimizer.lr"]
        assert float(row["val/loss"]) == pytest.approx(searches.loss_of(planned))
        assert float(row["test/accuracy"]) == pytest.approx(1 - searches.loss_of(planned))
    text = (folder.path / "results.txt").read_text().splitlines()
    assert len(text) == 11
    assert text[2].split()[0] == rows[0]["trial"]
    searches.conduct(tmp_path, found)  # the same again: nothing is left to do
    assert begun(folder.path) == list(range(9))


def test_more_is_better_where_that_is_asked(tmp_path):
    folder = searches.conduct(tmp_path, asked("coarse_to_fine", trials=6, mode="max"))
    values = [float(row["val/loss"]) for row in csv.DictReader((folder.path / "results.csv").open())]
    assert values == sorted(values, reverse=True)
    outcomes = folder.outcomes()
    best = max((outcomes[n] for n in (0, 1)), key=lambda o: o.value).values["optimizer.lr"]
    assert all(abs(math.log10(outcomes[n].values["optimizer.lr"] / best)) <= 0.6 + 1e-9 for n in (2, 3))


@pytest.mark.parametrize("choice", ["grid", "random", "coarse_to_fine"])
def test_a_killed_search_goes_on_without_losing_or_repeating_a_trial(tmp_path, choice):
    assert ended(in_process(conducted, tmp_path, choice, searches.die)) == -9
    (path,) = tmp_path.iterdir()
    assert begun(path) == [0, 1, 2]
    before = json.loads((path / "trials/0002/trial.json").read_text())
    folder = searches.conduct(tmp_path, asked(choice))
    assert begun(path) == [0, 1, 2, 2, *range(3, 25)]  # the one that was cut short, and no other, is begun again
    assert folder.outcomes()[2].values == before["values"]
    assert [folder.outcomes()[n].attempts for n in (1, 2, 3)] == [1, 2, 1]
    (tmp_path / "whole").mkdir()
    whole = searches.conduct(tmp_path / "whole", asked(choice))
    values = {n: (o.values, o.value) for n, o in folder.outcomes().items()}
    assert values == {n: (o.values, o.value) for n, o in whole.outcomes().items()}


def conducted_together(folder, choice, meeting):
    (meeting / str(os.getpid())).touch()
    while len(list(meeting.iterdir())) < 3:  # a process that comes late would find all done
        time.sleep(0.005)
    conducted(folder, choice)


@pytest.mark.parametrize("choice", ["random", "coarse_to_fine"])
def test_processes_share_a_search_and_each_trial_is_run_once(tmp_path, choice):
    folder, meeting = tmp_path / "searches", tmp_path / "meeting"
    meeting.mkdir()
    processes = [in_process(conducted_together, folder, choice, meeting) for _ in range(3)]
    assert [ended(process) for process in processes] == [0, 0, 0]
    (path,) = folder.iterdir()
    assert sorted(begun(path)) == list(range(25))
    owners = {json.loads(file.read_text())["pid"] for file in path.glob("trials/*/claim.0")}
    assert len(owners) > 1
    assert not list(path.glob("trials/*/claim.1"))


class Slow(searches.Here):
    """Says that nothing has ended, until the claim has moved."""

    def ended(self, timeout_s=None):
        file = self._done[0][0].claim.file
        if not hasattr(self, "at"):
            self.at = 0
            os.utime(file, (0, 0))
            return []
        assert file.stat().st_mtime > 0
        return super().ended()


def test_the_claim_of_a_trial_that_runs_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(searches, "Here", Slow)
    assert len(searches.conduct(tmp_path, asked(trials=1)).outcomes()) == 1


def fail_some(settings, ranks, run):
    if settings.optimizer["lr"] > 0.1:
        raise ValueError("the loss is too large")
    searches.train(settings, ranks, run)


def fail(settings, ranks, run):
    raise ConfigError("optimizer.lr is cursed. Use none.")


def test_a_failed_trial_is_kept_with_its_reason_and_the_others_go_on(tmp_path, capsys):
    folder = searches.conduct(tmp_path, asked(trials=8), fail_some)
    outcomes = folder.outcomes()
    failed = [n for n, o in outcomes.items() if o.state == "failed"]
    assert 0 < len(failed) < 8
    assert failed == [n for n, o in outcomes.items() if o.values["optimizer.lr"] > 0.1]
    assert outcomes[failed[0]].reason.startswith("ValueError: the loss is too large (test_search_trials.py:")
    rows = list(csv.DictReader((folder.path / "results.csv").open()))
    assert [row["state"] for row in rows] == ["complete"] * (8 - len(failed)) + ["failed"] * len(failed)
    assert "ValueError: the loss is too large" in capsys.readouterr().out


def test_a_search_whose_trials_all_fail_says_why(tmp_path):
    found = asked("coarse_to_fine", trials=6)
    folder = searches.conduct(tmp_path, found, fail)
    assert sorted(folder.outcomes()) == [0, 1]  # the rounds that follow would draw the same
    with pytest.raises(conduct.SearchError) as error:
        conduct._conclude(found, folder, [])
    assert "All 2 trials failed, first: optimizer.lr is cursed" in str(error.value)
    assert "delete a trial's folder to run it again" in str(error.value)


def stop_first(settings, ranks, run):
    if len(begun(run.path.parent.parent) if (run.path.parent.parent / "begun").exists() else []) == 1:
        (run.path.parent.parent / "begun").open("a").write("99\n")
        raise RunInterruptedError("saved at step 3")
    searches.train(settings, ranks, run)


def test_a_trial_that_was_told_to_stop_is_left_for_the_next_time(tmp_path):
    with pytest.raises(
        RunInterruptedError, match="stopped after 3 of 4 trials; 1 were cut short, the first with: saved at step 3"
    ):
        searches.conduct(tmp_path, asked(trials=4), stop_first)
    (path,) = tmp_path.iterdir()
    assert begun(path) == [0, 99, 2, 3]
    assert not (path / "trials/0001/outcome.json").exists()


def wait_to_be_told(settings, ranks, run):
    searches.train(settings, ranks, run)
    if len(begun(run.path.parent.parent)) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
        runs.wait_for(run.stop.exists)
        raise RunInterruptedError("saved at step 3")


def say(folder):
    try:
        conducted(folder, "random", wait_to_be_told, trials=4)
    except RunInterruptedError as error:
        (folder / "said").write_text(str(error))


def test_a_search_that_gets_a_signal_asks_its_trials_to_save_and_begins_no_other(tmp_path):
    assert ended(in_process(say, tmp_path)) == 0
    text = (tmp_path / "said").read_text()
    assert "stopped after 1 of 4 trials; 1 were cut short, the first with: saved at step 3" in text
    assert "The same command goes on" in text
    (path,) = tmp_path.glob("search-*")
    assert begun(path) == [0, 1]
    searches.conduct(tmp_path, asked(trials=4))
    assert begun(path) == [0, 1, 1, 2, 3]


def be_told_while_composing(compose):
    def compose_with(changes):
        os.kill(os.getpid(), signal.SIGTERM)
        return compose(changes)

    return compose_with


def test_a_trial_that_is_made_ready_when_the_signal_comes_is_not_begun(tmp_path, monkeypatch):
    composer = searches.composer
    monkeypatch.setattr(searches, "composer", lambda settings: be_told_while_composing(composer(settings)))
    with pytest.raises(RunInterruptedError, match="stopped after 0 of 4 trials"):
        searches.conduct(tmp_path, asked(trials=4))
    (path,) = tmp_path.iterdir()
    assert not (path / "begun").exists()


def test_a_signal_that_came_before_the_search_counts(tmp_path):
    with signals.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(RunInterruptedError, match="stopped after 0 of 4 trials"):
            searches.conduct(tmp_path, asked(trials=4))


def test_a_name_is_one_search_s(tmp_path):
    folder = searches.conduct(tmp_path, asked(trials=2, name="mine"))
    assert folder.path.name == "search-mine"
    with pytest.raises(ConfigError) as error:
        searches.conduct(tmp_path, asked(trials=3, name="mine"))
    assert "search.name=mine is the name of another search: search.trials is 2 there, and 3 here" in str(error.value)
    assert "another name" in str(error.value)
    searches.conduct(tmp_path, asked(trials=2, name="mine", workers=7))  # how it is run is not what it is


def test_a_trial_s_value_is_its_best_or_last_validation(tmp_path):
    run = RunFolder(tmp_path)
    lines = [{"schema": 2}, {"step": 1, "val/loss": 3.0}, {"step": 2, "val/loss": 0.5, "test/loss": 0.01}]
    lines += [{"step": 2, "val/loss": 1.0}, {"step": 3, "val/loss": "nan"}, {"step": 4, "val/loss": 2.0}]
    run.record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_value(run, asked()) == 1.0  # step 2 was made twice
    assert read_value(run, asked(validation="last")) == 2.0
    assert read_value(run, asked(mode="max")) == 3.0
    assert read_value(RunFolder(tmp_path / "none"), asked()) is None


def test_the_figure_has_every_key_and_the_best_so_far(tmp_path):
    found = asked("coarse_to_fine", space=None, tiers=None, trials=9)
    tier = {"optimizer.lr": 0.1, "optimizer.momentum": 0.9, "model.widths": [8, 16, 32], "data.device_batch": 8}
    outcomes = [
        conduct.Outcome(
            n, 0, {**tier, "model.blocks_per_stage": 2, "optimizer.weight_decay": 1e-3}, "complete", 1 / (n + 1)
        )
        for n in range(9)
    ]
    svg, png = figure.draw([*outcomes, conduct.Outcome(9, 0, tier, "failed")], found, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.stat().st_size > 10_000
    assert figure.best_so_far([3, 1, 2, 0.5], "min") == [3, 1, 1, 0.5]
    assert figure.best_so_far([3, 1, 4], "max") == [3, 3, 4]


def test_the_standard_ranges_compose_at_both_ends():
    found = asked(space=None, tiers=None)
    dimensions = [dimension for tier in found.ladder for dimension in tier]
    for place in (0.0, 1.0):
        changes = [conduct.results.typed(d.key, d.value(place)) for d in dimensions]
        assert runs.composed("trainer=cpu", *changes).model["widths"] in ([8, 16, 32], [32, 64, 128])
