"""`distnorm doctor`: a launch looked at without a run, and after one the rank that failed first, named."""

import json
import os
import re
import time

import pytest

from distnorm import cli, positions
from distnorm.errors import GroupError
from distnorm.launch import doctor, failures
from distnorm.launch.run_dir import RunFolder
from tests import tasks

pytestmark = pytest.mark.unit
CPU = ("trainer.accelerator=cpu",)


def lines(text):
    """Verdict and words by check."""
    return {line.split()[1]: (line.split()[0], line[9:]) for line in text.splitlines() if line[0] != " "}


def test_one_process_is_looked_at_and_nothing_is_left(tmp_path, capsys):
    cli.main(["doctor", *CPU, f"runs_dir={tmp_path}"])
    found = lines(capsys.readouterr().out)
    assert list(found) == ["launch", "ranks", "code", "versions", "settings", "devices", "run"]
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert "1 CPU rank, on one node, this process" in found["launch"][1]
    assert f"{tmp_path}/doctor-" in found["run"][1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environ", "overrides", "words"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, CPU, "SLURM job 7 has 2 tasks"),
        ({}, ("norm=snyc",), "norm='snyc' is not one of"),
        ({}, (*CPU, "data.global_batch=3", "trainer.devices=2"), "data.global_batch=3 does not divide over 2 ranks"),
        ({}, (*CPU, "runs_dir=/proc/runs"), "runs_dir='/proc/runs' takes no run folder"),
    ],
    ids=["no srun", "a typo", "batches", "no folder"],
)
def test_what_would_be_refused_is_a_line_and_the_exit_code(environ, overrides, words, monkeypatch, capsys):
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *overrides])
    assert ended.value.code == 2
    verdict, said = lines(capsys.readouterr().out)["launch"]
    assert verdict == "failure"
    assert words in said


def test_outside_the_project_it_says_where_to_start_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["doctor"])
    assert "no conf/train.yaml" in capsys.readouterr().out


def test_two_tasks_are_looked_at_and_the_first_says_what_differs(tmp_path):
    overrides = ("trainer=slurm", *CPU, f"runs_dir={tmp_path}")
    first, second = tasks.srun("-m", "tests.doctor_of_rank", *overrides)
    assert (first.returncode, second.returncode, second.stdout) == (2, 2, "")
    found = lines(first.stdout)
    assert "2 CPU ranks, on one node, started by srun" in found["launch"][1]
    assert found["settings"][0] == "failure"
    assert "seed=0 on rank 0, seed=1 on rank 1" in found["settings"][1]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has started on three ranks."""
    folder = RunFolder(tmp_path / "runs" / "slurm-7-0")
    folder.ranks.mkdir(parents=True)
    failures.note_start(folder, 3, "ranks 0-2 on n1")
    return folder


def fail(run, rank, error):
    """Leave the note of a rank that raised."""
    try:
        raise error
    except type(error) as raised:
        failures.note(run, rank, raised)


LOST = RuntimeError("[..gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


def test_the_first_rank_that_raised_by_itself_is_named_last_with_its_traceback(run):
    fail(run, 0, LOST)
    fail(run, 2, ValueError("the label file is corrupt"))
    fail(run, 1, GroupError("rank 1 waited"))
    run.log_of(2).touch()
    before, _, last = failures.after(run).partition("rank 2 failed first, with ValueError:\n")
    assert last.startswith("Traceback")
    assert last.endswith("ValueError: the label file is corrupt")
    assert "rank 0 then ended with RuntimeError\nrank 1 then ended with GroupError" in before
    assert f"rank 2 wrote {run.log_of(2)}" in before


def test_of_two_that_raised_the_earlier_is_named(run):
    fail(run, 1, ValueError("early"))
    time.sleep(0.01)
    fail(run, 0, ValueError("late"))
    assert failures.after(run).endswith("ValueError: early")


def test_a_rank_without_a_word_is_named_and_where_it_was(run):
    """As SIGKILL leaves it: the others lost their peer, and its position is in its file."""
    positions.keep(run.ranks, 1, 3, time.time())
    positions.at_step(17)
    positions.leave(positions.enter("stages.0.bn1 forward", (0, 1, 2)))
    positions.stop()
    fail(run, 0, LOST)
    fail(run, 2, LOST)
    *before, last = failures.after(run).splitlines()
    assert last.startswith("rank 1 failed first, without a word: killed")
    assert "rank 1 was past stages.0.bn1 forward (step 17)" in "\n".join(before)


def test_without_any_word_it_points_to_what_stands_above(run):
    assert failures.after(run).endswith("what ended the run stands above, or in the scheduler's log.")


def test_ranks_that_all_lost_a_peer_name_the_earliest(run):
    for rank in (1, 0, 2):
        fail(run, rank, LOST)
        time.sleep(0.01)
    assert "rank 1 failed first, with RuntimeError" in failures.after(run)


def test_after_a_job_its_newest_run_folder_is_found_by_its_number(run, monkeypatch, capsys):
    other = run.path.parent / "slurm-8-0" / "ranks"
    other.mkdir(parents=True)
    os.utime(other, (time.time() + 9, time.time() + 9))
    fail(run, 1, ValueError("broken"))
    for environ, asked in (({"SLURM_JOB_ID": "7"}, f"runs_dir={run.path.parent}"), ({}, str(run.path))):
        for key, value in environ.items():
            monkeypatch.setenv(key, value)
        cli.main(["doctor", "--after", asked])
        said = capsys.readouterr().err
        assert f"--- {run.path}" in said
        assert said.rstrip().endswith("ValueError: broken")
    asked = [f"runs_dir={run.path.parent}"]
    assert doctor.find_run(asked, environ={"SLURM_JOB_ID": "8"}).path == other.parent
    assert doctor.find_run(asked, environ={}).path == other.parent
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "3"}
    assert doctor.find_run(asked, environ=array) is None
    (run.path.parent / "slurm-6_3-0" / "ranks").mkdir(parents=True)
    assert doctor.find_run(asked, environ=array).path.name == "slurm-6_3-0"


def test_a_job_that_never_had_a_folder_is_said_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    cli.main(["doctor", "--after", f"runs_dir={tmp_path}"])
    assert "no run folder: it ended before it made one" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["none", "."])
def test_what_is_no_run_folder_is_refused(tmp_path, monkeypatch, capsys, named):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--after", str(tmp_path / named)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / named} is no run's folder" in said
    assert "Give one, e.g. runs/<run>" in said
    assert len(said.strip().splitlines()) <= 3


def test_torchrun_hears_of_the_first_failure_too(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    fail(run, 0, LOST)
    assert not (tmp_path / "error.json").exists()
    fail(run, 1, ValueError("broken"))
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"].endswith("ValueError: broken")
    assert re.fullmatch(r"\d+", told["extraInfo"]["timestamp"])
