"""The comparison at a run's start, on real ranks that meet over a real store: what differs is refused on all alike."""

import contextlib
import json
import os
import socket
import subprocess

import pytest

from distnorm.errors import ConfigError, DistNormError
from distnorm.launch import comparison
from distnorm.launch.endings import RefusedError
from distnorm.launch.preflight import Preflight
from distnorm.launch.ranks import Ranks, first_host, meeting_place
from distnorm.launch.run_dir import RunFolder
from tests import ranks, runs, tasks

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def settings():
    return runs.composed("trainer=cpu_ddp").with_batches(2)


def meet(settings_of, folders, port, timeout_s, comes=(0, 1), raises=None, address="127.0.0.1"):
    """One rank's preflight: the kind of error and its words, and whether this rank says them."""
    rank = int(os.environ["RANK"])
    if rank not in comes:
        return None
    run = RunFolder(folders[rank])
    run.ranks.mkdir(parents=True, exist_ok=True)
    found = Ranks(2, 2, 1, rank, rank, "slurm", "cpu")
    environ = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    try:
        with Preflight(found, timeout_s, environ) as preflight:
            if raises is not None and rank == raises[0]:
                raise raises[1]
            preflight.check(settings_of[rank], run)
    except Exception as error:  # noqa: BLE001 — the test looks at whatever it is
        return type(error).__name__, str(error), getattr(error, "aloud", True)
    return "fine", "", True


def outcome(settings_of, folders, port=None, timeout_s=20, **how):
    return ranks.run(meet, settings_of, folders, port or tasks.free_port(), timeout_s, *how.values(), world=2)


def refused(answers, *parts):
    """Both ranks raise the same words, of at most three lines; the first says them."""
    kinds, words, aloud = zip(*answers, strict=True)
    assert kinds == ("RefusedError", "RefusedError")
    assert words[0] == words[1]
    assert aloud == (True, False)
    assert len(words[0].splitlines()) <= 3
    assert [part for part in parts if part not in words[0]] == [], words[0]


def test_ranks_that_are_alike_start_and_write_down_who_they_are(settings, tmp_path):
    assert outcome([settings] * 2, [tmp_path] * 2) == [("fine", "", True)] * 2
    started = json.loads((tmp_path / "ranks" / "started.json").read_text())
    assert (started["world_size"], started["where"]) == (2, f"ranks 0, 1 on {socket.gethostname()}")
    assert [file.name for file in (tmp_path / "ranks").iterdir()] == ["started.json"]


def test_ranks_that_meet_again_at_the_same_place_hear_the_new_verdict(settings, tmp_path):
    port, other = tasks.free_port(), settings.model_copy(update={"seed": 1})
    assert outcome([settings] * 2, [tmp_path] * 2, port) == [("fine", "", True)] * 2
    refused(outcome([settings, other], [tmp_path] * 2, port), "seed=0 on rank 0, seed=1 on rank 1")


def test_it_costs_less_than_a_tenth_of_a_second(settings, tmp_path):
    outcome([settings] * 2, [tmp_path] * 2)
    assert (
        min(ranks.run(_timed, [settings] * 2, [tmp_path] * 2, tasks.free_port(), 20, world=2)[0] for _ in "123") < 0.1
    )


def _timed(*arguments):
    import time

    started = time.thread_time()
    meet(*arguments)
    return time.thread_time() - started


def test_ranks_with_other_settings_are_refused_with_the_keys_and_both_values(settings, tmp_path):
    other = runs.composed("trainer=cpu_ddp", "optimizer.lr=0.3", "norm=group").with_batches(2)
    answers = outcome([settings, other], [tmp_path] * 2)
    refused(
        answers, "norm.kind=auto on rank 0, norm.kind=group on rank 1", "optimizer.lr=0.3 on rank 1", "command line"
    )


def test_what_one_rank_raises_while_it_prepares_ends_both(settings, tmp_path):
    error = ConfigError("data.root=/gone does not exist. Give an existing folder.")
    answers = outcome([settings] * 2, [tmp_path] * 2, None, 20, comes=(0, 1), raises=(1, error))
    refused(answers, f"rank 1 on {socket.gethostname()}: data.root=/gone does not exist", "Give an existing folder")


def test_a_bug_on_one_rank_keeps_its_traceback_there_and_ends_the_other(settings, tmp_path):
    (first, words, _), second = outcome([settings] * 2, [tmp_path] * 2, comes=(0, 1), raises=(1, KeyError("oh")))
    assert first == "RefusedError"
    assert words.startswith("rank 1 on ")
    assert "'oh'" in words
    assert second[0] == "KeyError"


def test_a_rank_that_does_not_come_is_named(settings, tmp_path):
    (kind, words, _), _ = outcome([settings] * 2, [tmp_path] * 2, timeout_s=1, comes=(0,))
    assert kind == "RefusedError"
    assert f"rank 1 did not come within trainer.timeout_s=1; rank 0 on {socket.gethostname()} did." in words
    assert "trainer.timeout_s=…" in words


def test_without_rank_0_the_others_say_where_they_looked(settings, tmp_path):
    port = tasks.free_port()
    _, (kind, words, _) = outcome([settings] * 2, [tmp_path] * 2, port, timeout_s=1, comes=(1,))
    assert kind == "ConfigError"
    assert f"found nobody at MASTER_ADDR=127.0.0.1, MASTER_PORT={port} within 1 s: Connection refused" in words
    assert "Did rank 0 start?" in words


def test_a_folder_that_is_a_nodes_own_is_refused_with_that_rank(settings, tmp_path, monkeypatch):
    answers = outcome([settings] * 2, [tmp_path / "a", tmp_path / "b"])
    refused(answers, f"rank 1 on {socket.gethostname()} cannot see in {tmp_path}/a", "runs_dir=/scratch")


def test_a_port_that_is_taken_is_refused_on_both_ranks_with_a_free_one(settings, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        (kind, words, _), (second, others, _) = outcome([settings] * 2, [tmp_path] * 2, port)
    assert (kind, second) == ("ConfigError", "ConfigError")
    assert f"MASTER_PORT={port} cannot be opened" in words
    assert "another program has it" in words
    assert "is no meeting place of ranks: no answer within 10 s" in others
    for text in (words, others):
        free = int(text.rpartition("export MASTER_PORT=")[2])
        assert free != port
        with socket.socket() as probe:
            probe.bind(("", free))


def test_an_address_that_nobody_knows_is_refused(settings, tmp_path):
    how = {"comes": (0, 1), "raises": None, "address": "nowhere.invalid"}
    for kind, words, _ in outcome([settings] * 2, [tmp_path] * 2, **how):
        assert kind == "ConfigError"
        assert "MASTER_ADDR=nowhere.invalid is no machine" in words
        assert "export MASTER_ADDR=<address>" in words


@contextlib.contextmanager
def mounted(folder, options):
    """A small disk of memory at a folder; the modes of files do not bind root."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def alone(settings, run):
    with Preflight(Ranks(1, 1, 1, 0, 0, "nobody", "cpu"), 5, {}) as preflight:
        preflight.check(settings, run)


def test_a_folder_that_cannot_be_written_is_refused(settings, tmp_path):
    with mounted(tmp_path / "disk", "size=64m") as disk:
        (disk / "run" / "ranks").mkdir(parents=True)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(RefusedError, match="cannot be written: Read-only file system") as caught:
            alone(settings, RunFolder(disk / "run"))
    assert str(disk / "run") in str(caught.value)
    assert "Make it writable, or give another: runs_dir=/scratch" in str(caught.value)


@pytest.mark.parametrize("size", ["100k", "8m"])
def test_a_disk_that_is_full_or_nearly_is_refused(settings, tmp_path, size):
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        (disk / "run" / "ranks").mkdir(parents=True)
        with pytest.raises(RefusedError, match="Free some room there, or give another: runs_dir=") as caught:
            alone(settings, RunFolder(disk / "run"))
    assert ("No space left" if size == "100k" else "8 MB left") in str(caught.value)


def answer(host="n1", *, problems=None, code="aa", torch="2.13", device="", **settings):
    place = {"hash": code, "place": f"/{code}"}
    versions = {"python": "3.11", "torch": torch}
    return comparison.Answer(
        host=host,
        problems=problems or {},
        code=place,
        versions=versions,
        accelerator="gpu" if device else "cpu",
        device=device,
        settings=settings,
    )


COMPARED = [
    (
        [answer(), answer("n2", code="bb"), answer()],
        "code",
        ["aa in /aa (ranks 0, 2 on n1)", "bb in /bb (rank 1 on n2)"],
    ),
    (
        [answer(), answer("n2", torch="2.12")],
        "versions",
        ["versions of torch: 2.13 (rank 0 on n1), 2.12 (rank 1 on n2)"],
    ),
    ([answer(device="GPU x"), answer("n2")], "devices", ["rank 1 on n2: torch finds no GPU there", "--exclude"]),
    ([answer(device="GPU x"), answer(device="GPU x")], "devices", ["ranks 0, 1 share GPU x on n1", "--gpus-per-node"]),
    ([answer(a=1), answer(a=2, b=3)], "settings", ["a=1 on rank 0, a=2 on rank 1; b=… on rank 0, b=3 on rank 1"]),
    ([answer(a=1, b=1, c=1, d=1), answer(a=2, b=2, c=2, d=2)], "settings", ["b=1 on rank 0", "and 2 more keys"]),
    (
        [answer(problems={"devices": "None. Ask."}), answer("n2", problems={"devices": "None. Ask."})],
        "devices",
        ["None."],
    ),
    ([answer(), answer("n2", problems={"run folder": "Full."})], "run folder", ["rank 1 on n2: Full."]),
]


@pytest.mark.parametrize(
    ("answers", "check", "parts"), COMPARED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_differs_is_said_with_ranks_hosts_and_values(answers, check, parts):
    findings = comparison.compare(dict(enumerate(answers)), len(answers), 5)
    (failure,) = [finding for finding in findings if finding.verdict == "failure"]
    assert failure.check == check
    assert len(failure.words.splitlines()) <= 3
    assert [part for part in parts if part not in failure.words] == [], failure.words


def test_the_same_gpu_number_on_two_nodes_is_fine():
    findings = comparison.compare({0: answer(device="GPU x"), 1: answer("n2", device="GPU x")}, 2, 5)
    assert {finding.verdict for finding in findings} == {"ok"}


def test_ranks_meet_at_the_first_node_of_the_step_unless_told_where():
    environ = {"SLURM_STEP_NODELIST": "n[5-9,12],m1", "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "1"}
    assert meeting_place(environ) == ("n5", 15154)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("n5", "15154")
    told = {**environ, "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    assert meeting_place(told) == ("here", 29500)
    lists = ["a", "a1,b2", "a[07-09]", "r[1-2]c[3,5].cluster", "x,a[1-2]"]
    assert [first_host(nodes) for nodes in lists] == ["a", "a1", "a07", "r1c3.cluster", "x"]


@pytest.mark.parametrize("port", ["http", "0", "70000"])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(DistNormError, match=f"MASTER_PORT='{port}' is no port: .*export MASTER_PORT=29500"):
        meeting_place({"MASTER_PORT": port})
