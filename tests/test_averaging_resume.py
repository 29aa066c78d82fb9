"""Checkpoints of a training that averages its weights: both states, each rank's own statistics of both, and back."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, WeightAveraging

from distnorm.population import own_running_stats
from tests import ranks
from tests.averaged import DECAY, ORDERS, Averaged, ema_of, fit, weights_of
from tests.test_callbacks import fit as fit_without
from tests.test_callbacks import spec_of

pytestmark = pytest.mark.unit


class SaveAtValidations(Callback):
    """Saves when a validation ends, before any other callback has seen the end."""

    def __init__(self, path):
        self._path = path

    def on_validation_end(self, trainer, pl_module):
        """Save."""
        trainer.save_checkpoint(self._path)


def saved_early(path, order):
    averaging = EMAWeightAveraging(decay=DECAY)
    task = Averaged()
    task.configure_callbacks = lambda: [averaging] if order == "after" else []
    listed = [averaging] if order == "before" else []
    fit_without(spec_of("pooled"), task, SaveAtValidations(path), *listed, max_steps=4)
    plain, _ = fit_without(spec_of("pooled"), Averaged(), max_steps=4)
    return task.steps, task.losses == plain.losses


@pytest.mark.parametrize("order", ORDERS)
def test_a_checkpoint_of_a_validations_end_has_each_ranks_own_statistics(tmp_path, order):
    found = ranks.run(saved_early, str(tmp_path / "early.ckpt"), order, world=2)
    entry = torch.load(tmp_path / "early.ckpt", weights_only=True)["distnorm"]
    for rank, (steps, same) in enumerate(found):
        assert same
        own, held = entry["rank_statistics"][rank], entry["average_statistics"][rank]
        assert all(torch.equal(own[f"model.{key}"], value) for key, value in steps[-1][1].items())
        expected = ema_of([statistics["1.running_mean"] for _, statistics in steps])[-1]
        torch.testing.assert_close(held["model.1.running_mean"].double(), expected, rtol=1e-5, atol=1e-6)


class Starts(Callback):
    """What the trained weights and the average have when training starts, on this rank."""

    def on_train_start(self, trainer, pl_module):
        """Look."""
        average = next((c._average_model for c in trainer.callbacks if isinstance(c, WeightAveraging)), None)
        models = [pl_module, *([average.module] if average else [])]
        self.found = [(weights_of(model), own_running_stats(model)) for model in models]
        self.updates = int(average.n_averaged) if average else None


def resumed(path, order, averages):
    starts = Starts()
    task = Averaged()
    averaging = EMAWeightAveraging(decay=DECAY) if averages else None
    fit_without(spec_of("pooled"), task, *[c for c in (averaging, starts) if c], ckpt_path=path, max_steps=6)
    return starts.found, starts.updates


def saves(folder, averages):
    task, _ = fit("pooled", EMAWeightAveraging(decay=DECAY) if averages else None, "before", folder=folder, max_steps=5)
    return task.steps


@pytest.mark.parametrize("world", [1, 2])
def test_both_states_come_back_on_resume(tmp_path, world):
    """Each rank's own statistics too, of the trained weights and of the average; in the middle of an epoch."""
    steps = ranks.run(saves, str(tmp_path), True, world=world)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for rank, (found, updates) in enumerate(
        ranks.run(resumed, str(tmp_path / "last.ckpt"), "before", True, world=world)
    ):
        (weights, own), (average, averages_own) = found
        assert torch.equal(weights, steps[rank][-1][0])
        assert all(torch.equal(own[f"model.{key}"], value) for key, value in steps[rank][-1][1].items())
        assert torch.equal(
            average,
            torch.cat(
                [
                    stored["state_dict"][f"model.{name}"].double().flatten()
                    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
                ]
            ),
        )
        assert updates == 5
        held = ema_of([statistics["1.running_mean"] for _, statistics in steps[rank]])[-1]
        torch.testing.assert_close(averages_own["model.1.running_mean"].double(), held, rtol=1e-5, atol=1e-6)


def test_on_another_number_of_ranks_both_start_from_what_was_pooled(tmp_path):
    steps = ranks.run(saves, str(tmp_path), True, world=2)
    [((weights, own), (_, averages_own)), updates] = ranks.run(
        resumed, str(tmp_path / "last.ckpt"), "before", True, world=1
    )[0]
    assert torch.equal(weights, steps[0][-1][0])
    assert updates == 5
    for statistics, of in (
        (own, lambda values: values[-1].double()),
        (averages_own, lambda values: ema_of(values)[-1]),
    ):
        means = torch.stack([of([each["1.running_mean"] for _, each in rank]) for rank in steps])
        torch.testing.assert_close(statistics["model.1.running_mean"].double(), means.mean(0), rtol=1e-5, atol=1e-6)


def test_training_resumes_with_the_trained_weights_where_nothing_is_averaged_now(tmp_path, caplog):
    steps = ranks.run(saves, str(tmp_path), True, world=1)
    [(weights, own)], _ = resumed(str(tmp_path / "last.ckpt"), "before", False)
    assert torch.equal(weights, steps[0][-1][0])
    assert torch.equal(own["model.1.running_mean"], steps[0][-1][1]["1.running_mean"])
    assert (
        caplog.text.count("training continues with the trained weights, without an average. To keep it, use trai") == 1
    )


def test_an_average_begins_with_the_weights_of_a_checkpoint_without_one(tmp_path):
    steps = ranks.run(saves, str(tmp_path), False, world=1)
    [(weights, own), (average, averages_own)], updates = resumed(str(tmp_path / "last.ckpt"), "before", True)
    assert updates == 0
    assert torch.equal(average, weights)
    assert torch.equal(average, steps[0][-1][0])
    assert own.keys() == averages_own.keys()
    assert all(torch.equal(own[key], value) for key, value in averages_own.items())
