"""The scripts of slurm/ on a real SLURM: what they start, pass on and requeue, and that training is the same there."""

import csv
import itertools
import json
import textwrap
from pathlib import Path

import pytest
import torch

from distnorm.launch.run_dir import RunFolder
from distnorm.launch.slurm import submit
from tests import runs

pytestmark = pytest.mark.run

ON_CPUS = ("--nodes=1", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
ON_TWO = ("--nodes=2", *ON_CPUS[1:])
TRAINING = (*runs.QUICK, "drift=none", "norm=sync", "data.device_batch=64", "trainer.max_steps=6")
ODD = ["norm.layers={layer4.*: group, 'a b': sync}", 'x=$HOME `id` "q" \\ * ;', "é", ""]


@pytest.fixture
def stub(slurm, tmp_path):
    """A `python` that notes what it is given, and ends as told; gives what a job with it did."""
    python = tmp_path / "python"
    python.write_text(
        textwrap.dedent(f"""\
        #!/usr/bin/env bash
        if [[ "$*" == *doctor* ]]; then echo "doctor: $*"; exit 1; fi
        attempt="${{SLURM_ARRAY_TASK_ID:-0}}.${{SLURM_RESTART_COUNT:-0}}"
        printf '%s\\0' "$@" > {tmp_path}/arguments."$attempt.$SLURM_PROCID"
        cores="$SLURM_CPUS_PER_TASK cores, $OMP_NUM_THREADS threads"
        echo "rank $SLURM_PROCID at $MASTER_ADDR:$MASTER_PORT, $cores, attempt $attempt"
        [[ $SLURM_PROCID == 0 ]] && exit "$(cat {tmp_path}/code."$attempt" 2>/dev/null || echo 0)"
        exit 0
        """)
    )
    python.chmod(0o755)

    def start(script, *arguments, codes, options=ON_CPUS):
        for attempt, code in codes.items():
            (tmp_path / f"code.{attempt}").write_text(str(code))
        return slurm.submit(f"slurm/{script}.sbatch", *arguments, options=options, PYTHON=str(python))

    start.arguments = lambda file: (tmp_path / f"arguments.{file}").read_text().split("\0")[:-1]
    return start


def test_all_arguments_reach_every_rank_as_they_were_typed(slurm, stub):
    job = stub("train", *ODD, codes={}, options=[*ON_TWO, "--cpus-per-task=3"])
    slurm.wait(job, "COMPLETED")
    for rank in range(2):
        assert stub.arguments(f"0.0.{rank}") == ["-u", "train.py", "trainer=slurm", *ODD]
        assert f"rank {rank} at 127.0.0.1:{10000 + int(job) % 20000}, 3 cores, 3 threads" in slurm.output(job)


@pytest.mark.parametrize("script", ["train", "torchrun"])
def test_a_failure_keeps_its_code_and_the_doctor_has_the_last_word(slurm, stub, script):
    job = stub(script, "a b", codes={"0.0": 7})
    slurm.wait(job, "FAILED")
    assert slurm.exit_code(job) == 7
    assert slurm.output(job).splitlines()[-1] == "doctor: -m distnorm.cli doctor --after a b"


def test_a_run_that_was_told_to_stop_and_saved_is_not_called_ill(slurm, stub):
    job = stub("train", codes={"0.0": 75})
    slurm.wait(job, "FAILED")
    assert slurm.exit_code(job) == 75
    assert "doctor" not in slurm.output(job)


def test_code_76_makes_the_script_requeue_the_job_whose_log_goes_on(slurm, stub):
    job = stub("train", "seed=1", codes={"0.0": 76})
    slurm.start_now(job, restarts=1)
    slurm.wait(job, "COMPLETED")
    assert [line for line in slurm.output(job).splitlines() if line.startswith("rank")] == [
        f"rank 0 at 127.0.0.1:{10000 + int(job) % 20000}, 1 cores, 1 threads, attempt 0.{attempt}"
        for attempt in range(2)
    ]
    assert stub.arguments("0.1.0") == ["-u", "train.py", "trainer=slurm", "seed=1"]


def test_code_76_requeues_that_task_of_an_array_alone(slurm, stub):
    job = stub("sweep", "norm=batch,sync", codes={"0.0": 76}, options=[*ON_CPUS, "--array=0-1"])
    slurm.start_now(f"{job}_0", restarts=1)
    for task in range(2):
        slurm.wait(f"{job}_{task}", "COMPLETED")
        assert slurm.restarts(f"{job}_{task}") == 1 - task
    assert stub.arguments("1.0.0") == ["-u", "train.py", "-m", "trainer=slurm", "norm=batch,sync"]


def test_a_search_is_one_task_that_code_76_requeues(slurm, stub):
    job = stub("search", *ODD, codes={"0.0": 76}, options=["--gpus-per-node=0", "--cpus-per-task=1"])
    slurm.start_now(job, restarts=1)
    slurm.wait(job, "COMPLETED")
    assert stub.arguments("0.1.0") == ["-u", "train.py", "trainer.ranks_from=local", *ODD]
    assert slurm.output(job).count("rank 0 at") == 2


@pytest.mark.slow
def test_a_task_of_an_array_conducts_a_search(slurm, tmp_path):
    typed = ["search=random", "search.trials=2", "search.name=lr", "search.tiers=[[optimizer.lr]]"]
    short = ["trainer.max_steps=-1", "trainer.max_epochs=1", "model.widths=[8,8,8]"]
    short += ["+trainer.lightning.limit_train_batches=3", "+trainer.lightning.limit_val_batches=1"]
    job = slurm.submit(
        "slurm/search.sbatch",
        *(*runs.QUICK, "drift=none", *short, *typed, f"runs_dir={tmp_path}"),
        options=["--gpus-per-node=0", "--cpus-per-task=1", "--array=0-0"],
    )
    slurm.wait(f"{job}_0", "COMPLETED")
    rows = list(csv.DictReader((tmp_path / "search-lr" / "results.csv").open()))
    assert sorted((row["trial"], row["state"]) for row in rows) == [("0", "complete"), ("1", "complete")]


def same(run, result, expected):
    """Hold a run's checkpoint and result against another's, bit for bit."""
    state, other = (
        torch.load(folder.checkpoints / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, expected)
    )
    assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert json.loads(run.result.read_text())["metrics"] == result["metrics"]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run of two local ranks, and its result."""
    folder = tmp_path_factory.mktemp("local") / "run"
    return RunFolder(folder), runs.in_pool(folder, 2, *TRAINING)[0]


@pytest.mark.parametrize("script", ["train", "torchrun"])
def test_two_nodes_train_what_two_local_ranks_train_bit_for_bit(slurm, local, tmp_path, script):
    job = slurm.submit(f"slurm/{script}.sbatch", *TRAINING, f"runs_dir={tmp_path}", options=ON_TWO, RANKS_PER_NODE="1")
    slurm.wait(job, "COMPLETED")
    [folder] = tmp_path.iterdir()
    assert folder.name == f"slurm-{job}-0"
    same(RunFolder(folder), local[1], local[0])
    assert "2 CPU ranks on 2 nodes" in slurm.output(job)
    assert slurm.output(job).count("Result on the test set") == 1, "rank 0 alone has the console"
    assert (folder / "ranks" / "rank1.log").is_file()


def test_a_requeued_job_goes_on_in_its_folder_from_its_checkpoint(slurm, tmp_path):
    typed = [*TRAINING, "trainer.max_steps=-1", "trainer.max_epochs=4", "data.device_batch=120", f"runs_dir={tmp_path}"]
    job = slurm.submit("slurm/train.sbatch", *typed, options=ON_CPUS)
    run = RunFolder(tmp_path / f"slurm-{job}-0")
    runs.wait_for((run.checkpoints / "last.ckpt").is_file)
    run.stop.touch()  # too late for a run that is killed: it must not stop the next attempt
    slurm.requeue_now(job)
    slurm.wait(job, "COMPLETED")
    assert list(tmp_path.iterdir()) == [run.path]
    assert slurm.output(job).count(f"run       {run.path}") == 2
    assert f"resumed   from {run.checkpoints}/last.ckpt" in slurm.output(job)
    epochs = [row["epoch"] for row in runs.rows(run) if "val/loss" in row]
    assert epochs[-1] == 3
    assert 0 < epochs.count(0) < 3, "the first epoch was not trained again"
    assert not run.stop.exists()
    assert json.loads(run.result.read_text())["resumed_from"] == f"{run.checkpoints}/last.ckpt"


@pytest.mark.slow
def test_a_requeued_task_of_a_sweep_goes_on_with_all_its_ranks(slurm, tmp_path):
    lasting = ["trainer.max_steps=-1", "trainer.max_epochs=6", "data.device_batch=120", "norm=sync,batch"]
    options = [*ON_TWO, "--array=0"]
    job = slurm.submit("slurm/sweep.sbatch", *TRAINING[:-3], *lasting, f"runs_dir={tmp_path}", options=options)
    pattern = "sweep-*/jobs/norm=sync/checkpoints/last.ckpt"
    saved = runs.wait_for(lambda: next(tmp_path.glob(pattern), None))
    slurm.requeue_now(f"{job}_0")
    slurm.wait(f"{job}_0", "COMPLETED")
    run = RunFolder(saved.parents[1])
    assert json.loads(run.result.read_text())["world_size"] == 2
    assert json.loads(run.result.read_text())["resumed_from"] == str(saved)
    assert [row["epoch"] for row in runs.rows(run) if "val/loss" in row][-1] == 5
    assert "runs elsewhere" not in slurm.output(f"{job}_0")
    rows = list(csv.DictReader((run.path.parents[1] / "results.csv").open()))
    assert [(row["norm"], row["state"]) for row in rows] == [("sync", "done"), ("batch", "waiting")]


@pytest.mark.slow
def test_submit_starts_a_sweep_as_an_array_and_says_where_it_is(slurm, monkeypatch, tmp_path):
    for key, value in slurm.environ.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(runs.ROOT)
    grid = ["norm=batch,sync,group", "data.device_batch=64,128", "trainer.max_steps=2"]
    typed = [*TRAINING[:-3], *grid, f"runs_dir='{tmp_path}/with a blank'"]
    log = f"--output={slurm.folder}/%j.out"
    words = submit(typed, script="sweep", nodes="1", gpus_per_node="0", cpus_per_task="1", sbatch=[log])
    said = dict(line.split(maxsplit=1) for line in words.splitlines())
    for task in range(6):
        slurm.wait(f"{said['job']}_{task}", "COMPLETED", timeout_s=200)
    assert said["log"] == f"{slurm.folder}/{said['job']}.out"
    rows = list(csv.DictReader((Path(said["run"]) / "results.csv").open()))
    assert sorted(row["job"] for row in rows if row["state"] == "done") == list("012345")
    assert {(row["norm"], row["data.device_batch"]) for row in rows} == set(
        itertools.product(("batch", "sync", "group"), ("64", "128"))
    )
