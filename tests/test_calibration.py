"""Precise batch norm: equals numpy over what each layer was given, on any shards; the model is left as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distnorm import ConfigError, GhostBatchNorm, SyncBatchNorm, collectives
from distnorm.calibration import calibrate
from distnorm.norms import BatchRenorm, FrozenBatchNorm
from distnorm.norms.base import OF_ONE_STEP
from distnorm.norms.recurrent import RecurrentBatchNorm
from tests import ranks

pytestmark = pytest.mark.unit


def network(kind="batch"):
    """Two norms, the second behind a non-linearity and dropout, in double precision; alike on all ranks."""
    torch.manual_seed(1)
    norms = {
        "batch": nn.BatchNorm2d,
        "sync": SyncBatchNorm,
        "ghost": lambda c: GhostBatchNorm(c, 2),
        "renorm": BatchRenorm,
    }
    model = nn.Sequential(
        norms[kind](3),
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.Dropout(),
        norms[kind](4),
        nn.Flatten(),
        nn.Linear(24, 2),
    ).double()
    for norm in (model[0], model[4]):  # of a training that was elsewhere: nothing may lean on it
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(2000)
    return model


def data(sizes, rank=0, seed=0):
    """This rank's batches: each with an offset and a scale of its own, far from zero."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return [
        torch.randn(n, 3, 2, 3, generator=generator, dtype=torch.float64) * (1 + step) + 7 * rank + step
        for step, n in enumerate(sizes)
    ]


def recorded(model, batches, **options):
    """Calibrate, and keep beside it, by a hook of the test's own, what each norm was given."""
    seen = {"0": [], "4": []}
    handles = [
        model[int(name)].register_forward_pre_hook(lambda _, args, to=seen[name]: to.append(args[0].numpy().copy()))
        for name in seen
    ]
    statistics = calibrate(model, batches, **options)
    for handle in handles:
        handle.remove()
    return statistics, seen


def sharded(kind, shards, num_samples):
    model = network(kind)
    return recorded(model, data(shards[collectives.rank()], collectives.rank()), num_samples=num_samples)


def check_equals_numpy(found, rtol=1e-9):
    """Mean and unbiased variance over all values that all ranks' layers were given."""
    for name in ("0", "4"):
        values = np.concatenate([np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for _, s in found for x in s[name]], 1)
        for statistics, _ in found:
            np.testing.assert_allclose(statistics[f"{name}.running_mean"], values.mean(1), rtol=rtol, atol=rtol)
            np.testing.assert_allclose(statistics[f"{name}.running_var"], values.var(1, ddof=1), rtol=rtol)


@pytest.mark.parametrize("kind", ["batch", "sync", "ghost", "renorm"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_numpy_over_what_the_layers_were_given(kind, world):
    shards = [[4, 3], [2], [], [5, 1, 6]][:world]
    check_equals_numpy(ranks.run(sharded, kind, shards, 1000, world=world))


@given(
    shards=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=2, max_size=2).filter(lambda s: sum(map(sum, s))),
    kind=st.sampled_from(["batch", "sync"]),
)
@settings(max_examples=25, deadline=None)
def test_shards_of_any_size(shards, kind):
    check_equals_numpy(ranks.run(sharded, kind, shards, 1000, world=2))


def test_synced_layers_see_the_joined_batch():
    """One process on the joined batches gives the same statistics as ranks that sync, one of them without any batch."""
    shards = [[3, 2], [], [4], [1, 5, 2]]
    found = ranks.run(sharded, "sync", shards, 1000, world=4)
    parts = [data(sizes, rank) for rank, sizes in enumerate(shards)]
    joined = [torch.cat([part[step] for part in parts if step < len(part)]) for step in range(3)]
    alone = calibrate(network("sync"), joined)
    for statistics, _ in found:
        for key, value in alone.items():
            torch.testing.assert_close(statistics[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["batch", "renorm", "ghost", "sync"])
def test_layers_normalize_with_their_own_batch(kind):
    """The second norm is given what plain batch norm with batch statistics makes of each batch; no dropout."""
    batches = data([4, 6])
    _, seen = recorded(network(kind), batches)
    model = network(kind)
    for x, inner in zip(batches, seen["4"], strict=True):
        parts = x.split(2) if kind == "ghost" else [x]
        normalized = torch.cat(
            [
                (p - p.mean((0, 2, 3), keepdim=True)) / (p.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
                for p in parts
            ]
        )
        with torch.no_grad():
            np.testing.assert_allclose(inner, model[1](normalized).relu().numpy(), atol=1e-9)


def fingerprint(model):
    """All that calibrate must leave: values, identities, modes, attributes, hooks, gradients, random streams."""
    values = {k: v.clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}
    identities = {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
    attributes = {
        name: {k: v for k, v in m.__dict__.items() if k[0] != "_" or k in OF_ONE_STEP}
        | {"kept": len(getattr(getattr(m, "_passes", None), "_living", ()))}
        for name, m in model.named_modules()
    }
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    learns = {k: (p.requires_grad, None if p.grad is None else p.grad.clone()) for k, p in model.named_parameters()}
    assert not any(hasattr(m, "last") for m in model.modules())
    streams = (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.is_grad_enabled(),
    )
    return values, identities, attributes, hooks, learns, streams


def same(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


class Interrupt(nn.Module):
    """Raises at its n-th forward; before, draws from every stream, writes a buffer and binds another and attributes."""

    def __init__(self, at, error):
        super().__init__()
        self.error, self.left, self.count = error, [at], 0
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(()))

    def forward(self, x):
        nn.functional.dropout(x, 0.5, training=True)
        self.calls += 1
        self.count += 1
        self.cache = x.mean()
        self.left[0] -= 1
        if self.left[0] < 50:  # not in the forward that the test itself makes
            self.last = x
        if self.left[0] < 0:
            raise self.error
        return x


def noisy(batches, error=None):
    for batch in batches:
        torch.rand(3), random.random(), np.random.rand()
        yield batch
    if error is not None:
        raise error


@pytest.mark.parametrize("kind", ["batch", "sync", "ghost", "renorm"])
@pytest.mark.parametrize("at", [0, 2, 9])
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_the_model_is_untouched_whatever_happens(kind, at, error):
    model = network(kind)
    model.insert(5, Interrupt(100, error))
    model(data([4])[0]).sum().backward()  # gradients, and what one step leaves in the layers
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[4].momentum = None
    model[5].left[0] = at
    before = fingerprint(model)
    if at < 3:
        with pytest.raises(type(error)):
            calibrate(model, noisy(data([4, 4, 4])))
    else:
        with pytest.raises(type(error)):
            calibrate(model, noisy(data([4, 4, 4]), error))
        model[5].left[0] = 9
        calibrate(model, noisy(data([4, 4, 4])))
    model[5].left[0] = at
    assert same(before, fingerprint(model))


def test_the_fingerprint_sees_what_calibrate_must_not_change():
    model = network()
    before = fingerprint(model)
    model(data([4])[0])
    assert not same(before, fingerprint(model))
    assert same(before[:2][1:], fingerprint(model)[:2][1:])


def far_apart():
    torch.manual_seed(collectives.rank())
    batches = [(torch.randn(500, 1, dtype=torch.float64) + 4 * collectives.rank(),) for _ in range(10)]
    return calibrate(nn.Sequential(nn.BatchNorm1d(1)).double(), batches, 10_000)["0.running_var"].item()


def test_ranks_at_0_and_4_pool_to_variance_5():
    first, second = ranks.run(far_apart, world=2)
    assert first == second == pytest.approx(5, rel=0.03)


def shard_until_1000():
    batches = iter([torch.zeros(100 + collectives.rank(), 2) + step for step in range(20)])
    statistics = calibrate(nn.Sequential(nn.BatchNorm1d(2)), batches, 700)
    return statistics["0.running_mean"].tolist(), sum(1 for _ in batches)


def test_ends_with_the_round_in_which_all_ranks_together_have_enough():
    for mean, left in ranks.run(shard_until_1000, world=2):
        assert mean == pytest.approx([1.5] * 2)
        assert left == 16


def test_fewer_samples_than_asked_are_used_and_said(caplog):
    calibrate(nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(5, 3)], 9)
    assert "calibrate() measured 5 samples: the batches had no more of the 9." in caplog.text


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, _: x,
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: {"image": x, "label": y},
    ],
)
def test_the_input_is_the_first_entry_of_a_batch(wrap):
    batches = [wrap(torch.randn(4, 3), torch.zeros(4)) for _ in range(2)]
    first = batches if wrap(1, 2) == 1 else [next(iter(b.values())) if isinstance(b, dict) else b[0] for b in batches]
    found = calibrate(nn.Sequential(nn.BatchNorm1d(3)), batches)
    torch.testing.assert_close(found["0.running_mean"], torch.cat(first).mean(0))


def by_forward():
    rank = collectives.rank()
    batches = [{"id": ["a", "b"], "pixels": torch.full((2, 3), 5.0 + rank) + torch.arange(3.0)}] * (2 * rank)
    model = nn.Sequential(SyncBatchNorm(3))
    return calibrate(model, batches, forward=lambda model, batch: model(batch["pixels"]))["0.running_mean"].tolist()


def test_forward_takes_any_batch_and_a_rank_without_one_gets_an_empty_one_of_its_structure():
    assert ranks.run(by_forward, world=2) == [[6.0, 7.0, 8.0]] * 2


def test_a_shuffling_loader_draws_from_no_stream():
    x = torch.randn(40, 3)
    loader = DataLoader(TensorDataset(x, torch.zeros(40)), batch_size=8, shuffle=True)
    before = torch.get_rng_state()
    found = calibrate(nn.Sequential(nn.BatchNorm1d(3)), loader)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(found["0.running_var"], x.var(0))


def test_the_mask_of_a_synced_layer_is_respected():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = SyncBatchNorm(3)

        def forward(self, batch):
            return self.norm(batch["x"], mask=batch["mask"])

    x = torch.randn(6, 3, 5, 4)
    mask = torch.rand(6, 5) < 0.5
    x.masked_fill_(~mask[:, None, :, None], float("nan"))
    batches = [{"x": x[:4], "mask": mask[:4]}, {"x": x[4:], "mask": mask[4:]}]
    found = calibrate(Masked(), batches, forward=lambda model, batch: model(batch))
    valid = x.permute(1, 0, 2, 3)[:, mask].flatten(1).numpy()
    np.testing.assert_allclose(found["norm.running_mean"], valid.mean(1), atol=1e-6)
    np.testing.assert_allclose(found["norm.running_var"], valid.var(1, ddof=1), rtol=1e-5)


def test_a_shared_layer_merges_all_it_is_given():
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm, nn.Linear(2, 2), norm)
    x = torch.randn(50, 2)
    with torch.no_grad():
        inner = model[1](nn.functional.batch_norm(x, None, None, training=True))
    found = calibrate(model, [x])
    assert found.keys() == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    torch.testing.assert_close(found["0.running_var"], torch.cat((x, inner)).var(0))


@pytest.mark.parametrize("step", [int, np.int64, torch.tensor], ids=["int", "numpy", "torch"])
def test_statistics_with_a_row_a_time_step_are_measured_a_row(step):
    model = nn.Sequential(RecurrentBatchNorm(2, 4))
    x = torch.randn(5, 30, 2) + torch.arange(5.0)[:, None, None] * 10
    steps = [step(time) for time in (0, 1, 3, 4, 5)]
    found = calibrate(model, [x], forward=lambda m, b: [m[0](part, t) for part, t in zip(b, steps, strict=True)])
    mean, var = found["0.running_mean"], found["0.running_var"]
    torch.testing.assert_close(mean[:2], x[:2].mean(1))
    torch.testing.assert_close(var[3], x[2:].flatten(0, 1).var(0))
    assert mean[2].tolist() == [0, 0], "no step has come to this row: it keeps what it had"
    assert var[2].tolist() == [1, 1]


def test_frozen_layers_have_no_part_and_unreached_ones_are_named(caplog):
    model = nn.Sequential(FrozenBatchNorm(3), nn.BatchNorm1d(3))
    model.add_module("spare", nn.BatchNorm1d(3))
    found = calibrate(model, [torch.randn(8, 3)], forward=lambda m, x: m[1](m[0](x)))
    assert found.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert caplog.text.count("no value came to layer 'spare': it is left out") == 1


def test_a_compiled_model_is_measured_too():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.compile(backend="eager")
    x = torch.randn(9, 3)
    model(x)
    torch.testing.assert_close(calibrate(model, [x])["0.running_var"], x.var(0))


class Failing(nn.Module):
    """A model that raises on one rank, before any exchange."""

    def __init__(self, on):
        super().__init__()
        self.norm, self.on = nn.BatchNorm1d(2), on

    def forward(self, x):
        if collectives.rank() == self.on:
            raise ValueError("cannot\nat all")
        return self.norm(x)


def caught(case):
    rank = collectives.rank()
    model, batches, samples = nn.Sequential(SyncBatchNorm(2)), [torch.randn(4, 2)] * 3, 100
    if case == "loader":
        batches = noisy([torch.randn(4, 2)] * (1 + rank), OSError("disk gone") if rank == 1 else None)
    elif case == "model":
        model = Failing(on=1)
    elif case == "all":
        batches = [{"name": "a"}]
    elif case == "empty":
        batches = []
    elif case == "samples":
        samples += rank
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception) as error:  # noqa: PT011
        calibrate(model, batches, samples)
    assert same(dict(before), dict(model.state_dict()))
    assert all(m.training for m in model.modules())
    return type(error.value).__name__, str(error.value)


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        (
            "loader",
            "GroupError",
            ["rank 1 raised before round 3 of calibrate(): OSError: disk gone", "traceback of the"],
        ),
        (
            "model",
            "GroupError",
            ["rank 1 raised before round 2 of calibrate(): ValueError: cannot\n", "traceback of the"],
        ),
        ("all", "ConfigError", ["type dict, whose first entry is no tensor", "forward=lambda model, batch"]),
        ("empty", "ConfigError", ["got no samples: no batch came on any of 2 ranks", "Give it batches, e.g. a Data"]),
        ("samples", "ConfigError", ["num_samples are [100, 101] on ranks 0, 1", "Give every rank the same model"]),
    ],
)
def test_all_ranks_raise_together_and_name_the_cause(case, kind, words):
    for found, message in ranks.run(caught, case, world=2):
        assert found == kind
        assert all(word in message for word in words), message
        assert len(message.splitlines()) <= 3


NORM = nn.Sequential(nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (nn.Linear(3, 3), []),
            r"no batch norm with running statistics in Linear[\s\S]*Give it a model with nn\.Batch",
        ),
        ((nn.Sequential(FrozenBatchNorm(3)), []), r"no batch norm.*in Sequential[\s\S]*before fold"),
        (([torch.ones(2, 3)], NORM), r"calibrate\(\) got a list, that is not the model.*Give it the model first"),
        ((NORM, [torch.ones(2, 3)], 0), r"num_samples=0; it must be at least 1\. Give e\.g\. 1024"),
        ((NORM, [torch.ones(2, 3)], "1024"), r"num_samples='1024'; it must be at least 1\. Give e\.g\. 1024"),
        ((NORM, None), r"got None for its batches, that cannot be gone through\. Give a DataLoader"),
        (
            (NORM, [torch.ones(2, 3), torch.ones(1, 3)]),
            r"got a batch of 1 sample: layer '0' has 1 value a channel[\s\S]*drop_last=True",
        ),
        (
            (nn.Sequential(SyncBatchNorm(3)), [torch.ones(1, 3)]),
            r"got a batch of 1 sample: layer '0' has 1 value a channel[\s\S]*drop_last=True",
        ),
        (
            (nn.Sequential(GhostBatchNorm(3, 2)), [torch.ones(5, 3)]),
            r"got 5 samples in runs of 2: layer '0' has 1 value a channel[\s\S]*leave no sample alone",
        ),
        ((NORM, torch.ones(2, 3)), r"got one tensor \(2, 3\) for its batches\. Give a list of batches"),
        ((NORM, [("a", "b")]), r"batch of type tuple, whose first entry is no tensor[\s\S]*forward=lambda"),
        (
            (NORM, (x for x in ())),
            r"got no samples: no batch came on any of 1 ranks[\s\S]*a generator gives them only on",
        ),
    ],
)
def test_wrong_input_is_refused_with_the_remedy(arguments, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(*arguments)


def test_samples_that_cannot_be_counted_are_refused():
    with pytest.raises(ConfigError, match=r"type list without a tensor.*\n.*hold a tensor with the samples"):
        calibrate(NORM, [["a"]], forward=print)


def wrapped():
    with pytest.raises(ConfigError, match=r"got a DistributedDataParallel, that is not.*Pass model\.module"):
        calibrate(nn.parallel.DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(3))), [torch.ones(2, 3)])


def test_a_model_in_ddp_is_refused():
    ranks.run(wrapped, world=2)


def one_sample_a_rank():
    return calibrate(nn.Sequential(SyncBatchNorm(1)), [torch.full((1, 1), 2.0 * collectives.rank())])


def test_one_sample_a_rank_is_enough_where_ranks_pool():
    for found in ranks.run(one_sample_a_rank, world=2):
        assert (found["0.running_mean"].item(), found["0.running_var"].item()) == (1, 2)


def empty_structures():
    heard, original = [], collectives.agree
    collectives.agree = lambda value, what, **rest: heard.append(what) or original(value, what, **rest)
    try:
        batches = [torch.randn(4, 2)] * (3 * collectives.rank())
        calibrate(nn.Sequential(SyncBatchNorm(2)), batches)
    finally:
        collectives.agree = original
    return heard


def test_the_structure_of_an_empty_batch_is_agreed_on_once():
    assert ranks.run(empty_structures, world=2) == [["the structure of an empty batch"]] * 2
