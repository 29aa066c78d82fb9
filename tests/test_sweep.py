"""Sweeps: which jobs there are and where, what a failure and a repetition do, arrays, the results."""

import concurrent.futures
import csv
import errno
import fcntl
import json
import multiprocessing
import threading
import time

import pytest

from distnorm import sweep
from distnorm.errors import ConfigError
from distnorm.launch.endings import RunInterruptedError
from distnorm.sweep import results
from distnorm.sweep.conduct import SweepError
from tests import runs

pytestmark = pytest.mark.unit

NORMS, BATCHES = ("batch", "sync"), ("2", "4", "8")
GRID = [[f"norm={norm}", f"data.device_batch={batch}", "seed=1"] for norm in NORMS for batch in BATCHES]


@pytest.fixture(scope="module")
def composed():
    return [(runs.composed(*overrides), overrides) for overrides in GRID]


@pytest.fixture
def jobs(composed, tmp_path):
    return sweep.plan(composed, tmp_path)


class Training:
    """Stands for a run's processes: leaves what they leave, and notes who ran. Losses are the batch sizes."""

    def __init__(self, *failing, error=None):
        self.ran, self._failing, self._error = [], failing, error or RuntimeError("it broke")

    def __call__(self, settings, run):
        self.ran.append((settings.norm.kind, settings.device_batch))
        if self.ran[-1] in self._failing:
            raise self._error
        loss = settings.device_batch + (0.5 if settings.norm.kind == "sync" else 0)
        run.record.write_text(
            "".join(json.dumps(row) + "\n" for row in ({"schema": 2}, {"step": 1, "time": 0, "val/loss": loss}))
        )
        decision = settings.decide(1, 1).to_dict()
        result = {"metrics": {"test/accuracy": 1 / loss}, "samples_per_s": 10.0, "decision": decision, "alarms": []}
        run.result.write_text(json.dumps(result))


EVERY = [(norm, int(batch)) for norm in NORMS for batch in BATCHES]


def test_jobs_are_named_by_what_differs_and_keep_their_order(jobs, tmp_path):
    assert [job.number for job in jobs] == [0, 1, 2, 3, 4, 5]
    assert jobs[3].changes == {"norm": "sync", "data.device_batch": "2"}
    assert jobs[3].run.path.name == "norm=sync,data.device_batch=2"
    assert len({job.run.path for job in jobs}) == 6
    assert {job.run.path.parents[2] for job in jobs} == {tmp_path}


def test_the_same_sweep_finds_its_folder_and_another_its_own(composed, jobs, tmp_path):
    again = sweep.plan(composed, tmp_path)
    assert [job.run for job in again] == [job.run for job in jobs]
    for another in ({"seed": 2}, {"ckpt_path": "runs/one"}):
        other = [(settings.model_copy(update=another), overrides) for settings, overrides in composed]
        assert sweep.plan(other, tmp_path)[0].run.path.parents[1] != jobs[0].run.path.parents[1]
    elsewhere = [(settings.model_copy(update={"runs_dir": "/x"}), overrides) for settings, overrides in composed]
    assert sweep.plan(elsewhere, tmp_path)[0].run == jobs[0].run


def test_a_name_that_no_folder_can_have_stays_unique(composed, tmp_path):
    settings = composed[0][0]
    long = [(settings, [f"norm.layers={{a*: group, {'b' * 150}: {kind}}}"]) for kind in ("sync", "batch")]
    names = [job.run.path.name for job in sweep.plan(long, tmp_path)]
    assert len(set(names)) == 2
    assert all(len(name) < 140 and not set(name) & set("/*{} :") for name in names)


def test_a_failed_job_takes_no_other_with_it_and_is_run_again(jobs, capsys):
    first = Training(("batch", 4), ("sync", 8))
    with pytest.raises(SweepError, match=r"2 of 6 jobs failed; .*\n?.*skips what is done"):
        sweep.conduct(jobs, first, {})
    assert first.ran == EVERY
    assert [job.state for job in jobs] == ["done", "failed", "done", "done", "done", "failed"]
    said = capsys.readouterr()
    assert "failed  norm=batch,data.device_batch=4: it broke" in said.out
    assert "norm=sync,data.device_batch=8: it broke" in said.err
    second = Training()
    sweep.conduct(jobs, second, {})
    assert second.ran == [("batch", 4), ("sync", 8)]
    assert {job.state for job in jobs} == {"done"}
    third = Training()
    sweep.conduct(jobs, third, {})
    assert third.ran == []


def test_a_mistake_in_one_jobs_settings_is_that_jobs(composed, tmp_path):
    refused = ConfigError("norm.sync_ranks=3 does not divide world_size=2. Use 1 or 2.")
    jobs = sweep.plan([*composed[:2], (refused, ["norm=sync", "data.device_batch=3"])], tmp_path)
    training = Training()
    with pytest.raises(SweepError, match="1 of 3 jobs failed"):
        sweep.conduct(jobs, training, {})
    assert len(training.ran) == 2
    assert "Use 1 or 2" in jobs[2].failure


def test_a_job_that_is_told_to_stop_ends_the_sweep_which_goes_on_later(jobs):
    stopping = Training(("batch", 8), error=RunInterruptedError("stopped"))
    with pytest.raises(RunInterruptedError):
        sweep.conduct(jobs, stopping, {})
    assert stopping.ran == EVERY[:3]
    jobs[2].run.checkpoints.mkdir()
    (jobs[2].run.checkpoints / "last.ckpt").touch()
    assert [job.state for job in jobs] == ["done", "done", "interrupted", "waiting", "waiting", "waiting"]
    resumed = Training()
    sweep.conduct(jobs, resumed, {})
    assert resumed.ran == EVERY[2:]


def test_each_task_of_an_array_runs_its_job_and_the_last_sees_all_results(jobs):
    for task in (4, 0, 5, 2, 1, 3):
        training = Training()
        folder = sweep.conduct(jobs, training, {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_PROCID": "0"})
        assert training.ran == [EVERY[task]]
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["state"] for row in rows] == ["done"] * 6


TASK_0 = {"SLURM_ARRAY_TASK_ID": "0"}


def test_the_ranks_of_an_arrays_task_train_one_job_together(jobs):
    """Whichever begins first, the first rank alone has the lock and the word."""
    barrier, ran = threading.Barrier(2, timeout=30), []

    def start(settings, run):
        barrier.wait()  # as ranks meet
        ran.append(run)

    for _ in range(3):  # the folder is there already, as after a requeue, the second time
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            ranks = [pool.submit(sweep.conduct, jobs, start, TASK_0 | {"SLURM_PROCID": str(rank)}) for rank in (1, 0)]
            for rank in ranks:
                rank.result()
    assert ran == [jobs[0].run] * 6


def test_another_rank_does_not_hide_what_ends_it(jobs):
    with pytest.raises(RuntimeError, match="it broke"):
        sweep.conduct(jobs, Training(("batch", 2)), TASK_0 | {"SLURM_PROCID": "1"})
    assert not (jobs[0].run.path.parents[1] / "results.csv").exists()


def test_a_disk_without_locks_is_said_and_trained_on(jobs, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    training = Training()
    sweep.conduct(jobs[:2], training, {})
    assert training.ran == EVERY[:2]
    assert "No locks available" in caplog.text
    assert "do not start a sweep twice" in caplog.text


def test_an_array_with_too_many_tasks_is_refused_with_its_bounds(jobs):
    with pytest.raises(ConfigError, match=r"a task 6, and the sweep has 6 jobs(.|\n)*--array=0-5"):
        sweep.conduct(jobs, Training(), {"SLURM_ARRAY_TASK_ID": "6"})


def _hold(job, ready, leave):
    job.run.path.mkdir(parents=True)
    with job.claimed() as is_free:
        ready.put(is_free)
        leave.wait(30)
        time.sleep(60)


def test_a_job_that_runs_elsewhere_is_left_alone_until_that_process_is_gone(jobs, capsys):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Queue(), context.Event()
    other = context.Process(target=_hold, args=(jobs[0], ready, leave), daemon=True)
    other.start()
    assert ready.get(timeout=30) is True
    training = Training()
    assert jobs[0].state == "running"
    sweep.conduct(jobs[:2], training, {})
    assert training.ran == EVERY[1:2]
    assert "runs elsewhere" in capsys.readouterr().out
    with pytest.raises(SweepError, match=r"Job 0, norm=batch,data.device_batch=2, runs in another(.|\n)*cancel it"):
        sweep.conduct(jobs[:1], training, TASK_0)  # a sweep of one job too
    other.kill()
    other.join()
    sweep.conduct(jobs[:2], training, {})
    assert training.ran == [EVERY[1], EVERY[0]]


def test_results_of_other_code_are_kept_and_said(jobs, capsys):
    sweep.conduct(jobs[:2], Training(), {})
    sweep.conduct(jobs[:2], Training(), {})
    assert "2 done already (2 by other code: remove their folders to run them again)" in capsys.readouterr().out


def test_results_are_sorted_by_validation_loss_and_hold_every_job(jobs, capsys):
    with pytest.raises(SweepError):
        sweep.conduct(jobs, Training(("batch", 2)), {})
    folder = jobs[0].run.path.parents[1]
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["val/loss"] for row in rows] == ["2.5", "4", "4.5", "8", "8.5", ""]
    assert [row["job"] for row in rows] == ["3", "1", "4", "2", "5", "0"]
    assert rows[0]["norm"] == "sync"
    assert rows[0]["normalization"] == "sync over 1 rank, normalization batch 2"
    assert float(rows[1]["test/accuracy"]) == 0.25
    assert rows[-1]["state"] == "failed"
    assert rows[-1]["reason"] == "it broke"
    table = (folder / "results.txt").read_text()
    assert table in capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["3", "1", "4", "2", "5", "0"]
    assert (folder / "figure.png").stat().st_size > 5000
    svg = (folder / "figure.svg").read_text()
    assert svg.count("<!-- norm=batch -->") == 1 == svg.count("<!-- norm=sync -->")
    assert "<!-- data.device_batch -->" in svg


def test_changes_without_numbers_are_drawn_as_a_bar_each(composed, tmp_path):
    jobs = sweep.plan([composed[0], composed[3]], tmp_path)
    folder = sweep.conduct(jobs, Training(), {})
    svg = (folder / "figure.svg").read_text()
    assert svg.count("<!-- norm=batch -->") == 1 == svg.count("<!-- norm=sync -->")


def test_a_seed_is_averaged_over(composed, tmp_path):
    settings = composed[0][0]
    typed = [(settings, [f"seed={seed}", f"optimizer.lr={rate}"]) for seed in (0, 1) for rate in (0.1, 0.2)]
    jobs = sweep.plan([(s.model_copy(update={"seed": n}), o) for n, (s, o) in enumerate(typed)], tmp_path)
    sweep.conduct(jobs, Training(), {})
    rows = results.collect(jobs)
    assert results._numeric_key(rows) == "optimizer.lr"
