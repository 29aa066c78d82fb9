"""How ranks end: no thread of a group outlives `end_ranks`, and none can abort a process that `end_process` ends."""

import atexit
import concurrent.futures
import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distnorm import GroupError, collectives
from distnorm.collectives import groups
from distnorm.launch import main
from tests import ranks, runs


def number_of_threads():
    return len(list(Path("/proc/self/task").iterdir()))


def exchange(world):
    """Make every kind of group, and use it."""
    collectives.gather(torch.zeros(3), collectives.members(None), "a layer of all ranks")
    collectives.gather(torch.zeros(3), collectives.members(1), "a layer of one rank")
    if world > 2:
        collectives.gather(torch.zeros(3), collectives.members(2), "a layer of two ranks")
    collectives.agree(None, "an agreement")
    collectives.start_vote(torch.tensor([0]), "a vote").wait()
    collectives.start_notice(torch.tensor([0]))[1].wait()


def counts_threads(rank, world, store, left, messages):
    torch.set_num_threads(1)
    model = torch.nn.parallel.DistributedDataParallel  # what it loads is no thread of the group
    before = number_of_threads()
    collectives.start_ranks(rank=rank, world_size=world, store_path=store, timeout_s=30)
    exchange(world)
    wrapped = model(torch.nn.Linear(3, 3))
    wrapped(torch.randn(2, 3)).sum().backward()
    during = number_of_threads()
    del wrapped
    if left == "by end_ranks":
        collectives.end_ranks()
    else:  # as a user's script does
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()
    messages.put((before, during, number_of_threads()))
    messages.close()
    messages.join_thread()


def joined(target, world, *arguments):
    """Run processes to their end; their exit codes."""
    processes = [ranks.context.Process(target=target, args=(r, world, *arguments)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


@pytest.mark.unit
@pytest.mark.parametrize(("world", "left"), [(2, "by end_ranks"), (4, "by end_ranks"), (2, "by the user")])
def test_no_thread_of_a_group_outlives_its_end(tmp_path, world, left):
    messages = ranks.context.Queue()
    assert joined(counts_threads, world, str(tmp_path / "store"), left, messages) == [0] * world
    for _ in range(world):
        before, during, after = messages.get(timeout=10)
        assert during > before
        assert after <= before + 1  # autograd's own stays


def ends_while_a_thread_waits(rank, world, store, way):
    """Give gloo's threads Python's lock only where this one waits, as on a machine that lets them wait for a core."""
    torch.set_num_threads(1)
    collectives.start_ranks(rank=rank, world_size=world, store_path=store, timeout_s=30)
    everyone = collectives.members(None)
    sys.setswitchinterval(0.3)
    started = [collectives.start_gather(torch.zeros(3), everyone, "x") for _ in range(40)]
    while started:
        started.pop(0).wait()
    if way == "end_process":
        collectives.end_process()
    collectives.end_ranks()
    ctypes.pythonapi.Py_Exit(0)  # the end of a script: multiprocessing's own processes are not taken down


@pytest.mark.parametrize("way", ["end_ranks", "end_process"])
def test_a_thread_that_still_waits_for_pythons_lock_aborts_no_process(tmp_path, way):
    for number in range(4):
        assert joined(ends_while_a_thread_waits, 2, str(tmp_path / f"store{number}"), way) == [0, 0]


def ends_early(rank, world, folder):
    def finish():
        time.sleep(0.3)
        (folder / "thread").touch()

    threading.Thread(target=finish).start()
    atexit.register((folder / "exit").touch)
    os.dup2(os.open(folder / "output", os.O_CREAT | os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stdout.write("written")
    collectives.end_process(3)


@pytest.mark.unit
def test_end_process_waits_runs_exit_functions_writes_and_has_the_code(tmp_path):
    assert joined(ends_early, 1, tmp_path) == [3]
    assert (tmp_path / "thread").exists()
    assert (tmp_path / "exit").exists()
    assert (tmp_path / "output").read_text() == "written"


def exits(rank, world, folder, code):
    os.dup2(os.open(folder / "output", os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["train.py", "trainer=cpu", "logger.mode=disabled", f"runs_dir={folder / 'runs'}"]

    def train(*_):
        collectives.start_ranks(rank=0, world_size=1, store_path=str(folder / "store"), timeout_s=30)
        sys.exit(code)

    main(train, config=runs.ROOT / "conf" / "train.yaml")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("code", "expected", "said"), [(None, 0, ""), (3, 3, ""), ("no such file", 1, "no such file\n")]
)
def test_what_a_rank_exits_with_is_what_python_would(tmp_path, code, expected, said):
    assert joined(exits, 1, tmp_path, code) == [expected]
    assert (tmp_path / "output").read_text().endswith(said)


def exchanges_over_a_destroyed_group():
    some = (0, 1, 2)  # no test adopts a group of these
    members = collectives.members(None, some)
    try:
        if collectives.rank() in some:
            dist.destroy_process_group(groups.group_of(members))
            collectives.gather(torch.zeros(3), members, "layer")
    except GroupError as error:
        return str(error)
    finally:  # on the rank outside too: all make it again together
        del groups._groups[some], groups._members[None, some, False]


@pytest.mark.unit
def test_a_destroyed_group_is_named_and_never_replaced_by_all_ranks():
    *messages, _ = ranks.run(exchanges_over_a_destroyed_group, world=4)
    for message in messages:
        assert "The process group of ranks (0, 1, 2) has been destroyed" in message
        assert "destroy_process_group() without arguments, after the last step" in message


@pytest.mark.run
def test_a_rank_of_a_run_is_not_taken_down_with_its_group_alive(tmp_path):
    command = [sys.executable, "-m", "tests.ends_well", "trainer=cpu_ddp", "logger.mode=disabled"]
    done = subprocess.run(
        [*command, f"runs_dir={tmp_path / 'runs'}"],
        env={**os.environ, "LEFT": str(tmp_path)},
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(file.name for file in tmp_path.glob("rank*")) == ["rank0.exit", "rank1.exit"]


def one_end(number, folder):
    """Run a quick benchmark of one row, to its end."""
    command = [sys.executable, "-m", "bench.sync_batchnorm", "--quick", "--rows", "16x64x8x8 contiguous"]
    command += ["--json", str(folder / f"{number}.json")]
    return subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_benchmarks_in_a_row_end_well(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # four ranks: more than most machines have idle cores
        ended = list(pool.map(one_end, range(50), [tmp_path] * 50))
    assert [done.stderr for done in ended if done.returncode] == []
    assert len(list(tmp_path.glob("*.json"))) == 50
