"""The run folder: one for all ranks, of one run only, the same when SLURM or torchrun start the run again."""

import datetime as dt
import json
import threading
import time
import types
from pathlib import Path

import pytest
import torch.distributed as dist

from distnorm import ConfigError
from distnorm.launch import run_dir
from distnorm.launch.ranks import Ranks
from tests.runs import composed

pytestmark = pytest.mark.unit

ALONE = Ranks(1, 1, 1, 0, 0, "nobody", "cpu")
LOCAL = Ranks(2, 2, 1, 0, 0, "distnorm", "cpu")
STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Settings whose runs go to a temporary folder, in a second that does not end."""
    now = types.SimpleNamespace(now=lambda: dt.datetime(2026, 1, 2, 3, 4, 5))
    monkeypatch.setattr(run_dir, "dt", types.SimpleNamespace(datetime=now))
    return composed(f"runs_dir={tmp_path}").with_batches(1)


def opened(found, ranks, environ):
    """What each rank does at the start."""
    run = run_dir.locate(found, ranks, environ)
    run_dir.open_run(found, ranks, run, again=run_dir.has_restarted(run, environ))
    return run


def test_two_runs_of_one_second_have_folders_of_their_own(found):
    one, other = (opened(found, ALONE, {}) for _ in range(2))
    assert one.path != other.path
    for run in (one, other):
        assert run.path.name.startswith("2026-01-02_03-04-05_")
        assert run.checkpoints.is_dir()
        assert run.read_settings() == found


def tasks(found, started_by="slurm", **environ):
    """The names of the folders that the four tasks of a job step open."""
    ranks = [Ranks(4, 2, 2, rank, rank % 2, started_by, "cpu") for rank in range(4)]
    [name] = {opened(found, of_task, STEP | environ).path.name for of_task in ranks}
    return name


def test_the_tasks_of_a_step_share_one_folder_and_find_it_again_after_a_requeue(found):
    assert tasks(found) == "slurm-77-0"
    assert tasks(found, SLURM_STEP_ID="1") == "slurm-77-1"
    assert tasks(found, SLURM_RESTART_COUNT="1") == "slurm-77-0"
    assert tasks(found, SLURM_RESTART_COUNT="2") == "slurm-77-0"


def test_each_task_of_an_array_has_its_own(found):
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "5"}
    assert tasks(found, **array) == "slurm-70_5-0"
    assert tasks(found, **array | {"SLURM_ARRAY_TASK_ID": "6"}) == "slurm-70_6-0"
    assert tasks(found, **array, SLURM_RESTART_COUNT="1") == "slurm-70_5-0"


def test_what_killed_saves_left_goes_when_the_run_goes_on(found):
    folder = Path(found.runs_dir) / tasks(found) / "checkpoints"
    stay = {"last.ckpt", "previous.ckpt", "best.ckpt", ".mine.ckpt", "last.ckpt.1", "notes"}
    for name in (*stay, ".last.ckpt.4711", ".previous.ckpt.4711", ".best.ckpt.12", "best.ckpt.partial"):
        (folder / name).touch()
    other = folder.parent.parent / "another" / "checkpoints" / ".last.ckpt.4711"
    other.parent.mkdir(parents=True)
    other.touch()
    late = Ranks(4, 2, 2, 3, 1, "slurm", "cpu")
    opened(found, late, STEP | {"SLURM_RESTART_COUNT": "1"})
    assert (folder / ".last.ckpt.4711").exists()  # the first rank alone removes
    tasks(found, SLURM_RESTART_COUNT="1")
    assert {file.name for file in folder.iterdir()} == stay
    assert other.exists()


def test_torchrun_in_a_step_whose_rendezvous_is_the_jobs_shares_the_steps_folder(found):
    assert tasks(found, "torchrun", TORCHELASTIC_RUN_ID="77") == "slurm-77-0"


def test_a_folder_of_another_job_of_this_number_is_refused(found):
    tasks(found)
    with pytest.raises(ConfigError, match=r"slurm-77-0' is the folder of another run already[\s\S]*runs_dir=runs2"):
        tasks(found)


@pytest.mark.parametrize("ranks", [ALONE, LOCAL])
def test_runs_that_a_batch_script_starts_itself_are_told_apart_by_their_settings(found, ranks):
    batch = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "distnorm"}
    other = found.model_copy(update={"seed": 1})
    first, second, repeated = (opened(settings, ranks, batch).path.name for settings in (found, other, found))
    assert len({first, second, repeated}) == 3
    assert first.startswith("slurm-77-")
    assert second.startswith("slurm-77-")
    again = [opened(settings, ranks, batch | {"SLURM_RESTART_COUNT": "1"}).path.name for settings in (found, other)]
    assert again == [first, second]


@pytest.mark.parametrize("job", ["bash", "interactive"])
def test_where_a_person_types_each_run_has_its_own(found, job):
    names = {opened(found, ALONE, STEP | {"SLURM_JOB_NAME": job, "SLURM_RESTART_COUNT": "1"}).path for _ in range(2)}
    assert len(names) == 2


def test_a_first_start_does_not_go_on_and_neither_does_a_requeued_one_that_never_began(found):
    run = opened(found, ALONE, {})
    assert not run_dir.has_restarted(run, {})
    assert not run_dir.has_restarted(run, {"SLURM_RESTART_COUNT": "0"})
    assert run_dir.has_restarted(run, {"SLURM_RESTART_COUNT": "1"})
    assert run_dir.has_restarted(run, {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert not run_dir.has_restarted(run_dir.RunFolder(run.path / "none"), {"SLURM_RESTART_COUNT": "1"})


def test_what_ended_the_run_before_is_gone_at_the_start(found):
    ranks = [Ranks(2, 2, 1, rank, rank, "slurm", "cpu") for rank in range(2)]
    run = opened(found, ranks[0], STEP)
    run.stop.touch()
    for rank in range(2):
        run.error_of(rank).write_text("{}")
    opened(found, ranks[1], STEP | {"SLURM_RESTART_COUNT": "1"})
    assert run.stop.exists(), "rank 1 may come late, when a person has told the run to stop again"
    assert run.error_of(0).exists()
    opened(found, ranks[0], STEP | {"SLURM_RESTART_COUNT": "1"})
    assert not run.stop.exists()
    assert not list(run.ranks.iterdir())


def test_a_place_that_takes_no_folder_is_refused(found, tmp_path):
    (tmp_path / "file").touch()
    settings = found.model_copy(update={"runs_dir": str(tmp_path / "file" / "runs")})
    with pytest.raises(ConfigError, match=r"file/runs' takes no run folder: Not a directory. Give a folder that every"):
        opened(settings, ALONE, {})


@pytest.mark.parametrize("restarts", [0, 1])
def test_ranks_of_torchrun_agree_through_its_store_and_find_the_folder_again_after_a_restart(found, restarts):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    paths = {}

    def join(rank, attempt):
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "none"}
        environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        paths[rank, attempt] = opened(found, Ranks(2, 2, 1, rank, rank, "torchrun", "cpu"), environ).path

    for attempt in range(restarts + 1):
        early = threading.Thread(target=join, args=(1, attempt))
        early.start()
        time.sleep(0.2)
        join(0, attempt)
        early.join()
    assert len(set(paths.values())) == 1
    assert len(paths) == 2 * (restarts + 1)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    run_dir.write_json(path, {"a": 1})
    run_dir.write_json(path, {"a": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception):
        run_dir.write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 2}
