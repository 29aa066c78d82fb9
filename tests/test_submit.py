"""`distnorm submit`: what it renders is the script of slurm/, sbatch takes it, and mistakes do not wait in a queue."""

import itertools
import os
import shlex
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm import cli
from distnorm.launch.slurm import SCRIPTS, multiplied, render, submit
from tests import runs

pytestmark = pytest.mark.unit

SEARCH = ["search=random", "search.name=lr"]
PRELUDE = "set -euo pipefail"


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(runs.ROOT)


def text_of(script):
    return (runs.ROOT / "slurm" / f"{script}.sbatch").read_text()


def options(text):
    """The options that sbatch reads."""
    typed = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return dict(option.partition("=")[::2] for option in itertools.chain.from_iterable(map(shlex.split, typed)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_give_the_script_itself(script):
    array = {"array": "0-5"} if script == "sweep" else {}
    text = submit(SEARCH if script == "search" else [], script=script, dry_run=True, **array)
    if script == "search":
        text = text.replace(f"set -- {' '.join(SEARCH)}\n", "")
    assert text == text_of(script)


def test_options_replace_their_lines_and_add_others():
    text = submit(
        [],
        dry_run=True,
        nodes="4",
        time="1:00:00",
        partition="gpu",
        sbatch=["--qos=high", "--exclusive", "--comment=a b"],
    )
    expected = options(text_of("train")) | {
        "--nodes": "4",
        "--time": "1:00:00",
        "--partition": "gpu",
        "--qos": "high",
        "--exclusive": "",
        "--comment": "a b",
    }
    assert options(text) == expected
    body = text_of("train").partition("\nset -euo")[2]
    assert text.endswith(body), "only the options differ"
    assert "##SBATCH --account=project" in text
    assert "##SBATCH --partition" not in text


@pytest.mark.parametrize(
    ("asked", "tasks", "gpus"),
    [
        ({"gpus_per_node": "8"}, "8", "8"),
        ({"gpus_per_node": "a100:8"}, "8", "a100:8"),
        ({"ntasks_per_node": "2"}, "2", "2"),
        ({"gpus_per_node": "0"}, "1", None),
        ({"gpus_per_node": "0", "ntasks_per_node": "6"}, "6", None),
    ],
)
def test_there_is_a_task_for_each_gpu_unless_both_are_given(asked, tasks, gpus):
    found = options(submit([], dry_run=True, **asked))
    assert found["--ntasks-per-node"] == tasks
    assert found.get("--gpus-per-node") == gpus


def test_under_torchrun_there_is_one_task_a_node():
    found = options(submit([], script="torchrun", dry_run=True, gpus_per_node="8"))
    assert (found["--ntasks-per-node"], found["--gpus-per-node"]) == ("1", "8")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=3))
def test_any_argument_reaches_train_py_as_it_was_typed(typed):
    text = render(f"{PRELUDE}\nprintf '%s\\0' \"$@\"\n", {}, typed)
    given_to = subprocess.run(["bash", "-c", text, "-", "other"], capture_output=True, check=True).stdout
    assert given_to.decode().split("\0")[:-1] == typed


def test_several_values_multiply_as_hydras_own_sweep_does():
    typed = ["norm=batch,sync", "+model.name='a,b'", "data.device_batch=range(2,5)", "seed=choice(1,2)"]
    expected = [
        [f"norm={norm}", "+model.name='a,b'", f"data.device_batch={batch}", f"seed={seed}"]
        for norm in ("batch", "sync")
        for batch in (2, 3, 4)
        for seed in (1, 2)
    ]
    assert multiplied(typed) == expected
    assert multiplied([]) == [[]]


def test_a_sweep_has_a_task_for_each_job_unless_told():
    typed = ["norm=batch,sync", "data.device_batch=2,4,8"]
    assert options(submit(typed, script="sweep", dry_run=True, nodes="1"))["--array"] == "0-5"
    assert options(submit(typed, script="sweep", dry_run=True, array="0-5%2"))["--array"] == "0-5%2"
    assert options(submit(["norm=batch"], script="sweep", dry_run=True))["--array"] == "0-0"


@pytest.mark.parametrize("script", SCRIPTS)
def test_sbatch_takes_what_is_rendered(slurm, script):
    typed = {"sweep": ["norm=batch,sync"], "search": SEARCH}.get(script, ["norm=sync"])
    text = submit(typed, script=script, dry_run=True, nodes="1", time="10", gpus_per_node="2", cpus_per_task="2")
    done = slurm.run("sbatch", "--test-only", stdin=text)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


WRONG = [
    (["--", "norm=snyc"], "norm='snyc' is not one of", "Did you mean 'sync'?"),
    (["--", "norm.normalisation_batch=8"], "norm.normalisation_batch", "Did you mean 'norm.normalization_batch'?"),
    (["--", "norm=sync", "norm.sync_ranks=3"], "norm.sync_ranks=3", "Use 1, 2, 4 or 8."),
    (["--script=torchrun", "--", "norm.sync_ranks=3", "norm=sync"], "norm.sync_ranks=3", "Use 1, 2, 4 or 8."),
    (["--", "data.global_batch=9"], "data.global_batch=9 does not divide over 8 ranks", "data.global_batch=16"),
    (["--", "norm=batch,sync"], "norm=batch,sync is 2 runs", "Use --script sweep"),
    (["--", "{a"], "'{a' cannot be read as key=value", "Write e.g. norm=sync"),
    (["--", "experiment=normalization_batch"], "is a study of many runs", "Start it with: python train.py"),
    (["--script=sweep", "--", "norm=sync,snyc"], "norm='snyc'", "Did you mean 'sync'?"),
    (["--sbatch=qos=high", "--"], "--sbatch='qos=high' is no long option of sbatch", "--sbatch=--qos=high"),
    (["--nods=2"], "unrecognized arguments: --nods=2", "distnorm"),
    (["--script=trian"], "invalid choice: 'trian'", "'train', 'sweep', 'torchrun'"),
    (["--", "search=random"], "search.kind=random is a search of many runs", "Use --script search"),
    (["--script=torchrun", "--", "search=asha"], "search.kind=asha", "leave out search=…"),
    (["--script=sweep", "--", "search=random"], "search.kind=random", "Use --script search"),
    (["--script=search", "--", "norm=sync"], "there is none", "Add search=random"),
    (["--script=search", "--", "search=random", "seed=1,2"], "seed=1,2 is 2 runs", "Give one value a key"),
    (
        ["--script=search", "--", "search=random", "optimizer.lr=1"],
        "optimizer.lr is searched",
        "Leave optimizer.lr=1 out",
    ),
    (["--script=search", "--nodes=2", "--", "search=random"], "--nodes=2: a search is one task", "--array=0-3"),
    (["--script=search", "--ntasks-per-node=4", "--", "search=random"], "--ntasks-per-node=4", "search.workers=4"),
    (["--nodes=two"], "--nodes='two' must be a whole number", "--nodes=2"),
    (["--nodes=0"], "--nodes='0' must be a whole number of at least 1", "--nodes=2"),
    (["--cpus-per-task=1.5"], "--cpus-per-task='1.5'", "--cpus-per-task=2"),
    (["--time="], "--time='' is empty", "leave --time out"),
]


def said(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", *arguments])
    assert ended.value.code == 2
    words = capsys.readouterr()
    assert words.out == ""
    assert len(words.err.strip().splitlines()) <= 3
    return words.err


@pytest.mark.parametrize(("arguments", "value", "remedy"), WRONG, ids=lambda part: " ".join(part)[:40])
def test_a_mistake_is_refused_before_anything_is_submitted(capsys, monkeypatch, arguments, value, remedy):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was submitted"))
    words = said(arguments, capsys)
    assert value in words
    assert remedy in words


def test_without_sbatch_the_remedy_is_a_dry_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = said(["--", "norm=sync"], capsys)
    assert "There is no sbatch on this machine" in words
    assert "--dry-run" in words


def test_elsewhere_than_in_the_project_it_says_where_to_go(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = said(["--", "norm=sync"], capsys)
    assert f"no slurm/train.sbatch and conf/train.yaml in {tmp_path}" in words
    assert "Submit from the project's folder" in words


@pytest.mark.parametrize(
    ("option", "why"), [("--partition=none", "invalid partition"), ("--sbatch=--nonsense", "unrecognized option")]
)
def test_sbatchs_refusal_comes_with_its_reason(slurm, capsys, monkeypatch, option, why):
    for key, value in slurm.environ.items():
        monkeypatch.setenv(key, value)
    words = said([option, "--", "norm=sync"], capsys)
    assert words.startswith("sbatch refused the script: ")
    assert why in words
    assert "--dry-run prints what was refused" in words


def test_a_controller_that_does_not_answer_is_named(capsys, monkeypatch, tmp_path):
    silent = tmp_path / "sbatch"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("distnorm.launch.slurm._ANSWER_S", 0.2)
    words = said(["--", "norm=sync"], capsys)
    assert "sbatch did not answer within 0.2 s" in words
    assert "sinfo" in words
