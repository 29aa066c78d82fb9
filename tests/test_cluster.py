"""The tests' own SLURM: it starts jobs, requeues and preempts them, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tests import cluster, runs

pytestmark = pytest.mark.run

WAITS = """#!/bin/bash
#SBATCH --open-mode=append
echo "start ${SLURM_RESTART_COUNT:-0}"
((${SLURM_RESTART_COUNT:-0})) || srun python3 -uc '
import signal, time
signal.signal(signal.SIGTERM, lambda *_: print("told"))
print("waits")
time.sleep(60)'
"""


def test_a_job_runs_on_two_nodes_and_fails_with_its_code(slurm):
    script = "#!/bin/bash\nsrun bash -c 'echo $SLURMD_NODENAME $SLURM_PROCID/$SLURM_STEP_NUM_TASKS $1; exit 3' - \"$1\""
    job = slurm.submit(script, "a word", options=["--nodes=2", "--ntasks-per-node=2"])
    slurm.wait(job, "FAILED")
    assert slurm.exit_code(job) == 3
    expected = [f"n{1 + rank // 2} {rank}/4 a word" for rank in range(4)]
    assert sorted(line for line in slurm.output(job).splitlines() if line[0] == "n") == expected


def test_a_job_goes_on_after_a_requeue_and_appends_to_its_log(slurm):
    job = slurm.submit(WAITS)
    runs.wait_for(lambda: "waits" in slurm.output(job))
    slurm.requeue_now(job)
    slurm.wait(job, "COMPLETED")
    assert slurm.restarts(job) == 1
    starts = [line for line in slurm.output(job).splitlines() if line.startswith("start")]
    assert starts == ["start 0", "start 1"]


def test_a_job_of_higher_priority_tells_one_to_go(slurm):
    all_nodes = ["--nodes=2", "--ntasks-per-node=1", "--exclusive"]
    job = slurm.submit(WAITS, options=all_nodes)
    runs.wait_for(lambda: slurm.output(job).count("waits") == 2)
    other = slurm.submit("#!/bin/bash\nsleep 60", options=[*all_nodes, "--partition=high"])
    runs.wait_for(lambda: slurm.output(job).count("told") == 2)
    slurm.cancel(other)
    slurm.cancel(job)


def test_nothing_is_left_when_the_session_is_killed():
    reason = cluster.missing()
    if reason:
        pytest.skip(reason)
    code = """
        import os, time
        from tests.cluster import Cluster
        slurm = Cluster(nodes=3)
        job = slurm.submit("#!/bin/bash\\nsrun sleep 77", options=["--nodes=3"])
        slurm.wait(job, "RUNNING")
        print(slurm.folder, flush=True)
        time.sleep(60)
    """
    mark = {"DISTNORM_TEST_MARK": "a cluster to be killed"}
    session = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | mark,
        cwd=runs.ROOT,
    )
    session.mark = mark["DISTNORM_TEST_MARK"]
    folder = cluster.Path(session.stdout.readline().strip())
    assert len(runs.descendants(session)) >= 5
    session.send_signal(signal.SIGKILL)
    session.wait()
    runs.wait_for(lambda: not runs.descendants(session) and not folder.exists(), 10)


def test_without_slurm_a_reason_is_given_and_where_it_is_required_a_failure(monkeypatch, tmp_path, request):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no slurmctld and no slurmd and no sbatch" in cluster.missing()
    start = cluster.slurm.__wrapped__
    monkeypatch.delenv(cluster.REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt install slurm-wlm"):
        next(start())
    monkeypatch.setenv(cluster.REQUIRED, "1")
    with pytest.raises(AssertionError, match="DISTNORM_REQUIRE_SLURM is set, and there is no slurmctld"):
        next(start())
