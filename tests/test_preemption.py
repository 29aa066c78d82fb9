"""Runs that are told to stop: one agreed step, one save, one end; and what must not become of the checkpoint."""

import random
import re
import types

import pytest
import torch

from distnorm.launch.endings import RunInterruptedError
from distnorm.launch.preemption import Preemption, Reason
from distnorm.launch.run_dir import RunFolder
from tests import preempted, ranks, runs

pytestmark = pytest.mark.unit

SMALL = ("model.widths=[4,4]", "data.device_batch=8", "norm=sync", "drift=none")
LONG = (*SMALL, "trainer.max_steps=40", "trainer.max_epochs=9", "model._target_=tests.preempted.Told")


def told(folder, world, what, *overrides, at=3, rank=0, slow=None, patience_s=10.0):
    """Train in the pool until told to stop; what each rank says, and the run's folder."""
    deeds = [f"+model.what={what}", f"+model.at={at}", f"+model.rank={rank}"]
    deeds += [] if slow is None else [f"+model.slow={slow}"]
    complete = runs.composed(*runs.QUICK, *LONG, f"trainer.devices={world}", *deeds, *overrides).with_batches(world)
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    return ranks.run(preempted.train, complete, run, patience_s, world=world), run


def saved_step(run):
    return torch.load(run.checkpoints / "last.ckpt", weights_only=True)["global_step"]


def steps_told(every):
    return {int(re.search(r"after step (\d+), and saved", ended["message"]).group(1)) for ended in every}


def steps_logged(run):
    return [row["step"] for row in runs.rows(run) if "train/loss" in row]


@pytest.mark.parametrize("what", ["SIGUSR1", "SIGTERM"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_signal_on_one_rank_stops_all_at_one_step_though_another_is_late(tmp_path, what, seed):
    at, rank = random.Random(seed).randint(3, 15), seed
    every, run = told(tmp_path / "run", 2, what, at=at, rank=rank, slow=1 - rank)
    assert {ended["exit_code"] for ended in every} == {75}
    assert all(ended["wants_requeue"] and ended["handlers"] for ended in every)
    assert steps_told(every) == {saved_step(run)} == {at + 1}
    assert every[0]["message"] == (
        f"Stopped by {what} after step {at + 1}, and saved in {run.checkpoints / 'last.ckpt'}.\n"
        f"Go on with the same command and ckpt_path={run.path}"
    )
    assert "val/loss" not in run.record.read_text(), "it validated"
    assert steps_logged(run) == list(range(1, at + 2)), "the last step is logged too"


def test_signals_on_all_ranks_and_again_while_saving_change_nothing(tmp_path):
    what = "SIGTERM+SIGUSR1+SIGTERM while saving+SIGUSR1 while saving"
    every, run = told(tmp_path / "run", 2, what, rank=-1)
    assert steps_told(every) == {saved_step(run)} == {4}
    assert all("Stopped by SIGTERM" in ended["message"] and ended["handlers"] for ended in every)
    assert [file.name for file in run.checkpoints.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(("world", "expected"), [(1, 4), (2, 4)])
def test_it_goes_on_from_there(tmp_path, world, expected):
    _, first = told(tmp_path / "first", world, "SIGUSR1")
    assert saved_step(first) == expected
    result, _ = runs.in_pool(
        tmp_path / "on", world, *SMALL, "trainer.max_steps=7", f"ckpt_path={first.checkpoints / 'last.ckpt'}"
    )
    assert steps_logged(RunFolder(tmp_path / "on")) == [5, 6, 7]
    assert result["resumed_from"] == str(first.checkpoints / "last.ckpt")


@pytest.mark.parametrize(("text", "how"), [("", "the file"), ("SIGTERM", "SIGTERM")])
def test_the_file_stops_a_run_is_removed_and_asks_for_no_requeue(tmp_path, text, how):
    folder = tmp_path / "run"
    every, run = told(folder, 2, f"write {folder / 'stop'} {text}+stall 1.1")
    assert steps_told(every) == {saved_step(run)} == {4}
    assert every[0]["message"].startswith(f"Stopped by {how}")
    assert every[0]["wants_requeue"] is (text == "SIGTERM")
    assert not run.stop.exists()


def test_a_time_limit_stops_a_run(tmp_path):
    every, run = told(tmp_path / "run", 2, "stall 3", "trainer.time_limit_s=3.0", at=1)
    assert steps_told(every) == {saved_step(run)}
    assert saved_step(run) < 40
    assert "Stopped by its time limit" in every[1]["message"]
    assert every[1]["wants_requeue"]


def test_a_job_stops_a_minute_before_its_end(tmp_path, monkeypatch):
    from distnorm.launch import preemption

    monkeypatch.setattr(preemption.time, "time", lambda: 1000.0)
    assert preemption._seconds_of_job({"SLURM_JOB_END_TIME": "1360"}) == 300
    assert preemption._seconds_of_job({}) == float("inf")


def test_accumulated_batches_are_not_torn_apart(tmp_path):
    every, run = told(tmp_path / "run", 2, "SIGUSR1", "trainer.accumulate_grad_batches=4", at=5)
    assert steps_told(every) == {saved_step(run)} == {2}  # told in batch 5, heard after 6: batch 8 ends step 2
    stored = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    assert stored["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 8


@pytest.mark.parametrize("at", [5, 6])
def test_told_in_the_last_steps_it_ends_saved_and_what_is_left_is_the_test(tmp_path, at):
    every, run = told(tmp_path / "run", 2, "SIGTERM", "trainer.max_steps=6", at=at, rank=1)
    assert steps_told(every) == {saved_step(run)} == {6}
    assert {ended["exit_code"] for ended in every} == {75}
    assert not run.result.exists()
    path = f"ckpt_path={run.checkpoints / 'last.ckpt'}"
    result, _ = runs.in_pool(tmp_path / "on", 2, *SMALL, "trainer.max_steps=6", path)
    assert 0 <= result["metrics"]["test/accuracy"] <= 1


def test_told_while_validating_it_stops_after_the_next_batch(tmp_path):
    every, run = told(tmp_path / "run", 2, "SIGUSR1 while validating", "+trainer.lightning.val_check_interval=5", at=1)
    assert steps_told(every) == {saved_step(run)} == {6}


def test_told_before_training_it_stops_after_the_first_batch(tmp_path):
    every, run = told(tmp_path / "run", 2, "SIGTERM while checking", at=0)
    assert steps_told(every) == {saved_step(run)} == {1}


def test_checkpoints_are_saved_by_the_clock_and_training_goes_on(tmp_path):
    every, run = told(tmp_path / "run", 2, "stall 1.1", "trainer.checkpoint_every_s=1.0", "trainer.max_steps=6", rank=1)
    assert {ended["exit_code"] for ended in every} == {None}
    saved = [step for step in every[0]["saved_at"] if step < 6]
    assert saved == every[1]["saved_at"][: len(saved)]
    assert saved[0] in (4, 5)


def test_a_peer_that_stalls_is_named_and_the_old_checkpoint_stays(tmp_path):
    run, late = tmp_path / "run", ["norm=batch", "trainer.accumulate_grad_batches=30"]  # no other exchange waits first
    what = "SIGTERM on 0+stall 60 on 1"
    with pytest.raises(ranks.RankError) as caught:
        told(run, 2, what, *late, "trainer.checkpoint_every_s=1e-9", at=35, rank=-1, patience_s=1.0)
    assert "GroupError: rank 1 never came to the vote on whether to stop; rank 0 did." in str(caught.value)
    assert saved_step(RunFolder(run)) == 1


def test_a_stop_whose_save_failed_says_that_the_checkpoint_before_it_stays(tmp_path):
    callback = Preemption(RunFolder(tmp_path), lambda _: None, every_s=60)
    trainer = types.SimpleNamespace(is_global_zero=True, global_step=7)
    with pytest.raises(RunInterruptedError) as raised:
        callback._stop(trainer, Reason.SIGTERM, "No space left on device")
    said = str(raised.value)
    assert "SIGTERM after step 7, and could not save (No space left on device): the checkpoint before it stays" in said
    assert f"ckpt_path={tmp_path}" in said
