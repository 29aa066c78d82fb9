"""Lightning's averages of the weights: what is evaluated, saved and left are they, with statistics of their own."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, WeightAveraging
from torch import nn

from distnorm import ConfigError
from distnorm.averaging import WeightAverage, sample_weights
from distnorm.drift.monitor import DriftMonitor
from distnorm.drift.shift import EvaluationShift
from distnorm.population import own_running_stats
from tests import ranks
from tests.averaged import DECAY, ORDERS, Averaged, ema_of, fit, weights_of
from tests.test_callbacks import fit as fit_without
from tests.test_callbacks import spec_of

pytestmark = pytest.mark.unit


class AtEpochs(WeightAveraging):
    """Averages the ends of epochs: after their validation, before their checkpoint."""

    def should_update(self, step_idx=None, epoch_idx=None):
        """Whether an epoch has ended."""
        return epoch_idx is not None


def whole(found, index):
    """What precise statistics should be at a validation: over all ranks' samples."""
    truth = np.concatenate([met[index][2].numpy() for met, *_ in found])
    return truth.mean(0), truth.var(0, ddof=1)


def precisely(folder, order):
    task, trainer = fit("precise", EMAWeightAveraging(decay=DECAY), order, folder=folder, max_steps=9)
    left = weights_of(task.model), own_running_stats(task.model), task.truth()
    plain, _ = fit("precise", None, order, Averaged(), max_steps=9)
    same = task.losses == plain.losses and all(
        torch.equal(a, b) for a, b in zip(task.running, plain.running, strict=True)
    )
    return task.met, task.steps, left, same, trainer.callback_metrics is not None


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_precise_statistics_are_those_of_the_averaged_weights(tmp_path, order, world):
    found = ranks.run(precisely, str(tmp_path), order, world=world)
    averages = ema_of([weights for weights, _ in found[0][1]])
    for number, step in enumerate((2, 4, 6, 8)):
        mean, var = whole(found, number)
        for met, *_ in found:
            weights, (seen_mean, seen_var), _ = met[number]
            torch.testing.assert_close(weights, averages[step - 1], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(seen_mean, mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(seen_var, var, rtol=1e-5)
            assert torch.equal(seen_mean, found[0][0][number][1][0]), "alike on all ranks"
    assert all(same for *_, same, _ in found), "training is the same, bit for bit, without an average"
    truth = np.concatenate([left[2].numpy() for _, _, left, *_ in found])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for weights, statistics, _ in [left for _, _, left, *_ in found]:
        torch.testing.assert_close(weights, averages[-1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(statistics["1.running_mean"], truth.mean(0), rtol=1e-5, atol=1e-6)
        for key, value in statistics.items():
            assert torch.equal(saved["state_dict"][f"model.{key}"], value), "what is left is what was saved"
    assert torch.equal(saved["current_model_state"]["model.0.weight"].double().flatten(), found[0][1][-1][0][:12])
    for own, (_, steps, *_) in zip(saved["distnorm"]["rank_statistics"], found, strict=True):
        assert all(torch.equal(own[f"model.{key}"], value) for key, value in steps[-1][1].items())


def running(evaluation, order, use_buffers):
    task, _ = fit(evaluation, EMAWeightAveraging(decay=DECAY, use_buffers=use_buffers), order, max_steps=4)
    return task.met, task.steps


@pytest.mark.parametrize(("order", "use_buffers"), [("before", True), ("after", True), ("after", False)])
@pytest.mark.parametrize("evaluation", ["pooled", "running"])
def test_running_statistics_are_those_that_the_average_holds(order, use_buffers, evaluation):
    """Of each rank, pooled with the term between the ranks; rank 0's, where nothing is pooled."""
    found = ranks.run(running, evaluation, order, use_buffers, world=2)
    held = []
    for _, steps in found:
        own = [{key: value for key, value in statistics.items() if "running" in key} for _, statistics in steps]
        averages = {key: ema_of([statistics[key] for statistics in own]) for key in own[0]}
        held.append(
            {key: (values if use_buffers else [s[key].double() for s in own])[-1] for key, values in averages.items()}
        )
    mean = torch.stack([own["1.running_mean"] for own in held])
    var = torch.stack([own["1.running_var"] for own in held])
    expected = mean.mean(0), (var + (mean - mean.mean(0)).square()).mean(0)
    if evaluation == "running":
        expected = mean[0], var[0]
    for met, _ in found:
        torch.testing.assert_close(met[-1][1][0].double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(met[-1][1][1].double(), expected[1], rtol=1e-5, atol=1e-6)


class SaveAtEpochs(Callback):
    """Saves when an epoch has ended; it is listed last."""

    def __init__(self, path):
        self._path = path

    def on_train_epoch_end(self, trainer, pl_module):
        """Save."""
        trainer.save_checkpoint(self._path)


def at_epochs(path, order):
    task = Averaged()
    averaging = AtEpochs()
    listed = [averaging] if order == "before" else []
    task.configure_callbacks = lambda: [*([] if listed else [averaging]), SaveAtEpochs(path)]
    fit_without(spec_of("precise"), task, *listed, max_epochs=3, max_steps=-1)
    return task.truth()


@pytest.mark.parametrize("order", ORDERS)
def test_an_average_of_epochs_is_saved_with_its_own_statistics(tmp_path, order):
    """It moves between the validation of an epoch and the checkpoint at its end."""
    [truth] = ranks.run(at_epochs, str(tmp_path / "last.ckpt"), order, world=1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(saved["model.1.running_mean"].double(), truth.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saved["model.1.running_var"].double(), truth.var(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_an_average_that_has_not_begun_is_the_weights_of_now(order):
    """Lightning would evaluate, and save, the weights that training started from."""
    task, _ = fit("precise", EMAWeightAveraging(decay=DECAY, update_starting_at_step=99), order, max_steps=4)
    for number, step in enumerate((2, 4)):
        assert torch.equal(task.met[number][0], task.steps[step - 1][0])
        np.testing.assert_allclose(task.met[number][1][0], task.met[number][2].mean(0), rtol=1e-5, atol=1e-6)


def later(folder, order):
    task, trainer = fit("precise", EMAWeightAveraging(decay=DECAY), order, folder=folder, max_steps=5)
    left = weights_of(task.model)
    task.met.clear()
    trainer.test(task, verbose=False)
    trainer.validate(task, verbose=False)
    trainer.predict(task)
    trainer.test(task, ckpt_path=f"{folder}/last.ckpt", verbose=False)
    trainer.validate(task, ckpt_path=f"{folder}/last.ckpt", verbose=False)
    return task.met, left


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_tested_after_training_is_what_training_left(tmp_path, order):
    found = ranks.run(later, str(tmp_path), order, world=2)
    for index in range(5):
        mean, var = whole(found, index)
        for met, left in found:
            assert torch.equal(met[index][0], left)
            np.testing.assert_allclose(met[index][1][0], mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(met[index][1][1], var, rtol=1e-5)


class Fails(Averaged):
    """Its second validation fails."""

    def validation_step(self, batch, batch_idx):
        """Fail once the average differs from the weights."""
        super().validation_step(batch, batch_idx)
        if len(self.met) == 2:
            raise RuntimeError("as a user's metric might")


@pytest.mark.parametrize("order", [*ORDERS, None])
@pytest.mark.parametrize("evaluation", ["precise", "running"])
def test_a_validation_that_fails_leaves_what_was_trained(order, evaluation):
    task = Fails()
    with pytest.raises(RuntimeError, match="as a user's metric"):
        fit(evaluation, EMAWeightAveraging(decay=DECAY) if order else None, order, task)
    weights, statistics = task.steps[-1]
    assert torch.equal(weights_of(task.model), weights)
    assert all(torch.equal(value, statistics[key]) for key, value in own_running_stats(task.model).items())


def frozen(order):
    task, _ = fit("precise", EMAWeightAveraging(decay=DECAY), order, max_steps=10, frozen_last=0.4)
    return task.met, task.modes, task.running, own_running_stats(task.model)


@pytest.mark.parametrize("order", ORDERS)
def test_constants_are_those_of_the_trained_weights_and_stay(order):
    """The switch at step 6 takes what training's weights give; from then on the average has them too."""
    found = ranks.run(frozen, order, world=2)
    for met, modes, running, left in found:
        assert modes == [True] * 6 + [False] * 4
        assert torch.equal(met[-1][1][0], running[-1])
        assert torch.equal(left["1.running_mean"], running[-1])
        assert torch.equal(running[-1], found[0][2][-1])


def test_two_averages_are_refused():
    with pytest.raises(
        ConfigError, match=r"2 averages of the weights: EMAWeightAveraging, WeightAverage\.[^\n]*\nKeep one"
    ):
        fit_without(spec_of("precise"), Averaged(), EMAWeightAveraging(), WeightAverage(0.9))


class Indexed(Averaged):
    """Has an index of positions, as models with relative positions do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("index", torch.arange(200))
        self.wrong = []

    def validation_step(self, batch, batch_idx):
        """Hold the index against what it was."""
        super().validation_step(batch, batch_idx)
        self.wrong.append(int((self.index != torch.arange(200)).sum()))


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, WeightAverage])
def test_whole_numbers_are_not_averaged(tmp_path, averaging):
    """Lightning's rounds them down: of 200 numbers some are one less after a step."""
    task, _ = fit("precise", averaging(decay=0.9), "before", Indexed(), folder=tmp_path, max_steps=4)
    assert set(task.wrong) == {0}
    assert torch.equal(task.index, torch.arange(200))
    assert torch.equal(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["index"], torch.arange(200))


@pytest.mark.parametrize(("decay", "steps", "said"), [(0.99, 9, 1), (0.5, 9, 0)])
def test_a_training_too_short_for_its_average_says_so(caplog, decay, steps, said):
    """Of 9 steps the average keeps 0.99 ^ 9 = 91 % of its first weights."""
    fit_without(spec_of("pooled"), Averaged(), WeightAverage(decay), max_steps=steps)
    words = (
        "decays by 0.99 a step (trainer.ema), and training has 9 steps: at its end 91 % of the average are the weights"
    )
    assert caplog.text.count(f"{words} after the first. Use a smaller decay, e.g. trainer.ema=0.5.") == said


def test_the_drift_monitor_compares_evaluation_data_with_the_statistics_of_the_average(monkeypatch):
    """They come in after its `on_validation_start`. What it watches in training is what is trained."""
    compared, finish = [], EvaluationShift.finish
    monkeypatch.setattr(EvaluationShift, "finish", lambda self: (compared.append(self._references[0]), finish(self))[1])
    monitor = DriftMonitor("full", 2)
    task = Averaged()
    task.configure_callbacks = lambda: [monitor]
    fit_without(spec_of("precise"), task, EMAWeightAveraging(decay=DECAY))
    assert len(compared) == len(task.met) == 4
    for found, (_, (mean, var), _) in zip(compared, task.met, strict=True):
        assert torch.equal(found, torch.cat((mean, var)).double())


@pytest.mark.parametrize(
    ("later", "evaluation"), [(lambda: nn.LazyLinear(2), "precise"), (nn.LazyBatchNorm1d, "pooled")]
)
def test_weights_are_known_again_before_all_have_a_shape(caplog, later, evaluation):
    task = Averaged()
    task.later = later()
    _, trainer = fit_without(spec_of(evaluation), task, max_steps=6)
    assert len(task.met) > 1
    assert "does not use" not in caplog.text
    before = sample_weights(trainer, task)
    with torch.no_grad():
        task.model[0].weight.view(-1)[0] += 1
    assert not torch.equal(sample_weights(trainer, task), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_on_several_devices_are_known_again():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="cuda"))
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    before = sample_weights(trainer, model)
    with torch.no_grad():
        model[1].bias[0] += 1
    assert not torch.equal(sample_weights(trainer, model), before)
