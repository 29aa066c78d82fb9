"""Real processes: wrong input, ranks that raise or are killed, a killed run's record, and nothing left running."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import pytest

from distnorm.drift import record
from distnorm.launch import local
from distnorm.launch.run_dir import RunFolder
from tests import runs

pytestmark = pytest.mark.run

WRONG = [
    # what is typed → the value named, the remedy
    (["norm=snyc"], "norm='snyc'", "Did you mean 'sync'?"),
    (["norm.normalisation_batch=8"], "norm.normalisation_batch", "Did you mean 'norm.normalization_batch'?"),
    (["+norm.foo=1"], "norm.foo=1", "Keys of norm: kind, normalization_batch"),
    (["norm.normalization_batch=0"], "norm.normalization_batch=0 must be a whole number of at least 1", "Use e.g."),
    (["data.device_batch=-1"], "data.device_batch=-1 must be a whole number of at least 1", "data.device_batch=16"),
    (["trainer.devices=two"], "trainer.devices='two'", "trainer.devices=2"),
    (["trainer=cpu_ddp", "trainer.devices=4", "norm.sync_ranks=3"], "norm.sync_ranks=3", "Use 1, 2 or 4."),
    (["ckpt_path=/nowhere"], "ckpt_path='/nowhere' does not exist", "Give a run folder or a checkpoint file"),
    (["data=folder", "data.root=/nowhere"], "data.root='/nowhere' does not exist", "Give an existing folder"),
    (["logger.mode=onlin"], "logger.mode='onlin'", "Did you mean 'online'?"),
    (["trainer=cpu_ddp", "data.device_batch=1000"], "1078 training samples", "data.last_batch=keep"),
    (["ckpt_path=README.md"], "README.md' has no 'distnorm' entry", "run folder"),
    (["model.num_classes=5"], "model.num_classes=5, and the data has 10", "Use model.num_classes=10"),
    (["optimizer.lr=fast"], "optimizer.lr='fast' must be a number", "optimizer.lr=0.1"),
]
TYPED = [typed for typed, _, _ in WRONG]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What each wrong command line ended in; the first in a fresh interpreter, as a user's."""
    folders = {tuple(typed): tmp_path_factory.mktemp("wrong") / "runs" for typed in TYPED}

    def type_in(typed):
        if typed is TYPED[0]:
            return runs.train_py(*typed, folder=folders[tuple(typed)], check=False)
        return runs.type_in(typed, folders[tuple(typed)])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {tuple(typed): pool.submit(type_in, typed) for typed in TYPED}


@pytest.mark.parametrize(
    ("typed", "value", "remedy"), WRONG, ids=lambda part: " ".join(part) if isinstance(part, list) else ""
)
def test_wrong_input_ends_in_three_lines_before_any_rank_starts(ended, typed, value, remedy):
    done, run = ended[tuple(typed)].result()
    assert done.returncode == 2
    assert run is None, "a run folder was made"
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) <= 3
    assert "Traceback" not in done.stderr
    assert value in done.stderr
    assert remedy in done.stderr


def finish(process, timeout_s):
    """Wait for the launcher; its output, and how long it took."""
    started = time.monotonic()
    output, _ = process.communicate(timeout=timeout_s)
    return output, time.monotonic() - started


def faulty(model, folder, *overrides):
    """Train with a model that goes wrong; what was printed."""
    quick = ("trainer=cpu_ddp", "norm=sync", "logger.mode=disabled", "drift=none", "trainer.timeout_s=60")
    process = runs.start(*quick, f"model._target_=tests.faulty.{model}", *overrides, folder=folder)
    output, _ = finish(process, 120)
    assert process.returncode == 1
    return output


def test_the_launcher_says_who_left_before_which_layer(tmp_path):
    output = faulty("DiesOnRank1", tmp_path)
    words, _, last = output.strip().splitlines()[-3:]
    assert last.startswith("rank 1 failed first: it ended by exit code 7")
    assert words.startswith(
        "rank 1 left before stages.1.0.bn1 (step 4); rank 0 waits in its forward; "
        "rank 1 was past stages.0.0.bn2 forward (step 4)"
    )


def test_debug_ends_a_run_where_the_ranks_part(tmp_path):
    output = faulty("BranchesOnRank1", tmp_path, "debug=true")
    last = output[output.index("failed first, with GroupError") :]
    assert "rank 0 is at stages.2.0.shortcut.1 backward, rank 1 is at bn forward (step 2)." in last
    assert "Every rank must run the same layers" in last


def no_process_is_left(process):
    return not runs.descendants(process)


def steps_of(folder):
    """Steps in the newest record of a folder of runs."""
    files = list(folder.glob("*/record.jsonl"))
    return [row["step"] for row in record.read(files[0]) if "train/loss" in row] if files else []


def test_a_rank_that_raises_ends_the_run_and_is_named_last(tmp_path):
    process = runs.start(
        "trainer=cpu_ddp",
        "norm=sync",
        "logger.mode=disabled",
        "model._target_=tests.faulty.RaisesOnRank1",
        folder=tmp_path,
    )
    output, _ = finish(process, 120)
    assert process.returncode == 1
    last = output[output.index("rank 1 failed first, with ValueError") :]
    assert "Traceback" in last
    assert "ValueError: the label file is corrupt" in last
    assert "rank 0 failed" not in last
    assert "rank 1 left before bn (step 4); rank 0 waits in its forward" in output[: -len(last)]
    runs.wait_for(lambda: no_process_is_left(process), 10)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_killed_by_sigkill_ends_the_run_within_10_s_and_is_named_last(tmp_path, rank):
    process = runs.start("trainer=cpu_ddp", "norm=sync", "trainer.log_every_n_steps=1", folder=tmp_path)
    runs.wait_for(lambda: len(steps_of(tmp_path)) >= 5)
    assert len(runs.descendants(process)) >= 3
    runs.kill(runs.rank_process(process, rank))
    output, seconds = finish(process, 60)
    assert seconds < 10
    assert process.returncode == 1
    assert f"rank {rank} failed first: it ended by signal SIGKILL" in output.strip().splitlines()[-1]
    runs.wait_for(lambda: no_process_is_left(process), 10)


def test_a_killed_run_keeps_its_last_steps_in_record_and_wandb_file_and_leaves_no_process(tmp_path):
    from distnorm.drift import wandb_file

    process = runs.start("trainer=cpu_ddp", "trainer.log_every_n_steps=1", folder=tmp_path)
    runs.wait_for(lambda: len(steps_of(tmp_path)) >= 20)
    killed_after = max(steps_of(tmp_path))
    time.sleep(1.5)  # wandb writes twice a second
    runs.kill(process.pid)
    process.wait()
    runs.wait_for(lambda: no_process_is_left(process), 15)
    run = next(tmp_path.iterdir())
    in_record = steps_of(tmp_path)
    rows = wandb_file.read(next(run.glob("wandb/*/*.wandb"))).rows
    in_wandb = [row["trainer/global_step"] for row in rows if "train/loss" in row]
    assert in_record == list(range(1, len(in_record) + 1))
    assert in_wandb == list(range(1, len(in_wandb) + 1))
    assert len(in_record) >= killed_after
    assert len(in_wandb) >= killed_after


def test_ctrl_c_ends_all_ranks(tmp_path):
    process = runs.start("trainer=cpu_ddp", "logger.mode=disabled", "trainer.log_every_n_steps=1", folder=tmp_path)
    runs.wait_for(lambda: len(steps_of(tmp_path)) >= 5)
    process.send_signal(signal.SIGINT)
    finish(process, 30)
    assert process.returncode != 0
    runs.wait_for(lambda: no_process_is_left(process), 10)


def test_torchruns_ranks_are_found_and_share_one_folder(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    overrides = [f"runs_dir={tmp_path}", "trainer.accelerator=cpu", "trainer.devices=auto", "trainer.max_steps=3"]
    done = subprocess.run(
        [*command, *overrides, "norm=sync", "logger.mode=disabled"],
        capture_output=True,
        text=True,
        cwd=runs.ROOT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 CPU ranks" in done.stdout
    assert "sync over 2 ranks" in done.stdout
    assert len(list(tmp_path.iterdir())) == 1


def test_two_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    quick = ("trainer=cpu", "trainer.max_steps=1", "logger.mode=disabled", "drift=none")
    pair = [runs.start(*quick, folder=tmp_path) for _ in range(2)]
    for process in pair:
        finish(process, 120)
        assert process.returncode == 0
    assert len(list(tmp_path.glob("*/result.json"))) == 2


@pytest.mark.unit
@pytest.mark.parametrize(("typed", "threads"), [([], 1), (["trainer.threads_per_rank=3"], 3)])
def test_libraries_on_the_cpu_have_as_many_threads_on_any_machine(tmp_path, monkeypatch, typed, threads):
    """Another number gives other bits."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    run = RunFolder(tmp_path)
    run.write_settings(runs.composed("trainer=cpu_ddp", *typed))
    assert local._threads(run, 2) == threads
