"""Batch norm inside a recurrence: statistics of each step, alone and over ranks, and the LSTM cell that uses it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from distnorm import ConfigError, ShapeError, collectives
from distnorm.norms import BatchNormLSTMCell, RecurrentBatchNorm
from tests import ranks, reference, reference_norms, steps

pytestmark = pytest.mark.unit

T, T_MAX = 4, 3


def close(found, truth):
    truth = torch.from_numpy(truth) if isinstance(truth, np.ndarray) else truth
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def train(x, dy, weight, bias):
    """Body: this rank's shard, doubled at each time step, through one layer."""
    rank, found = collectives.rank(), []
    layer = RecurrentBatchNorm(3, T_MAX, dtype=torch.float64)
    layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    for time in range(T):
        layer.zero_grad()
        own = (x[rank] * 2**time + time).requires_grad_()
        y = layer(own, time)
        y.backward(dy[rank])
        found.append({"y": y.detach(), "dx": own.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad})
    return found, layer.state_dict()


@pytest.mark.parametrize("dimensions", [2, 3, 4])
@pytest.mark.parametrize("sizes", [[6], [3, 5], [0, 6], [0, 5, 2, 1]], ids=str)
def test_each_step_is_batch_norm_of_the_joined_batch_with_its_own_statistics(sizes, dimensions):
    x, dy, weight, bias = steps.shards(sizes, steps.POSITIONS[dimensions], 1.0)
    found = ranks.run(train, x, dy, weight, bias, world=len(sizes))
    running = [(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)) for _ in range(T_MAX)]
    for time in range(T):
        joined = torch.cat(x) * 2**time + time
        truth = reference.batch_norm(joined, torch.cat(dy), weight, bias)
        for key in ("y", "dx"):
            close(torch.cat([own[time][key] for own, _ in found]), truth[key])
        for key in ("dweight", "dbias"):
            close(sum(own[time][key] for own, _ in found), truth[key])
        row = min(time, T_MAX - 1)
        values = joined.transpose(0, 1).flatten(1)
        running[row] = tuple(
            0.9 * old + 0.1 * new for old, new in zip(running[row], (values.mean(1), values.var(1)), strict=True)
        )
    for _, state in found:
        close(state["running_mean"], torch.stack([mean for mean, _ in running]))
        close(state["running_var"], torch.stack([var for _, var in running]))
        assert state["num_batches_tracked"].tolist() == [1, 1, 2]


def trained(**options):
    torch.manual_seed(0)
    layer = RecurrentBatchNorm(3, T_MAX, dtype=torch.float64, **options)
    for time in range(T):
        layer(torch.randn(5, 3, dtype=torch.float64) * (time + 1) + time, time)
    return layer


def test_evaluation_uses_the_steps_statistics_and_beyond_t_max_the_last():
    layer, x = trained().eval(), torch.randn(4, 3, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    for time, row in ((0, 0), (1, 1), (2, 2), (3, 2), (99, 2)):
        mean, var = layer.running_mean[row], layer.running_var[row]
        close(layer(x, time), (x - mean) / (var + 1e-5).sqrt() * 0.1)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_cumulative_averages_count_each_step_apart(momentum):
    layer = RecurrentBatchNorm(2, 2, momentum=momentum)
    batches = torch.randn(3, 6, 2)
    layer(batches[0], 0), layer(batches[1], 0), layer(batches[2], 1)
    means = batches.mean(1)
    first = means[:2].mean(0) if momentum is None else 0.1 * means[1] + 0.09 * means[0]
    torch.testing.assert_close(layer.running_mean, torch.stack((first, means[2] * (momentum or 1))))


def test_padding_has_no_part():
    layer, x = RecurrentBatchNorm(3, 2, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    lengths = torch.tensor([1, 2, 2, 1, 2, 2])
    y = layer(torch.where((lengths > 1)[:, None], x, 1e9), 1, mask=lengths > 1)
    kept = reference_norms.batch_norm_step(x[lengths > 1].numpy(), 0.1, 0)[0]
    close(y[lengths > 1], kept)
    assert not y[lengths == 1].any()


def test_copies_repr_and_what_it_is():
    layer = trained(bias=False, sync_ranks=1)
    x = torch.randn(4, 3, dtype=torch.float64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, 1), copy.deepcopy(layer)(x, 1))
    assert isinstance(layer, _BatchNorm)
    assert layer.bias is None
    assert "sync_ranks=1, t_max=3" in repr(layer)
    layer.reset_parameters()
    assert layer.weight.tolist() == pytest.approx([0.1] * 3)
    assert layer.running_mean.shape == (3, 3)
    assert not layer.running_mean.any()


def cell_and_inputs(samples=5, **options):
    torch.manual_seed(3)
    cell = BatchNormLSTMCell(2, 3, t_max=T_MAX, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in (cell.bias, cell.norm_c.bias, *(norm.weight for norm in norms_of(cell))):
            parameter.uniform_(0.2, 1.0)
    return cell, torch.randn(T, samples, 2, dtype=torch.float64), torch.randn(2, samples, 3, dtype=torch.float64)


def norms_of(cell):
    return cell.norm_ih, cell.norm_hh, cell.norm_c


def weights_of(cell):
    gains = [norm.weight for norm in norms_of(cell)]
    parameters = [cell.weight_ih, cell.weight_hh, cell.bias, *gains, cell.norm_c.bias]
    return [parameter.detach().numpy() for parameter in parameters]


def run(cell, xs, state):
    found = []
    for time, x in enumerate(xs):
        state = cell(x, state, time)
        found.append(state)
    return found


def test_the_cell_is_the_papers_over_time():
    cell, xs, (h, c) = cell_and_inputs()
    truth, measured = reference_norms.lstm(xs.numpy(), h.numpy(), c.numpy(), weights_of(cell))
    for own, expected in zip(run(cell, xs, (h, c)), truth, strict=True):
        close(own[0], expected[0]), close(own[1], expected[1])
    for place, norm in enumerate(norms_of(cell)):
        for t in range(T_MAX - 1):
            close(norm.running_mean[t], 0.1 * measured[t][place][0])
            close(norm.running_var[t], 0.9 + 0.1 * measured[t][place][1])


def test_the_cell_evaluates_with_the_statistics_of_each_step():
    cell, xs, (h, c) = cell_and_inputs()
    run(cell, xs, (h, c))
    rows = [min(t, T_MAX - 1) for t in range(T)]
    statistics = [[(n.running_mean[r].numpy(), n.running_var[r].numpy()) for n in norms_of(cell)] for r in rows]
    truth, _ = reference_norms.lstm(xs.numpy(), h.numpy(), c.numpy(), weights_of(cell), statistics)
    for own, expected in zip(run(cell.eval(), xs, (h, c)), truth, strict=True):
        close(own[0], expected[0]), close(own[1], expected[1])


def test_gradients_through_time():
    cell, xs, states = cell_and_inputs(samples=3)
    names, values = zip(*cell.named_parameters(), strict=True)

    def function(xs, states, *parameters):
        named = dict(zip(names, parameters, strict=True))
        h = c = None
        for time, x in enumerate(xs[:2]):
            h, c = torch.func.functional_call(cell, named, (x, (states[0], states[1]) if h is None else (h, c), time))
        return h, c

    inputs = [t.detach().requires_grad_() for t in (xs, states, *values)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def train_cell(cuts):
    cell, xs, states = cell_and_inputs(samples=cuts[-1])
    rank = collectives.rank()
    own = slice(*cuts[rank : rank + 2]) if collectives.world_size() > 1 else slice(None)
    xs, states = xs[:, own].clone().requires_grad_(), states[:, own]
    h, c = run(cell, xs, tuple(states))[-1]
    (h.sin().sum() + c.square().sum()).backward()
    return xs.grad, [parameter.grad for parameter in cell.parameters()], [b.double() for b in cell.buffers()]


@pytest.mark.parametrize("cuts", [[0, 2, 7], [0, 0, 3, 4, 7]], ids=str)
def test_a_cell_over_ranks_trains_as_one_on_the_joined_batch(cuts):
    found = ranks.run(train_cell, cuts, world=len(cuts) - 1)
    dx, grads, buffers = train_cell(cuts)
    close(torch.cat([own[0] for own in found], 1), dx)
    for place, grad in enumerate(grads):
        close(sum(own[1][place] for own in found), grad)
    for own in found:
        for value, truth in zip(own[2], buffers, strict=True):
            close(value, truth)


def counted():
    calls, originals = [], (collectives.gather, collectives.start_sum)
    collectives.gather = lambda values, *rest: calls.append(values.numel()) or originals[0](values, *rest)
    collectives.start_sum = lambda values, *rest: calls.append(-values.numel()) or originals[1](values, *rest)
    try:
        cell = BatchNormLSTMCell(2, 3, t_max=2)
        h, c = cell(torch.randn(4, 2), (torch.randn(4, 3), torch.randn(4, 3)), 0)
        (h.sum() + c.sum()).backward()
        if collectives.rank() == 0:
            cell.eval()(torch.randn(4, 2), None, 0)
    finally:
        collectives.gather, collectives.start_sum = originals
    return calls[:3], sorted(calls[3:])


def test_three_gathers_a_step_three_sums_back_and_evaluation_is_silent():
    assert ranks.run(counted, world=2) == [([25, 25, 7], [-24, -24, -6])] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repeated_sequence_moves_nothing_again(reentrant):
    cell, xs, states = cell_and_inputs()
    twin = copy.deepcopy(cell)
    xs, again = xs.clone().requires_grad_(), xs.clone().requires_grad_()
    run(cell, xs, tuple(states))[-1][0].sin().sum().backward()
    checkpoint(lambda xs: run(twin, xs, tuple(states))[-1][0], again, use_reentrant=reentrant).sin().sum().backward()
    close(again.grad, xs.grad)
    for value, found in zip(cell.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(found, value)


def test_a_compiled_cell_trains_as_in_eager_mode():
    torch._dynamo.reset()
    cell, xs, states = cell_and_inputs()
    twin = copy.deepcopy(cell)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for model in (cell, compiled):
        run(model, xs, tuple(states))[-1][0].sin().sum().backward()
    for one, found in zip(cell.state_dict().values(), twin.state_dict().values(), strict=True):
        close(found, one)
    for one, found in zip(cell.parameters(), twin.parameters(), strict=True):
        close(found.grad, one.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype):
    layer, x = RecurrentBatchNorm(3, 2), (torch.randn(64, 3) + 3).to(dtype)
    y, unit = layer(x, 1), torch.finfo(dtype).eps
    truth, mean, _ = reference_norms.batch_norm_step(x.double().numpy(), 0.1, 0)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), torch.from_numpy(truth), rtol=unit, atol=unit / 8)
    torch.testing.assert_close(layer.running_mean[1].double(), torch.from_numpy(0.1 * mean), rtol=1e-6, atol=1e-6)


def test_the_first_state_may_be_left_out():
    cell, xs, _ = cell_and_inputs()
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    close(cell(xs[0], None, 0)[1], cell(xs[0], (zeros, zeros), 0)[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: RecurrentBatchNorm(3, 0),
            r"t_max=0, which must be a whole number of at least 1. Give the length of the usual",
        ),
        (
            lambda: RecurrentBatchNorm(4, t_max="5"),
            r"t_max='5', which must be a whole number of at least 1. Give the length",
        ),
        (lambda: RecurrentBatchNorm(3, 2)(torch.randn(4, 3), -1), r"RecurrentBatchNorm\(3\) got time=-1.*time=0 first"),
        (lambda: RecurrentBatchNorm(3, 2, sync_ranks=0), r"sync_ranks=0 must be at least 1. Give a number of ranks"),
    ],
)
def test_steps_that_are_none_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        wrong()


@pytest.mark.parametrize(
    ("x", "state"),
    [
        (torch.randn(5, 4, 2), None),
        (torch.randn(5, 3), None),
        (torch.randn(5, 2), (torch.randn(5, 2), torch.randn(5, 3))),
        (torch.randn(5, 2), (torch.randn(5, 3), torch.randn(4, 3))),
    ],
)
def test_sizes_that_do_not_fit_are_refused(x, state):
    with pytest.raises(ShapeError) as caught:
        BatchNormLSTMCell(2, 3, 1)(x, state, 0)
    assert f"BatchNormLSTMCell(2, 3) got an input of {tuple(x.shape)}" in str(caught.value)
    assert "Give it x[:, time], or build it with the sizes of its input" in str(caught.value)
    with pytest.raises(ShapeError, match=r"it normalizes \[N, 3, \*\].*\n.*3 channels in the second"):
        RecurrentBatchNorm(3, 1)(nn.functional.pad(x, (0, 7)), 0)
