"""Searches of real trainings: killed and gone on with, stopped early on several ranks, refused before anything runs."""

import csv
import os
import signal

import optuna
import pytest
import torch
from hydra import compose, initialize_config_dir

from distnorm.drift import record
from distnorm.errors import ConfigError
from distnorm.launch import entry
from distnorm.launch.run_dir import RunFolder
from distnorm.search import rungs
from distnorm.search.folder import SearchFolder
from distnorm.search.trials import read_value
from tests import runs, searches

RULES = {"metric": "val/loss", "mode": "min", "min_resource": 1, "reduction_factor": 2}
EPOCHS = ("trainer.max_steps=-1", "trainer.max_epochs=3", "+trainer.lightning.limit_train_batches=4", "drift=none")


def told(journal, losses):
    """Trials that the journal knows already: one validation each."""
    study = rungs._study(journal, RULES)
    for loss in losses:
        trial = study.ask()
        trial.report(loss, 1)
        trial.should_prune()
        study.tell(trial, loss)
    return study


@pytest.mark.unit
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("before", "epochs"), [([1e-3, 2e-3, 3e-3], 1), ([50.0, 60.0], 3)], ids=["worse", "better"])
def test_a_trial_that_is_worse_than_others_stops_at_the_first_rung(tmp_path, world, before, epochs):
    run, journal = RunFolder(tmp_path / "0003"), tmp_path / "journal.log"
    told(journal, before)
    run.path.mkdir()
    rungs.begin(run, journal, {"optimizer.lr": 0.1, "model.widths": [8, 8, 8]}, RULES)
    result, _ = runs.in_pool(run.path, world, *EPOCHS, "model.widths=[8,8,8]")
    validated = [row["epoch"] for row in record.read(run.record) if "val/loss" in row]
    assert len(validated) == epochs
    assert 0 <= result["metrics"]["test/accuracy"] <= 1  # it ends as any run does
    value = read_value(run, searches.asked())
    assert rungs.end(run, value) is (epochs == 1)
    trial = rungs._study(journal, RULES).trials[-1]
    assert trial.state == (optuna.trial.TrialState.PRUNED if epochs == 1 else optuna.trial.TrialState.COMPLETE)
    assert len(trial.intermediate_values) == epochs
    assert (trial.params, trial.user_attrs["model.widths"]) == ({"optimizer.lr": 0.1}, [8, 8, 8])


@pytest.mark.unit
def test_a_trial_that_was_cut_short_stays_the_same_to_the_journal_and_stays_stopped(tmp_path):
    run, journal = RunFolder(tmp_path / "0000"), tmp_path / "journal.log"
    told(journal, [1e-3, 2e-3])
    run.path.mkdir()
    rungs.begin(run, journal, {"optimizer.lr": 0.1}, RULES)
    result, _ = runs.in_pool(run.path, 1, *EPOCHS, "model.widths=[8,8,8]")
    rungs.begin(run, journal, {"optimizer.lr": 0.1}, RULES)  # as after a kill between the stop and the test
    assert len(rungs._study(journal, RULES).trials) == 3
    before = run.path.rename(tmp_path / "before")
    run.path.mkdir()
    (run.path / "rungs.json").write_text((before / "rungs.json").read_text())
    again, _ = runs.in_pool(run.path, 1, *EPOCHS, "model.widths=[8,8,8]", f"ckpt_path={before}/checkpoints/last.ckpt")
    assert not [row for row in record.read(run.record) if "val/loss" in row]  # no step is made, nothing is told
    assert again["metrics"] == result["metrics"]


def fading(settings, ranks, run):
    """Stands for a training of 9 epochs under `Rungs`: a loss that falls to a level of its learning rate's."""
    told_to = rungs._study(run.path.parent.parent / "journal.log", RULES | {"reduction_factor": 3})
    number = len(told_to.trials) - 1
    trial = optuna.trial.Trial(told_to, told_to.trials[number]._trial_id)
    level = searches.loss_of({"optimizer.lr": settings.optimizer["lr"]})
    rows = record.Record(run.record)
    for epoch in range(1, 10):
        rows.append(epoch, {"val/loss": level + 1 / epoch})
        trial.report(level + 1 / epoch, epoch)
        if trial.should_prune():
            about = (run.path / "rungs.json").read_text().replace("null", str(epoch))
            (run.path / "rungs.json").write_text(about)
            break
    rows.close()


@pytest.mark.unit
def test_asha_spends_its_epochs_on_the_good_trials(tmp_path):
    space = {"optimizer.lr": searches.SPACE["optimizer.lr"]}
    found = searches.asked("asha", trials=27, space=space)
    folder = searches.conduct(tmp_path, found, fading)
    outcomes = folder.outcomes()
    levels = {n: searches.loss_of(o.values) for n, o in outcomes.items()}
    pruned = [n for n, o in outcomes.items() if o.state == "pruned"]
    assert len(pruned) >= 15
    assert min(levels, key=levels.get) not in pruned
    assert min(outcomes.values(), key=lambda o: o.value).number == min(levels, key=levels.get)
    epochs = sum(len(record.read(folder.run(n).record)) for n in outcomes)
    assert epochs < 0.5 * 27 * 9


def saving(settings, ranks, run):
    """The same, that counts its beginnings and leaves a checkpoint, or dies in the third before that."""
    with (run.path.parent.parent / "begun").open("a") as file:
        file.write(f"{run.path.name}\n")
    if "dies" in run.path.parent.parent.name and len(searches.begun(run.path.parent.parent)) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    fading(settings, ranks, run)
    torch.save({}, run.checkpoints / "last.ckpt")


def killed_at_the_end(folder):
    """Conduct a search whose process is killed when the third trial has ended, and before that is written."""
    add = SearchFolder.add
    SearchFolder.add = lambda self, outcome: add(self, outcome) if outcome.number < 2 else os.kill(os.getpid(), 9)
    searches.conduct(folder, asha(), saving)


def killed_in_between(folder):
    searches.conduct(folder, asha(name="dies"), saving)


def asha(**changes):
    space = {"optimizer.lr": searches.SPACE["optimizer.lr"]}
    return searches.asked("asha", trials=6, space=space, keep=False, **changes)


@pytest.mark.unit
def test_a_trial_of_asha_that_has_ended_counts_though_its_outcome_was_not_written(tmp_path):
    assert searches.ended(searches.in_process(killed_at_the_end, tmp_path)) == -9
    (path,) = tmp_path.iterdir()
    assert (path / "trials/0002/checkpoints/last.ckpt").exists()  # until the outcome is written it may be needed
    assert not list(path.glob("trials/000[01]/checkpoints/*"))
    folder = searches.conduct(tmp_path, asha(), saving)
    assert searches.begun(path) == [0, 1, 2, 3, 4, 5]
    whole = searches.conduct(tmp_path / "whole", asha(), saving).outcomes()
    found = folder.outcomes()
    assert {n: (o.state, o.value) for n, o in found.items()} == {n: (o.state, o.value) for n, o in whole.items()}
    assert found[2].attempts == 2
    assert not list(path.glob("trials/*/checkpoints/*"))


@pytest.mark.unit
def test_a_trial_of_asha_that_begins_anew_is_a_new_one_to_the_journal(tmp_path):
    assert searches.ended(searches.in_process(killed_in_between, tmp_path)) == -9
    file = tmp_path / "search-dies/trials/0002/rungs.json"
    file.write_text(file.read_text().replace("null", "1"))  # it was stopped, and its checkpoints are lost
    folder = searches.conduct(tmp_path, asha(name="dies"), saving)
    assert searches.begun(folder.path) == [0, 1, 2, 2, 3, 4, 5]
    assert {o.state for o in folder.outcomes().values()} <= {"complete", "pruned"}
    states = [trial.state for trial in rungs._study(folder.path / "journal.log", RULES).trials]
    assert states.count(optuna.trial.TrialState.FAIL) == 1
    assert len(states) == 7
    assert all(state.is_finished() for state in states)


@pytest.mark.unit
def test_asha_without_optuna_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError) as error:
        rungs.check_installed()
    assert "optuna is not installed" in str(error.value)
    assert "pip install 'distnorm[search]'" in str(error.value)


def refusal(call, *arguments):
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    assert str(error.value).count("\n") <= 2
    return str(error.value)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("changes", "value", "remedy"),
    [
        (["optimizer.lr=0.1"], "optimizer.lr=0.1: optimizer.lr is searched", "Leave optimizer.lr=0.1 out"),
        (["ckpt_path=/runs/x"], "ckpt_path='/runs/x'", "Leave it out"),
        (["optimizer=adamw"], "optimizer.momentum is a key of optimizer=sgd alone", "leave optimizer.momentum out"),
        (["search.space={optimizer.lrr: {low: 1, high: 2}}"], "optimizer.lrr: there is no such key", "'optimizer.lr'"),
        (["search.space={trainer.max_epochs: {low: 0, high: 9, integer: true}}"], "trainer.max_epochs=0", "at least 1"),
        (["search.trials=0"], "search.trials=0", "search.trials=8"),
        (["experiment=normalization_batch"], "is a study of many runs already", "Leave out search"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path, changes, value, remedy):
    typed = ["search=random", *changes, "trainer.accelerator=cpu", f"runs_dir={tmp_path}"]
    checked = runs.composed(*typed)
    text = refusal(entry._conduct, None, checked, runs.ROOT / "conf" / "train.yaml", typed)
    assert value in text
    assert remedy in text
    assert not list(tmp_path.iterdir())


@pytest.mark.unit
def test_a_search_starts_its_own_ranks_and_is_not_swept(monkeypatch):
    checked = runs.composed("search=random")
    with initialize_config_dir(str(runs.ROOT / "conf"), version_base="1.3"):
        text = refusal(entry._sweep, None, [(compose("train", ["search=random"]), ["search=random"])])
    assert "a study or a search of many already. Leave out -m" in text
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    text = refusal(entry._conduct, None, checked, runs.ROOT / "conf" / "train.yaml", ["search=random"])
    assert "torchrun has started 2" in text
    assert "python train.py search=…" in text


@pytest.mark.slow
@pytest.mark.run
def test_a_killed_search_goes_on_from_the_checkpoint_of_the_trial_that_was_cut_short(tmp_path):
    command = ["search=random", "search.trials=2", "search.name=it", "search.tiers=[[optimizer.lr]]", "trainer=cpu"]
    command += ["drift=none", "logger.mode=disabled", "trainer.max_epochs=20", "model.widths=[8,8,8]"]
    command += ["+trainer.lightning.limit_train_batches=3", "+trainer.lightning.limit_val_batches=1"]
    folder = SearchFolder(tmp_path / "search-it")
    process = runs.start(*command, folder=tmp_path)
    checkpoint = folder.run(1).checkpoints / "last.ckpt"
    runs.wait_for(checkpoint.exists)
    process.kill()
    process.wait()
    runs.wait_for(lambda: not runs.descendants(process))
    assert sorted(folder.outcomes()) == [0]
    first = folder.run(0).result.stat().st_mtime_ns
    done, _ = runs.train_py(*command, folder=tmp_path)
    assert "2/2" in done.stdout
    assert "trial 0" not in done.stdout
    assert folder.run(0).result.stat().st_mtime_ns == first
    outcomes = folder.outcomes()
    assert [(o.state, o.attempts) for _, o in sorted(outcomes.items())] == [("complete", 1), ("complete", 2)]
    assert folder.run(1).read_settings().ckpt_path == str(checkpoint)
    steps = [row["step"] for row in record.read(folder.run(1).record) if "val/loss" in row]
    assert set(steps) == set(range(3, 61, 3))
    rows = list(csv.DictReader((folder.path / "results.csv").open()))
    assert {row["trial"] for row in rows} == {"0", "1"}
    assert "best      python train.py trainer=cpu" in done.stdout
    assert (folder.path / "figure.png").exists()
