"""`convert`, then `revert`, is the identity: on every kind, and on models that make it hard."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from distnorm import ConfigError, NormSpec, SyncBatchNorm, convert
from distnorm.fold import fold
from distnorm.models import ResNet
from tests.nasty import (
    KINDS,
    MODELS,
    FrozenBatchNorm2d,
    Nasty,
    Watched,
    input_of,
    picture,
    same_values,
    trained,
    values,
)

pytestmark = pytest.mark.unit

CASES = [(kind, model) for model in MODELS for kind in KINDS if (kind, model) != ("frozen", "statless")]


def convert_all(model, kind, **options):
    """Convert, constants too."""
    frozen = {name: {"kind": kind} for name, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)}
    spec = NormSpec.from_dict(KINDS[kind].to_dict() | {"layers": frozen})
    return convert(model, spec, **options)


@pytest.mark.parametrize(("kind", "make"), CASES, ids=str)
def test_convert_then_revert_is_the_identity(kind, make):
    torch.manual_seed(0)
    model = trained(MODELS[make]())
    modes, x = [m.training for m in model.modules()], input_of(model)
    before, state = picture(model), values(model)
    conversion = convert_all(model, kind, remove_redundant_biases=True)
    assert conversion.model is model
    assert conversion.layers
    assert modes == [m.training for m in model.modules()]
    if kind != "batch":
        assert picture(model) != before
    assert conversion.revert() is model
    assert picture(model) == before
    assert same_values(values(model), state)
    conversion.revert()
    assert picture(model) == before
    fresh = MODELS[make]()
    fresh.load_state_dict(state)
    assert x.is_meta or torch.equal(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("make", "kind"),
    [(m, k) for m in ("nasty", "timm", "constants") for k in KINDS if (m, k) != ("timm", "batch")],  # that stays timm's
)
def test_converted_models_run_and_can_be_copied_pickled_and_saved(make, kind):
    torch.manual_seed(0)
    model = trained(MODELS[make]())
    convert_all(model, kind)
    model.train()
    x = input_of(model)
    model(x.clone().requires_grad_()).square().mean().backward()
    model.eval()
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in {"frozen", "none"}])
def test_weights_keep_what_they_learned(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), FrozenBatchNorm2d(8))
    keys = list(model.state_dict())
    conversion = convert_all(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(4, 3, 4, 4)).square().mean().backward()
    optimizer.step()
    learned = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("weight")}
    conversion.revert()
    assert type(model[2]) is FrozenBatchNorm2d
    assert list(model.state_dict()) == keys
    assert not list(model[2].parameters())
    for key, value in learned.items():
        assert torch.equal(model.state_dict()[key], value)
    assert not torch.equal(model[1].weight, torch.ones(8))
    assert not torch.equal(model[2].weight, torch.ones(8))


def test_running_statistics_learned_meanwhile_survive():
    model = nn.Sequential(nn.BatchNorm1d(3))
    conversion = convert(model, KINDS["sync"])
    model(torch.randn(8, 3) + 5)
    learned = model[0].running_mean.clone()
    conversion.revert()
    assert torch.equal(model[0].running_mean, learned)
    assert not torch.equal(learned, torch.zeros(3))


def test_hooks_work_on_through_conversion_and_back():
    model = Watched()
    conversion = convert(model, KINDS["sync"])
    for _ in range(2):
        model.calls.clear()
        model(torch.randn(4, 3, 6, 6, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        assert sorted(model.calls) == ["backward", "forward", "kwargs", "load", "pre", "state_dict"]
        conversion.revert()


def test_a_backward_hook_set_meanwhile_stays_a_full_one():
    model, seen = nn.Sequential(nn.BatchNorm1d(2)), []
    conversion = convert(model, KINDS["sync"])
    model[0].register_full_backward_hook(lambda _, into, out: seen.append((len(into), out[0].shape)))
    conversion.revert()
    model(torch.randn(4, 2, requires_grad=True)).sum().backward()
    assert seen == [(1, (4, 2))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_revert_follows_a_model_that_changed_its_dtype(kind, affine):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=affine))
    weight = model[1].weight
    conversion = convert(model, KINDS[kind])
    model.double()
    conversion.revert()
    assert model(torch.randn(4, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64
    assert model[1].num_batches_tracked.dtype == torch.int64
    assert model[1].weight is weight


def test_constants_that_learned_follow_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), FrozenBatchNorm2d(8))
    conversion = convert_all(model, "sync")
    model.double()
    with torch.no_grad():
        model[1].weight.fill_(3)
    conversion.revert()
    assert torch.equal(model[1].weight, torch.full((8,), 3.0, dtype=torch.float64))
    assert model(torch.randn(4, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64


def test_revert_follows_a_model_from_meta():
    model = ResNet(widths=(4, 8)).to("meta")
    conversion = convert(model, KINDS["none"])
    model.to_empty(device="cpu")
    conversion.revert()
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    assert isinstance(model.bn.weight, nn.Parameter)


def test_a_user_who_freezes_meanwhile_is_not_undone():
    model = Nasty()
    conversion = convert(model, KINDS["sync"])
    model.requires_grad_(False)
    conversion.revert()
    assert not any(p.requires_grad for p in model.parameters())


def folded(model):
    fold(model)


def converted(model):
    convert(model, KINDS["frozen"])


@pytest.mark.parametrize("later", [folded, converted])
def test_what_was_changed_since_is_refused_and_nothing_undone(later):
    torch.manual_seed(0)
    model = trained(ResNet(widths=(4, 8), in_channels=3))
    conversion = convert(model, KINDS["sync"], remove_redundant_biases=True)
    later(model.eval())
    x, before, state = input_of(model), picture(model), values(model)
    expected = model(x)
    with pytest.raises(ConfigError, match=r"layer 'bn' is a (torch.Identity|distnorm.FrozenBatchNorm) now") as caught:
        conversion.revert()
    assert "Revert the later conversion first; after fold() there is no way back" in str(caught.value)
    assert picture(model) == before
    assert same_values(values(model), state)
    assert torch.equal(model(x), expected)


def test_conversions_are_undone_from_the_last_to_the_first():
    model = nn.Sequential(nn.BatchNorm2d(4))
    first = convert(model, KINDS["sync"])
    last = convert(model, KINDS["ghost"])
    with pytest.raises(ConfigError, match=r"is a distnorm.GhostBatchNorm now, and convert\(\) left a distnorm.Sync"):
        first.revert()
    last.revert()
    first.revert()
    assert type(model[0]) is nn.BatchNorm2d


def test_a_removed_bias_that_fold_gave_anew_is_not_put_back():
    """The norm after it was not converted, so that only the bias can tell."""
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    conversion = convert(model, KINDS["sync"], include="2", remove_redundant_biases=True)
    assert conversion.removed_biases == ("0.bias",)
    fold(model.eval())
    state = values(model)
    with pytest.raises(ConfigError, match=r"layer '0' has a bias again[\s\S]*load its weights"):
        conversion.revert()
    assert type(model[2]) is SyncBatchNorm
    assert same_values(values(model), state)


def test_a_removed_bias_stays_away_where_its_norm_lost_the_statistics():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    first = convert(model, KINDS["sync"], include="2", remove_redundant_biases=True)
    last = convert(model, KINDS["group"], include="1")
    with pytest.raises(
        ConfigError, match=r"'0' has lost the norm after it, that is a GroupNorm[\s\S]*later conversion"
    ):
        first.revert()
    last.revert()
    first.revert()
    assert model[0].bias is not None


def test_revert_follows_no_dtype_where_no_tensor_is_left():
    """As its docstring says."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    conversion = convert(model, KINDS["none"])
    model.half()
    assert conversion.revert()[0].weight.dtype == torch.float32
