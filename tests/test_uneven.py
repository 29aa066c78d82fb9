"""Uneven data: ranks with different numbers of batches against one process on the joined batches."""

import collections
import functools
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distnorm import ConfigError, EvenLoader, GroupError, SyncBatchNorm
from distnorm import collectives as ours
from distnorm.data import GlobalBatchSampler
from distnorm.tasks import Classification
from distnorm.uneven import loader as loader_module
from distnorm.uneven.batch import empty_like
from tests import ranks

pytestmark = pytest.mark.unit

BATCH, FEATURES, CLASSES = 4, 3, 5


def batches_of(rank, count, last=BATCH):
    """A rank's own batches, the last of `last` samples; the first feature is a number that no other sample has."""
    generator = torch.Generator().manual_seed(100 + rank)
    sizes = [BATCH] * (count - 1) + [last] if count else []
    made = []
    for step, size in enumerate(sizes):
        x = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64) * 2 + rank
        x[:, 0] = torch.arange(size) * 1e-3 + step * 0.1 + rank
        made.append((x, torch.randint(CLASSES, (size,), generator=generator)))
    return made


class Stream(IterableDataset):
    """A rank's samples without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 6), norm(6), nn.ReLU(), nn.Linear(6, CLASSES)).double()


def state_of(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def train(model, batches, share):
    """SGD over `batches`; every step's gradients, and the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    gradients, seen = [], []
    for inputs, targets in batches:
        optimizer.zero_grad()
        losses_N = functional.cross_entropy(model(inputs), targets, reduction="none")
        (losses_N.sum() / share(inputs)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        optimizer.step()
        seen += inputs[:, 0].tolist()
    return gradients, seen


def joined(counts, lasts):
    """The batches of all ranks as one process's."""
    own = [batches_of(rank, *of) for rank, of in enumerate(zip(counts, lasts, strict=True))]
    steps = [[batches[step] for batches in own if step < len(batches)] for step in range(max(counts))]
    return [tuple(torch.cat(part) for part in zip(*parts, strict=True)) for parts in steps]


def on_ranks(counts, lasts, kind, epochs):
    rank = ours.rank()
    own = batches_of(rank, counts[rank], lasts[rank])
    model = network(SyncBatchNorm)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    loader = EvenLoader(own if kind == "list" else DataLoader(Stream(own), batch_size=None), wrapped)
    length = len(loader) if kind == "list" else None
    gradients, seen = train(wrapped, (batch for _ in range(epochs) for batch in loader), lambda _: loader.share)
    return gradients, seen, state_of(model), length


UNEVEN = [
    ([3, 5], [4, 4], "list", 2),
    ([5, 3], [3, 1], "stream", 1),
    ([0, 4], [4, 3], "list", 1),
    ([4, 0], [4, 1], "stream", 2),
    ([7, 2, 2, 1], [4, 3, 1, 2], "list", 1),
    ([0, 0, 3, 0], [4, 4, 4, 4], "stream", 1),
]


@pytest.mark.parametrize(("counts", "lasts", "kind", "epochs"), UNEVEN, ids=str)
def test_uneven_ranks_train_as_one_process_on_the_joined_batches(counts, lasts, kind, epochs):
    model = network(nn.BatchNorm1d)
    gradients, seen = train(model, joined(counts, lasts) * epochs, len)
    state = state_of(model)
    found = ranks.run(on_ranks, counts, lasts, kind, epochs, world=len(counts))
    assert collections.Counter(value for own in found for value in own[1]) == collections.Counter(seen)
    for own_gradients, _, own_state, length in found:
        assert len(own_gradients) == max(counts) * epochs
        for ours_of_step, theirs_of_step in zip(own_gradients, gradients, strict=True):
            torch.testing.assert_close(ours_of_step, theirs_of_step, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own_state, state, rtol=1e-10, atol=1e-10)
        assert length in (None, max(counts))


class Data(torch.utils.data.Dataset):
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def lightning_task(norm):
    return Classification(
        network(norm), functools.partial(torch.optim.SGD, lr=0.3), CLASSES, schedule="constant", warmup_fraction=0
    )


def trainer(folder, **options):
    return Trainer(
        accelerator="cpu",
        devices=ours.world_size(),
        strategy=DDPStrategy() if ours.world_size() > 1 else "auto",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=100,
        **{"max_epochs": 2, **options},
    )


def fit(folder, counts, lasts, kind, batches=None):
    """Body, and the single process: `Trainer.fit` over this rank's batches, however Lightning fetches them."""
    own = batches_of(ours.rank(), counts[ours.rank()], lasts[ours.rank()]) if batches is None else batches
    dataset = Data(own) if kind == "sized" else Stream(own)
    loader = EvenLoader(DataLoader(dataset, batch_size=None))
    task = lightning_task(nn.BatchNorm1d if batches else SyncBatchNorm)
    fitted = trainer(folder)
    fitted.fit(task, loader)
    return state_of(task.model), fitted.global_step


@pytest.mark.parametrize("kind", ["sized", "stream"])
def test_lightning_ends_together_and_equals_one_process(tmp_path, kind):
    counts, lasts = [2, 3], [3, 2]
    found = ranks.run(fit, tmp_path, counts, lasts, kind, world=2)
    state, steps = fit(tmp_path, None, None, kind, joined(counts, lasts))
    for own_state, own_steps in found:
        assert own_steps == steps == 6
        torch.testing.assert_close(own_state, state, rtol=1e-10, atol=1e-10)


def test_a_task_counts_the_steps_of_its_loader_and_not_those_of_an_epoch_it_resumed():
    task = lightning_task(SyncBatchNorm)
    offers = type("Loader", (), {"global_count": lambda _, step: [6, 2, 0][step]})()
    task._trainer = type("Trainer", (), {"train_dataloader": offers, "world_size": 2, "datamodule": None})()
    assert task._samples_a_rank(batch_idx=7, own=4) == 3
    task._batches_done = 1
    assert task._samples_a_rank(batch_idx=8, own=0) == 1
    task._batches_done = 2
    assert task._samples_a_rank(batch_idx=9, own=0) == 0.5  # a step without samples has no loss, not 0 / 0
    task.on_train_epoch_start()
    assert task._samples_a_rank(batch_idx=0, own=4) == 3


def fit_refused(folder):
    task = lightning_task(nn.BatchNorm1d)
    with pytest.raises(ConfigError) as caught:
        trainer(folder).fit(task, EvenLoader(batches_of(ours.rank(), 2 + ours.rank())))
    return str(caught.value)


def test_lightning_refuses_local_batch_norm_before_the_first_step(tmp_path):
    for message in ranks.run(fit_refused, tmp_path, world=2):
        assert message == (
            "1 (BatchNorm1d) normalizes each rank alone and counts an empty batch as one it has seen, and a rank will "
            "get empty batches: the ranks have 2, 3 batches.\nConvert the model (norm.kind=sync), put "
            "SyncBatchNorm(C, sync_ranks=1) in its place, or give every rank as many batches."
        )


class Lying(list):
    """Says that it is as long as the others."""

    def __len__(self):
        return 3


def refused(layer, kind):
    own = batches_of(ours.rank(), 2 + ours.rank())
    own = {"sized": own, "stream": (batch for batch in own), "lying": Lying(own), "even": own[:2]}[kind]
    steps = 0
    try:
        for _ in EvenLoader(own, nn.Sequential(layer)):
            steps += 1
    except ConfigError as error:
        return steps, str(error)
    return steps, None


REFUSED = [
    (nn.BatchNorm1d(3), "sized", 0, "the ranks have 2, 3 batches", "norm.kind=sync"),
    (nn.BatchNorm2d(3), "stream", 0, "the ranks have unknown, unknown batches", "sync_ranks=1"),
    (
        nn.InstanceNorm2d(3, affine=True),
        "sized",
        0,
        "0 (InstanceNorm2d) raises on an empty batch or",
        "GroupNorm(C, C)",
    ),
    (nn.PixelShuffle(2), "sized", 0, "in its backward", "view and permute"),
    (nn.BatchNorm1d(3), "lying", 2, "rank 0 ran out first", "norm.kind=sync"),
]


@pytest.mark.parametrize(("layer", "kind", "after", "value", "remedy"), REFUSED, ids=str)
def test_a_layer_that_cannot_take_an_empty_batch_is_refused_alike(layer, kind, after, value, remedy):
    for steps, message in ranks.run(refused, layer, kind, world=2):
        assert steps == after
        assert value in message
        assert remedy in message
        assert message.count("\n") <= 2


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.BatchNorm1d(3), "even"),
        (nn.BatchNorm1d(3).eval(), "sized"),
        (SyncBatchNorm(3), "stream"),
        (nn.InstanceNorm1d(3), "sized"),
    ],
)
def test_a_layer_that_can_is_not(layer, kind):
    assert [message for _, message in ranks.run(refused, layer, kind, world=2)] == [None, None]


def test_the_layers_that_are_refused_are_those_that_torch_has_trouble_with():
    x = torch.empty(0, 4, 4, 4, requires_grad=True)
    for layer in (nn.InstanceNorm2d(4, affine=True), nn.PixelShuffle(2), nn.PixelUnshuffle(2)):
        with pytest.raises((IndexError, RuntimeError)):
            layer(x).sum().backward()
    tracking = nn.InstanceNorm2d(4, track_running_stats=True)
    tracking(x)
    assert tracking.running_var.isnan().all()
    norm = nn.BatchNorm2d(4)
    norm(x)
    assert int(norm.num_batches_tracked) == 1  # of nothing
    for layer in (
        nn.Conv2d(4, 2, 3),
        nn.GroupNorm(2, 4),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.InstanceNorm2d(4),
        SyncBatchNorm(4),
    ):
        layer(x).sum().backward()
    values = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(nn.GroupNorm(4, 4)(values), nn.InstanceNorm2d(4, affine=True)(values))


def raising(batches, after):
    yield from batches[:after]
    raise OSError("disk 7 is gone\nand more")


def one_raises(after):
    rank = ours.rank()
    own = batches_of(rank, 4)
    loader = EvenLoader(raising(own, after) if rank == 1 else own)
    steps = 0
    try:
        for _ in loader:
            steps += 1
            ours.gather(torch.ones(1), (0, 1), "a step")
    except GroupError as error:
        return steps, str(error), type(error.__cause__).__name__


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_loader_that_raises_stops_all_ranks_after_the_steps_before(after):
    began = time.monotonic()
    for rank, (steps, message, cause) in enumerate(ranks.run(one_raises, after, world=2)):
        assert steps == after
        assert message == (
            f"The loader of rank 1 raised at batch {after} of pass 1 through the data: OSError: disk 7 is gone\n"
            "All ranks stop here. The traceback of the rank that raised has the cause."
        )
        assert cause == ("OSError" if rank == 1 else "NoneType")
    assert time.monotonic() - began < 20


def stalls(seconds):
    def slow():
        for step, batch in enumerate(batches_of(ours.rank(), 3)):
            if ours.rank() == 1 and step == 2:
                time.sleep(seconds)
            yield batch

    loader = EvenLoader(slow(), timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(GroupError) as caught:
        for _ in loader:
            pass
    waited = time.monotonic() - began
    ours.agree(None, "the end of the test")
    return str(caught.value), waited


def test_a_loader_that_stalls_is_named_within_the_timeout():
    (first, waited, *_), (second, _) = ranks.run(stalls, 1.5, world=2)
    assert "rank 1 did not come to batch 2 of pass 1 through the data; rank 0 did, and waited 0.3" in first
    assert "longer timeout" in first
    assert "The loader of rank 1 took 1.5" in second
    assert "s for batch 2 of pass 1 through the data" in second
    assert "rank 0 gave up after timeout_s=0.3" in second
    assert waited < 5


def leaves_early(together):
    loader = EvenLoader(batches_of(ours.rank(), 3 + ours.rank()))
    seen = []
    try:
        for epoch in range(3):
            for step, (inputs, _) in enumerate(loader):
                seen.append((epoch, step, len(inputs), loader.global_count(step)))
                if epoch == 1 and step == (1 if together else ours.rank()):
                    break
    except GroupError as error:
        return str(error)
    return seen


def test_leaving_early_together_and_going_through_it_again():
    for rank, seen in enumerate(ranks.run(leaves_early, True, world=2)):
        own = [4, 4, 4, 4 if rank else 0]
        epoch = [(step, own[step], 4 if step == 3 else 8) for step in range(4)]
        assert seen == [(e, *s) for e, steps in enumerate((epoch, epoch[:2], epoch)) for s in steps]


def test_leaving_in_different_steps_is_named():
    for message in ranks.run(leaves_early, False, world=2):
        assert (
            "The ranks are at different places of their data: rank 0 in step 0 of pass 3, rank 1 in step 2" in message
        )
        assert "leave its loop on all ranks in the same step" in message


Pair = collections.namedtuple("Pair", ["left", "right"])
NESTED = {
    "pair": Pair(torch.ones(4, 2), [torch.ones(4, dtype=torch.int64)]),
    "names": ["a", "b", "c", "d"],
    "more": collections.OrderedDict(deep=(torch.ones(4, 2, 3, dtype=torch.float16), None, torch.tensor(3.0))),
    "array": np.ones((4, 2)),
    "scale": 2.5,
}


def nested():
    loader = EvenLoader([NESTED] if ours.rank() == 0 else [])
    return next(iter(loader)), loader.share


def test_an_empty_batch_has_the_structure_of_a_full_one():
    (full, share), (empty, _) = ranks.run(nested, world=2)
    assert share == 2
    assert type(empty["pair"]) is Pair
    assert (empty["pair"].left.shape, empty["pair"].right[0].dtype) == ((0, 2), torch.int64)
    assert empty["names"] == []
    assert type(empty["more"]) is collections.OrderedDict
    deep = empty["more"]["deep"]
    assert (deep[0].shape, deep[0].dtype, deep[1], deep[2].item()) == ((0, 2, 3), torch.float16, None, 3)
    assert (empty["array"].shape, empty["scale"]) == ((0, 2), 2.5)
    assert NESTED["pair"].left.shape == (4, 2)


def test_what_no_empty_batch_can_be_made_of_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"A batch holds a object.*empty=…"):
        empty_like({"a": object()})
    with pytest.raises(ConfigError, match=r"type str holds no tensor.*count=…"):
        next(iter(EvenLoader(["text"])))
    with pytest.raises(ConfigError, match=r"timeout_s=0 must be above 0.*None"):
        EvenLoader([], timeout_s=0)


def counts_tokens():
    own = [torch.tensor([[1, 1, 0], [1, 0, 0]])] * (1 + ours.rank())
    loader = EvenLoader(own, empty=torch.zeros(0, 3), count=lambda batch: int(batch.sum()))
    return [(len(batch), loader.share, batch.dtype) for batch in loader]


def test_the_count_and_the_empty_batch_can_be_given():
    assert ranks.run(counts_tokens, world=2) == [
        [(2, 3, torch.int64), (0, 1.5, torch.float32)],
        [(2, 3, torch.int64), (2, 1.5, torch.int64)],
    ]


def lengths(kinds):
    own = batches_of(ours.rank(), 2 + ours.rank())
    loader = EvenLoader(own if kinds[ours.rank()] == "sized" else Stream(own))
    try:
        return len(loader)
    except TypeError as error:
        return str(error)


def test_the_length_is_the_largest_where_all_ranks_have_one():
    assert ranks.run(lengths, ["sized", "sized"], world=2) == [3, 3]
    message = "EvenLoader has no len(): the loader of rank 1 has none."
    assert ranks.run(lengths, ["sized", "stream"], world=2) == [message] * 2


def length_on_one_rank():
    loader = EvenLoader(batches_of(ours.rank(), 2 + ours.rank()))
    return len(loader) if ours.rank() else None  # the other rank is not there


def test_the_length_asks_nobody_once_constructed():
    assert ranks.run(length_on_one_rank, world=2) == [None, 3]


def message_count():
    sent = []
    original = ours.start_notice
    ours.start_notice = lambda own: sent.append(own.tolist()) or original(own)
    agreed = []
    original_agree = ours.agree
    ours.agree = lambda value, what: agreed.append(what) or original_agree(value, what)
    try:
        loader = EvenLoader(batches_of(ours.rank(), 2 + ours.rank()))
        at_step = [len(sent) for _ in loader]
    finally:
        ours.start_notice, ours.agree = original, original_agree
    return at_step, sent[-1], agreed


def test_a_step_costs_one_notice_that_was_started_a_step_ahead():
    for at_step, last, agreed in ranks.run(message_count, world=2):
        assert at_step == [2, 3, 4]
        assert last == [1, 0, 1, 3, 0]
        assert agreed == ["the agreement on the length of an EvenLoader"]


def test_without_a_group_it_is_transparent(monkeypatch):
    def forbidden(*_):
        raise AssertionError

    for name in ("start_notice", "agree", "gather", "start_sum"):
        monkeypatch.setattr(ours, name, forbidden)
    own = batches_of(0, 3, last=1)
    loader = EvenLoader(own, nn.BatchNorm1d(3))
    shares = []
    for _ in range(2):
        for batch, original in zip(loader, own, strict=True):
            assert batch is original
            shares.append(loader.share)
    assert shares == [4, 4, 1] * 2
    assert len(loader) == 3
    assert [loader.global_count(step) for step in range(3)] == [4, 4, 1]
    with pytest.raises(IndexError, match=r"step=3 is none of the 3 that were fetched"):
        loader.global_count(3)
    with pytest.raises(TypeError, match="rank 0 has none"):
        len(EvenLoader(Stream(own)))


def test_epochs_reach_the_samplers_through_it():
    sampler = GlobalBatchSampler(num_samples=8, device_batch=2, rank=0, world_size=1, seed=0)
    loader = EvenLoader(DataLoader(TensorDataset(torch.ones(8)), batch_sampler=sampler))
    loader.set_epoch(3)
    assert sampler.epoch == 3
    assert loader.batch_sampler.sampler is sampler
    assert loader.sampler is loader.loader.sampler
    assert EvenLoader([]).sampler is None
    EvenLoader([]).set_epoch(1)


class OneOfMany:
    """A rank's side of the exchange without ranks: the others' rows are computed."""

    def __init__(self, counts, rank):
        self.counts, self.rank = counts, rank

    def start(self, values, what):
        step, passes = values[3], values[2]
        rows = [
            [loader_module.MORE, sizes[step], passes, step, 0]
            if step < len(sizes)
            else [loader_module.DONE, 0, passes, step, 0]
            for sizes in self.counts
        ]
        assert rows[self.rank][:2] == list(values[:2])
        return type("Notice", (), {"wait": lambda *_: rows})()


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=2, max_size=4), st.data())
def test_every_sample_once_and_every_rank_as_many_steps(counts, data):
    rank = data.draw(st.integers(0, len(counts) - 1))
    own = [torch.full((size,), float(step)) for step, size in enumerate(counts[rank])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "world_size", lambda: len(counts))
        patch.setattr(ours, "agree", lambda *_: [len(sizes) for sizes in counts])
        patch.setattr(loader_module, "start_notice", OneOfMany(counts, rank).start)
        loader = EvenLoader(own, empty=torch.empty(0))
        got, totals = [], []
        for batch in loader:
            got.append(batch)
            totals.append(loader.global_count(len(totals)))
            assert loader.share == max(1, totals[-1]) / len(counts)
        assert len(got) == len(loader) == max(map(len, counts))
    assert torch.equal(torch.cat([torch.empty(0), *got]), torch.cat([torch.empty(0), *own]))
    assert sum(totals) == sum(map(sum, counts))
