"""The gallery of docs/drift.md: each failure raises the alarm that the guide says; a healthy training raises none."""

import re
import shlex

import numpy as np
import pytest

from distnorm.drift import history
from distnorm.drift.alarms import measures
from tests.runs import ROOT, in_pool

pytestmark = pytest.mark.unit

GUIDE = (ROOT / "docs" / "drift.md").read_text()
GALLERY = dict(re.findall(r"<!-- gallery: (\w+) -->\s+```bash\npython train\.py (.+)\n", GUIDE))
ALARMS = {  # the guide's own words: measure, layers that may be the worst, what to type
    "sorted": ("between_ranks", r"features\.\d+", "data.shards=shuffled"),
    "small": ("effective_samples", r"features\.19", "norm=group_ws"),
    "lagging": ("lag", r"features\.\d+", "norm.momentum"),
    "dead": ("dead_relus", r"stages\.2\.0\..*", "task.warmup_fraction"),
    "domain": ("shift", r"stages\..*", "distnorm calibrate"),
}
SHORT = {"sorted": 80, "small": 260, "lagging": 200, "dead": 120, "domain": 280}


def trained(folder, world, *overrides):
    in_pool(folder, world, *overrides)
    return history.read(folder)


def ranks_of(overrides):
    """How many ranks a command line asks for."""
    return 4 if any("sorted_shards" in override for override in overrides) else 1


def test_the_guide_shows_every_failure():
    assert GALLERY.keys() == ALARMS.keys()


@pytest.mark.parametrize("name", ALARMS)
def test_a_failure_of_the_gallery_raises_its_alarm_with_layer_and_remedy(name, tmp_path):
    overrides = [o for o in shlex.split(GALLERY[name].partition("#")[0]) if not o.startswith("trainer.max_steps")]
    short = [f"trainer.max_steps={SHORT[name]}", "norm.calibration_samples=64"]
    run = trained(tmp_path / "run", ranks_of(overrides), *overrides, *short)
    measure, layer, remedy = ALARMS[name]
    raised = [alarm for alarm in run.alarms if (alarm.measure, alarm.state) == (measure, "raised")]
    assert raised, [alarm.message for alarm in run.alarms]
    assert re.fullmatch(layer, raised[0].layer)
    assert f"in {raised[0].layer}" in raised[0].message
    assert remedy in raised[0].message


def test_a_healthy_training_raises_none(tmp_path):
    run = trained(tmp_path / "run", 2, "drift=full", "trainer.max_steps=330", "trainer.log_every_n_steps=10")
    assert [alarm.message for alarm in run.alarms] == []
    assert {"jeffreys", "between_ranks", "lag", "shift", "precise_ratio"} <= run.values.keys()


EIGHT = [
    "experiment=sorted_shards", "study=null", "drift=light", "drift.interval=1", "data.device_batch=4",
    "data.augmentation=none", "trainer.max_steps=30",
]  # fmt: skip


@pytest.mark.parametrize("shards", ["shuffled", "sorted"])
def test_eight_ranks_are_as_far_apart_as_their_shards(shards, tmp_path):
    run = trained(tmp_path / "run", 8, *EIGHT, f"data.shards={shards}")
    ratios = run.values["between_ranks"][1:, -1]  # the stem's channels move as one: a chance of their own
    if shards == "shuffled":
        assert ((ratios > 0.5) & (ratios < 2)).all(), ratios
    else:
        limit = measures(8)["between_ranks"].limit.at
        assert limit == pytest.approx(4.45, abs=0.01)
        assert (ratios[-3:] > 4).all(), ratios
        assert [alarm.measure for alarm in run.alarms if alarm.state == "raised"][:1] == ["between_ranks"]
    assert run.world_size == 8
    assert np.isfinite(run.values["between_ranks"][:, -1]).all()
