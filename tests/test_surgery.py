"""Which layers are changed, which are known, and every refusal, that changes nothing."""

import pytest
import torch
from torch import nn

from distnorm import ConfigError, GhostBatchNorm, NormSpec, SyncBatchNorm, collectives, convert, decide, load
from distnorm.checkpoint import entry
from distnorm.models import ResNet
from distnorm.models.resnet import BasicBlock
from distnorm.norms import FrozenBatchNorm
from distnorm.norms.surgery import register_norm, source_of
from tests import nasty, ranks
from tests.nasty import KINDS, BatchNormAct2d, FrozenBatchNorm2d, OwnForward, Swish, SyncBatchNormAct

pytestmark = pytest.mark.unit

SYNC = decide(8, 4)
STAGES = ["stages.0.0.bn1", "stages.0.0.bn2", "stages.1.0.bn1", "stages.1.0.bn2", "stages.1.0.shortcut.1"]


def resnet():
    return ResNet(widths=(4, 8))  # norms: bn, and STAGES


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ["bn", *STAGES]),
        (["bn"], None, ["bn"]),
        ("stages.1", None, STAGES[2:]),  # one glob needs no list; a container stands for what is below it
        (["*.bn1", "bn"], None, ["bn", STAGES[0], STAGES[2]]),
        (None, ["stages.?.0.bn*"], ["bn", STAGES[4]]),
        (["stages"], ["stages.0"], STAGES[2:]),
        (BasicBlock, None, STAGES),
        ([nn.BatchNorm2d], [BasicBlock], ["bn"]),
        (["stages.1.0.shortcut.1"], [], [STAGES[4]]),
    ],
)
def test_globs_and_types_choose_the_layers(include, exclude, expected):
    model = resnet()
    conversion = convert(model, SYNC, include, exclude)
    assert [row.name for row in conversion.layers] == expected
    assert [name for name, m in model.named_modules() if type(m) is SyncBatchNorm] == expected
    assert sorted([row.name for row in conversion.left] + expected) == sorted(["bn", *STAGES])


def test_the_spec_can_say_it_and_an_argument_takes_its_place():
    spec = NormSpec("sync", 8, include=("stages",), exclude=("stages.1",))
    assert [row.name for row in convert(resnet(), spec).layers] == STAGES[:2]
    assert [row.name for row in convert(resnet(), spec, include="bn").layers] == ["bn"]
    assert [row.name for row in convert(resnet(), spec, exclude=()).layers] == STAGES


def test_any_name_of_a_shared_layer_will_do():
    model = nasty.Nasty()
    conversion = convert(model, SYNC, exclude=["again"])
    assert type(model.shared) is nn.BatchNorm2d
    assert "shared" in {row.name for row in conversion.left}
    conversion.revert()
    convert(model, NormSpec("sync", 8, layers={"in_list.1": {"kind": "layer"}}))
    assert type(model.again) is nn.GroupNorm
    assert type(model.in_list[2]) is SyncBatchNorm


def test_the_root_has_a_name():
    norm = nn.BatchNorm1d(4)
    convert(norm, NormSpec("sync", 8, layers={"(the model)": {"kind": "layer"}}))
    assert type(norm) is nn.GroupNorm


def test_overrides_by_container_and_the_first_counts():
    model = resnet()
    layers = {"stages.1.0.bn1": {"kind": "ghost", "ghost_batch": 2}, "stages.1": {"kind": "group", "groups": 2}}
    convert(model, NormSpec("sync", 8, layers=layers, per_kind={"2d": {"kind": "layer"}}))
    block = model.stages[1][0]
    assert (type(block.bn1), type(block.bn2), block.bn2.num_groups) == (GhostBatchNorm, nn.GroupNorm, 2)
    assert (type(model.bn), model.bn.num_groups) == (nn.GroupNorm, 1)


def test_the_table_names_what_was_left_and_why():
    model = nn.Sequential(nn.BatchNorm2d(4), FrozenBatchNorm2d(4), nn.BatchNorm2d(4), OwnForward(4))
    lines = str(convert(model, SYNC, include=["0", "1", "3"], exclude="3")).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2", "3"]
    assert lines[3].endswith("left: constants, that no entry of layers names")
    assert lines[4].endswith("left: not in include")
    assert lines[5].endswith("left: exclude='3'")
    assert [type(m) for m in model][1:] == [FrozenBatchNorm2d, nn.BatchNorm2d, OwnForward]


def test_a_checkpoint_rebuilds_the_same_choice(tmp_path):
    """Types as names, removed biases, and however many ranks the run had."""

    def make():
        torch.manual_seed(1)
        block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        return nn.Sequential(block, nn.ModuleList([nn.BatchNorm2d(4)])[0], nn.Conv2d(4, 4, 1, bias=False))

    trained = make()
    conversion = convert(trained, decide(2, 4, kind="sync"), include=nn.BatchNorm2d, remove_redundant_biases=True)
    assert conversion.spec.include == ("0.1", "1")
    assert conversion.removed_biases == ("0.0.bias",)
    x = torch.randn(4, 3, 5, 5)
    trained(x)
    state = {f"model.{k}": v for k, v in trained.state_dict().items()}
    torch.save({"state_dict": state, "distnorm": entry(conversion.spec, [])}, tmp_path / "last.ckpt")
    loaded = load(make(), tmp_path / "last.ckpt")
    assert [type(m) for m in loaded.modules()] == [type(m) for m in trained.modules()]
    assert loaded[0][0].bias is None
    assert torch.equal(loaded(x), trained.eval()(x))


# -- classes of others


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [BatchNormAct2d, Swish], ids=["timm", "registered"])
def test_an_activation_stays(make, kind):
    """The converted layer is the kind's own, then the activation."""
    torch.manual_seed(0)
    active, plain = nn.Sequential(make(8)), nn.Sequential(nn.BatchNorm2d(8))
    with torch.no_grad():
        active[0].weight.uniform_(0.5, 2), active[0].bias.uniform_(-1, 1), active[0].running_mean.uniform_(-1, 1)
    plain.load_state_dict(active.state_dict())
    after = active[0].act if make is BatchNormAct2d else active[0].gate
    for model in (active, plain):
        convert(model, KINDS[kind])
    x = torch.randn(4, 8, 3, 3)
    given = x.clone()
    for mode in (True, False):
        expected = plain.train(mode)(x)
        torch.testing.assert_close(active.train(mode)(given), after(expected.clone()))
        assert torch.equal(given, x)  # an activation that works in place may not reach a norm's input
    assert (kind == "batch") == (type(active[0]) is make)


def test_timms_synchronized_layer_hands_its_activation_on():
    layer = SyncBatchNormAct(4)
    layer.drop, layer.act = nn.Identity(), nn.ReLU(inplace=True)
    model = nn.Sequential(layer)
    convert(model, NormSpec("batch", 8))
    x = torch.randn(4, 4, 2, 2)
    torch.testing.assert_close(model(x), nn.BatchNorm2d(4)(x).relu())
    assert SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(4)))[0](x).min() >= 0


def test_constants_stay_unless_they_are_named():
    model = nn.Sequential(FrozenBatchNorm2d(4), FrozenBatchNorm(4), nn.BatchNorm2d(4))
    conversion = convert(model, SYNC)
    assert [row.name for row in conversion.left] == ["0", "1"]
    conversion.revert()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    conversion = convert(model, NormSpec("sync", 32, layers={"0": {}, "1": {}}))
    new = [name for name, p in model.named_parameters() if id(p) not in held]
    assert list(conversion.new_parameters) == sorted(new) == ["0.bias", "0.weight"]
    assert "\nnew parameters, that an optimizer built before does not have: 0.bias, 0.weight" in str(conversion)
    assert [type(m) for m in model] == [SyncBatchNorm] * 3
    assert all(m.weight.requires_grad for m in model)
    assert conversion.new_keys == ("0.num_batches_tracked",)
    x = torch.randn(8, 4, 2, 2)
    torch.testing.assert_close(model[0](x), nn.BatchNorm2d(4)(x))
    conversion.revert()
    assert not model[1].weight.requires_grad
    only = nn.Sequential(FrozenBatchNorm2d(4))
    assert "left: constants" in str(convert(only, SYNC))


def test_a_subclass_that_changes_nothing_needs_no_registration():
    assert source_of(nasty.Renamed(4)) is not None
    assert source_of(OwnForward(4)) is None
    assert source_of(nn.Conv2d(1, 1, 1)) is None


def test_register_refuses_what_it_cannot_use():
    with pytest.raises(ConfigError, match=r"got 'Swish', that is no class.*Give it the class itself"):
        register_norm("Swish")
    with pytest.raises(ConfigError, match=r"after='gate', that must be a tuple.*after=\('gate',\)"):
        register_norm(Swish, after="gate")
    for after in ([nn.ReLU()], 5):
        with pytest.raises(ConfigError, match=r"that must name submodules of a Swish[\s\S]*after=\('act',\)"):
            register_norm(Swish, after=after)
    assert source_of(Swish(4)).after == ("gate",)


def test_constants_that_saw_no_batch_are_warned_of(caplog):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1](torch.randn(8, 4, 3, 3))
    model[2].running_mean.fill_(2)  # loaded, without a count
    convert(model, NormSpec("frozen", 1))
    (record,) = caplog.records
    assert record.getMessage().startswith("norm=frozen: 1 of 3 layers have seen no batch: constants 0 and 1")
    assert record.getMessage().endswith("Load the weights first.")
    caplog.clear()
    seen = nn.Sequential(nn.BatchNorm2d(4))
    seen(torch.randn(8, 4, 3, 3))
    convert(seen, NormSpec("frozen", 1))
    convert(nn.Sequential(nn.BatchNorm2d(4)), SYNC)
    assert not caplog.records


# -- refusals


class Gateless(nn.BatchNorm2d):
    def forward(self, x):
        return self.gate(super().forward(x))


register_norm(Gateless, after=("gate",))


def wrapped_inside():
    return nn.Sequential(nn.DataParallel(nn.Sequential(nn.BatchNorm2d(2))), nn.BatchNorm2d(2))


def two(second):
    return lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), second())


GOOD = two(lambda: nn.BatchNorm2d(2))
LAZY, SCRIPTED = two(nn.LazyBatchNorm2d), two(lambda: torch.jit.script(nn.BatchNorm2d(2)))
REFUSALS = {
    "wrapped": (lambda: nn.DataParallel(GOOD()), SYNC, {}, "got a DataParallel", "pass model.module"),
    "wrapped inside": (wrapped_inside, SYNC, {}, "found a DataParallel, '0'", "Convert before wrapping"),
    "compiled": (lambda: torch.compile(GOOD()), SYNC, {}, "got a OptimizedModule", "model._orig_mod"),
    "scripted": (lambda: torch.jit.script(GOOD()), SYNC, {}, "a scripted model", "Convert the module it was made from"),
    "scripted inside": (SCRIPTED, SYNC, {}, "'2' is a scripted BatchNorm2d", "exclude=['2']"),
    "lazy": (LAZY, SYNC, {}, "'2' is a LazyBatchNorm2d", "Run one batch"),
    "own forward": (two(lambda: OwnForward(2)), SYNC, {}, "'2' is a OwnForward", "distnorm.register_norm(OwnForward"),
    "no gate": (two(lambda: Gateless(2)), SYNC, {}, "a Gateless without gate", "exclude=['2']"),
    "no norm": (lambda: nn.Sequential(nn.Linear(2, 2)), SYNC, {}, "no batch norm in Sequential", "norm_layer"),
    "a class": (lambda: ResNet, SYNC, {}, "got the class ResNet", "ResNet(…)"),
    "no module": (lambda: [nn.BatchNorm1d(2)], SYNC, {}, "got 'list'", "an nn.Module"),
    "no decision": (GOOD, "sync", {}, "got 'sync' for a decision", "NormSpec(kind="),
    "no such layer": (
        resnet,
        SYNC,
        {"exclude": "stages.2.*"},
        "exclude='stages.2.*' matches no",
        "Did you mean 'stages",
    ),
    "include": (resnet, SYNC, {"include": ["bn2"]}, "include='bn2' matches no", "Did you mean 'bn'?"),
    "include nothing": (GOOD, SYNC, {"include": []}, "include=[]", "include=['layer4']"),
    "all excluded": (GOOD, SYNC, {"exclude": "*"}, "leaves no batch norm", "Exclude fewer"),
    "no such type": (
        GOOD,
        SYNC,
        {"exclude": [nn.BatchNorm3d]},
        "exclude=BatchNorm3d matches no",
        "BatchNorm2d: name one",
    ),
    "no selector": (GOOD, SYNC, {"include": [4]}, "got 4 in include", "include=['layer4.*'"),
    "a number": (GOOD, SYNC, {"include": 5}, "got 5 in include", "include=['layer4.*'"),
    "a module": (GOOD, SYNC, {"exclude": nn.ReLU()}, "got ReLU() in exclude", "exclude=['layer4.*'"),
    "layers": (
        GOOD,
        NormSpec("batch", 8, layers={"3": {"kind": "group"}}),
        {},
        "spec.layers='3' matches",
        "e.g. 'layer4'",
    ),
    "a field": (
        GOOD,
        NormSpec("batch", 8, layers={"2": {"kin": "group"}}),
        {},
        "['2'] sets 'kin'",
        "Did you mean 'kind'?",
    ),
    "no fields": (
        GOOD,
        NormSpec("batch", 8, per_kind={"2d": "group"}),
        {},
        "is 'group', that must map",
        "'kind': 'group'",
    ),
    "a kind": (
        GOOD,
        NormSpec("batch", 8, layers={"2": {"kind": "snyc"}}),
        {},
        "'snyc' is not one of",
        "Did you mean 'sync'?",
    ),
    "a ghost": (GOOD, NormSpec("batch", 8, layers={"2": {"kind": "ghost"}}), {}, "ghost_batch=None", "give both"),
    "groups": (GOOD, NormSpec("batch", 8, layers={"2": {"kind": "group", "groups": 0}}), {}, "groups=0", "groups=32"),
    "nothing to freeze": (nasty.with_statless, KINDS["frozen"], {}, "'1' has no running statistics", "exclude=['1']"),
}


@pytest.mark.parametrize(("make", "spec", "options", "value", "remedy"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_change_nothing(make, spec, options, value, remedy):
    model = make()
    is_model = isinstance(model, nn.Module)
    before = nasty.picture(model) if is_model else None
    with pytest.raises(ConfigError) as caught:
        convert(model, spec, **options)
    assert value in str(caught.value)
    assert remedy in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert before is None or nasty.picture(model) == before


def test_what_is_excluded_may_be_unknown():
    for make in (LAZY, SCRIPTED, two(lambda: OwnForward(2))):
        conversion = convert(make(), SYNC, exclude="2")
        assert [row.name for row in conversion.layers] == ["1"]


def test_a_failure_on_the_way_puts_back_what_was_changed():
    class Brittle(nn.BatchNorm2d):
        __slots__ = ("x",)  # no other class has its layout

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Brittle(4))
    before = nasty.picture(model)
    with pytest.raises(TypeError, match="layout differs"):
        convert(model, KINDS["group_ws"])
    assert nasty.picture(model) == before


def convert_for(spec):
    """Body: what `convert` says on this rank of two."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    try:
        convert(model, spec)
    except ConfigError as error:
        assert type(model[0]) is nn.BatchNorm1d
        return str(error)
    y = model(torch.randn(4, 2))
    return type(model[0]).__name__, len(y), collectives.world_size()


def test_a_decision_for_other_ranks_is_refused_where_there_are_several():
    for spec in (decide(8, 4), decide(64, 1)):
        for said in ranks.run(convert_for, spec, world=2):
            assert f"world_size={spec.world_size}, and this run has 2 ranks" in said
            assert f"decide(device_batch={spec.device_batch}, world_size=2)" in said
    for kind in ("sync", "renorm"):
        for said in ranks.run(convert_for, NormSpec(kind, 24, sync_ranks=3), world=2):
            assert "'0' would share statistics over sync_ranks=3" in said
            assert "Use 1 or 2" in said
    by_hand = NormSpec("sync", 8, sync_ranks=2)  # says nothing of the world
    assert ranks.run(convert_for, by_hand, world=2) == [("SyncBatchNorm", 4, 2)] * 2
    assert ranks.run(convert_for, decide(8, 4), world=1) == [("SyncBatchNorm", 4, 1)]
    assert convert_for(decide(8, 4)) == ("SyncBatchNorm", 4, 1)


def load_here(path):
    """Body: evaluate on two ranks what four have trained."""
    return type(load(nn.Sequential(nn.BatchNorm1d(2)), path)[0]).__name__


def test_a_checkpoint_of_other_ranks_can_be_evaluated(tmp_path):
    spec, path = decide(8, 4), tmp_path / "last.ckpt"
    state = {f"model.{k}": v for k, v in nn.Sequential(nn.BatchNorm1d(2)).state_dict().items()}
    torch.save({"state_dict": state, "distnorm": entry(spec, [])}, path)
    assert ranks.run(load_here, str(path), world=2) == ["SyncBatchNorm"] * 2
