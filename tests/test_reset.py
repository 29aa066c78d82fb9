"""From the meta device: `to_empty`, then `reset_parameters` of each module, gives what the constructor gives.

The tests walk over every module class that the package defines: a new one with a parameter or buffer and without
`reset_parameters` fails.
"""

import importlib
import pkgutil

import pytest
import torch
from torch import nn
from torchmetrics import Metric

import distnorm
from distnorm import GhostBatchNorm, NormSpec, SyncBatchNorm, convert, register_norm
from distnorm.models import ConvNet, ResNet
from distnorm.models.resnet import BasicBlock
from distnorm.norms import (
    BatchNormLSTMCell,
    BatchRenorm,
    FilterResponseNorm,
    FrozenBatchNorm,
    RecurrentBatchNorm,
    ThresholdedLinearUnit,
    weight,
)
from distnorm.norms.sample import GroupNorm, Identity
from distnorm.tasks import classification

pytestmark = pytest.mark.unit

LEFTOVER = 7
MADE = {
    # each module class of the package: ways to build it
    SyncBatchNorm: [
        lambda: SyncBatchNorm(3),
        lambda: SyncBatchNorm(3, affine=False),
        lambda: SyncBatchNorm(3, bias=False),
    ],
    GhostBatchNorm: [lambda: GhostBatchNorm(3, 2), lambda: GhostBatchNorm(3, 2, track_running_stats=False)],
    BatchRenorm: [lambda: BatchRenorm(3)],
    RecurrentBatchNorm: [lambda: RecurrentBatchNorm(3, 4), lambda: RecurrentBatchNorm(3, 4, bias=False)],
    BatchNormLSTMCell: [lambda: BatchNormLSTMCell(3, 4, 2)],
    FrozenBatchNorm: [lambda: FrozenBatchNorm(3), lambda: FrozenBatchNorm(3, bias=False)],
    FilterResponseNorm: [lambda: FilterResponseNorm(3), lambda: FilterResponseNorm(3, 1e-3, learnable_eps=True)],
    ThresholdedLinearUnit: [lambda: ThresholdedLinearUnit(3)],
    GroupNorm: [lambda: GroupNorm(2, 4)],
    Identity: [Identity],
    ConvNet: [ConvNet],
    ResNet: [ResNet],
    BasicBlock: [lambda: BasicBlock(2, 4, 2)],
    classification.Classification: [lambda: classification.Classification(nn.Linear(3, 2), torch.optim.SGD, 2)],
    classification._Scores: [nn.Identity],  # torchmetrics, which place and reset states of their own
}
MADE |= {cls: [lambda cls=cls: cls(2, 4, 3)] for cls in weight.STANDARDIZED.values()}


def classes_of_the_package():
    for found in pkgutil.walk_packages(distnorm.__path__, "distnorm."):
        importlib.import_module(found.name)
    waiting, seen = [nn.Module], set()
    while waiting:
        new = [cls for cls in waiting.pop().__subclasses__() if cls not in seen]
        seen.update(new)
        waiting += new
    ours = {cls for cls in seen if cls.__module__.split(".")[0] == "distnorm" and not issubclass(cls, Metric)}
    return sorted((cls for cls in ours if not cls.__name__.startswith("Abstract")), key=lambda cls: cls.__qualname__)


@pytest.mark.parametrize("cls", classes_of_the_package(), ids=lambda cls: cls.__qualname__)
def test_every_module_of_the_package_is_here_and_resets_what_it_owns(cls):
    assert cls in MADE, f"{cls.__qualname__} is new: say how it is built, and give it reset_parameters()"
    for make in MADE[cls]:
        torch.manual_seed(0)
        fresh = make()
        owned = [*fresh.parameters(recurse=False), *fresh.buffers(recurse=False)]
        assert not owned or callable(getattr(fresh, "reset_parameters", None)), f"{cls.__qualname__} cannot be reset"
        assert_reset(make, fresh)


def spoil(module):
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            value.fill_(LEFTOVER)


def reset(module):
    """As FSDP2's documentation has it: each module, the outer one first."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def assert_reset(make, fresh):
    with torch.device("meta"):
        module = make()
    assert all(value.is_meta for value in (*module.parameters(), *module.buffers()))
    module.to_empty(device="cpu")
    spoil(module)
    reset(module)
    drawn = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    drawn = {id(value) for part in drawn for value in part.parameters(recurse=False)}
    truth = fresh.state_dict(keep_vars=True)
    for key, value in module.state_dict(keep_vars=True).items():
        assert not (value == LEFTOVER).any(), key
        if id(value) in drawn or key.startswith("weight_") or isinstance(module, nn.modules.conv._ConvNd):
            assert value.abs().max() < 3 * truth[key].abs().max(), key  # random, of about the same width
        else:
            assert torch.equal(value, truth[key]), key
        assert value.requires_grad == truth[key].requires_grad
        assert value.dtype == truth[key].dtype


def test_the_cells_weights_are_drawn_as_torchs_cells_are():
    drawn = []
    for cell in (BatchNormLSTMCell(3, 5, 2), nn.LSTMCell(3, 5)):
        spoil(cell)
        torch.manual_seed(3)
        cell.reset_parameters()
        drawn.append([cell.weight_ih, cell.weight_hh])
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


class ActiveNorm(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's: constants as buffers, and no count of batches."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        return x


register_norm(ActiveNorm, after=("act",))
register_norm(FrozenBatchNorm2d, frozen=True)
NORMS = {
    "torch": lambda: nn.BatchNorm2d(4),
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "active": lambda: ActiveNorm(4),
    "constants": lambda: FrozenBatchNorm2d(4),
}


def converted(norm, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[norm]())
    layers = {"1": {"kind": kind}} if norm == "constants" else {}
    ghost = 2 if kind == "ghost" else None
    convert(model, NormSpec(kind=kind, normalization_batch=2, ghost_batch=ghost, layers=layers))
    return model[1]


@pytest.mark.parametrize("kind", ["batch", "sync", "ghost", "renorm", "frozen", "group", "response", "none"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_converted_layer_resets_what_it_has(norm, kind):
    if kind == "frozen" and norm == "without statistics":
        pytest.skip("there is nothing to freeze")
    assert_reset(lambda: converted(norm, kind), converted(norm, kind))


def test_a_layer_whose_flag_was_cleared_resets_the_buffers_that_it_still_has():
    layer = SyncBatchNorm(3)
    layer.track_running_stats = False  # users do, to normalize evaluation by the batch
    spoil(layer)
    layer.reset_parameters()
    assert layer.running_mean.tolist() == [0] * 3
    assert layer.running_var.tolist() == [1] * 3
    assert int(layer.num_batches_tracked) == 0
