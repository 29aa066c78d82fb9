"""Every file of conf/norm trains two steps, and norm=auto decides, converts and trains on each number of ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distnorm import collectives, convert
from distnorm.data import DigitsData
from distnorm.models import ResNet
from tests import ranks, runs

unit = pytest.mark.unit

CONF = Path(runs.ROOT) / "conf" / "norm"
KINDS = {
    # file → the class of the layers, or how many batch norms are left; how evaluation gets its statistics
    "auto": ("BatchNorm2d", "pooled"),
    "batch": ("BatchNorm2d", "pooled"),
    "sync": ("SyncBatchNorm", "running"),
    "ghost": ("GhostBatchNorm", "precise"),
    "renorm": ("BatchRenorm", "precise"),
    "frozen": ("FrozenBatchNorm", "running"),
    "group": ("GroupNorm", "running"),
    "group_ws": ("GroupNorm", "running"),
    "layer": ("GroupNorm", "running"),
    "instance": ("GroupNorm", "running"),
    "response": ("FilterResponseNorm", "running"),
    "none": ("Identity", "running"),
}


@unit
def test_every_kind_is_here():
    assert {file.stem for file in CONF.glob("[!_]*.yaml")} == set(KINDS)


@unit
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_trains_two_steps(tmp_path, kind):
    cls, evaluation = KINDS[kind]
    more = ["norm.normalization_batch=8"] if kind == "ghost" else []
    result, _ = runs.in_pool(tmp_path / "run", 2, f"norm={kind}", "trainer.max_steps=2", *more)
    table = (tmp_path / "run" / "decision.txt").read_text()
    assert sum(f"  {cls}  " in line for line in table.splitlines()) == 9
    losses = [row["train/loss"] for row in runs.rows(runs.RunFolder(tmp_path / "run")) if "train/loss" in row]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert result["decision"]["evaluation"] == evaluation
    assert 0 <= result["metrics"]["test/accuracy"] <= 1


@unit
def test_as_many_samples_are_calibrated_on_as_asked(tmp_path):
    found = []
    for samples in (16, 64):
        folder = tmp_path / str(samples)
        asked = ["norm=batch", "norm.evaluation=precise", f"norm.calibration_samples={samples}", "trainer.max_steps=1"]
        runs.in_pool(folder, 1, *asked)
        found.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(found[0]["model.conv.weight"], found[1]["model.conv.weight"])
    assert not torch.equal(found[0]["model.bn.running_mean"], found[1]["model.bn.running_mean"])


DECIDED = {
    # device batch → for 1, 2 and 4 ranks on one machine: kind, ranks that share statistics, normalization batch
    1: [("group_ws", 1, 1), ("group_ws", 1, 1), ("group_ws", 1, 1)],
    2: [("group_ws", 1, 1), ("group_ws", 1, 1), ("group_ws", 1, 1)],
    4: [("group_ws", 1, 1), ("group_ws", 1, 1), ("sync", 4, 16)],
    8: [("group_ws", 1, 1), ("sync", 2, 16), ("sync", 4, 32)],
    16: [("batch", 1, 16), ("batch", 1, 16), ("batch", 1, 16)],
    64: [("batch", 1, 64), ("batch", 1, 64), ("batch", 1, 64)],
}
LAYERS = {"group_ws": "GroupNorm", "sync": "SyncBatchNorm", "batch": "BatchNorm2d"}


def two_steps(settings):
    """Body: decide, convert, and train under DDP as train.py does, on this rank's own digits."""
    world, rank = collectives.world_size(), collectives.rank()
    spec = settings.decide(world, world)
    torch.manual_seed(0)
    model = ResNet(widths=(8, 16))
    convert(model, spec)
    classes = {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}
    wrapped = DistributedDataParallel(model, forward_sync_buffers=False) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DigitsData(device_batch=settings.device_batch)
    images = torch.from_numpy(data.samples("train").read(range(2 * world * settings.device_batch)))
    targets = torch.as_tensor(data.samples("train").targets)
    losses = []
    for step in range(2):
        own = torch.arange(settings.device_batch) + (step * world + rank) * settings.device_batch
        loss = nn.functional.cross_entropy(wrapped(images[own]), targets[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    alike = [bool(torch.equal(row, weights)) for row in collectives.gather(weights, tuple(range(world)), "the test")]
    return (spec.kind, spec.sync_ranks, spec.normalization_batch), classes, all(alike), losses


@unit
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("device_batch", DECIDED)
def test_auto_decides_converts_and_trains(device_batch, world):
    settings = runs.composed(f"data.device_batch={device_batch}", f"trainer.devices={world}").with_batches(world)
    for decided, classes, alike, losses in ranks.run(two_steps, settings, world=world):
        assert decided == DECIDED[device_batch][(1, 2, 4).index(world)]
        assert classes == {LAYERS[decided[0]]}
        assert alike
        assert all(0 < loss < 20 for loss in losses)


@pytest.mark.slow
@pytest.mark.run
def test_auto_through_train_py(tmp_path):
    """On four ranks; on two `tests/test_run.py` has the main job, of 16 a rank, and a sweep's, of 2."""
    overrides = ["data.device_batch=8", "trainer=cpu_ddp", "trainer.devices=4", *runs.QUICK]
    _, run = runs.train_py(*overrides, folder=tmp_path)
    kind, sync_ranks, _ = DECIDED[8][2]
    decision = json.loads(run.result.read_text())["decision"]
    assert (decision["kind"], decision["sync_ranks"]) == (kind, sync_ranks)
