"""The probes equal closed forms and plain autograd on the joined batch, and leave the model as it was."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from distnorm import ConfigError, GroupError, collectives
from distnorm.drift.probes import covariate_shift, landscape
from tests import exchanges, ranks
from tests.reference_gap import batch_of, joined, network
from tests.undisturbed import fingerprint, same

pytestmark = pytest.mark.unit

LR = 0.3


def loss_of(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def test_linear_regression_has_closed_forms():
    """L(w) = ½ mean (x·w - y)²: its gradient is H (w - w*), and along it loss and gradient are known."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, n, generator=generator, dtype=torch.float64) for n in (4, 1))
    model = nn.Linear(4, 1, bias=False).double()
    w = model.weight.detach().flatten()
    found = landscape(model, (x, y), lambda model, batch: (model(batch[0]) - batch[1]).square().mean() / 2, lr=0.05)
    hessian, gradient = x.T @ x / 9, x.T @ (x @ w - y[:, 0]) / 9
    sizes = 0.05 * torch.arange(0.5, 4.5, 0.5, dtype=torch.float64)
    start = (x @ w - y[:, 0]).square().mean() / 2
    losses = start - sizes * (gradient @ gradient) + sizes**2 / 2 * (gradient @ hessian @ gradient)
    curvature = (hessian @ gradient).norm()
    assert found.loss_range == pytest.approx((losses.min().item(), losses.max().item()))
    assert found.gradient_predictiveness == pytest.approx(((0.025 * curvature).item(), (0.2 * curvature).item()))
    assert found.smoothness == pytest.approx((curvature / gradient.norm()).item())


def test_the_grid_has_as_many_steps_as_asked():
    calls = []

    def counted(model, batch):
        calls.append(model.weight.item())
        return model(batch).square().mean() / 2

    model = nn.Linear(1, 1, bias=False).double()
    w = model.weight.item()
    landscape(model, torch.ones(3, 1, dtype=torch.float64), counted, lr=0.1, steps=3)
    assert calls == pytest.approx([w, 0.95 * w, 0.775 * w, 0.6 * w])  # ½, 2¼ and 4 times 0.1 of w


def test_a_gradient_of_zero_has_no_smoothness():
    model = nn.Linear(1, 1, bias=False)
    found = landscape(model, torch.zeros(3, 1), lambda model, x: model(x).square().mean(), lr=0.1)
    assert found.gradient_predictiveness == (0, 0)
    assert math.isnan(found.smoothness)
    shift = covariate_shift(nn.Sequential(model), torch.zeros(3, 1), lambda m, x: m(x).square().mean(), 0.1, ["0"])["0"]
    assert (shift.distance, math.isnan(shift.cosine), math.isnan(shift.relative)) == (0, True, True)


def plain_gradient(model, batch, move=()):
    """Autograd's own, on one process and a copy: batch statistics, no dropout; `move` are (name, how far) before."""
    copied = network()
    copied.load_state_dict(model.state_dict())
    parameters = dict(copied.named_parameters())
    with torch.no_grad():
        for name, by in move:
            parameters[name] -= by
    loss = loss_of(copied, batch)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in parameters.items()}


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def probed(kind, sizes):
    rank = collectives.rank()
    model, batch = network(kind, dropout=0.5), batch_of(sizes[rank], rank)
    before = fingerprint(model)
    found = landscape(model, batch, loss_of, LR, steps=4), covariate_shift(model, batch, loss_of, LR, ["6", "3", "1"])
    assert same(before, fingerprint(model))
    return found


def check(sizes, found):
    model, batch = network(), joined([batch_of(n, rank) for rank, n in enumerate(sizes)])
    _, own = plain_gradient(model, batch)
    losses, distances, slopes = [], [], []
    for factor in torch.linspace(0.5, 4, 4).tolist():
        value, there = plain_gradient(model, batch, [(name, factor * LR * own[name]) for name in own])
        losses.append(value)
        distances.append((flat(there.values()) - flat(own.values())).norm().item())
        slopes.append(distances[-1] / (factor * LR * flat(own.values()).norm().item()))
    shifts = {}
    for layer, preceding in {"6": "013", "3": "01", "1": "0"}.items():
        _, after = plain_gradient(model, batch, [(name, LR * own[name]) for name in own if name[0] in preceding])
        first, second = (flat([g[name] for name in g if name[0] == layer]) for g in (own, after))
        distance = (first - second).norm().item()
        cosine = torch.cosine_similarity(first, second, dim=0).item()
        shifts[layer] = distance, cosine, distance / first.norm().item()
    for hills, shifted in found:
        assert hills.loss_range == pytest.approx((min(losses), max(losses)), rel=1e-8)
        assert hills.gradient_predictiveness == pytest.approx((min(distances), max(distances)), rel=1e-8)
        assert hills.smoothness == pytest.approx(max(slopes), rel=1e-8)
        assert list(shifted) == list(shifts)
        for name, values in shifts.items():
            assert (shifted[name].distance, shifted[name].cosine, shifted[name].relative) == pytest.approx(values, 1e-7)


@pytest.mark.parametrize("sizes", [(8,), (5, 3), (4, 1, 0, 7)], ids=str)
def test_equals_autograd_on_the_joined_batch(sizes):
    check(sizes, ranks.run(probed, "sync", sizes, world=len(sizes)))


@given(sizes=st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(any))
@settings(max_examples=8, deadline=None)
def test_shards_of_any_size(sizes):
    check(sizes, ranks.run(probed, "sync", sizes, world=2))


def exchanged():
    """Body: the sums of this room itself; those of the layers have 6 and 8 numbers."""
    model, batch = network("sync"), batch_of(4, collectives.rank())
    with exchanges.listed() as calls:
        landscape(model, batch, loss_of, LR, steps=2)
        covariate_shift(model, batch, loss_of, LR, ["3", "6"])
    return [numbers for kind, numbers in calls if kind == "sum" and numbers not in (6, 8)]


def test_one_sum_a_gradient():
    """105 trained numbers, 8 of layer 3 and 75 of layer 6; with the loss, the samples and what failed."""
    assert ranks.run(exchanged, world=2) == [[108, 108, 108, 108, 11, 78]] * 2


def local(sizes):
    """Without norms the joined batch is the mean of the shards, and a rank without samples runs nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    rank = collectives.rank()
    batch = batch_of(sizes[rank], rank) if len(sizes) > 1 else joined([batch_of(3, 0), batch_of(4, 2)])
    return landscape(model, batch, loss_of, LR), covariate_shift(model, batch, loss_of, LR, ["3"])["3"]


def test_local_layers_are_averaged_by_samples():
    (alone,) = ranks.run(local, (7,), world=1)
    for hills, shift in ranks.run(local, (3, 0, 4, 0), world=4):
        assert hills.smoothness == pytest.approx(alone[0].smoothness)
        assert hills.loss_range == pytest.approx(alone[0].loss_range)
        assert shift.cosine == pytest.approx(alone[1].cosine)


def test_two_linear_layers_by_hand():
    """y = b·a·x, L = mean y: G_b = a·mean x, and after a's step by lr·b·mean x it is (a - lr·b·mean x)·mean x."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    x = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    a, b = (layer.weight.item() for layer in model)
    found = covariate_shift(model, x, lambda model, x: model(x).mean(), 0.1, ["1", "0"])
    assert found["1"].distance == pytest.approx(abs(0.1 * b * 9))
    assert found["1"].relative == pytest.approx(abs(0.1 * b * 9) / abs(3 * a))
    assert found["1"].cosine == pytest.approx(math.copysign(1, (a - 0.3 * b) * a))
    assert (found["0"].distance, found["0"].cosine) == (0, pytest.approx(1))  # nothing precedes it
    for shift in covariate_shift(model, x, lambda model, x: model(x).mean(), 0.0, ["1", "0"]).values():
        assert (shift.distance, shift.cosine) == (0, pytest.approx(1))


class Backwards(nn.Module):
    """Runs its layers in another order than it registers them."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.spare = (nn.Linear(2, 2).double() for _ in range(3))

    def forward(self, x):
        return self.last(self.first(x).tanh())


def test_layers_precede_one_another_as_they_run():
    found = covariate_shift(
        Backwards(), torch.ones(3, 2).double(), lambda m, x: m(x).square().sum(), 0.1, ["first", "last"]
    )
    assert found["first"].distance == 0 < found["last"].distance
    with pytest.raises(ConfigError, match=r"layer 'spare', that this forward does not run\.\nLeave it out"):
        covariate_shift(Backwards(), torch.ones(3, 2).double(), lambda m, x: m(x).square().sum(), 0.1, ["spare"])


def test_autocast_keeps_no_parameter_that_was_moved():
    """With autocast's copies of parameters the loss would be the same at every step."""
    model = nn.Linear(4, 1)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)  # leaves a copy
        found = landscape(model, x, lambda model, x: model(x).float().square().mean(), lr=0.05)
    assert found.loss_range[1] - found.loss_range[0] > 0.01


@pytest.mark.parametrize("kind", ["batch", "sync", "ghost"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_the_model_is_untouched_when_the_loss_raises(kind, at):
    model = network(kind, dropout=0.3)
    model[1].bias.requires_grad_(False)
    loss_of(model, batch_of(4)).backward()
    waiting, left = loss_of(model, batch_of(4)), [at]
    before = fingerprint(model)

    def failing(model, batch):
        torch.rand(3)
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("broken")
        return loss_of(model, batch)

    for probe in (lambda: landscape(model, batch_of(4), failing, LR), lambda: shift_of(model, failing)):
        left[0] = at
        if at < 3:
            with pytest.raises(ValueError, match="broken"):
                probe()
        else:
            left[0] = 99
            probe()
        assert same(before, fingerprint(model))
    waiting.backward()


def shift_of(model, loss, lr=LR, layers=("3", "6")):
    return covariate_shift(model, batch_of(4), loss, lr, layers)


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (lambda: landscape(network(), batch_of(4), loss_of, 0.0), "lr=0.0; it must be above 0. Give the"),
        (lambda: shift_of(network(), loss_of, -1.0), "lr=-1.0; it must be not below 0. Give the"),
        (lambda: landscape(network(), batch_of(4), loss_of, 0.1, steps=0), "steps=0; it needs 1 .* Give e.g. 8"),
        (lambda: landscape(nn.ReLU(), batch_of(4), loss_of, 0.1), "no parameter to train in ReLU.*\n?.*Give a model"),
        (
            lambda: shift_of(network(), loss_of, LR, ["fc"]),
            "'fc', that the model does not have.*\nName layers .*'0', '1'",
        ),
        (lambda: shift_of(network(), loss_of, LR, ["2"]), "'2', that has no parameter to train.*\nName layers"),
        (lambda: landscape(network("ghost"), batch_of(0), loss_of, 0.1), "empty on all of 1 ranks.\nGive it a batch"),
    ],
)
def test_mistakes_are_named(probe, words):
    with pytest.raises(ConfigError, match=words):
        probe()


def test_one_sample_is_refused_in_our_words():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 3)).double()
    with pytest.raises(ConfigError, match=r"landscape\(\) got a batch of 1 sample: layer '1' .*\n.*drop_last"):
        landscape(model, batch_of(1), loss_of, LR)


def failing_on_rank_1():
    def loss(model, batch):
        if collectives.rank() == 1:
            raise ValueError("broken")
        return loss_of(model, batch)

    try:
        landscape(network(), batch_of(4), loss, LR)
    except GroupError as error:
        return str(error)


def test_all_ranks_raise_where_one_does():
    for words in ranks.run(failing_on_rank_1, world=2):
        assert "rank 1 raised in landscape(): ValueError: broken\n" in words
