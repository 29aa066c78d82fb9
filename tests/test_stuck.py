"""Where no batch norm can change: the error has the remedy of the very reason."""

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao
from torch.nn import functional

from distnorm import ConfigError, convert
from tests import nasty
from tests.nasty import KINDS

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore")]


class Reads(nn.Module):
    """It calls its norm, and reads a statistic."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(x) + self.bn.running_mean.view(-1, 1, 1)


class Applies(Reads):
    """It gives its norm's buffers to the function."""

    def forward(self, x):
        return functional.batch_norm(x, self.bn.running_mean, self.bn.running_var, None, None, self.training)


class Own(nn.Module):
    def forward(self, x):
        return functional.batch_norm(x, None, None, training=True)


def fused():
    return ao.fuse_modules_qat(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train(), [["0", "1"]])


READ = "choose a kind that keeps what is read (batch, sync)"
FUSED, BATCH = "call convert() on what prepare_qat() returns", "choose kind='batch', which keeps torch's norm"
CASES = {
    "fused": ([fused], "sync", [FUSED]),
    "reads": ([Reads], "group", [READ]),
    "applies": ([Applies], "sync", [BATCH]),
    "applies, and lacks": ([Applies], "group", [BATCH]),
    "fused and reads": ([fused, Reads], "group", [FUSED, READ]),
    "own and reads": ([Own, Reads], "group", [READ]),
    "own and fused twice": ([Own, fused, fused], "sync", [FUSED]),
}


@pytest.mark.parametrize(("makes", "kind", "remedies"), CASES.values(), ids=CASES)
def test_the_remedy_is_that_of_the_reason(makes, kind, remedies):
    model = nn.Sequential(*(make() for make in makes))
    before = nasty.picture(model)
    with pytest.raises(ConfigError) as caught:
        convert(model, KINDS[kind])
    said = str(caught.value)
    expected = ", or ".join([*remedies, "leave out convert()"]) + "."
    assert said.splitlines()[-1] == expected[0].upper() + expected[1:]
    assert len(said.splitlines()) <= 3
    assert nasty.picture(model) == before


@pytest.mark.parametrize(("make", "kind"), [(Reads, "batch"), (Reads, "sync"), (Applies, "batch")])
def test_the_kinds_that_a_remedy_names_convert(make, kind):
    model = make()
    assert not convert(model, KINDS[kind]).left
    assert model(torch.randn(2, 3, 4, 4)).isfinite().all()


def test_the_prepared_model_converts():
    model = nn.Sequential(fused())
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    assert not convert(ao.prepare_qat(model.train()), KINDS["sync"]).left
