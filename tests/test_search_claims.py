"""Who runs a trial of a search: claims, taken once, and taken over from the dead alone."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from distnorm.search.claims import Claims
from tests.searches import ended, in_process

pytestmark = pytest.mark.unit
OTHER = {"machine": "elsewhere", "pid": 1, "started": "1", "job": None, "restarts": 0, "time": 0}


def take(folder, gate, count):
    claims = Claims(600)
    while not gate.exists():
        time.sleep(0.0005)
    taken = sum(claims.take(one) is not None for one in sorted(folder.iterdir()))
    (count / str(os.getpid())).write_text(str(taken))
    while len(list(count.iterdir())) < 4:  # a process that has ended is dead, and the others may take what it had
        time.sleep(0.01)


def test_of_many_that_take_dead_claims_at_once_one_gets_each(tmp_path):
    folder, count = tmp_path / "trials", tmp_path / "count"
    count.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for number in range(200):
        (folder / f"{number:04d}").mkdir(parents=True)
        mine = Claims(600).take(folder / f"{number:04d}").file
        mine.write_text(json.dumps({**json.loads(mine.read_text()), "pid": gone.pid}))
    processes = [in_process(take, folder, tmp_path / "gate", count) for _ in range(4)]
    time.sleep(0.3)
    (tmp_path / "gate").touch()
    assert [ended(process) for process in processes] == [0] * 4
    assert sum(int(file.read_text()) for file in count.iterdir()) == 200
    assert len(list(folder.glob("*/claim.*"))) == 400


def test_a_claim_of_this_machine_is_dead_when_its_process_is(tmp_path):
    claims, process = Claims(600), subprocess.Popen(["sleep", "60"])
    mine = claims.take(tmp_path)
    assert claims.take(tmp_path) is None  # this process is alive
    about = json.loads(mine.file.read_text())
    start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    mine.file.write_text(json.dumps({**about, "pid": process.pid, "started": start}))
    assert claims.take(tmp_path) is None
    process.kill()
    process.wait()
    assert mine.holds
    assert claims.take(tmp_path).attempt == 1
    assert not mine.holds
    (tmp_path / "claim.1").write_text(json.dumps({**about, "started": "0"}))  # this process's number, another's start
    assert claims.take(tmp_path).attempt == 2


def test_a_claim_of_another_machine_is_dead_when_it_has_not_moved(tmp_path):
    (tmp_path / "claim.0").write_text(json.dumps(OTHER))
    os.utime(tmp_path / "claim.0", (0, 0))  # its clock is not ours
    claims = Claims(0.4)
    for moved in (1, 2, 3):
        assert claims.take(tmp_path) is None
        time.sleep(0.25)
        os.utime(tmp_path / "claim.0", (moved, moved))
    assert claims.take(tmp_path) is None
    time.sleep(0.45)
    assert claims.take(tmp_path).attempt == 1


def test_a_claim_of_a_job_that_slurm_does_not_know_is_dead(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"  # stands for SLURM's: job 7 runs, all others are unknown
    squeue.write_text(
        '#!/bin/sh\n[ "$3" = 7 ] && echo RUNNING && exit 0\necho "Invalid job id specified" >&2; exit 1\n'
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job, restarts, is_dead in (("7", 0, False), ("8", 0, True), ("9", 0, True), ("9", 1, False)):
        folder = tmp_path / f"{job}-{restarts}"
        folder.mkdir()
        (folder / "claim.0").write_text(json.dumps({**OTHER, "job": job, "restarts": restarts}))
        assert (Claims(600).take(folder) is not None) is is_dead, (job, restarts)
