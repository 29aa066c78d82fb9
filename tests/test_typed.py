"""What documents, errors and alternatives tell one to type: Hydra takes it, and the decision is the one announced."""

import re
import shlex
from pathlib import Path

import pytest

from distnorm import ConfigError, decide
from distnorm.launch.compose import composed
from tests.runs import ROOT

pytestmark = pytest.mark.unit

CONF = Path(ROOT) / "conf"
GUIDE = (Path(ROOT) / "docs" / "normalization.md").read_text()
IN_CODE = [words for words in re.findall(r"`([^`\n]+)`", GUIDE) if re.match(r"'?norm[.\w]*=.", words)]
IN_COMMENTS = re.findall(r"'norm\.[^']+'", (CONF / "norm" / "_base.yaml").read_text())


def decided(*typed, device_batch=8, world=4):
    return composed(CONF / "train.yaml", [*typed, f"data.device_batch={device_batch}"]).decide(world, 8)


@pytest.mark.parametrize("words", [*IN_CODE, *IN_COMMENTS])
def test_what_the_documents_write_can_be_typed(words):
    assert decided(*shlex.split(words)).reasons


def test_the_documents_write_some():
    assert len(IN_CODE) >= 3
    assert any("norm.layers={" in words for words in IN_CODE)
    assert any("norm.layers={" in words for words in IN_COMMENTS)


CASES = [
    # device batch, ranks, what was typed already
    (8, 4, ()),
    (2, 64, ()),
    (512, 4, ()),
    (2, 4, ("norm.pretrained=true",)),
    (8, 4, ("norm.pretrained=true",)),
    (8, 4, ("norm.task=contrastive",)),
    (8, 4, ("norm.iid=false",)),
    (8, 4, ("norm.foldable=true", "norm.memory_bound=true")),
    (8, 4, ("norm.task=generative",)),
    (8, 4, ("norm.sync_ranks=2",)),
    (8, 16, ("norm.exact=true",)),
    (64, 4, ("norm.exact=true",)),
    (512, 4, ("norm.exact=true", "norm.normalization_batch=512", "norm.min_normalization_batch=64")),
    (8, 4, ("norm=group", "norm.normalization_batch=8", "norm.exact=true")),
    (1, 4, ("norm=none",)),
]


@pytest.mark.parametrize(("device_batch", "world", "before"), CASES)
def test_every_alternative_can_be_typed_after_what_led_to_it_and_keeps_its_promise(device_batch, world, before):
    spec = decided(*before, device_batch=device_batch, world=world)
    settings = [other for other in spec.alternatives if other.setting != "activation checkpointing"]
    assert settings
    for other in settings:
        found = decided(*before, *shlex.split(other.setting), device_batch=device_batch, world=world)
        if "layers=" in other.setting:
            assert found.layers["head.*"]["kind"] == "group"
        else:
            assert (found.kind, found.penalty, found.cost_ms) != (spec.kind, spec.penalty, spec.cost_ms)
            assert (found.penalty, found.cost_ms) == (other.penalty, other.cost_ms), other
            assert f"norm={found.kind}" in other.setting


LAYERS = [
    ("norm.layers={layer4.*: group}", {"layer4.*": "group"}),
    ("norm.layers={*.bn1: group, 0: layer}", {"*.bn1": "group", "0": "layer"}),
    ("norm.layers={head.bn: {kind: sync, sync_ranks: 2}}", {"head.bn": {"kind": "sync", "sync_ranks": 2}}),
    ("norm.layers={}", {}),
]


@pytest.mark.parametrize(("typed", "layers"), LAYERS)
def test_overrides_of_layers_mean_the_same_typed_and_called(typed, layers):
    assert decided(typed).layers == decide(8, 4, layers=layers).layers
    assert decided(typed).layers.keys() == layers.keys()


REFUSED = [
    ('norm.layers={"layer4.*": group}', "without quotes inside", "'norm.layers={layer4.*: group, "),
    ("norm.layers.head=group", "one dictionary", "'norm.layers={layer4.*: group, "),
    ("norm.layers={a: group}; norm.layers={b: group}", "given once", "++norm.layers={…} adds to one"),
    ("norm.layers=group", "norm.layers='group' must be kinds by globs", "Use e.g. 'norm.layers={layer4.*: group}'."),
    ("norm.layers={a: 3}", "norm.layers['a']=3 must be a kind", "'norm.layers={a: {kind: sync, sync_ranks: 2}}'"),
    ("norm.layers={a: grup}", "norm.layers['a'].kind='grup' is not one of", "Did you mean 'group'?"),
    ("norm.include=layer4", "norm.include='layer4' must be a list of globs", "Use e.g. norm.include=[layer4]."),
    ("norm.calibration_samples=0", "norm.calibration_samples=0 must be", "Use e.g. norm.calibration_samples=1024."),
    ("norm.renorm.rmax=3", "norm.renorm.rmax: there is no such key", "Did you mean 'norm.renorm.r_max'?"),
    ("norm.layerss={a: group}", "norm.layerss: there is no such key", "Did you mean 'norm.layers'?"),
    ("norm.task=detection", "norm.task='detection' is not one of", "Use norm.task=dense."),
    ("norm.task=vae", "norm.task='vae' is not one of", "Use norm.task=generative."),
    ("norm.task=contrastiv", "norm.task='contrastiv' is not one of", "Did you mean 'contrastive'?"),
]


@pytest.mark.parametrize(("typed", "value", "remedy"), REFUSED)
def test_what_cannot_be_typed_so_says_how(typed, value, remedy):
    with pytest.raises(ConfigError) as caught:
        decided(*typed.split("; "))
    assert value in str(caught.value)
    assert remedy in str(caught.value)
    assert str(caught.value).count("\n") <= 2
