"""The watch: every measure of every kind of layer against numpy on the joined data, on one, two and four ranks."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from distnorm import GhostBatchNorm, SyncBatchNorm, collectives
from distnorm.drift.catalogue import BY_KEY, MEASURES
from distnorm.drift.events import Measurement
from distnorm.drift.watch import DriftWatch
from distnorm.norms import FrozenBatchNorm, RecurrentBatchNorm, pooling
from tests import ranks, reference_watch

pytestmark = pytest.mark.unit

LIGHT = {measure.key for measure in MEASURES if measure.tier == "light"}
BATCH = {"jeffreys", "kl", "wasserstein", "bhattacharyya", "lag", "effective_samples", "cv_mean", "cv_var"}
BATCH |= {"design_effect", "estimator_sd"}
RANKS = {"between_ranks", "f", "icc"}
NORMS = {
    "local": lambda: nn.BatchNorm2d(5),
    "world": lambda: SyncBatchNorm(5, momentum=0.3),
    "pairs": lambda: SyncBatchNorm(5, sync_ranks=2),
    "outer": lambda: SyncBatchNorm(5, group_ranks=(0, 3)),
    "cumulative": lambda: nn.BatchNorm2d(5, momentum=None),
}


class Memory(list):
    """Keeps events."""

    take = list.append


def noting(seen):
    def note(layer, args):
        if layer.training or not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            running = [layer.running_mean, layer.running_var]
            seen.append([tensor.detach().double().numpy().copy() for tensor in (args[0], *running)])

    return note


def watched(kinds, kind="full", steps=11, uneven=True, **options):
    """Body: events of a watch over layers of some kinds, and what each layer was given at every step."""
    rank = collectives.rank()
    torch.manual_seed(rank)
    model = nn.ModuleList(NORMS[name]() for name in kinds)
    memory, seen = Memory(), [[] for _ in kinds]
    for layer, steps_of_layer in zip(model, seen, strict=True):
        nn.init.uniform_(layer.weight), nn.init.normal_(layer.bias)
        layer.register_forward_pre_hook(noting(steps_of_layer))
    with DriftWatch(model, [memory], kind=kind, interval=1, **options) as watch:
        for step in range(steps):
            with watch.step():
                samples = 6 + 2 * rank * uneven
                x = torch.randn(samples, 5, 3, 2) * (1 + 0.1 * step) + 0.2 * rank + torch.arange(5)[:, None, None]
                for layer in model:
                    layer(x)
    return list(memory), seen


def measurements(events):
    return [event for event in events if isinstance(event, Measurement)]


ALONE = {1: [[0]], 2: [[0], [1]], 4: [[0], [1], [2], [3]]}
CASES = [
    (("local", "cumulative"), 1, {}),
    (("local", "world"), 2, {"world": [[0, 1]]}),
    (("world",), 2, {"world": [[0, 1]]}),
    (("world", "pairs", "local"), 4, {"world": [[0, 1, 2, 3]], "pairs": [[0, 1], [2, 3]]}),
    (("outer", "world"), 4, {"world": [[0, 1, 2, 3]], "outer": [[0, 3], [1], [2]]}),
]


def compare(found, kinds, world, blocks):
    last = measurements(found[0][0])[-1]
    for place, name in enumerate(kinds):
        momentum = {"world": 0.3, "cumulative": None}.get(name, 0.1)
        seen = [found[rank][1][place] for rank in range(world)]
        expected = reference_watch.measures(seen, blocks.get(name, ALONE[world]), momentum)
        assert expected.keys() == BATCH | (RANKS if world > 1 else set()) | (
            {"rank_spread"} if len(blocks.get(name, ALONE[world])) > 1 else set()
        )
        for key, values_C in expected.items():
            less = BY_KEY[key].span < BY_KEY[key].healthy
            median, p95, worst, channel = reference_watch.of_layer(values_C, less)
            ours = [last.values[f"{key}{part}"][place] for part in ("", ".p95", ".max")]
            assert ours == pytest.approx(
                [median, p95, worst], rel=0.06 if key == "between_ranks" else 1e-4, abs=1e-6
            ), key
            assert last.worst_channels[key][place] == channel


@pytest.mark.parametrize(("kinds", "world", "blocks"), CASES, ids=str)
def test_every_measure_is_numpys_on_the_joined_data(kinds, world, blocks):
    found = ranks.run(watched, kinds, world=world) if world > 1 else [watched(kinds)]
    compare(found, kinds, world, blocks)
    assert all(events == [] for events, _ in found[1:])


def watched_summing(kinds):
    """Body: as in a world of more than 16 ranks, where a layer sums and has no rank's moments."""
    largest, pooling.GATHER_UP_TO = pooling.GATHER_UP_TO, 1
    try:
        return watched(kinds)
    finally:
        pooling.GATHER_UP_TO = largest


def test_layers_that_sum_join_the_gather():
    found = ranks.run(watched_summing, ("world", "pairs"), world=4)
    compare(found, ("world", "pairs"), 4, {"world": [[0, 1, 2, 3]], "pairs": [[0, 1], [2, 3]]})


def held(evaluation):
    """Body: samples that the running averages hold, of a local layer and of one that pairs of ranks share."""
    events, _ = watched(("local", "pairs"), uneven=False, evaluation=evaluation)
    return [event.values["estimator_samples"] for event in measurements(events)[-1:]]


def test_pooled_averages_hold_the_samples_of_all_ranks():
    for evaluation, samples in (("running", [6, 12]), ("pooled", [24, 24])):
        ((found,), *_) = ranks.run(held, evaluation, world=4)
        assert found == pytest.approx([n * 1.9 / 0.1 for n in samples])


def counting(kinds, options):
    """Body: how many gathers the watch started, and their numbers."""
    sizes, original = [], collectives.start_gather

    def start_gather(values, group, what):
        sizes.append(values.numel())
        return original(values, group, what)

    collectives.start_gather = start_gather
    try:
        watched(kinds, steps=6, **options)
    finally:
        collectives.start_gather = original
    return sizes


@pytest.mark.parametrize(
    ("kinds", "options", "sizes"),
    [
        (("world", "world"), {}, []),
        (("world", "local"), {}, [4 * 5 + 2 + 1] * 6),
        (("local", "local"), {"kind": "light"}, [4 * 10 + 4 + 1] * 6),
        (("world", "world"), {"on_alarm": "stop"}, [1] * 6),
    ],
    ids=str,
)
def test_an_interval_has_at_most_one_gather_of_the_promised_size(kinds, options, sizes):
    assert ranks.run(counting, kinds, options, world=2) == [sizes] * 2


def test_light_has_the_light_measures_and_full_all_that_need_no_evaluation():
    light, full = (measurements(watched(("local",), kind=kind)[0])[-1] for kind in ("light", "full"))
    alone = {"between_ranks", "rank_spread", "f", "icc"}
    of_evaluation = {"precise_jeffreys", "precise_ratio", "shift", "gap_share", "covariate_shift"}
    assert {key for key in light.values if "." not in key} == LIGHT - alone
    assert {key for key in full.values if "." not in key} == set(BY_KEY) - alone - of_evaluation


class Channels(nn.Module):
    """Layers that have nothing to be compared with but their own past, and constants."""

    def __init__(self):
        super().__init__()
        self.group, self.layer, self.frozen = nn.GroupNorm(2, 4), nn.LayerNorm(4), FrozenBatchNorm(4)
        self.untracked = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        for layer in (self.group, self.untracked, self.frozen):
            layer(x)
        self.layer(x.unsqueeze(1))


def of_samples(steps=9, drift=0.0):
    """Body: values of norms of single samples, and each rank's inputs."""
    torch.manual_seed(collectives.rank())
    model, memory, inputs = Channels(), Memory(), []
    with DriftWatch(model, [memory], interval=1, kind="full") as watch:
        for step in range(steps):
            inputs.append(torch.randn(16, 4) + drift * step)
            with watch.step():
                model(inputs[-1])
    return list(memory), torch.stack(inputs).double().numpy()


@pytest.mark.parametrize("world", [1, 2])
def test_norms_of_single_samples_are_compared_with_their_own_past(world):
    found = ranks.run(of_samples, 9, 0.3, world=world) if world > 1 else [of_samples(9, 0.3)]
    joined_TNC = np.concatenate([inputs for _, inputs in found], 1)
    last = measurements(found[0][0])[-1]
    names = [layer.name for layer in found[0][0][0].layers]
    past = joined_TNC[:-1].reshape(-1, 4)
    now, samples = joined_TNC[-1], 16 * world
    floor = reference_watch.divergence.floors(samples, 2 / 9)["jeffreys"]
    gap = (now.mean(0) - past.mean(0)) ** 2
    for name, eps in (("group", 1e-5), ("layer", 1e-5), ("untracked", 1e-5)):
        exact = reference_watch.reference_drift.textbook(gap, now.var(0) + eps, past.var(0) + eps)["jeffreys"]
        place = names.index(name)
        assert last.values["jeffreys"][place] == pytest.approx(np.median(exact - float(floor)), rel=1e-5)
        assert math.isnan(last.values["lag"][place])
    place = names.index("frozen")
    means = [inputs[-1].mean(0) for _, inputs in found]
    blocks = [
        reference_watch.reference_drift.textbook(mean**2, inputs[-1].var(0) + 1e-5, 1.0 + 1e-5)["jeffreys"]
        for mean, (_, inputs) in zip(means, found, strict=True)
    ]
    floor = float(reference_watch.divergence.floors(16, None)["jeffreys"])
    assert last.values["jeffreys"][place] == pytest.approx(np.median(np.mean(blocks, 0) - floor), rel=1e-5)


def test_ghosts_are_measured_by_the_first_and_recurrent_layers_at_their_first_step():
    torch.manual_seed(0)
    model, memory, seen = nn.ModuleList([GhostBatchNorm(3, 4), RecurrentBatchNorm(3, 5)]), Memory(), [[], []]
    for layer, steps in zip(model, seen, strict=True):
        layer.register_forward_pre_hook(
            lambda layer, args, steps=steps: steps.append(
                [
                    t.detach().double().reshape(-1, 3).numpy().copy()
                    for t in (args[0], layer.running_mean, layer.running_var)
                ]
            )
        )
    with DriftWatch(model, [memory], interval=1, kind="full") as watch:
        for _ in range(11):
            with watch.step():
                model[0](torch.randn(12, 3))
                for time in range(3):
                    model[1](torch.randn(12, 3) + time, time)
    last = measurements(memory)[-1]
    ghosts = [[(x[:4], mean[0], var[0]) for x, mean, var in seen[0]]]
    first = [[(x, mean[0], var[0]) for x, mean, var in seen[1][::3]]]
    for place, steps in enumerate((ghosts, first)):
        expected = reference_watch.measures(steps, [[0]], 0.1)
        for key in BATCH:
            assert last.values[key][place] == pytest.approx(np.median(expected[key]), rel=1e-4, abs=1e-6), key
