"""Reading source: what loops, unpacking and passing on make of the norms that a module holds."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from distnorm import NormSpec, convert
from distnorm.reading import Use, read_code
from tests.nasty import KINDS

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore")]


class Pairs(nn.Module):
    """Two convolutions and their norms, held in pairs; only the norms' running variances are read."""

    def __init__(self):
        super().__init__()
        made = [nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]) for _ in range(2)]
        self.blocks, self.by_name = nn.ModuleList(made), nn.ModuleDict({"a": made[0], "b": made[1]})
        self.tuples = [tuple(pair) for pair in made]
        (self.conv, self.bn), (self.other_conv, self.other_bn) = made


def scaled(conv, bn, x):
    return conv(x) * torch.rsqrt(bn.running_var + bn.eps).view(1, -1, 1, 1)


def scaled_by(pair, x):
    return pair[0](x) * torch.rsqrt(pair[1].running_var + pair[1].eps).view(1, -1, 1, 1)


class OfLists(Pairs):
    def forward(self, x):
        for conv, bn in self.blocks:
            x = scaled(conv, bn, x)
        return x


class OfTuples(Pairs):
    def forward(self, x):
        for conv, bn in self.tuples:
            x = conv(x) * torch.rsqrt(bn.running_var + bn.eps).view(1, -1, 1, 1)
        return x


class Counted(Pairs):
    def forward(self, x):
        for _, (conv, bn) in enumerate(self.blocks):
            x = scaled(conv, bn, x)
        return x


class Named(Pairs):
    def forward(self, x):
        for name, (conv, bn) in self.by_name.items():
            x = scaled(conv, bn, x) if name else x
        for name, block in self.blocks.named_children():
            x = scaled(block[0], block[1], x) if name else x
        return x


class Starred(Pairs):
    def forward(self, x):
        for conv, *rest in self.blocks:
            x = scaled(conv, rest[0], x)
        return x


class Literal(Pairs):
    def forward(self, x):
        for conv, gain, bn in [(self.conv, 2, self.bn), (self.other_conv, 3, self.other_bn)]:
            x = scaled(conv, bn, x) * gain
        return x


class Comprehended(Pairs):
    def forward(self, x):
        return sum(scaled(conv, bn, x) for conv, bn in self.blocks)


class Assigned(Pairs):
    def forward(self, x):
        for pair in self.blocks:
            conv, bn = pair
            x = scaled(conv, bn, x)
        return x


@pytest.mark.parametrize("make", [OfLists, OfTuples, Counted, Named, Starred, Literal, Comprehended, Assigned])
def test_norms_that_a_loop_unpacks_count_as_read(make):
    model, x = nn.ModuleDict({"own": make(), "plain": nn.BatchNorm2d(4)}), torch.randn(2, 3, 4, 4)
    left = {row.name: row.why for row in convert(model, KINDS["group"]).left}
    assert list(left) == ["own.blocks.0.1", "own.blocks.1.1"]
    assert all(" reads its running_var, which a GroupNorm lacks" in why for why in left.values())
    assert model["own"](x).isfinite().all()


class OtherWeight(Pairs):
    """It reads the convolution's weight, and calls the norm."""

    def forward(self, x):
        for conv, bn in self.blocks:
            x = bn(functional.conv2d(x, conv.weight - conv.weight.mean()))
        for conv, bn in [(self.conv, self.bn), (self.other_conv, self.other_bn)]:
            x = bn(functional.conv2d(x, conv.weight))
        return x


@pytest.mark.parametrize("kind", ["none", "group", "sync"])
def test_what_else_is_in_the_pair_is_not_taken_for_the_norm(kind):
    model = OtherWeight()
    assert not convert(model, KINDS[kind]).left
    assert model(torch.randn(2, 3, 4, 4)).isfinite().all()


class ManyPairs(nn.Module):
    """Each pair is a new tuple, and may lie where one lay that was read before."""

    def __init__(self):
        super().__init__()
        for name in "abcdefgh":
            self.add_module(f"conv_{name}", nn.Conv2d(3, 3, 1))
            self.add_module(f"bn_{name}", nn.BatchNorm2d(3))

    def forward(self, x):
        x = scaled_by((self.conv_a, self.bn_a), x)
        x = scaled_by((self.conv_b, self.bn_b), x)
        x = scaled_by((self.conv_c, self.bn_c), x)
        x = scaled_by((self.conv_d, self.bn_d), x)
        x = scaled_by((self.conv_e, self.bn_e), x)
        x = scaled_by((self.conv_f, self.bn_f), x)
        x = scaled_by((self.conv_g, self.bn_g), x)
        return scaled_by((self.conv_h, self.bn_h), x)


def test_every_pair_that_is_passed_on_is_read():
    for _ in range(5):
        model, use = ManyPairs(), Use()
        norms = {module for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
        read_code(model, norms, use)
        assert use.reads.keys() == norms


class Applies(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        bn = self.bn
        return functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)


def test_many_owners_cost_no_more_each_than_few():
    def seconds(count):
        model = nn.Sequential(nn.BatchNorm2d(3), *(Applies() for _ in range(count)))
        start = time.process_time()
        assert len(convert(model, NormSpec("sync", 16)).left) == count
        return time.process_time() - start

    seconds(4)
    assert seconds(400) < 40 * seconds(40)  # 10 times as many: 10 to 15 times the time, and 100 times if quadratic


class Collects(ManyPairs):
    """Lists of lists, as dense blocks pass them on, of what is known and what is not."""

    def forward(self, x):
        kept, seen = [x], (x, self.bn_a)
        kept = [kept, self.bn_a]
        seen = (seen, kept)
        kept = [kept, self.bn_b]
        seen = (seen, kept)
        kept = [kept, self.bn_c]
        seen = (seen, kept)
        kept = [kept, self.bn_d]
        seen = (seen, kept)
        kept = [kept, self.bn_e]
        seen = (seen, kept)
        kept = [kept, self.bn_f]
        seen = (seen, kept)
        kept = [kept, self.bn_g]
        seen = (seen, kept)
        kept = [kept, self.bn_h]
        seen = (seen, kept)
        return scaled(seen[0], kept[1], x)


def test_lists_that_hold_what_they_were_are_read_in_no_time():
    model, use = Collects(), Use()
    norms = {module for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    start = time.process_time()
    read_code(model, norms, use)
    assert time.process_time() - start < 5
    assert model.bn_h in use.reads
