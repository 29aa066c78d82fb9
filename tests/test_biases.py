"""Biases that do nothing: found only where that is certain, removed without a trace in the output, and put back."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from distnorm import NormSpec, convert
from tests.nasty import KINDS, picture, same_values, values

pytestmark = pytest.mark.unit


class Odd(nn.Module):
    """A layer and a norm, joined in the way that a function says."""

    def __init__(self, joined, between=None):
        super().__init__()
        self.conv, self.norm, self.other, self.joined = (
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(3, 4, 1),
            joined,
        )
        self.between = between or nn.Identity()

    def forward(self, x):
        return self.joined(self, x)


def residual(m, x):
    y = m.conv(x)
    return m.norm(y) + y


def by_value(m, x):
    return m.norm(m.conv(x)) if x.sum() > 0 else x


def only_in_training(m, x):
    y = m.conv(x)
    return m.norm(y) if m.training else m.norm(y) + y


def shape_is_read(m, x):
    y = m.conv(x)
    return m.norm(y).view(x.shape[0], y.shape[1], -1)


JOINED = {
    "plain": (lambda m, x: m.norm(m.conv(x)), ("conv.bias",)),
    "other order": (lambda m, x: m.norm(m.other(x)), ("other.bias",)),
    "its shape is read": (shape_is_read, ("conv.bias",)),
    "residual": (residual, ()),
    "one mode": (only_in_training, ()),
    "activation": (lambda m, x: m.norm(m.conv(x).relu()), ()),
    "called twice": (lambda m, x: m.norm(m.conv(m.conv(x)[:, :3])), ()),
    "norm called twice": (lambda m, x: m.norm(m.norm(m.conv(x))), ()),
    "parameter used": (lambda m, x: m.norm(m.conv(x)) + m.conv.bias.sum(), ()),
    "untraceable": (by_value, ()),
}


@pytest.mark.parametrize(("joined", "expected"), JOINED.values(), ids=JOINED)
def test_they_are_found_where_that_is_certain(joined, expected):
    assert convert(Odd(joined), NormSpec("sync", 8)).redundant_biases == expected


def test_what_cannot_be_traced_is_looked_at_child_by_child():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else x

    assert convert(Outer(), NormSpec("sync", 8)).redundant_biases == ("body.0.bias",)


def pair():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("kind", KINDS)
def test_only_batch_statistics_take_a_bias_out(kind):
    found = convert(pair(), KINDS[kind]).redundant_biases
    assert found == (("0.bias",) if kind in {"batch", "sync", "ghost", "renorm"} else ())


def test_hooks_ties_frozen_norms_and_other_widths_keep_their_bias():
    hooked, tied, frozen, wide = pair(), pair(), pair(), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(2))
    hooked[0].register_forward_hook(lambda *_: None)
    tied.append(nn.Conv2d(4, 4, 1))
    tied[2].bias = tied[0].bias
    frozen[1].eval()
    for model in (hooked, tied, frozen, wide):
        assert convert(model, NormSpec("sync", 8)).redundant_biases == ()
    left = convert(nn.Sequential(*pair(), nn.BatchNorm2d(4)), NormSpec("sync", 8), include="2")
    assert left.redundant_biases == ("0.bias",)  # torch's batch norm takes it out too


def test_tracing_leaves_no_trace():
    class Leaky(Odd):
        def forward(self, x):
            self.seen = x
            self.register_buffer("cache", x)
            return self.norm(self.conv(x))

    model = Leaky(None)
    model.norm.eval().train()
    before = picture(model)
    conversion = convert(model, NormSpec("batch", 8))
    assert conversion.redundant_biases == ("conv.bias",)
    conversion.revert()  # what was converted is named to DDP
    assert picture(model) == before


@pytest.mark.parametrize("kind", ["batch", "sync", "ghost", "renorm"])
def test_removed_ones_change_no_output_and_come_back(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).double()
    nn.init.uniform_(model[0].bias, 1, 2)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    model(x)
    reference = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).double()
    reference.load_state_dict(model.state_dict())
    convert(reference, KINDS[kind])
    before, state, bias = picture(model), values(model), model[0].bias
    conversion = convert(model, KINDS[kind], remove_redundant_biases=True)
    assert conversion.removed_biases == conversion.redundant_biases == ("0.bias",)
    assert conversion.lost_keys == ("0.bias",)
    assert "removed, since a norm follows: 0.bias" in str(conversion)
    for mode in (False, True, False):
        torch.testing.assert_close(model.train(mode)(x), reference.train(mode)(x), rtol=1e-10, atol=1e-10)
    conversion.revert()
    assert model[0].bias is bias
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean, rtol=1e-10, atol=1e-10)
    model.load_state_dict(state)
    model.train()
    convert(model, KINDS[kind], remove_redundant_biases=True).revert()
    assert picture(model) == before
    assert same_values(values(model), state)


def test_they_are_named_under_the_table():
    model = nn.Sequential(*pair(), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    text = str(convert(model, NormSpec("sync", 8)))
    assert text.endswith("\nwithout effect, since a norm follows (remove_redundant_biases=True): 0.bias")
    assert "bias" not in str(convert(model[3:], NormSpec("sync", 8)))


def test_an_optional_argument_is_tried_both_ways():
    class Masked(Odd):
        def forward(self, x, features=None):
            y = self.conv(x)
            return self.norm(y) if features is None else self.norm(y) + functional.relu(y)

    assert convert(Masked(None), NormSpec("sync", 8)).redundant_biases == ()
