"""Whole runs: what is decided and trained, what the folder holds, resume, the setting kept on other hardware."""

import json
import re

import numpy as np
import pytest
import torch

import distnorm
from distnorm.models import ResNet
from tests import runs

IN_POOL = [
    # ranks, overrides → what the run says at its start
    (2, ["data.device_batch=2", "norm=batch"], "local batch norm, normalization batch 2"),
    (4, ["data.device_batch=2", "norm=batch"], "local batch norm, normalization batch 2"),
    (2, ["data.device_batch=2", "norm=sync"], "sync over 2 ranks, normalization batch 4"),
    (4, ["data.device_batch=2", "norm=sync"], "sync over 4 ranks, normalization batch 8"),
    (2, ["data.device_batch=2", "norm=auto"], "GroupNorm with weight standardization, each sample alone"),
    (4, ["data.device_batch=2", "norm=auto"], "GroupNorm with weight standardization, each sample alone"),
    (
        2,
        ["data.device_batch=2", "norm=auto", "norm.min_normalization_batch=4"],
        "sync over 2 ranks, normalization batch 4",
    ),
    (
        4,
        ["data.device_batch=2", "norm=auto", "norm.min_normalization_batch=4"],
        "sync over 4 ranks, normalization batch 8",
    ),
    (4, ["data.device_batch=8", "norm=auto"], "sync over 4 ranks, normalization batch 32"),
    (
        2,
        ["data.device_batch=8", "norm=ghost", "norm.normalization_batch=4"],
        "ghost batches of 4, normalization batch 4",
    ),
    (2, ["data.device_batch=8", "norm=group"], "GroupNorm, each sample alone"),
    (4, ["data.device_batch=8", "norm=sync", "norm.sync_ranks=2"], "sync over 2 ranks, normalization batch 16"),
    (2, ["data.device_batch=9", "data.last_batch=keep", "norm=sync"], "sync over 2 ranks, normalization batch 18"),
    (2, ["optimizer=adamw", "trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2"], "local batch norm"),
]


@pytest.mark.unit
@pytest.mark.parametrize(("world", "overrides", "said"), IN_POOL, ids=str)
def test_each_decision_is_said_and_trains(tmp_path, world, overrides, said):
    result, console = runs.in_pool(tmp_path / "run", world, *overrides)
    assert re.search(r"^norm +" + re.escape(said), console, re.MULTILINE)
    if said.startswith("GroupNorm with"):
        assert f"norm.min_normalization_batch={2 * world}" in console
    assert f"{world} CPU ranks" in console
    rows = runs.rows(runs.RunFolder(tmp_path / "run"))
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    assert 0 <= result["metrics"]["test/accuracy"] <= 1
    assert distnorm.NormSpec.from_dict(result["decision"]).in_words().startswith(said)


@pytest.mark.unit
@pytest.mark.parametrize(("global_batch", "last"), [(240, [30, 30, 29, 29]), (1076, [1, 1, 0, 0])])
def test_a_kept_last_batch_dealt_unevenly_trains_as_one_process_does(tmp_path, global_batch, last):
    steps = 1078 // global_batch + 1
    same = ["data.last_batch=keep", "norm=sync", "data.augmentation=none", "trainer.precision=64-true", "drift=none"]
    weights, losses = {}, {}
    for world in (1, 4):
        folder = tmp_path / str(world)
        runs.in_pool(folder, world, *same, f"data.global_batch={global_batch}", f"trainer.max_steps={steps}")
        run = runs.RunFolder(folder)
        losses[world] = losses_of(run)
        weights[world] = torch.load(run.checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    assert sum(last) == 1078 - (steps - 1) * global_batch
    assert len(losses[1]) == steps
    assert losses[4] == pytest.approx(losses[1], abs=1e-8)
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[4][key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.run
def test_the_main_job_reaches_97_percent_and_leaves_a_whole_folder(tmp_path):
    done, run = runs.train_py("trainer=cpu_ddp", folder=tmp_path)
    result = json.loads(run.result.read_text())
    assert result["metrics"]["test/accuracy"] >= 0.97
    assert f"{result['metrics']['test/accuracy']:.4f}" in done.stdout
    assert done.stdout.rstrip().endswith(str(run.path))
    assert "local batch norm, normalization batch 16" in done.stdout
    assert "22 of 1078 training samples are left out each epoch" in done.stdout
    assert re.search(r"step \d+/1980 .* loss .* samples/s", done.stdout)
    for part in ("config.yaml", "decision.txt", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "record.jsonl"):
        assert (run.path / part).stat().st_size, part
    assert result["versions"]["torch"] == torch.__version__
    assert result["seed"] == 0
    assert result["world_size"] == 2
    assert (result["decision"]["kind"], result["decision"]["sync_ranks"]) == ("batch", 1)
    assert len(result["code_hash"]) == 16
    assert result["worst_drift"]["layer"] in (run.path / "decision.txt").read_text()

    from distnorm.drift import history, wandb_file

    in_file_path = next(run.path.glob("wandb/offline-run-*/run-*.wandb"))
    in_file = wandb_file.read(in_file_path)
    logged = in_file.rows
    names = {name for row in logged for name in row}
    expected = {f"drift/worst/{key}" for key in ("jeffreys", "between_ranks", "lag", "effective_samples")}
    assert expected | {"train/loss", "val/loss", "val/accuracy", "test/accuracy", "lr"} <= names
    shown = {name.split("/")[1] for name in names if re.fullmatch(r"drift/[^/]+/(jeffreys|lag)", name)} - {"worst"}
    assert shown <= set(LAYERS)
    assert len(shown) >= 5
    assert (result["alarms"], result["stopped_by_alarm"]) == ([], False)
    drift, same = history.read(run.path), history.read(in_file_path.parent)
    assert sorted(layer.name for layer in drift.layers) == sorted(LAYERS)
    assert drift.steps.tolist() == same.steps.tolist() == list(range(20, 1981, 20))
    assert drift.values.keys() == same.values.keys()
    for key, values in drift.values.items():
        np.testing.assert_array_equal(values, same.values[key])
    assert in_file.config["decision_layers"][0]["name"] == "bn"
    assert in_file.config["norm"]["normalization_batch"] == 32
    in_wandb = [row["test/accuracy"] for row in logged if "test/accuracy" in row]
    in_record = [row["test/accuracy"] for row in runs.rows(run) if "test/accuracy" in row]
    assert in_wandb == in_record == [result["metrics"]["test/accuracy"]]

    model = distnorm.load(ResNet(), run.checkpoints / "best.ckpt")
    from distnorm.data import DigitsData

    batches = list(DigitsData(device_batch=64).test_dataloader())
    with torch.no_grad():
        right = sum(int((model(inputs).argmax(1) == targets).sum()) for inputs, targets in batches)
    assert right / sum(len(targets) for _, targets in batches) == pytest.approx(result["metrics"]["test/accuracy"])


LAYERS = (
    ["bn"]
    + [f"stages.{s}.0.{bn}" for s in range(3) for bn in ("bn1", "bn2")]
    + [f"stages.{s}.0.shortcut.1" for s in (1, 2)]
)


@pytest.mark.run
def test_other_hardware_trains_the_same(tmp_path):
    """Two ranks by train.py, in processes of their own; one and four in the pool."""
    asked = ["experiment=same_everywhere", "trainer.max_steps=30", "logger.mode=disabled"]
    _, by_train_py = runs.train_py(*asked, "trainer.devices=2", folder=tmp_path / "2")
    trained = {2: by_train_py}
    for world in (1, 4):
        trained[world] = runs.RunFolder(tmp_path / str(world))
        runs.in_pool(trained[world].path, world, *asked)
    losses, weights = {}, {}
    for world, run in trained.items():
        losses[world] = losses_of(run)
        weights[world] = torch.load(run.checkpoints / "last.ckpt", weights_only=True)["state_dict"]
        decision = json.loads(run.result.read_text())["decision"]
        assert (decision["normalization_batch"], decision["sync_ranks"]) == (32, world)
    assert len(losses[1]) == 30
    for world in (2, 4):
        assert losses[world] == pytest.approx(losses[1], abs=1e-8)
        for key, value in weights[1].items():
            torch.testing.assert_close(weights[world][key], value, rtol=0, atol=1e-6, msg=f"{key} on {world} ranks")


@pytest.mark.run
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_goes_on_in_a_new_folder_as_if_never_stopped(tmp_path, world):
    """The runs to compare with train in the pool; the one that goes on is train.py's, in processes of its own."""
    common = [f"trainer.devices={world}", "trainer.max_steps=-1", "task.schedule=constant", "task.warmup_fraction=0"]
    whole, first = runs.RunFolder(tmp_path / "whole"), runs.RunFolder(tmp_path / "parts" / "first")
    runs.in_pool(whole.path, world, *common, "trainer.max_epochs=3")
    runs.in_pool(first.path, world, *common, "trainer.max_epochs=2")
    goes_on = [*runs.QUICK, *common, "trainer.max_epochs=3", f"ckpt_path={first.path}"]
    done, second = runs.train_py(*goes_on, folder=tmp_path / "second")
    assert second.path != first.path
    assert "resumed   from" in done.stdout
    assert json.loads(second.result.read_text())["resumed_from"] == str(first.checkpoints / "last.ckpt")
    ends = [torch.load(run.checkpoints / "last.ckpt", weights_only=True) for run in (whole, second)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 3 * len(losses_of(whole)) // 3
    assert losses_of(first) == losses_of(whole)[: len(losses_of(first))]
    assert losses_of(second) == losses_of(whole)[len(losses_of(first)) :]
    for key, value in ends[0]["state_dict"].items():
        assert torch.equal(ends[1]["state_dict"][key], value), key
    for whole_rank, resumed_rank in zip(*(end["distnorm"]["rank_statistics"] for end in ends), strict=True):
        assert all(torch.equal(whole_rank[key], resumed_rank[key]) for key in whole_rank)


def losses_of(run):
    return [row["train/loss"] for row in runs.rows(run) if "train/loss" in row]


@pytest.mark.run
def test_a_sweep_starts_each_job_with_its_own_configuration_and_survives_a_refused_one(tmp_path):
    swept = ["-m", "norm=sync", "norm.sync_ranks=3,1,2", "trainer=cpu_ddp", "trainer.ranks_from=local"]
    few = ["data.device_batch=2", *runs.QUICK, "trainer.max_steps=2"]
    done, _ = runs.train_py(*swept, *few, folder=tmp_path, check=False)
    assert done.returncode == 1
    assert "norm.sync_ranks=3: norm.sync_ranks=3 does not divide world_size=2. Use 1 or 2." in done.stderr
    assert "1 of 3 jobs failed" in done.stderr.splitlines()[-1]
    seen = set()
    for file in tmp_path.glob("sweep-*/jobs/*/result.json"):
        result, kept = json.loads(file.read_text()), runs.RunFolder(file.parent).read_settings()
        seen.add((file.parent.name, kept.norm.sync_ranks, result["world_size"], result["decision"]["sync_ranks"]))
    assert seen == {("norm.sync_ranks=1", 1, 2, 1), ("norm.sync_ranks=2", 2, 2, 2)}
    assert len(list(tmp_path.glob("sweep-*/results.csv"))) == 1
