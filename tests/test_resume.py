"""Going on from a checkpoint: what is kept, what is refused, what is said."""

import json
import shutil

import pytest
import torch

from distnorm import ConfigError, NormSpec, checkpoint, decide
from tests import runs

pytestmark = pytest.mark.unit

EPOCHS = ("data.device_batch=120", "trainer.max_steps=-1", "trainer.check_val_every_n_epoch=1")


def resumed(folder, before, *overrides, world=1):
    result, console = runs.in_pool(folder, world, *EPOCHS, *overrides, f"ckpt_path={before}")
    return result, console


def best_loss(folder):
    rows = runs.rows(runs.RunFolder(folder))
    return min(row["val/loss"] for row in rows if "val/loss" in row)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    runs.in_pool(folder, 1, *EPOCHS, "trainer.max_epochs=3", "norm=batch")
    return folder


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def test_a_worse_continuation_keeps_and_tests_the_old_best(tmp_path, first):
    path = tmp_path / "moved"
    shutil.copytree(first, path)  # a run folder may have moved since
    stored = torch.load(last(path), weights_only=True)
    for group in stored["optimizer_states"][0]["param_groups"]:
        group["initial_lr"] = group["lr"] = 1e4
    torch.save(stored, last(path))
    result, console = resumed(
        tmp_path / "on", last(path), "norm=batch", "trainer.max_epochs=4", "task.schedule=constant"
    )
    assert result["checkpoint"] == str(tmp_path / "on" / "checkpoints" / "best.ckpt")
    assert best_loss(tmp_path / "on") > best_loss(first)
    old, new = (
        torch.load(f / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"] for f in (first, tmp_path / "on")
    )
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert "the optimizer's state is the checkpoint's" in console


def test_a_better_continuation_replaces_the_best(tmp_path, first):
    resumed(tmp_path / "on", last(first), "norm=batch", "trainer.max_epochs=9")
    stored = torch.load(tmp_path / "on" / "checkpoints" / "best.ckpt", weights_only=True)
    assert stored["epoch"] > 2
    assert json.loads((tmp_path / "on" / "result.json").read_text())["resumed_from"] == str(last(first))


@pytest.mark.parametrize("kind", ["group", "group_ws", "layer", "instance", "response", "none"])
def test_another_family_of_norms_is_refused(first, kind):
    with pytest.raises(ConfigError, match=r"was trained with local batch norm.*[\s\S]*Use norm=batch to go on"):
        checkpoint.check_resume(last(first), NormSpec(kind, 1))


@pytest.mark.parametrize("kind", ["sync", "renorm", "frozen", "ghost"])
def test_the_same_weights_and_statistics_serve_the_batch_norms(first, kind):
    checkpoint.check_resume(last(first), NormSpec(kind, 120, ghost_batch=8))


@pytest.mark.parametrize("words", ["# not a checkpoint", "image,label"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, words):
    text = tmp_path / "README.md"
    text.write_text(words)
    with pytest.raises(ConfigError, match=r"README.md' has no 'distnorm' entry: no distnorm run wrote it"):
        checkpoint.check_resume(text, decide(8, 1))
