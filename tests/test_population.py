"""Pooled statistics: right between ranks, for evaluation and checkpoints only (design: contract line 12)."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from distnorm import collectives, convert, decide, evaluation_statistics, pool_running_stats
from distnorm.callbacks import EvaluationStatistics
from distnorm.launch.trainer import make_ddp
from distnorm.population import pooled
from tests import ranks, reference

pytestmark = pytest.mark.unit


def two_layers():
    torch.manual_seed(collectives.rank())
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    model[0].running_mean.copy_(torch.randn(3))
    model[0].running_var.copy_(torch.rand(3) + 0.5)
    model[0].num_batches_tracked.fill_(5)
    model[2].num_batches_tracked.fill_(5 if collectives.rank() else 0)
    model[2].running_mean.fill_(float(collectives.rank()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with evaluation_statistics(model) as inside:
        swapped = {key: value.clone() for key, value in model.state_dict().items()}
    unchanged = all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return before, dict(inside), swapped, unchanged


@pytest.mark.parametrize("world", [1, 2, 4])
def test_pooled_is_the_mixture_of_the_ranks(world):
    found = ranks.run(two_layers, world=world)
    means = np.stack([before["0.running_mean"].double().numpy() for before, *_ in found])
    variances = np.stack([before["0.running_var"].double().numpy() for before, *_ in found])
    mean, var = reference.pooled(means, variances)
    for _, inside, swapped, unchanged in found:
        np.testing.assert_allclose(inside["0.running_mean"], mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(inside["0.running_var"], var, rtol=1e-6)
        assert torch.equal(swapped["0.running_var"], inside["0.running_var"])
        assert unchanged
        # A rank that has seen no batch has nothing to say: the others' mean stands.
        others = np.mean(range(1, world)) if world > 1 else 0.0
        np.testing.assert_allclose(inside["2.running_mean"], others, rtol=1e-6)


def far_apart():
    model = nn.Sequential(nn.BatchNorm1d(1))
    model[0].running_mean.fill_(4.0 * collectives.rank())
    model[0].num_batches_tracked.fill_(1)
    return pool_running_stats(model)["0.running_var"].item()


def test_ranks_at_0_and_4_pool_to_variance_5():
    assert ranks.run(far_apart, world=2) == [5.0, 5.0]


class Shifted(pl.LightningModule):
    """Rank 0 draws N(0, 1), rank 1 draws N(4, 1), through one local batch norm, under two names."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        self.alias = self.model[0]

    def training_step(self, batch, batch_idx):
        x = torch.randn(256, 2) + 4 * self.global_rank
        return self.model(x).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen = (self.model[0].running_mean.clone(), self.model[0].running_var.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)

    def train_dataloader(self):
        return DataLoader(range(100), batch_size=1)

    def val_dataloader(self):
        return DataLoader(range(1), batch_size=1)


class Spy(Callback):
    """What evaluation saw, and what training had left, at each validation."""

    def __init__(self):
        self.history = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.start = module.model[0].running_mean.clone()

    def on_validation_end(self, trainer, module):
        self.history.append(module.seen)


def validate_and_save_every_step(folder, steps, ckpt_path=None, validations=1):
    task = Shifted()
    conversion = convert(task.model, decide(256, 2, kind="batch"))
    spy = Spy()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=make_ddp(60),
        plugins=[TorchElasticEnvironment()],
        max_steps=steps,
        val_check_interval=1,
        num_sanity_val_steps=0,
        limit_val_batches=validations,
        use_distributed_sampler=False,
        callbacks=[
            spy,
            EvaluationStatistics(conversion.spec),
            ModelCheckpoint(folder, every_n_train_steps=1, save_last=True),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, ckpt_path=ckpt_path)
    own = (task.model[0].running_mean.clone(), task.model[0].running_var.clone())
    return spy.history[-1] if validations else None, own, spy.start


def test_evaluation_and_checkpoint_hold_variance_5_and_the_ranks_their_own(tmp_path):
    found = ranks.run(validate_and_save_every_step, str(tmp_path), 100, world=2)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for rank, ((seen_mean, seen_var), (own_mean, own_var), _) in enumerate(found):
        assert seen_var.tolist() == pytest.approx([5, 5], rel=0.05)
        assert seen_mean.tolist() == pytest.approx([2, 2], abs=0.1)
        assert own_var.tolist() == pytest.approx([1, 1], rel=0.1)
        assert own_mean.tolist() == pytest.approx([4 * rank] * 2, abs=0.1)
        mine = stored["distnorm"]["rank_statistics"][rank]
        assert torch.equal(mine["model.0.running_mean"], own_mean)
        for name in ("model.0", "alias"):
            assert torch.equal(stored["state_dict"][f"{name}.running_var"], seen_var)
            assert torch.equal(stored["state_dict"][f"{name}.running_mean"], seen_mean)

    resumed = ranks.run(validate_and_save_every_step, str(tmp_path / "on"), 101, str(tmp_path / "last.ckpt"), world=2)
    for rank, (_, _, start) in enumerate(resumed):
        assert torch.equal(start, found[rank][1][0]), "training did not go on with the rank's own statistics"


def test_no_broadcast_of_rank_0s_buffers_reaches_the_training(tmp_path):
    """A validation in between would hide DDP's broadcast: it skips the forward after one without gradients."""
    for rank, (_, (mean, _), _) in enumerate(
        ranks.run(validate_and_save_every_step, str(tmp_path), 60, None, 0, world=2)
    ):
        assert mean.tolist() == pytest.approx([4 * rank] * 2, abs=0.2)


def test_more_ranks_than_the_checkpoint_has_start_from_the_pooled_statistics(tmp_path):
    ranks.run(validate_and_save_every_step, str(tmp_path), 3, world=2)
    path = tmp_path / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    stored["distnorm"]["rank_statistics"] = stored["distnorm"]["rank_statistics"][:1]
    torch.save(stored, path)
    for _, _, start in ranks.run(validate_and_save_every_step, str(tmp_path / "on"), 4, str(path), world=2):
        assert torch.equal(start, stored["state_dict"]["model.0.running_mean"])


def count_gathers():
    calls = []
    original = collectives.gather

    def gather(values, group, what):
        calls.append(what)
        return original(values, group, what)

    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(5)])
    from distnorm import population

    population.collectives.gather = gather
    try:
        pool_running_stats(model)
        pool_running_stats(nn.Sequential(nn.GroupNorm(1, 3)))
    finally:
        population.collectives.gather = original
    return calls


def test_all_layers_are_gathered_at_once_and_none_for_a_model_without():
    assert ranks.run(count_gathers, world=2) == [["the gathering of running statistics"]] * 2


def test_rows_of_time_steps_pool_row_by_row_over_the_ranks_that_saw_them():
    generator = torch.Generator().manual_seed(3)
    counts = [torch.tensor([5, 5, 0]), torch.tensor([1, 0, 0]), torch.tensor([900, 3, 0])]
    ranks_statistics = [
        {
            "running_mean": torch.randn(3, 4, generator=generator, dtype=torch.float64),
            "running_var": torch.rand(3, 4, generator=generator, dtype=torch.float64),
            "num_batches_tracked": count,
        }
        for count in counts
    ]
    found = pooled(ranks_statistics)
    for row, saw in enumerate([[0, 1, 2], [0, 2], [0, 1, 2]]):
        means, variances = (
            np.stack([ranks_statistics[rank][key][row].numpy() for rank in saw])
            for key in ("running_mean", "running_var")
        )
        mean, var = reference.pooled(means, variances)
        np.testing.assert_allclose(found["running_mean"][row], mean, rtol=1e-12)
        np.testing.assert_allclose(found["running_var"][row], var, rtol=1e-12)
    assert found["num_batches_tracked"].tolist() == [900, 5, 0]


def test_one_count_holds_for_all_rows():
    rows = {"running_mean": torch.tensor([[0.0], [2.0]]), "running_var": torch.ones(2, 1)}
    found = pooled(
        [
            {**rows, "num_batches_tracked": torch.tensor(4)},
            {**rows, "running_mean": torch.tensor([[4.0], [4.0]]), "num_batches_tracked": torch.tensor(70)},
        ]
    )
    assert found["running_mean"].tolist() == [[2], [3]]
    assert found["running_var"].tolist() == [[5], [2]]
    assert int(found["num_batches_tracked"]) == 70
