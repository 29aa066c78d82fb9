"""From conf/ and a command line to checked settings and ranks: what passes, and the words of each mistake."""

import functools
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distnorm import settings
from distnorm.errors import ConfigError
from distnorm.launch import overrides, ranks
from distnorm.spec import KINDS

pytestmark = pytest.mark.unit

CONF = Path(__file__).parent.parent / "conf"
CHOICES = sorted((file.parent.name, file.stem) for file in CONF.glob("*/[!_]*.yaml"))
REMOTE = {"timm": ["timm"], "torchvision": ["torchvision", "torchvision.models"]}
SCHEMA = {
    "norm": settings.NormSettings,
    "trainer": settings.TrainerSettings,
    "drift": settings.DriftSettings,
    "logger": settings.LoggerSettings,
}


@functools.cache
def composed(*changes):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(changes))


def checked(*changes):
    return settings.check(composed(*changes))


def message_of(call, *arguments):
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    assert str(error.value).count("\n") <= 2
    return str(error.value)


def stub(monkeypatch, choice):
    """Pretend that the package of a model choice is installed."""
    for name in REMOTE.get(choice, ()):
        module = types.ModuleType(name)
        module.create_model = module.get_model = lambda **_: None
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_file_of_every_group_composes_and_passes(group, choice, monkeypatch, tmp_path):
    stub(monkeypatch, choice)
    root = [f"data.root={tmp_path}"] if choice == "folder" else []
    found = checked(f"{group}={choice}", *root)
    own = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"), resolve=False)
    for key, value in own.items():
        if group in settings.Settings.model_fields and key != "defaults" and "${" not in str(value):
            node = getattr(found, group)
            expected = str(tmp_path) if value == "???" else value
            assert (node[key] if isinstance(node, dict) else getattr(node, key)) == expected


def test_no_group_is_without_files_and_every_kind_of_norm_has_one():
    groups = {group for group, _ in CHOICES}
    assert groups - {"experiment"} == {"data", "model", "task", *SCHEMA, "optimizer", "search"}
    assert {choice for group, choice in CHOICES if group == "norm"} == set(KINDS)


@pytest.mark.parametrize("choice", REMOTE)
def test_a_model_whose_package_is_missing_says_what_to_install(choice, monkeypatch):
    for name in REMOTE[choice]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails, installed or not
    text = message_of(checked, f"model={choice}")
    assert re.match(rf"model\._target_='{choice}\.[\w.]+' cannot be imported: ", text)
    assert f"Install the package ({choice}), or correct the name." in text


def test_a_folder_without_a_root_says_what_to_add():
    assert message_of(checked, "data=folder") == "data.root is missing, and has no default. Add data.root=…"


def test_experiments_change_what_they_name():
    small, same = checked("experiment=small_batch"), checked("experiment=same_everywhere")
    assert (small.device_batch, small.trainer.devices, small.trainer.max_epochs) == (2, 2, 10)
    assert (same.data["global_batch"], same.norm.exact, same.trainer.precision) == (32, True, "64-true")


@pytest.mark.parametrize(("group", "choice"), [pair for pair in CHOICES if pair[0] in SCHEMA])
def test_conf_and_schema_have_the_same_keys(group, choice):
    assert set(composed(f"{group}={choice}")[group]) == set(SCHEMA[group].model_fields)
    assert set(composed()) == set(settings.Settings.model_fields)


@pytest.mark.parametrize("name", ["123", "null", "1e-3", "yes", "a: b # c", "ünï\ncode", "100%", " ", "{x}", "0o7"])
def test_settings_come_back_from_yaml_as_they_were(name):
    found = checked("optimizer=adamw", "+trainer.lightning.limit_val_batches=3", "logger.tags=[a,'1']", "seed=7")
    found = found.model_copy(update={"logger": found.logger.model_copy(update={"name": name})}).with_batches(2)
    again = settings.from_yaml(found.to_yaml())
    assert again == found
    assert (again.logger.name, again.seed, again.device_batch) == (name, 7, 16)
    assert (again.optimizer["betas"], again.trainer.lightning) == ([0.9, 0.999], {"limit_val_batches": 3})


def test_batches_follow_from_one_another_and_the_ranks():
    assert checked().with_batches(4).data.items() >= {"device_batch": 16, "global_batch": 64}.items()
    assert checked("data.global_batch=32").with_batches(4).device_batch == 8
    assert checked("data.device_batch=3").with_batches(4).data["global_batch"] == 12
    agreed = checked("data.device_batch=3", "data.global_batch=12").with_batches(4)
    assert (agreed.device_batch, agreed.data["global_batch"]) == (3, 12)
    assert agreed.decide(4, 4).device_batch == 3
    text = message_of(checked("data.global_batch=30").with_batches, 4)
    assert all(part in text for part in ("data.global_batch=30", "over 4 ranks", "e.g. data.global_batch=32"))
    text = message_of(checked("data.device_batch=3", "data.global_batch=16").with_batches, 4)
    assert all(part in text for part in ("data.device_batch=3", "12 samples", "data.global_batch=16", "one of the two"))


WRONG = [
    ("+norm.kin=sync", "norm.kin='sync'", "Did you mean 'kind'?", "Keys of norm: kind, "),
    ("+trainer.device=2", "trainer.device=2", "Did you mean 'devices'?"),
    ("+seeed=1", "seeed=1", "Did you mean 'seed'?"),
    ("~norm.exact", "norm.exact is missing", "norm=auto"),
    ("seed=???", "seed is missing, and has no default", "Add seed="),
    ("seed=abc", "seed='abc'", "a whole number", "e.g. seed=0"),
    ("seed=-1", "seed=-1", "a whole number", "e.g. seed=0"),
    ("seed=4294967296", "seed=4294967296", "4294967295"),
    ("norm.normalization_batch=0", "norm.normalization_batch=0", "at least 1", "e.g. norm.normalization_batch=16"),
    ("norm.normalization_batch=2.5", "norm.normalization_batch=2.5", "a whole number"),
    ("norm.sync_ranks=0", "norm.sync_ranks=0", "at least 1", "e.g. norm.sync_ranks="),
    ("norm.exact=maybe", "norm.exact='maybe'", "true or false", "e.g. norm.exact=true"),
    ("norm.momentum=2", "norm.momentum=2", "(0, 1]", "e.g. norm.momentum=0.1"),
    ("norm.kind=synk", "norm.kind='synk'", "not one of auto, batch, sync, ", "Did you mean 'sync'?"),
    ("trainer.accelerator=gpuu", "trainer.accelerator='gpuu'", "Did you mean 'gpu'?"),
    ("trainer.devices=all", "trainer.devices='all'", "at least 1, or auto", "e.g. trainer.devices=2"),
    ("trainer.devices=0", "trainer.devices=0", "at least 1, or auto"),
    ("trainer.precision=8", "trainer.precision=8", "not one of 32-true, 64-true, bf16-mixed, 16-mixed"),
    ("trainer.max_steps=-2", "trainer.max_steps=-2", "-1 for no limit"),
    ("trainer.max_steps=true", "trainer.max_steps=True", "a whole number"),
    ("trainer.gradient_clip_val=0", "trainer.gradient_clip_val=0", "above 0", "e.g. trainer.gradient_clip_val=1.0"),
    ("trainer.timeout_s=0", "trainer.timeout_s=0", "seconds, above 0", "e.g. trainer.timeout_s=300"),
    ("trainer.timeout_s=inf", "trainer.timeout_s=inf", "e.g. trainer.timeout_s=300"),
    ("trainer.lightning=3", "trainer.lightning=3", "dictionary"),
    ("trainer.ranks_from=slrm", "trainer.ranks_from='slrm'", "Did you mean 'slurm'?"),
    ("drift.kind=lite", "drift.kind='lite'", "Did you mean 'light'?"),
    ("drift.interval=0", "drift.interval=0", "at least 1"),
    ("logger.mode=ofline", "logger.mode='ofline'", "Did you mean 'offline'?"),
    ("logger.tags=x", "logger.tags='x'", "list"),
    ("runs_dir=null", "runs_dir=None", "string"),
    ("data.device_batch=0", "data.device_batch=0", "at least 1", "e.g. data.device_batch=16"),
    ("data.global_batch=two", "data.global_batch='two'", "a whole number", "e.g. data.global_batch=16"),
    ("data.seed=${nope}", "data.seed", "'nope' not found", "plain value"),
    ("model._target_=distnorm.models.Nope", "model._target_='distnorm.models.Nope'", "cannot be imported", "correct"),
    ("model._target_=no_such_package.X", "cannot be imported", "Install the package (no_such_package)"),
    ("model._target_=null", "model._target_=None", "Give a class, e.g. model._target_=package.Class"),
    ("+model.width=[3]", "model.width=[3]", "not an argument of distnorm.models.ResNet", "Did you mean 'widths'?"),
    ("+optimizer.momentun=3", "optimizer.momentun=3", "Did you mean 'momentum'?", "It takes params, lr, "),
    ("~task.num_classes", "task.num_classes is missing", "distnorm.tasks.Classification needs it", "Add "),
    ("model.num_classes=ten", "model.num_classes='ten'", "a whole number", "e.g. model.num_classes=16"),
    ("optimizer.lr=fast", "optimizer.lr='fast'", "a number", "e.g. optimizer.lr=0.1"),
]


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_wrong_value_is_named_with_its_rule_and_a_remedy(case):
    change, *parts = case
    text = message_of(checked, change)
    assert [part for part in parts if part not in text] == [], text


def test_what_is_right_passes_in_whatever_way_it_is_written():
    found = checked("trainer.precision=32", "trainer.devices=auto", "norm.momentum=1", "norm.exact=True", "seed=0")
    assert (found.trainer.precision, found.trainer.devices, found.norm.momentum) == ("32-true", "auto", 1)


MISTYPED = [
    (
        "norm=synk",
        "norm='synk' is not one of auto, batch, frozen, ghost, group, group_ws, instance, layer, none, renorm,",
        "Did you mean 'sync'?",
    ),
    ("experiment=smal_batch", "experiment='smal_batch'", "Did you mean 'small_batch'?"),
    ("norm.normalisation_batch=3", "norm.normalisation_batch", "Did you mean 'norm.normalization_batch'?"),
    ("model.width=3", "model.width: there is no such key", "Did you mean 'model.widths'?"),
    ("kind=sync", "kind: there is no such key", "Groups and keys: seed, "),
    ("trainr=cpu", "trainr: there is no such key", "Did you mean 'trainer'?"),
    ("trainer.lightning.deterministic=true", "with a plus, +trainer.lightning.deterministic="),
    ("trainer.lightning={limit_val_batches: 0}", "with a plus, +trainer.lightning.<argument>="),
    ("model.blocks=3", "model.blocks: there is no such key", "Did you mean 'model.blocks_per_stage'?"),
    ("model.strides=[1]", "model.strides is a key of model=convnet", "Add model=convnet, or leave model.strides out."),
    ("norm=sync,batch", "norm=sync,batch gives several values for one run", "Add -m"),
    ("norm", "'norm' cannot be read as key=value", "e.g. norm=sync"),
    ("~foo", "'foo' does not exist"),
    ("norm.kind=[a", "norm.kind=[a"),
    ("norm=sync norm=x", "norm=sync norm=x", "quote"),
    ("trainer=2", "e.g. norm=sync"),
    ("norm=null", "e.g. norm=sync"),
]


@pytest.mark.parametrize("case", MISTYPED, ids=str)
def test_what_hydra_refuses_is_said_in_three_lines_with_what_was_meant(case):
    change, *parts = case
    with pytest.raises(Exception) as error:  # noqa: PT011 — Hydra's many kinds
        composed(change)
    text = overrides.in_words(error.value, CONF)
    assert text.count("\n") <= 2
    assert [part for part in parts if part not in text] == [], text


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
}  # fmt: skip


def find(environ, *changes, gpus=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        return ranks.find(checked(*(f"trainer.{change}" for change in changes)).trainer, environ)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_local_ranks_are_to_be_started_and_one_alone_is_this_process(devices):
    starter = "distnorm" if devices > 1 else "nobody"
    expected = ranks.Ranks(devices, devices, 1, 0, 0, starter, "cpu")
    assert find({}, "accelerator=cpu", f"devices={devices}", gpus=8) == expected
    assert find(SLURM | TORCHRUN, "ranks_from=local", f"devices={devices}") == expected


def test_automatic_devices_are_the_gpus_or_one_cpu():
    assert find({}, "devices=auto", gpus=2) == ranks.Ranks(2, 2, 1, 0, 0, "distnorm", "gpu")
    assert find({}, "devices=auto") == ranks.Ranks(1, 1, 1, 0, 0, "nobody", "cpu")


def test_ranks_that_torchrun_or_srun_started_are_found():
    for asked in ("devices=1", "devices=2", "devices=auto"):
        assert find(TORCHRUN, asked, "num_nodes=2") == ranks.Ranks(4, 2, 2, 3, 1, "torchrun", "cpu")
        assert find(SLURM, asked, "num_nodes=auto") == ranks.Ranks(4, 2, 2, 3, 1, "slurm", "cpu")
    assert find(SLURM | TORCHRUN, "ranks_from=slurm").started_by == "slurm"
    assert not find(TORCHRUN).is_first
    assert find(SLURM | {"SLURM_JOB_NAME": "interactive"}).started_by == "slurm"


UNEVEN = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,3"}
DISAGREEMENTS = [
    ({}, "num_nodes=2", "trainer.num_nodes=2", "sbatch --nodes="),
    ({}, "accelerator=gpu", "trainer.accelerator=gpu", "trainer=cpu"),
    ({}, "ranks_from=torchrun", "RANK is not set", "torchrun train.py"),
    ({}, "ranks_from=slurm", "SLURM_STEP_ID is not set", "srun --ntasks-per-node="),
    (TORCHRUN, "devices=3", "trainer.devices=3", "torchrun started 2", "--nproc-per-node=3", "trainer.devices=2"),
    (TORCHRUN, "num_nodes=3", "trainer.num_nodes=3", "4 ranks, 2 on this node", "trainer.num_nodes=auto"),
    (SLURM, "devices=3", "slurm started 2", "--ntasks-per-node=3, or trainer.devices=2"),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, "num_nodes=auto", "slurm started 3,1 ranks", "as many on each"),
    (UNEVEN, "num_nodes=auto", "slurm started 1,3 ranks", "as many on each"),
]


@pytest.mark.parametrize("case", DISAGREEMENTS, ids=lambda case: f"{case[1]}-{case[2]}")
def test_ranks_that_disagree_with_what_was_asked_for_are_refused(case):
    environ, asked, *parts = case
    text = message_of(find, environ, asked)
    assert [part for part in parts if part not in text] == [], text


def test_more_gpus_than_there_are_are_refused():
    text = message_of(lambda: find({}, "devices=3", gpus=2))
    assert "trainer.devices=3" in text
    assert "2 GPUs" in text
