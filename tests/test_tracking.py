"""What a run leaves: its folder, the record, and wandb's file; each readable after a kill."""

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from distnorm.drift import record
from distnorm.launch import run_dir
from distnorm.launch.ranks import Ranks
from tests import wandb_file
from tests.runs import composed

pytestmark = pytest.mark.unit


def test_rows_are_read_back_with_numbers_that_json_has_no_word_for(tmp_path):
    path = tmp_path / "record.jsonl"
    writer = record.Record(path, {"run": "one"})
    writer.append(10, {"loss": 0.5, "nan": float("nan")})
    writer.append(20, {"up": float("inf"), "down": float("-inf")})
    first, second = record.read(path)  # before it is closed
    assert (first["step"], first["loss"], second["step"]) == (10, 0.5, 20)
    assert np.isnan(first["nan"])
    assert (second["up"], second["down"]) == (float("inf"), float("-inf"))
    assert abs(first["time"] - path.stat().st_mtime) < 60
    writer.close()
    about, *rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert (about["schema"], about["run"]) == (1, "one")
    assert len(rows) == 2


def test_a_torn_last_line_is_left_out_and_the_rows_before_it_survive(tmp_path):
    path = tmp_path / "record.jsonl"
    writer = record.Record(path)
    for step in (1, 2, 3):
        writer.append(step, {"loss": 1.0})
    whole = path.read_bytes()
    start_of_last = whole[:-1].rindex(b"\n") + 1
    for end in range(start_of_last, len(whole) - 2):
        path.write_bytes(whole[:end])
        assert [row["step"] for row in record.read(path)] == [1, 2]


def test_appending_to_a_record_keeps_its_one_first_line(tmp_path):
    path = tmp_path / "record.jsonl"
    for step in (1, 2):
        writer = record.Record(path, {"opened": step})
        writer.append(step, {"loss": 1.0})
        writer.close()
    assert [row["step"] for row in record.read(path)] == [1, 2]
    assert [json.loads(line).get("opened") for line in path.read_text().splitlines()] == [1, None, None]


def test_appending_after_a_torn_line_loses_no_row(tmp_path):
    path = tmp_path / "record.jsonl"
    record.Record(path).append(1, {"loss": 1.0})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    record.Record(path).append(2, {"loss": 2.0})
    assert [row["step"] for row in record.read(path)] == [1, 2]


WRITER = """
import sys, pathlib
from distnorm.drift.record import Record
record, step = Record(pathlib.Path(sys.argv[1])), 0
while True:
    step += 1
    record.append(step, {"loss": float(step)})
    print(step, flush=True)
"""


def test_a_killed_process_leaves_every_row_it_wrote(tmp_path):
    path = tmp_path / "record.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= 200:
                process.send_signal(signal.SIGKILL)
                break
        written = max([200, *map(int, process.stdout.read().split("\n")[:-1])])
    steps = [row["step"] for row in record.read(path)]
    assert written <= len(steps) <= written + 1
    assert steps == list(range(1, len(steps) + 1))


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Settings whose runs go to a temporary folder, in a second that does not end."""
    now = types.SimpleNamespace(now=lambda: dt.datetime(2026, 1, 2, 3, 4, 5))
    monkeypatch.setattr(run_dir, "dt", types.SimpleNamespace(datetime=now))
    return composed(f"runs_dir={tmp_path}").with_batches(1)


def test_two_runs_of_one_second_have_folders_of_their_own(found):
    alone = Ranks(1, 1, 1, 0, 0, "nobody", "cpu")
    one, other = (run_dir.open_run(found, alone, {}) for _ in range(2))
    assert one.path != other.path
    for run in (one, other):
        assert run.path.name.startswith("2026-01-02_03-04-05_")
        assert run.checkpoints.is_dir()
        assert run.read_settings() == found


def slurm_name(found, rank, **environ):
    started = Ranks(4, 2, 2, rank, rank % 2, "slurm", "cpu")
    return run_dir.open_run(found, started, {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"} | environ).path.name


def test_the_tasks_of_a_slurm_job_agree_and_arrays_and_restarts_have_their_own(found):
    assert {slurm_name(found, rank) for rank in range(4)} == {"slurm-77-0"}
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "5"}
    assert slurm_name(found, 0, **array) == "slurm-70_5-0"
    assert slurm_name(found, 1, **array, SLURM_RESTART_COUNT="2", SLURM_STEP_ID="1") == "slurm-70_5-1-r2"
    assert slurm_name(found, 1, SLURM_RESTART_COUNT="0") == "slurm-77-0"


@pytest.mark.parametrize("restarts", [0, 1])
def test_ranks_of_torchrun_agree_through_its_store_also_after_a_restart(found, restarts):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    paths = {}

    def join(rank, attempt):
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        paths[rank] = run_dir.open_run(found, Ranks(2, 2, 1, rank, rank, "torchrun", "cpu"), environ).path

    for attempt in range(restarts + 1):
        early = threading.Thread(target=join, args=(1, attempt))
        early.start()
        time.sleep(0.2)
        join(0, attempt)
        early.join()
    assert paths[0] == paths[1]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    run_dir.write_json(path, {"a": 1})
    run_dir.write_json(path, {"a": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception):
        run_dir.write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 2}


LOGGING = """
import pathlib, sys, time
from distnorm.launch import console, report
console.quiet_libraries()
from distnorm.launch.run_dir import RunFolder
from distnorm.tracking import make_loggers
from tests.runs import composed

folder, mode, rows, then = sys.argv[1:]
run = RunFolder(pathlib.Path(folder))
run.path.mkdir()
names = ["logger.name=mine", "logger.group=ours", "logger.project=theirs"]
settings = composed(f"logger.mode={mode}", "norm=sync", *names).with_batches(2)
made = make_loggers(settings.logger, run, report.config(settings, settings.decide(2, 2)), is_first=True)
for step in range(10, 10 * int(rows) + 1, 10):
    for logger in made:
        logger.log_metrics({"train/loss": 1 / step, "epoch": 0}, step=step)
print("logged", flush=True)
if then == "hang":
    time.sleep(60)
for logger in made:
    logger.finalize("success")
"""


def start(folder, mode, rows=3, then="end"):
    """A process that logs as a run does; HOME is empty and has no key."""
    home = folder / "home"
    home.mkdir()
    environ = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_") and key != "NETRC"}
    return subprocess.Popen(
        [sys.executable, "-c", LOGGING, folder / "run", mode, str(rows), then],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=environ | {"HOME": str(home), "PYTHONPATH": "."},
    )


def log(folder, mode):
    """Log three rows; what was printed besides, what the record holds, and wandb's files."""
    with start(folder, mode) as process:
        printed = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0, printed
    printed.remove("logged")
    return printed, record.read(folder / "run" / "record.jsonl"), list((folder / "run").glob("wandb/offline-*/*.wandb"))


EXPECTED = [(10, 1 / 10, 0), (20, 1 / 20, 0), (30, 1 / 30, 0)]


def rows_of(wandb_path):
    return [(r["trainer/global_step"], r["train/loss"], r["epoch"]) for r in wandb_file.history(wandb_path)]


def test_offline_both_the_record_and_wandbs_file_have_every_number(tmp_path):
    printed, rows, [path] = log(tmp_path, "offline")
    assert printed == []
    assert [(row["step"], row["train/loss"], row["epoch"]) for row in rows] == EXPECTED
    assert rows_of(path) == EXPECTED
    assert wandb_file.step_metrics(path)["*"] == "trainer/global_step"
    kept = wandb_file.config(path)
    assert kept["norm"]["kind"] == "sync"
    assert kept["norm"]["normalization_batch"] == 32
    assert kept["decision"].items() >= {"kind": "sync", "sync_ranks": 2, "normalization_batch": 32}.items()
    assert kept["decision"]["reasons"]
    torn = tmp_path / "torn.wandb"
    for end in range(0, path.stat().st_size, 50):
        torn.write_bytes(path.read_bytes()[:end])
        assert rows_of(torn) == EXPECTED[: len(rows_of(torn))]


def test_disabled_only_the_record_is_written(tmp_path):
    printed, rows, files = log(tmp_path, "disabled")
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert printed == files == []
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.fixture(scope="module")
def without_key(tmp_path_factory):
    return log(tmp_path_factory.mktemp("online"), "online")


def test_online_without_a_key_logs_offline_and_warns_once_of_the_remedy(without_key):
    printed, rows, [path] = without_key
    assert len(rows) == len(rows_of(path)) == 3
    [warning] = [line for line in printed if "logger.mode=online" in line]
    assert "Run `wandb login` first" in warning


def test_online_without_a_key_prints_nothing_but_that_warning(without_key):
    assert len(without_key[0]) == 1


def test_a_killed_run_has_left_every_row_in_the_record_and_in_wandbs_file(tmp_path):
    rows = 400  # more than one block of the file
    with start(tmp_path, "offline", rows, "hang") as process:
        assert process.stdout.readline() == "logged\n"
        time.sleep(2)
        [path] = (tmp_path / "run").glob("wandb/offline-*/*.wandb")
        left = path.read_bytes()  # nothing that wandb's own process may still add when it sees the kill
        process.send_signal(signal.SIGKILL)
    (tmp_path / "left.wandb").write_bytes(left)
    assert len(left) > 32 * 1024
    steps = list(range(10, 10 * rows + 1, 10))
    assert [row["step"] for row in record.read(tmp_path / "run" / "record.jsonl")] == steps
    assert [step for step, *_ in rows_of(tmp_path / "left.wandb")] == steps
    assert [step for step, *_ in rows_of(path)] == steps


def test_only_the_first_rank_writes(tmp_path):
    from distnorm.tracking import make_loggers

    run = run_dir.RunFolder(tmp_path)
    for logger in make_loggers(composed("logger.mode=offline").logger, run, {}, is_first=False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
            logger.log_metrics({"loss": 1.0}, step=1)
    assert list(tmp_path.iterdir()) == []
