"""A SLURM of the tests' own: slurmctld and a slurmd a node on this one machine, from a configuration in a new folder.

    def test_a_job(slurm):                          # a session's one cluster: two nodes of 32 CPUs and 4 GPUs, all sham
        job = slurm.submit("slurm/train.sbatch", "trainer.max_steps=3", options=["--gpus-per-node=0"])
        slurm.wait(job, "COMPLETED")

Nothing of the system is touched: ports and folders are its own, no service, no account, no database. Partition `low` is
the default; a job in `high` preempts those of `low` (`--exclusive` on both: the nodes are large), which are told by
SIGTERM and SIGCONT, requeued, and killed `GRACE_S` later. The names of the nodes do not resolve: MASTER_ADDR is preset.

The daemons, the jobs and all that these start are descendants of one process, that ends them when the test session ends
or dies.
"""

import contextlib
import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

REQUIRED = "DISTNORM_REQUIRE_SLURM"
ROOT = Path(__file__).parent.parent
GRACE_S = 30
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
FirstJobId={first}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
KillWait=5
MinJobAge=3600
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=32 RealMemory=1000 Gres=gpu:4\n"


def missing():
    """What keeps SLURM from running here, in words; nothing where it can."""
    absent = [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if absent:
        return f"no {' and no '.join(absent)} on this machine (Debian: apt install slurm-wlm)"
    return "" if os.getuid() == 0 else "slurmd starts jobs as root alone"


@pytest.fixture(scope="session")
def slurm():
    """The session's cluster of two nodes; skipped where it cannot run, failed where it is required."""
    reason = missing()
    if reason:
        assert not os.environ.get(REQUIRED), f"{REQUIRED} is set, and there is {reason}"
        pytest.skip(reason)
    with contextlib.closing(Cluster()) as cluster:
        yield cluster


class Cluster:
    """`nodes` machines that are all this one. What is submitted starts in the project, and logs in `folder`."""

    def __init__(self, nodes=2):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: sockets' paths have 108 letters
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",
            "PYTHON": sys.executable,
        }
        self._write_configuration()
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, str(self.folder), *self.names],
            stdin=subprocess.PIPE,
            env=self.environ,
            start_new_session=True,  # Ctrl-C is for the session, that closes the pipe
        )
        try:
            self._wait_for(lambda: self._idle() == nodes, 20, "SLURM did not start")
        except AssertionError:
            self.close()
            raise

    def _write_configuration(self):
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(1 + len(self.names))
        first = 1 + 100 * (os.getpid() % 199)  # the scripts make a port of it, and two clusters may be at work
        user = getpass.getuser()
        text = _CONF.format(host=host, port=ports[0], user=user, folder=self.folder, grace_s=GRACE_S, first=first)
        text += "".join(_NODE.format(name=n, host=host, port=p) for n, p in zip(self.names, ports[1:], strict=True))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        for name in ("state", *self.names):
            (self.folder / name).mkdir()
        for number in range(4):
            (self.folder / f"gpu{number}").touch()

    def _idle(self):
        said = subprocess.run(
            ["sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D"], env=self.environ, capture_output=True, check=False
        )
        return int(said.stdout or 0)

    def close(self):
        self._keeper.stdin.close()
        self._keeper.wait()

    def call(self, *command, check=True, **environ):
        """Run a command that talks to this cluster, in the project; its output."""
        done = self.run(*command, **environ)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def run(self, *command, stdin=None, timeout_s=60, **environ):
        """Run a command that talks to this cluster, in the project; the finished process."""
        return subprocess.run(
            [str(part) for part in command],
            env=self.environ | environ,
            input=stdin,
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=timeout_s,
            check=False,
        )

    def submit(self, script, *arguments, options=(), **environ):
        """Submit a script, a path or a text that starts with `#!`; its job id. The output goes to `output`."""
        log = f"--output={self.folder}/%j.out"
        if str(script).startswith("#!"):
            path = self.folder / f"{time.monotonic_ns()}.sh"
            path.write_text(script)
            script = path
        return self.call("sbatch", "--parsable", log, *options, script, *arguments, **environ)

    def facts(self, job):
        """What `scontrol show job` tells of a job or an array task, `7_2`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", job)))

    def state(self, job):
        return self.facts(job)["JobState"]

    def restarts(self, job):
        return int(self.facts(job)["Restarts"])

    def exit_code(self, job):
        return int(self.facts(job)["ExitCode"].split(":")[0])

    def wait(self, job, *states, timeout_s=200):
        """Wait until a job is in one of the states, or has ended; fails with its output where it ends in another."""
        self._wait_for(lambda: self.state(job) in (states or ENDED) + ENDED, timeout_s, f"job {job} stays as it is")
        found = self.facts(job)
        if states and found["JobState"] not in states:
            raise AssertionError(
                f"job {job} is {found['JobState']} ({found['Reason']}), not {' or '.join(states)}; exit code "
                f"{found['ExitCode']}, {found['Restarts']} restarts\n{self.output(job)}\n{self._log_of(found['JobId'])}"
            )
        return True

    def _log_of(self, job):
        """Say what the daemons told of a job."""
        lines = [line for file in self.folder.glob("*.log") for line in file.read_text().splitlines()]
        return "\n".join(line for line in lines if job in line)

    def start_now(self, job, restarts=1):
        """Start a job that was requeued so often, and that SLURM lets wait for 2 minutes, once it waits so."""
        self._wait_for(
            lambda: (self.state(job), self.restarts(job)) == ("PENDING", restarts), 100, f"job {job} is not requeued"
        )
        mark = f"slurmstepd: [{self.facts(job)['JobId']}."
        self._wait_for(lambda: not _any_process(mark), 60, f"job {job} has not ended")  # its end would be the next's
        time.sleep(2)  # slurmd refuses a credential of the second in which it revoked the last: "credential revoked"
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def requeue_now(self, job):
        """End a job, whatever it does, and start it again."""
        restarts = self.restarts(job) + 1
        self.call("scontrol", "requeue", job)
        self.start_now(job, restarts)

    def cancel(self, job):
        self.call("scancel", job)

    def output(self, job):
        """All that a job has printed so far."""
        file = self.folder / f"{self.facts(job)['JobId']}.out"
        return file.read_text() if file.exists() else ""

    def _wait_for(self, condition, timeout_s, otherwise):
        until = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > until or self._keeper.poll() is not None:
                logs = "\n".join(file.read_text()[-2000:] for file in self.folder.glob("*.log"))
                raise AssertionError(f"{otherwise} after {timeout_s} s\n{self.call('squeue', check=False)}\n{logs}")
            time.sleep(0.1)


def _free_ports(number):
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _any_process(beginning):
    """Tell whether a process runs whose command line begins so."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if entry.read_bytes().decode(errors="replace").startswith(beginning):
                return True
    return False


def _keep(folder, *nodes):
    """Start the daemons; when the pipe from the session closes, end them and all that they have started, and clean up.

    What a daemon leaves behind, steps and tasks, becomes a child of this process and not of the system's first.
    """
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    for name, command in {"ctld": ["slurmctld", "-i"], **{node: ["slurmd", "-N", node] for node in nodes}}.items():
        with (Path(folder) / f"{name}.log").open("wb") as log:
            subprocess.Popen([*command, "-D"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # no zombies stay; set now, for what has been started would inherit it
    sys.stdin.read()
    while left := _descendants(os.getpid()):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _descendants(root):
    """Living processes below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(entry.name)] = int(parent)
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


if __name__ == "__main__":
    _keep(*sys.argv[1:])
