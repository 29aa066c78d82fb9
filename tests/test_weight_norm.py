"""Weight normalization initialized from data: mean 0 and variance 1 after every layer, alone and over ranks."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from distnorm import ConfigError, SyncBatchNorm, collectives
from distnorm.norms import weight_normalize
from tests import ranks

pytestmark = pytest.mark.unit


def convolutional(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 25, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def batch_of(samples=16, dtype=torch.float64):
    return torch.randn(samples, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) + 2


def outputs_of(model, batch):
    """What each convolution and linear gives, a channel a row."""
    found, layers = [], [layer for layer in model if hasattr(layer, "weight")]
    keep = lambda _, __, y: found.append(y.transpose(0, 1).flatten(1))  # noqa: E731
    handles = [layer.register_forward_hook(keep) for layer in layers]
    model(batch)
    for handle in handles:
        handle.remove()
    return found


def close(found, truth, tolerance=1e-10):
    torch.testing.assert_close(found, torch.as_tensor(truth), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_each_pre_activation_has_mean_0_and_variance_1(training, dtype):
    model, batch = convolutional(dtype).train(training), batch_of(dtype=dtype)
    assert weight_normalize(model, batch) is model
    outputs = outputs_of(model, batch)
    assert len(outputs) == 4
    for y_CV in outputs:
        close(y_CV.mean(1), torch.zeros(len(y_CV), dtype=dtype), 1e-5 if dtype == torch.float32 else 1e-10)
        close(y_CV.var(1, correction=0), torch.ones(len(y_CV), dtype=dtype), 1e-5 if dtype == torch.float32 else 1e-10)
    assert model.training == training


def test_it_is_the_papers_layer_by_layer():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), batch_of()[:, :, 0, 0]
    directions = [layer.weight.detach().clone().numpy() for layer in (model[0], model[2])]
    weight_normalize(model, x)
    activation = x.numpy()
    for layer, v in zip((model[0], model[2]), directions, strict=True):
        t = activation @ v.T / np.linalg.norm(v, axis=1)  # Salimans & Kingma 2016, equation 5
        g, b = 1 / t.std(0), -t.mean(0) / t.std(0)  # and 6
        close(layer.weight.detach(), g[:, None] * v / np.linalg.norm(v, axis=1)[:, None])
        close(layer.bias.detach(), b)
        length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        close(direction.detach(), v)
        close(length.detach().flatten(), g)
        activation = np.maximum(t * g + b, 0)


def test_length_and_direction_learn():
    model = weight_normalize(convolutional(), batch_of())
    model(batch_of()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    lengths = {name: value.shape for name, value in model.named_parameters() if name.endswith("original0")}
    assert lengths["0.parametrizations.weight.original0"] == (4, 1, 1, 1)
    assert lengths["2.parametrizations.weight.original0"] == (1, 5, 1, 1)
    assert model[0].bias.shape == (4,)  # it had none


def initialize(cuts):
    """Body: this rank's shard; what the model became."""
    rank = collectives.rank()
    model = convolutional()
    weight_normalize(model, batch_of()[cuts[rank] : cuts[rank + 1]])
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("cuts", [[0, 6, 16], [0, 0, 9, 10, 16]], ids=str)
def test_over_ranks_it_is_the_joined_batchs(cuts):
    whole = weight_normalize(convolutional(), batch_of())
    for found in ranks.run(initialize, cuts, world=len(cuts) - 1):
        for value, truth in zip(found, whole.parameters(), strict=True):
            close(value, truth.detach(), 1e-9)


def counted():
    calls, original = [], collectives.gather
    collectives.gather = lambda values, *rest: calls.append((values.numel(), values.dtype)) or original(values, *rest)
    try:
        weight_normalize(convolutional(), batch_of())
    finally:
        collectives.gather = original
    return calls


def test_one_gather_a_layer():
    assert ranks.run(counted, world=2) == [[(2 * c + 1, torch.float64) for c in (4, 5, 6, 2)]] * 2


def with_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), SyncBatchNorm(4), nn.Linear(4, 2))
    model[3].eval()
    model[0].weight.requires_grad_(False)
    return model


def state_of(model):
    values = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    return values, {name: module.training for name, module in model.named_modules()}, dict(model.named_buffers())


def assert_same(before, after):
    assert list(before[0]) == list(after[0])
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1] == {name: after[1][name] for name in before[1]}
    assert all(value is after[2][name] for name, value in before[2].items())


def test_modes_buffers_and_what_is_frozen_stay():
    model, x = with_norms(), torch.randn(16, 3)
    before = state_of(model)
    weight_normalize(model, x)
    after = state_of(model)
    names = list(before[2])
    assert_same(*(({name: values[name] for name in names}, modes, own) for values, modes, own in (before, after)))
    assert [p.requires_grad for p in model[0].parametrizations.weight.parameters()] == [False, False]
    assert not model[0]._forward_hooks


class Counting(nn.Module):
    """Binds a buffer and a number anew in its forward, and adds an attribute."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("cache", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.cache, self.last = x.mean(), x
        return x


def test_buffers_and_attributes_that_forward_binds_anew_are_brought_back():
    model = nn.Sequential(nn.Linear(3, 4), Counting())
    before = model[1].cache
    weight_normalize(model, torch.randn(16, 3))
    assert model[1].cache is before
    assert float(before) == model[1].calls == 0
    assert not hasattr(model[1], "last")


class Interrupted(nn.Module):
    def forward(self, x):
        raise InterruptedError("no more")


def test_a_forward_that_raises_changes_nothing():
    model = with_norms().append(Interrupted())
    before = state_of(model)
    with pytest.raises(InterruptedError):
        weight_normalize(model, torch.randn(16, 3))
    assert_same(before, state_of(model))
    assert not model[0]._forward_hooks


class Twice(nn.Module):
    """One layer that runs twice, on a batch of two arguments, one sample unbatched."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 1)

    def forward(self, x, more):
        self.first = self.conv(x)
        return self.conv(self.first + more)


def test_a_layer_that_runs_twice_is_initialized_by_the_first():
    torch.manual_seed(0)
    model, x, more = Twice().double(), torch.randn(2, 9).double(), torch.randn(2, 9).double()
    seen = []
    handle = model.register_forward_hook(lambda _, __, y: seen.append(y))
    weight_normalize(model, (x, more))
    handle.remove()
    y = model(x, more)
    close(model.first.std(1, correction=0).detach(), torch.ones(2).double())
    close(seen[0], y.detach())


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


class Unused(nn.Sequential):
    def forward(self, x):
        return self[0](x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message", "remedy"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "found no layer in this Sequential", "their types in include=(…)"),
        (tied, "layer '0' shares its weight with another layer", "Untie them first"),
        (lambda: weight_normalize(nn.Linear(3, 3), X), "layer '(the model)' has a weight that is parametrized", "once"),
        (lambda: Unused(nn.Linear(3, 3), nn.Linear(3, 3)), "layer '1' did not run", "Give weight_normalize() the part"),
        (lambda: nn.ConvTranspose1d(4, 4, 1, groups=2), "is transposed with groups=2", "Use groups=1, or leave"),
        (lambda: nn.DataParallel(nn.Linear(3, 3)), "got a DataParallel model", "pass model.module"),
        (lambda: torch.compile(nn.Linear(3, 3)), "got a OptimizedModule model", "pass model._orig_mod"),
        (lambda: torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)), "got a scripted model", "the module it was made"),
    ],
    ids=["none", "tied", "again", "unused", "groups", "wrapped", "compiled", "scripted"],
)
def test_what_cannot_be_normalized_is_refused(make, message, remedy):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError) as caught:
        weight_normalize(model, X)
    assert message in str(caught.value)
    assert remedy in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


X = torch.randn(8, 3)


def refused(batches):
    rank = collectives.rank()
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight[1].zero_(), model[0].bias.fill_(0.3)
    before = state_of(model)
    with pytest.raises(ConfigError) as caught:
        weight_normalize(model, batches[rank])
    assert_same(before, state_of(model))
    return str(caught.value)


@pytest.mark.parametrize("world", [1, 2])
def test_batches_that_say_nothing_are_refused_on_all_ranks_alike(world):
    for message in ranks.run(refused, [X[:0]] * world, world=world):
        assert "got a batch that gives layer '0' 0 values a channel. Give it a batch with samples" in message
    for message in ranks.run(refused, [X, X[:0]][:world], world=world):
        assert "channel 1 of layer '0' has standard deviation 0 around 0.3 over 8 values" in message
        assert "Give a batch of more, and different, samples" in message
    for message in ranks.run(refused, [X * float("nan")] * world, world=world):
        assert "channel 0 of layer '0' has standard deviation nan" in message


def test_the_models_own_hooks_see_the_initialized_layer():
    model, seen = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), []
    model[0].register_forward_hook(lambda _, __, y: seen.append(y) or y * 2)
    weight_normalize(model, X)
    close(seen[0].std(0, correction=0), torch.ones(4), 1e-5)
    close(model(X), 2 * seen[0].relu(), 1e-5)


def test_types_may_be_chosen():
    model = weight_normalize(convolutional(), batch_of(), include=(nn.Linear,))
    assert [name for name, _ in model.named_modules() if name.endswith("parametrizations")] == [
        "5.parametrizations",
        "7.parametrizations",
    ]


def test_types_that_are_neither_are_refused():
    with pytest.raises(ConfigError, match=r"include names Embedding, LSTM; .*\n.*include=\(nn.Conv2d, nn.Linear\)"):
        weight_normalize(convolutional(), batch_of(), include=(nn.Linear, nn.Embedding, nn.LSTM))
