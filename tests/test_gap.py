"""The train/eval gap equals numpy on the joined batch, names a stale layer, and leaves the model as it was."""

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from distnorm import ConfigError, GroupError, ShapeError, SyncBatchNorm, collectives
from distnorm.drift.gap import attribute, train_eval_gap
from distnorm.drift.losses import TellsLoss
from distnorm.norms import BatchRenorm, FrozenBatchNorm
from distnorm.population import pool_running_stats
from distnorm.tasks import Classification
from tests import exchanges, ranks
from tests.reference_gap import batch_of, joined, loss_and_predictions, network
from tests.undisturbed import fingerprint, same

pytestmark = pytest.mark.unit


def loss_of(model, batch):
    logits = model(batch[0])
    return functional.cross_entropy(logits, batch[1]), logits


def measured(kind, sizes):
    rank = collectives.rank()
    model, batch = network(kind), batch_of(sizes[rank], rank)
    return train_eval_gap(model, batch, loss_of), attribute(model, batch, loss_of)


def parts_of(kind, sizes):
    """Where the samples that share statistics begin, in the joined batch."""
    starts = np.cumsum([0, *sizes])
    if kind == "sync":
        return []
    length = 2 if kind == "ghost" else 10**6
    return [int(i) for s, e in itertools.pairwise(starts) for i in range(s, e, length)][1:]


def check(kind, sizes, found):
    model, batch = network(kind), joined([batch_of(n, rank) for rank, n in enumerate(sizes)])
    expect = functools.partial(loss_and_predictions, model, batch, parts=parts_of(kind, sizes))
    (base, own), (running, other) = expect(()), expect({"0", "3"})
    for gap, shares in found:
        assert gap.batch_loss == pytest.approx(base, rel=1e-9)
        assert gap.running_loss == pytest.approx(running, rel=1e-9)
        assert gap.gap == pytest.approx(running - base, rel=1e-9)
        assert gap.relative == pytest.approx((running - base) / base, rel=1e-9)
        assert gap.flip_rate == pytest.approx((own != other).mean())
        assert list(shares) == ["0", "3"]
        for name, share in shares.items():
            assert share == pytest.approx(expect({name})[0] - base, rel=1e-8)


@pytest.mark.parametrize("kind", ["batch", "sync", "ghost"])
@pytest.mark.parametrize("sizes", [(8,), (5, 3), (4, 2, 0, 7)], ids=str)
def test_equals_numpy_on_the_joined_batch(kind, sizes):
    check(kind, sizes, ranks.run(measured, kind, sizes, world=len(sizes)))


@given(sizes=st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(any), kind=st.sampled_from(["sync", "batch"]))
@settings(max_examples=20, deadline=None)
def test_shards_of_any_size(sizes, kind):
    check(kind, sizes, ranks.run(measured, kind, sizes, world=2))


def test_other_statistics_of_evaluation():
    model, batch = network(), batch_of(6)
    given = {key: value + 0.5 for key, value in pool_running_stats(model).items() if "running" in key}
    found = train_eval_gap(model, batch, loss_of, statistics=given)
    assert found.running_loss == pytest.approx(loss_and_predictions(model, batch, {"0", "3"}, given)[0], rel=1e-9)
    shares = attribute(model, batch, loss_of, statistics=given)
    expected = loss_and_predictions(model, batch, {"3"}, given)[0] - found.batch_loss
    assert shares["3"] == pytest.approx(expected, rel=1e-9)


def test_the_stale_layer_is_named():
    """Four norms that took many batches, one of which then lags: its share is the largest, and near the gap."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(8, 3)).double()
    with torch.no_grad():
        for _ in range(60):
            model(torch.randn(256, 8, dtype=torch.float64))
        model[4].weight *= 5
    batch = torch.randn(256, 8, dtype=torch.float64), torch.randint(3, (256,))
    healthy = train_eval_gap(model, batch, loss_of)
    model[2][1].running_mean -= 3
    gap, shares = train_eval_gap(model, batch, loss_of), attribute(model, batch, loss_of)
    assert abs(healthy.gap) < 0.1 * gap.gap
    assert gap.flip_rate > 2 * healthy.flip_rate
    assert list(shares) == ["0.1", "1.1", "2.1", "3.1"]
    assert max(shares, key=shares.get) == "2.1"
    assert all(abs(share) < 0.1 * shares["2.1"] for name, share in shares.items() if name != "2.1")


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 4), lambda: FrozenBatchNorm(4)], ids=["group", "frozen"])
def test_without_batch_statistics_there_is_no_gap(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(), nn.Dropout(), nn.Flatten(), nn.Linear(24, 3)).double()

    def noisy(model, batch):  # draws of its own are the same in both forwards
        mean, logits = loss_of(model, batch)
        return mean + torch.rand(()), logits

    found = train_eval_gap(model, batch_of(5), noisy)
    assert (found.gap, found.relative, found.flip_rate) == (0, 0, 0)
    assert attribute(model, batch_of(5), noisy) == {}


def test_dropout_is_off_and_draws_are_alike():
    plain, dropping = network(), network(dropout=0.5)
    expected = train_eval_gap(plain, batch_of(6), loss_of)
    assert train_eval_gap(dropping, batch_of(6), loss_of) == expected
    noise = train_eval_gap(plain, batch_of(6), lambda m, b: loss_of(m, b)[0] + torch.rand(()))
    assert noise.gap == pytest.approx(expected.gap, rel=1e-6)
    assert math.isnan(noise.flip_rate)


def test_renorm_keeps_the_correction_it_trains_with():
    """Within its limits it trains with the running statistics, so that nothing changes in evaluation."""
    layer = BatchRenorm(3, r_max=100.0, d_max=100.0, warmup=0, ramp=0).double()
    layer.running_mean += 1
    layer.num_batches_tracked += 10
    batch = batch_of(6)[0]
    found = train_eval_gap(nn.Sequential(layer), batch, lambda model, x: model(x).square().mean())
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.batch_loss > 1.5  # uncorrected it is 1


def test_a_layer_held_in_eval_mode_is_constant():
    model, batch = network(), batch_of(6)
    model[3].eval()
    found = train_eval_gap(model, batch, loss_of)
    assert found.batch_loss == pytest.approx(loss_and_predictions(model, batch, {"3"})[0], rel=1e-9)
    assert list(attribute(model, batch, loss_of)) == ["0"]
    free = train_eval_gap(model.eval(), batch, loss_of)  # nothing trains here: all layers would
    assert free.batch_loss == pytest.approx(loss_and_predictions(model, batch, ())[0], rel=1e-9)


def without_running_statistics(sizes):
    torch.manual_seed(0)
    model = nn.Sequential(SyncBatchNorm(3, track_running_stats=False), nn.Flatten(), nn.Linear(18, 3)).double()
    rank = collectives.rank()
    return train_eval_gap(model, batch_of(sizes[rank], rank), loss_of)


def test_layers_without_running_statistics_pool_only_in_training():
    found = ranks.run(without_running_statistics, (5, 3), world=2)
    assert abs(found[0].gap) > 0.01
    assert train_eval_gap(network().eval(), batch_of(4), loss_of).gap != 0
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).double()
    assert train_eval_gap(model, batch_of(6)[0], lambda model, x: model(x).square().mean()).gap == 0


class Interrupt(nn.Module):
    """Raises at its n-th forward; before, draws from every stream, writes a buffer and binds attributes."""

    def __init__(self, at, error):
        super().__init__()
        self.left, self.error = [at], error
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        nn.functional.dropout(x, 0.5, training=True), random.random(), np.random.rand()
        self.calls = self.calls + 1
        self.last = x
        self.left[0] -= 1
        if self.left[0] < 0:
            raise self.error
        return x


@pytest.mark.parametrize("kind", ["batch", "sync", "ghost"])
@pytest.mark.parametrize("at", [0, 1, 99])
@pytest.mark.parametrize("ask", [train_eval_gap, attribute])
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_the_model_is_untouched_whatever_happens(kind, at, ask, error):
    model = network(kind, dropout=0.3)
    model.insert(2, Interrupt(99, error))
    model[0].weight.requires_grad_(False)
    loss_of(model, batch_of(4))[0].backward()
    waiting = loss_of(model, batch_of(4))[0]  # a graph that waits for its backward, over running statistics too
    model[0].eval()
    statistics = {"4.running_mean": torch.ones(4, dtype=torch.float64)}
    model[2].left[0] = at
    before = fingerprint(model)
    if at < 2:
        with pytest.raises(type(error)):
            ask(model, batch_of(4), loss_of, statistics=statistics)
    else:
        ask(model, batch_of(4), loss_of, statistics=statistics)
    assert same(before, fingerprint(model))
    waiting.backward()


def test_one_sample_is_refused_in_our_words():
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    for ask, name in ((train_eval_gap, "train_eval_gap"), (attribute, "attribute")):
        with pytest.raises(
            ConfigError, match=rf"{name}\(\) got a batch of 1 sample: layer '2' has 1 value.*\n.*drop_last"
        ):
            ask(model, batch_of(1), loss_of)
    model[2] = SyncBatchNorm(4).double()
    with pytest.raises((ConfigError, ShapeError), match="a variance needs 2"):
        train_eval_gap(model, batch_of(1), loss_of)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            (nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel), 0, loss_of),
            "model.module",
        ),
        ((3, 0, loss_of), "got a int, that is not the model itself. Give it the model, then the batch"),
        ((network(), batch_of(4), "mse"), "got 'mse' for its loss, that cannot be called.\nGive e.g. lambda"),
        ((network(), "cats", loss_of), "type str without a tensor.*\n?.*samples in dimension 0"),
        ((network(), batch_of(0), loss_of), "the batch is empty on all of 1 ranks.\nGive it a batch"),
        ((network(), batch_of(4), lambda m, b: m(b[0])), r"a tensor \(4, 3\); it must be one number.*\n.*losses.mean"),
        ((network(), batch_of(4), lambda *_: 3.0), "returned a float; it must be one number.*\n.*losses.mean"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        train_eval_gap(*arguments)


def test_statistics_of_another_model_are_refused():
    with pytest.raises(ConfigError, match=r"9\.running_mean is not in the model"):
        train_eval_gap(network(), batch_of(4), loss_of, statistics={"9.running_mean": torch.ones(4)})


def failing_on_rank_1(everywhere):
    loss = (lambda *_: 1 / 0) if collectives.rank() == 1 or everywhere else loss_of
    model = network()
    before = fingerprint(model)
    try:
        train_eval_gap(model, batch_of(4), loss)
    except Exception as error:  # noqa: BLE001
        return type(error), str(error), same(before, fingerprint(model))


def test_all_ranks_raise_where_one_does():
    for kind, words, is_same in ranks.run(failing_on_rank_1, False, world=2):
        assert kind is GroupError
        assert "rank 1 raised in train_eval_gap(): ZeroDivisionError: division by zero\nAll ranks stop" in words
        assert is_same
    assert [found[0] for found in ranks.run(failing_on_rank_1, True, world=2)] == [ZeroDivisionError] * 2


def exchanged(ask):
    with exchanges.listed() as calls:
        ask(network("sync"), batch_of(4, collectives.rank()), loss_of)
    return calls


def test_one_training_forward_and_one_sum():
    """Layers on running statistics exchange nothing."""
    first, second = ("gather", 7), ("gather", 9)
    assert ranks.run(exchanged, train_eval_gap, world=2) == [[first, second, ("sum", 5)]] * 2
    assert ranks.run(exchanged, attribute, world=2) == [[first, second, second, first, ("sum", 5)]] * 2


def test_the_classification_task_tells_its_loss():
    model, batch = network(), batch_of(6)
    task = Classification(model, torch.optim.SGD, 3, label_smoothing=0.1)
    assert isinstance(task, TellsLoss)
    mean, logits = task.probe_loss(model, batch)
    torch.testing.assert_close(logits, model(batch[0]))
    log_softmax = logits.log_softmax(1)
    expected = -(0.9 * log_softmax[range(6), batch[1]] + 0.1 * log_softmax.mean(1)).mean()
    torch.testing.assert_close(mean, expected)
    assert train_eval_gap(task.model, batch, task.probe_loss).gap != 0
