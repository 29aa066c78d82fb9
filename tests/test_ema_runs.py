"""`trainer.ema=0.9` through train.py: validation, test, checkpoint, load, exact resume, all of the averaged weights."""

import copy
import json

import pytest
import torch
from torch import nn

import distnorm
from distnorm.convert import normalization_layers
from distnorm.domains import load_statistics
from distnorm.launch.adaptation import adapt
from distnorm.launch.run_dir import RunFolder
from distnorm.population import own_running_stats, swap_in
from distnorm.study.design import Probe
from distnorm.study.measure import measure
from distnorm.targets import build
from tests import interrupted, runs

pytestmark = pytest.mark.unit

EMA = "trainer.ema=0.9"
LOGGED = "trainer.log_every_n_steps=3"
CASES = {
    "one rank, precise, bfloat16": (
        1,
        ["data.device_batch=112", "norm=batch", "norm.evaluation=precise", "trainer.precision=bf16-mixed"],
    ),
    "two ranks, pooled, accumulated": (
        2,
        ["data.device_batch=28", "norm=batch", "norm.evaluation=pooled", "trainer.accumulate_grad_batches=2"],
    ),
    "two ranks, precise, frozen": (
        2,
        ["data.device_batch=56", "norm=batch", "norm.evaluation=precise", "norm.frozen_last=0.3"],
    ),
}


def rows(*folders):
    """What was logged of training and validation."""
    every = [row for folder in folders for row in runs.rows(RunFolder(folder)) if "test/loss" not in row]
    return [
        [{k: v for k, v in row.items() if k != "time"} for row in every if key in row]
        for key in ("train/loss", "val/loss", "drift")
    ]


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(tmp_path, case):
    """Stopped within the second epoch, between an average's updates and with pooled statistics saved quickly."""
    world, overrides = CASES[case]
    overrides = [*overrides, EMA, LOGGED]
    interrupted.in_pool(tmp_path / "whole", world, *overrides)
    assert interrupted.in_pool(tmp_path / "first", world, *overrides, stop_at=11)[0]
    interrupted.in_pool(tmp_path / "then", world, *overrides, f"ckpt_path={interrupted.last(tmp_path / 'first')}")
    whole = interrupted.stored(tmp_path / "whole")
    assert interrupted.differences(whole, interrupted.stored(tmp_path / "then")) == []
    assert rows(tmp_path / "first", tmp_path / "then") == rows(tmp_path / "whole")
    assert whole["averaging_state"]["n_averaged"] == whole["global_step"]
    assert len(whole["distnorm"]["average_statistics"]) == world


def given(model, images):
    """What the first norm of a model is given."""
    name, norm = next(iter(normalization_layers(model)))
    found = []
    hook = norm.register_forward_pre_hook(lambda _, x: found.append(x[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return name, found[0].double().transpose(0, 1).flatten(1)


def loss_of(model, batches):
    """Mean loss and accuracy."""
    batches = list(batches)
    images, labels = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    with torch.no_grad():
        logits = model(images)
    return float(nn.functional.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


def check_others(settings, run, last, data):
    """What a study measures of a run's both weights, and what `distnorm calibrate` measures, of the average."""
    stored = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    trained = copy.deepcopy(last)
    trained.load_state_dict(
        {key.removeprefix("model."): v for key, v in stored["current_model_state"].items() if "model." in key}
    )
    probes = {"saved": Probe(of="loss"), "pooled": Probe(weights="trained", statistics="pooled", of="loss")}
    probes["first"] = Probe(statistics="first_rank")
    found = measure(settings, run, probes)
    assert found["saved"] == pytest.approx(loss_of(last, data.test_dataloader())[0], rel=1e-4)
    assert found["pooled"] == pytest.approx(loss_of(trained, data.test_dataloader())[0], rel=1e-4)
    swap_in(last, {key.removeprefix("model."): v for key, v in stored["distnorm"]["average_statistics"][0].items()})
    assert found["first"] == pytest.approx(100 * (1 - loss_of(last, data.test_dataloader())[1]))
    run.write_settings(settings)
    file = adapt(run.path, "training", num_samples=100_000)
    name, inputs = given(last, torch.cat([images for images, _ in data.train_dataloader()]))
    mean = load_statistics(file)["training"][f"{name}.running_mean"]
    torch.testing.assert_close(mean.double(), inputs.mean(1), rtol=1e-5, atol=1e-6)


def test_a_run_evaluates_tests_and_saves_the_average(tmp_path):
    """The first norm's statistics against all training images; the drift monitor and its probes look at training."""
    overrides = ["data.device_batch=56", "norm=batch", "norm.evaluation=precise", "data.last_batch=keep"]
    overrides += ["data.augmentation=none", "norm.calibration_samples=100000", "drift=full", "drift.gap_interval=5"]
    _, console = interrupted.in_pool(tmp_path / "run", 2, *overrides, EMA)
    assert "weights   averaged over about 10 steps (trainer.ema=0.9)" in console
    run = RunFolder(tmp_path / "run")
    result = json.loads(run.result.read_text())
    assert result["ema"] == 0.9
    assert "\nweights averaged over about 10 steps (trainer.ema=0.9)\n" in (run.path / "decision.txt").read_text()
    settings = interrupted.settled(2, *overrides, EMA)
    data = build(settings.data)
    images = torch.cat([images for images, _ in data.train_dataloader()])
    for file in ("best", "last"):
        path = run.checkpoints / f"{file}.ckpt"
        stored = torch.load(path, weights_only=True)
        model = distnorm.load(build(settings.model), path)
        assert torch.equal(model.head.weight, stored["state_dict"]["model.head.weight"])
        assert not torch.equal(model.head.weight, stored["current_model_state"]["model.head.weight"])
        name, inputs = given(model, images)
        statistics = own_running_stats(model)
        torch.testing.assert_close(statistics[f"{name}.running_mean"].double(), inputs.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics[f"{name}.running_var"].double(), inputs.var(1), rtol=1e-5, atol=1e-6)
    assert result["checkpoint"] == str(run.checkpoints / "best.ckpt")
    best = distnorm.load(build(settings.model), run.checkpoints / "best.ckpt")
    loss, accuracy = loss_of(best, data.test_dataloader())
    assert result["metrics"]["test/loss"] == pytest.approx(loss, rel=1e-4)
    assert result["metrics"]["test/accuracy"] == pytest.approx(accuracy)
    check_others(settings, run, model, data)
    logged = [row["val/loss"] for row in runs.rows(run) if "val/loss" in row]
    assert min(logged) == pytest.approx(loss_of(best, data.val_dataloader())[0], rel=1e-4)


def test_a_resume_says_where_the_average_begins_or_ends(tmp_path):
    """And through all of it the training is that of a run without an average, bit for bit."""
    small = ["data.device_batch=112", "norm=batch", "task.schedule=constant", "task.warmup_fraction=0"]
    interrupted.in_pool(tmp_path / "first", 1, *small, "trainer.max_epochs=1")
    more = ["trainer.max_epochs=2", f"ckpt_path={interrupted.last(tmp_path / 'first')}"]
    _, console = interrupted.in_pool(tmp_path / "then", 1, *small, *more, EMA)
    assert "the average of the weights begins with the checkpoint's" in console
    more = ["trainer.max_epochs=3", f"ckpt_path={interrupted.last(tmp_path / 'then')}"]
    _, console = interrupted.in_pool(tmp_path / "last", 1, *small, *more)
    assert "the trained weights, without the average that the checkpoint has of them" in console
    interrupted.in_pool(tmp_path / "never", 1, *small)
    last, never = (interrupted.stored(tmp_path / run) for run in ("last", "never"))
    assert "averaging_state" not in last
    for part in ("state_dict", "optimizer_states", "distnorm"):
        assert interrupted.differences(last[part], never[part]) == []


@pytest.mark.parametrize("typed", ["1", "99.9", "0", "true", "fast"])
def test_a_decay_that_is_none_ends_with_the_rule(typed):
    with pytest.raises(
        distnorm.ConfigError, match=r"trainer\.ema=.* above 0 and below 1.* Use e\.g\. trainer\.ema=0\.999"
    ) as e:
        runs.composed(f"trainer.ema={typed}")
    assert str(e.value).count("\n") <= 2


@pytest.mark.parametrize("norm", ["sync", "renorm", "group_ws"])
def test_other_norms_are_averaged_too(tmp_path, norm):
    """Over two ranks that exchange, and without any statistics."""
    overrides = [f"norm={norm}", "norm.evaluation=precise", "data.device_batch=56", "trainer.max_epochs=1", EMA]
    interrupted.in_pool(tmp_path, 2, *overrides)
    stored = interrupted.stored(tmp_path)
    both = [stored[state]["model.head.weight"] for state in ("state_dict", "current_model_state")]
    assert not torch.equal(*both)
    assert len(stored["distnorm"]["average_statistics"]) == 2
    assert 0 < json.loads(RunFolder(tmp_path).result.read_text())["metrics"]["test/loss"] < 3
