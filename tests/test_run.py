"""Whole runs: what is decided and trained, what the folder holds, resume, the setting kept on other hardware."""

import json
import re

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
    assert len(result["code_hash"]) == 16
    assert result["worst_drift"]["layer"] in (run.path / "decision.txt").read_text()

    from distnorm.drift import wandb_file

    in_file = wandb_file.read(next(run.path.glob("wandb/offline-run-*/run-*.wandb")))
    logged = in_file.rows
    names = {name for row in logged for name in row}
    expected = {f"drift/{layer}/{key}" for layer in LAYERS for key in ("jeffreys", "between_ranks")}
    assert expected | {"train/loss", "val/loss", "val/accuracy", "test/accuracy", "lr"} <= names
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
    losses, weights = {}, {}
    for ranks in (1, 2, 4):
        overrides = [
            "experiment=same_everywhere",
            f"trainer.devices={ranks}",
            "trainer.max_steps=30",
            "logger.mode=disabled",
        ]
        _, run = runs.train_py(*overrides, folder=tmp_path / str(ranks))
        losses[ranks] = [row["train/loss"] for row in runs.rows(run) if "train/loss" in row]
        weights[ranks] = torch.load(run.checkpoints / "last.ckpt", weights_only=True)["state_dict"]
        decision = json.loads(run.result.read_text())["decision"]
        assert (decision["normalization_batch"], decision["sync_ranks"]) == (32, ranks)
    assert len(losses[1]) == 30
    for ranks in (2, 4):
        assert losses[ranks] == pytest.approx(losses[1], abs=1e-8)
        for key, value in weights[1].items():
            torch.testing.assert_close(weights[ranks][key], value, rtol=0, atol=1e-6, msg=f"{key} on {ranks} ranks")


@pytest.mark.run
@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_goes_on_in_a_new_folder_as_if_never_stopped(tmp_path, ranks):
    common = [
        f"trainer.devices={ranks}",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        "logger.mode=disabled",
    ]
    common += ["task.schedule=constant", "task.warmup_fraction=0"]
    _, whole = runs.train_py(*common, "trainer.max_epochs=3", folder=tmp_path / "whole")
    _, first = runs.train_py(*common, "trainer.max_epochs=2", folder=tmp_path / "parts")
    done, second = runs.train_py(*common, "trainer.max_epochs=3", f"ckpt_path={first.path}", folder=tmp_path / "parts")
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
def test_a_sweep_starts_each_job_with_its_own_configuration(tmp_path):
    overrides = [
        "-m",
        "norm=batch,sync",
        "optimizer.lr=0.1,0.01",
        "trainer=cpu_ddp",
        "trainer.ranks_from=local",
        "trainer.max_steps=2",
        "logger.mode=disabled",
    ]
    runs.train_py(*overrides, folder=tmp_path)
    seen = set()
    for file in tmp_path.glob("*/result.json"):
        run = runs.RunFolder(file.parent)
        result = json.loads(run.result.read_text())
        assert result["world_size"] == 2
        seen.add((result["decision"]["kind"], run.read_settings().optimizer["lr"]))
    assert seen == {("batch", 0.1), ("batch", 0.01), ("sync", 0.1), ("sync", 0.01)}
