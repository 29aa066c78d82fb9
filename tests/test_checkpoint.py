"""Rebuilding a trained model with torch alone, and every refusal."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from distnorm import ConfigError, checkpoint, convert, decide, load
from distnorm.models import ResNet
from distnorm.population import own_running_stats

pytestmark = pytest.mark.unit


def saved(folder, spec):
    """A checkpoint as a run leaves it, of a model that has seen data."""
    torch.manual_seed(3)
    model = ResNet(widths=(4, 8), num_classes=3)
    convert(model, spec)
    model(torch.randn(8, 1, 12, 12))
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    state = {f"model.{key}": value for key, value in model.state_dict().items()} | {"other": torch.zeros(1)}
    torch.save({"state_dict": state, "distnorm": checkpoint.entry(spec, [own_running_stats(model)])}, path)
    return model.eval(), path


@pytest.mark.parametrize("spec", [decide(8, 4), decide(2, 2), decide(64, 1, exact=True)], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("by", ["file", "folder"])
def test_load_rebuilds_what_was_trained(tmp_path, spec, by):
    trained, path = saved(tmp_path, spec)
    fresh = ResNet(widths=(4, 8), num_classes=3)
    loaded = load(fresh, path if by == "file" else tmp_path)
    assert loaded is fresh
    assert not loaded.training
    x = torch.randn(3, 1, 12, 12)
    assert torch.equal(loaded(x), trained(x))


def test_load_says_that_precise_statistics_are_missing(tmp_path, caplog):
    _, path = saved(tmp_path, decide(8, 4))
    stored = torch.load(path, weights_only=True)
    for evaluated, said in ((True, []), (False, [path])):
        stored["distnorm"]["evaluated"] = evaluated
        torch.save(stored, path)
        load(ResNet(widths=(4, 8), num_classes=3), path)
        assert [record.args[0] for record in caplog.records] == said
    assert f"{path} was saved quickly, to go on from: its batch norms have pooled statistics" in caplog.text
    assert "swap_in(model, distnorm.calibrate(model, batches))" in caplog.text


def test_load_needs_neither_lightning_nor_hydra(tmp_path):
    _, path = saved(tmp_path, decide(8, 4))
    code = (
        "import sys, distnorm; from distnorm.models import ResNet;"
        f"distnorm.load(ResNet(widths=(4, 8), num_classes=3), {str(path)!r});"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'lightning', 'hydra', 'wandb', 'torchmetrics'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_refusals_name_file_and_remedy(tmp_path):
    _, path = saved(tmp_path / "run", decide(8, 4))
    with pytest.raises(ConfigError, match=r"weights of another model than Sequential.*[\s\S]*config.yaml"):
        load(nn.Sequential(nn.BatchNorm1d(3)), path)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(ConfigError, match=r"no 'distnorm' entry[\s\S]*load_state_dict"):
        load(nn.Sequential(nn.BatchNorm1d(3)), foreign)
    with pytest.raises(ConfigError, match=r"ckpt_path='/nowhere' does not exist.*e\.g\. ckpt_path=runs/<run>"):
        load(nn.Sequential(nn.BatchNorm1d(3)), "/nowhere")
    with pytest.raises(ConfigError, match=r"holds no checkpoints/last\.ckpt"):
        load(nn.Sequential(nn.BatchNorm1d(3)), tmp_path)
