"""Ways in which the plain stack goes wrong without a word, each shown beside ours: that one fails, this one does not.

Numbered as they were found. 2, a requeue that deadlocks where ranks are skewed, has `test_preemption.py` and, on a real
SLURM, `test_campaign.py`: the plain stack's side of it is a hang.
"""

import contextlib
import importlib
import random
import subprocess
import sys
import time
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import distnorm
from distnorm import checkpoint, collectives, population
from distnorm.data.sampler import GlobalBatchSampler
from distnorm.drift import wandb_file
from distnorm.errors import ConfigError
from distnorm.launch import ranks as launch_ranks
from distnorm.launch import run_dir
from distnorm.launch.trainer import make_ddp
from distnorm.spec import NormSpec
from tests import interrupted, logged, ranks, runs

pytestmark = pytest.mark.unit


def _joined_statistics(make):
    """Body: one training step of a layer under DDP on N(0, 1) and N(4, 1); its running mean, or what it raised."""
    torch.manual_seed(collectives.rank())
    model = nn.Sequential(make(1))
    x_NCL = torch.randn(4000, 1, 1) + 4 * collectives.rank()
    try:
        DistributedDataParallel(model)(x_NCL).sum().backward()
    except ValueError as error:
        return str(error)
    return model[0].running_mean.item() / model[0].momentum


def test_1_synchronized_batch_norm_runs_on_the_cpu():
    plain = ranks.run(_joined_statistics, nn.SyncBatchNorm, world=2)
    assert all("SyncBatchNorm layers only work with GPU modules" in words for words in plain)
    ours = ranks.run(_joined_statistics, distnorm.SyncBatchNorm, world=2)
    assert ours == pytest.approx([2, 2], abs=0.1)


def test_3_a_requeued_jobs_ranks_have_the_folder_of_before(tmp_path):
    """Hydra's default, `outputs/${now}`, gave a requeued job and each rank another one."""
    settings = runs.composed("trainer=slurm", "trainer.accelerator=cpu", f"runs_dir={tmp_path}")
    job = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"}

    def folder(rank, **environ):
        found = launch_ranks.Ranks(2, 1, 2, rank, 0, "slurm", "cpu")
        return run_dir.locate(settings, found, job | environ).path

    assert len({folder(0), folder(1), folder(0, SLURM_RESTART_COUNT="1"), folder(1, SLURM_RESTART_COUNT="2")}) == 1
    assert folder(0, SLURM_JOB_ID="6") != folder(0)
    array = {"SLURM_ARRAY_JOB_ID": "5"}
    assert folder(0, **array, SLURM_ARRAY_TASK_ID="1") != folder(0, **array, SLURM_ARRAY_TASK_ID="2")


def _lr_of(run):
    """Body: what this rank would compose by itself, with a sweeper that draws; and what it reads in the run folder."""
    OmegaConf.register_new_resolver("draw", lambda: random.SystemRandom().random(), replace=True)
    return OmegaConf.create({"lr": "${draw:}"}).lr, run.read_settings().optimizer["lr"]


def test_4_ranks_of_a_sweeps_job_read_what_was_composed_once(tmp_path):
    """The plain stack composes anew on each rank: a sweeper that draws gives each another learning rate."""
    run = run_dir.RunFolder(tmp_path)
    run.write_settings(runs.composed("trainer=cpu_ddp", "optimizer.lr=0.257").with_batches(2))
    composed, read = zip(*ranks.run(_lr_of, run, world=2), strict=True)
    assert composed[0] != composed[1]
    assert read == (0.257, 0.257)


def test_5_one_task_for_two_devices_is_refused_where_half_the_data_went_unseen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = set(DistributedSampler(range(16), num_replicas=2, rank=0, shuffle=False))  # as Lightning shards it: 2 × 1
    assert len(seen) == 8
    alone = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0"}
    with pytest.raises(ConfigError, match="devices=2, and srun started 1 task"):
        launch_ranks.find(runs.composed("trainer.devices=2").trainer, alone)
    found = launch_ranks.find(runs.composed("trainer.devices=1").trainer, alone)
    sampler = GlobalBatchSampler(
        num_samples=16, device_batch=4, rank=found.rank, world_size=found.world_size, seed=0, shuffle=False
    )
    assert {sample for batch in sampler for _, sample in batch} == set(range(16))


class Notes(BoringModel):
    """Notes the samples that it was trained on, and saves and breaks off after some step."""

    def __init__(self, stop_at, path):
        super().__init__()
        self.seen, self._stop_at, self._path = [], stop_at, path

    def training_step(self, batch, batch_idx):
        self.seen += batch[:, 0].int().tolist()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx + 1 == self._stop_at:
            self.trainer.save_checkpoint(self._path)
            raise InterruptedError

    def train_dataloader(self):
        samples = torch.zeros(16, 32)
        samples[:, 0] = torch.arange(16)
        return DataLoader(samples, batch_size=2, shuffle=True)


def plain_samples(path, stop_at=None, resumed_from=None):
    """The samples of one epoch, or of its rest, as the plain stack deals them."""
    pl.seed_everything(0, verbose=False)
    module = Notes(stop_at, path)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    with contextlib.suppress(InterruptedError):
        trainer.fit(module, ckpt_path=resumed_from)
    return module.seen


def test_6_a_resumed_epoch_sees_every_sample_once(tmp_path):
    """The plain stack deals the rest of the epoch from a new shuffle's beginning: samples come twice, others never."""
    path = tmp_path / "plain.ckpt"
    plain = plain_samples(path, stop_at=3) + plain_samples(path, resumed_from=path)
    assert len(plain) == 16
    assert len(set(plain)) < 16
    small = ["data.device_batch=112", "trainer.max_epochs=1"]
    *_, first = interrupted.in_pool_drawing(tmp_path / "first", 1, *small, stop_at=3)
    *_, rest = interrupted.in_pool_drawing(
        tmp_path / "rest", 1, *small, f"ckpt_path={interrupted.last(tmp_path / 'first')}"
    )
    ours = [pair for drawn in (*first, *rest) for pair in drawn]
    assert len(first[0]) == 3 * 112
    assert len(ours) == len(set(ours)) == 8 * 112


class KeepsConfig(BoringModel):
    """As many a project's module does."""

    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters()


def test_7_a_checkpoint_loads_with_weights_only(tmp_path):
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(KeepsConfig(OmegaConf.create({"lr": 0.1})))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "plain.ckpt", weights_only=True)
    runs.in_pool(tmp_path / "run", 1)
    ours = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert NormSpec.from_dict(ours[checkpoint.ENTRY]["spec"])


PLAIN_WANDB = """
import sys, time
import wandb
run = wandb.init(mode="offline", dir=sys.argv[1], settings=wandb.Settings(silent=True, console="off"))
for step in range(30):
    run.log({"train/loss": step})
print("logged", flush=True)
time.sleep(60)
"""


FLUSHED_EVERY_S = 15


def kill_after_30_rows(process, folder, left):
    """Copy a run's wandb file as it is 2 s after its rows, which is what SIGKILL leaves."""
    with process:
        assert process.stdout.readline().startswith("logged")
        time.sleep(2)
        [file] = folder.glob("wandb/offline-*/*.wandb")
        copied = left / file.name
        copied.write_bytes(file.read_bytes())  # nothing that wandb's own process may add when it sees the kill
        process.kill()
    return copied


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Files of a plain run, of three the first that was not flushed yet, and of ours; the plain one's age."""
    ours = tmp_path_factory.mktemp("ours")
    mine = logged.start(ours, "offline", 30, "hang")
    for _ in range(3):  # wandb's own process may flush early on a loaded machine
        plain, started = tmp_path_factory.mktemp("plain"), time.monotonic()
        theirs = subprocess.Popen([sys.executable, "-c", PLAIN_WANDB, plain], stdout=subprocess.PIPE, text=True)
        file = kill_after_30_rows(theirs, plain, plain)
        age_s = time.monotonic() - started
        if len(file.read_bytes()) < 100:
            break
    return file, kill_after_30_rows(mine, ours / "run", ours / "run"), age_s


def losses(file):
    return [row for row in wandb_file.read(file).rows if "train/loss" in row]


def test_8_a_killed_run_keeps_its_numbers_in_wandbs_file(killed):
    plain, ours, age_s = killed
    if age_s < FLUSHED_EVERY_S:  # else, on a loaded machine, the plain one has been flushed by now
        assert len(plain.read_bytes()) < 100
    assert len(losses(ours)) == 30


def test_9_wandbs_file_is_read_without_wandbs_reader(killed):
    with pytest.raises(ImportError):
        importlib.import_module("wandb.sdk.internal.datastore")
    assert losses(killed[1])[0]["trainer/global_step"] == 10


def _running_means(options):
    """Body: the running mean after 20 steps under DDP on N(0, 1) and N(4, 1), as the next forward leaves it; pooled."""
    torch.manual_seed(collectives.rank())
    norm = nn.BatchNorm1d(1, momentum=None)
    model = DistributedDataParallel(norm, **options)
    for _ in range(20):
        model(torch.randn(500, 1) + 4 * collectives.rank()).sum().backward()
    before = norm.running_mean.item()
    model(torch.randn(500, 1) + 4 * collectives.rank())
    pooled = population.pool_running_stats(norm)
    return before, norm.running_mean.item(), pooled["running_mean"].item(), pooled["running_var"].item()


def test_10_every_ranks_statistics_count_where_ddp_keeps_rank_0s_alone():
    """Under DDP each forward begins from rank 0's, with one batch of the rank's own; of the pool, (2, 5) is true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, (_, plain, _, _) = ranks.run(_running_means, {}, world=2)
    assert plain == pytest.approx(4 / 21, abs=0.1)
    strategy = make_ddp(60)
    (_, first, mean, var), (_, second, _, _) = ranks.run(_running_means, strategy._ddp_kwargs, world=2)
    assert (first, second) == (pytest.approx(0, abs=0.1), pytest.approx(4, abs=0.1))
    assert (mean, var) == (pytest.approx(2, abs=0.1), pytest.approx(5, abs=0.2))
