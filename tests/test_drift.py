"""The drift monitor inside Lightning, on several ranks."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distnorm import SyncBatchNorm, collectives
from distnorm.drift.monitor import DriftMonitor
from distnorm.launch.trainer import make_ddp
from distnorm.norms import pooling
from tests import ranks, reference

pytestmark = pytest.mark.unit


class Memory(DummyLogger):
    """A logger that remembers."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step):
        assert step not in self.rows, "two rows for one step"
        self.rows[step] = metrics


class Task(pl.LightningModule):
    """Two watched layers of given kinds, and one without running statistics; hooks of its own note what they saw."""

    def __init__(self, kinds):
        super().__init__()
        image, flat = (NORMS[kind] for kind in kinds)
        self.model = nn.Sequential(
            nn.Conv2d(2, 3, 2),
            nn.BatchNorm2d(3) if kinds[0] == "local" else image(3),
            nn.Flatten(),
            nn.Linear(12, 5),
            flat(5, momentum=0.3),
            nn.BatchNorm1d(5, track_running_stats=False),
        )
        self.seen = {name: [] for name in ("1", "4")}
        for name, steps in self.seen.items():
            self.model[int(name)].register_forward_pre_hook(self.noting(steps))

    @staticmethod
    def noting(steps):
        return lambda layer, args: steps.append(
            [t.detach().double().numpy().copy() for t in (args[0], layer.running_mean, layer.running_var)]
        )

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == getattr(self, "fail_at", None):
            raise RuntimeError("told to")
        return self.model(batch[0]).square().mean() + self.model[3].weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


NORMS = {
    "local": nn.BatchNorm1d,
    "world": SyncBatchNorm,
    "pairs": lambda channels, **options: SyncBatchNorm(channels, sync_ranks=2, **options),
    "outer": lambda channels, **options: SyncBatchNorm(channels, group_ranks=(0, 3), **options),
}


def train(kinds, interval=2, steps=6, batch=6, shift=0.0, fail_at=None, **options):
    """Body: what the monitor logged, what the task's own hooks saw, gathers by step, hooks left, the worst layer."""
    task, memory, monitor = Task(kinds), Memory(), DriftMonitor(interval)
    task.fail_at = fail_at
    gathers, original = [], collectives.gather

    def gather(values, group, what):
        gathers.extend([task.trainer.global_step] * (what == "the drift monitor"))
        return original(values, group, what)

    world = collectives.world_size()
    several = {"strategy": make_ddp(60), "plugins": [TorchElasticEnvironment()]} if world > 1 else {}
    x = torch.randn(steps * batch * options.get("accumulate_grad_batches", 1), 2, 3, 3) + shift * collectives.rank()
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, max_steps=steps, logger=[memory], callbacks=[monitor],
        use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **several, **options,
    )  # fmt: skip
    collectives.gather = gather
    try:
        trainer.fit(task, DataLoader(TensorDataset(x), batch_size=batch))
    except RuntimeError as error:
        if "told to" not in str(error):
            raise
    finally:
        collectives.gather = original
    hooks = [len(task.model[n]._forward_pre_hooks) - 1 for n in (1, 4)]
    worst = monitor.worst and (monitor.worst.value, monitor.worst.layer)
    return memory.rows, task.seen, gathers, hooks, worst


def expected(found, layer, step, blocks, momentum):
    """Mean and worst channel of the excess over blocks of ranks, from what every rank's hooks saw."""
    excess_BC = []
    for block in blocks:
        inputs, means, variances = zip(*(found[rank][1][layer][step - 1] for rank in block), strict=True)
        excess_BC.append(reference.excess_jeffreys(inputs, means[0], variances[0], momentum))
    return np.mean(excess_BC, 0).mean(), np.mean(excess_BC, 0).max()


ALONE, PAIR = [[0], [1]], [[0, 1]]
FOUR = [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("kinds", "world", "blocks"),
    [
        (("local", "local"), 2, (ALONE, ALONE)),
        (("world", "world"), 2, (PAIR, PAIR)),
        (("local", "world"), 2, (ALONE, PAIR)),
        (("world", "local"), 2, (PAIR, ALONE)),
        (("pairs", "world"), 4, ([[0, 1], [2, 3]], FOUR)),
        (("outer", "world"), 4, ([[0, 3], [1], [2]], FOUR)),
    ],
    ids=str,
)
def test_every_layer_is_measured_once_an_interval_with_at_most_one_gather(kinds, world, blocks):
    found = ranks.run(train, kinds, world=world)
    rows, _, _, _, worst = found[0]
    assert sorted(rows) == [2, 4, 6]
    for step, row in rows.items():
        keys = {f"drift/{layer}/{key}" for layer in ("1", "4", "worst") for key in ("jeffreys", "jeffreys_max")}
        assert row.keys() == keys - {"drift/worst/jeffreys_max"}
        for layer, shared, momentum in zip(("1", "4"), blocks, (0.1, 0.3), strict=True):
            ours = row[f"drift/{layer}/jeffreys"], row[f"drift/{layer}/jeffreys_max"]
            assert ours == pytest.approx(expected(found, layer, step, shared, momentum), rel=1e-4, abs=1e-5)
        assert row["drift/worst/jeffreys"] == max(row[f"drift/{layer}/jeffreys"] for layer in ("1", "4"))
    by_layer = {layer: np.mean([row[f"drift/{layer}/jeffreys"] for row in rows.values()]) for layer in ("1", "4")}
    assert worst == (pytest.approx(max(by_layer.values())), max(by_layer, key=by_layer.get))
    for rank, (own_rows, _, gathers, hooks, own_worst) in enumerate(found):
        assert gathers == ([] if set(kinds) == {"world"} else [2, 4, 6])
        assert hooks == [0, 0]
        assert rank == 0 or (own_rows, own_worst) == ({}, None)


def train_summing(kinds):
    """Body: as in a world of more than 16 ranks, where a layer sums and has no rank's moments."""
    largest, pooling.GATHER_UP_TO = pooling.GATHER_UP_TO, 1
    try:
        return train(kinds)
    finally:
        pooling.GATHER_UP_TO = largest


@pytest.mark.parametrize(
    ("kinds", "world", "blocks"),
    [(("world", "world"), 2, (PAIR, PAIR)), (("pairs", "world"), 4, ([[0, 1], [2, 3]], FOUR))],
)
def test_layers_that_sum_join_the_gather(kinds, world, blocks):
    found = ranks.run(train_summing, kinds, world=world)
    rows, _, gathers, _, _ = found[0]
    assert gathers == sorted(rows) == [2, 4, 6]
    for step, row in rows.items():
        for layer, shared, momentum in zip(("1", "4"), blocks, (0.1, 0.3), strict=True):
            ours = row[f"drift/{layer}/jeffreys"], row[f"drift/{layer}/jeffreys_max"]
            assert ours == pytest.approx(expected(found, layer, step, shared, momentum), rel=1e-4, abs=1e-5)


def test_a_single_process_compares_with_running_statistics_and_with_no_rank():
    found = train(("local", "world"))
    assert sorted(found[0]) == [2, 4, 6]
    for step, row in found[0].items():
        for layer, momentum in (("1", 0.1), ("4", 0.3)):
            mean, _ = expected([found], layer, step, [[0]], momentum)
            assert row[f"drift/{layer}/jeffreys"] == pytest.approx(mean, rel=1e-3)
        assert not any("between_ranks" in key for key in row)


def ratios(rows, layer="1"):
    key = f"drift/{layer}/between_ranks"
    return {step: row[key] for step, row in rows.items() if key in row}


@pytest.mark.parametrize("kind", ["local", "world"])
def test_ranks_are_compared_from_the_fifth_measurement_on_and_sorted_shards_stand_out(kind):
    shuffled, sorted_ = (ranks.run(train, (kind, kind), 2, 16, 32, shift, world=2)[0][0] for shift in (0.0, 2.0))
    assert sorted(ratios(shuffled)) == sorted(ratios(sorted_, "4")) == [10, 12, 14, 16]
    assert ratios(sorted_)[16] > 20
    assert ratios(shuffled)[16] < 10
    assert sorted_[16]["drift/worst/between_ranks"] == max(ratios(sorted_)[16], ratios(sorted_, "4")[16])


def test_under_four_samples_no_divergence_is_logged():
    rows = ranks.run(train, ("local", "world"), 1, 5, 2, world=2)[0][0]
    assert all("drift/1/jeffreys" not in row and "drift/4/jeffreys" in row for row in rows.values())
    assert "drift/1/between_ranks" in rows[5]


def test_the_hooks_are_gone_after_a_training_that_failed():
    rows, seen, _, hooks, _ = train(("local", "local"), fail_at=3)
    assert (sorted(rows), len(seen["1"]), hooks) == ([2], 3, [0, 0])


@pytest.mark.parametrize("interval", [1, 2])
def test_accumulated_batches_are_measured_once_an_optimizer_step(interval):
    rows, seen, *_ = train(("local", "local"), interval, accumulate_grad_batches=2)
    assert sorted(rows) == list(range(interval, 7, interval))
    assert len(seen["1"]) == 12
