"""Ranks that do not train the same layers: every rank says so before the first step, with layer and ranks."""

import os
import time

import pytest
import torch
from torch import nn

from distnorm import (
    ConfigError,
    GhostBatchNorm,
    GroupError,
    SyncBatchNorm,
    agreement,
    check_ranks,
    collectives,
    convert,
    positions,
)
from distnorm.spec import NormSpec
from tests import ranks

pytestmark = pytest.mark.unit


def spec(**options):
    return NormSpec(kind="sync", device_batch=2, world_size=4, normalization_batch=8, **options)


class Net(nn.Module):
    """A stem and two blocks."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 1), SyncBatchNorm(8))
        self.block = nn.Sequential(nn.Conv1d(8, channels, 1), SyncBatchNorm(channels))


def other_channels(net):
    net.block[1] = SyncBatchNorm(32)


def other_class(net):
    net.block[1] = GhostBatchNorm(8, 4)


def other_group(net):
    net.block[1].sync_ranks = 2


def other_subset(net):
    net.block[1].group_ranks = (0, 1)


def other_dtype(net):
    net.block[1].double()


def other_mode(net):
    net.block[1].eval()


def fewer(net):
    net.block[1] = nn.Identity()


def other_order(net):
    net.stem, net.block = net.stem, net.block
    first = net._modules.pop("stem")
    net._modules["stem"] = first


def without_running_statistics(net):
    net.block[1] = SyncBatchNorm(8, track_running_stats=False)


def checked(change):
    net = Net()
    if collectives.rank() == 2:
        change(net)
    try:
        check_ranks(net)
    except ConfigError as error:
        return str(error)
    return None


WRONG = [
    (other_channels, "block.1 has 8 channels on ranks 0, 1, 3 and 32 on rank 2.", "Build the same model"),
    (
        other_class,
        "block.1 is a distnorm.SyncBatchNorm on ranks 0, 1, 3 and distnorm.GhostBatchNorm on rank 2.",
        "Convert the model with the same NormSpec",
    ),
    (other_group, "block.1 has sync_ranks=None on ranks 0, 1, 3 and 2 on rank 2.", "same NormSpec"),
    (other_subset, "block.1 has group_ranks=None on ranks 0, 1, 3 and (0, 1) on rank 2.", "Name the same ranks"),
    (other_dtype, "block.1 is kept in float32 on ranks 0, 1, 3 and float64 on rank 2.", "Cast the same layers"),
    (other_mode, "block.1 is in training mode on ranks 0, 1, 3 and evaluation on rank 2.", "Freeze the same layers"),
    (fewer, "block.1 is in the model of ranks 0, 1, 3 and not of rank 2.", "Build the same model"),
    (other_order, "Layer 0 of the model is stem.1 on ranks 0, 1, 3 and block.1 on rank 2.", "in the same order"),
    (
        without_running_statistics,
        "block.1 has track_running_stats=True on ranks 0, 1, 3 and False on rank 2.",
        "Build the same model",
    ),
]


@pytest.mark.parametrize(("change", "difference", "remedy"), WRONG, ids=[change.__name__ for change, *_ in WRONG])
def test_a_rank_that_differs_is_named_with_its_layer_on_every_rank(change, difference, remedy):
    messages = ranks.run(checked, change, world=4)
    assert len(set(messages)) == 1
    assert messages[0].startswith(difference)
    assert remedy in messages[0]
    assert len(messages[0].splitlines()) <= 3


def equal(folder):
    net = Net()
    try:
        check_ranks(net, folder=folder)
        names = [net.stem[1].layer_name, net.block[1].layer_name]
        net.stem(torch.randn(2, 3, 4))
        return names, [(p.rank, p.trail[-1].what, p.trail[-1].waiting) for p in positions.read_this_run().values()]
    finally:
        positions.stop()


def test_equal_ranks_pass_and_layers_get_names_and_positions(tmp_path):
    names, kept = ranks.run(equal, str(tmp_path / "ranks"), world=2)[0]
    assert names == ["stem.1", "block.1"]
    assert kept[0] == (0, "stem.1 forward", False)
    assert len(kept) == 2
    check_ranks(Net(), folder=tmp_path / "alone")  # without ranks there is nothing to agree on
    assert not (tmp_path / "alone").exists()


def other_debug():
    try:
        check_ranks(Net(), debug=collectives.rank() == 1)
    except ConfigError as error:
        return str(error)


def test_debug_must_be_alike():
    assert set(ranks.run(other_debug, world=2)) == {
        "debug=False on rank 0 and True on rank 1.\nGive every rank the same."
    }


def complains():
    try:
        agreement.compare(Net(), modes=True, complaint="stem.1 is odd." if collectives.rank() == 1 else None)
    except ConfigError as error:
        return str(error)


def test_what_one_rank_finds_wrong_is_raised_on_all():
    assert ranks.run(complains, world=2) == ["rank 1: stem.1 is odd."] * 2


def never_comes(rank, store, way, messages):
    torch.set_num_threads(1)
    collectives.start_ranks(rank=rank, world_size=3, store_path=store, timeout_s=3)
    if rank == 2:
        time.sleep(1)
        if way == "stalls":
            time.sleep(30)
        os._exit(1)
    try:
        check_ranks(Net())
    except GroupError as error:
        messages.put(str(error))
        messages.close()
        messages.join_thread()
        time.sleep(1)
    os._exit(0)


@pytest.mark.parametrize("way", ["stalls", "dies"])
def test_a_rank_that_never_comes_is_named(tmp_path, way):
    messages = ranks.context.Queue()
    processes = [
        ranks.context.Process(target=never_comes, args=(r, str(tmp_path / "s"), way, messages)) for r in range(3)
    ]
    for process in processes:
        process.start()
    found = [messages.get(timeout=60) for _ in range(2)]
    for process in processes:
        process.kill()
        process.join()
    for message in found:
        assert message.startswith(f"rank 2 never came to {agreement.WHAT}; ranks 0, 1 did.")
        assert "Look at the log of rank 2" in message
        assert len(message.splitlines()) <= 3


def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Sequential(nn.BatchNorm1d(8)))


def test_torchs_own_conversion_after_ours_is_found():
    conversion = convert(plain(), spec(sync_ranks=4))
    conversion.check()
    nn.SyncBatchNorm.convert_sync_batchnorm(conversion.model)
    with pytest.raises(ConfigError) as caught:
        conversion.check()
    assert str(caught.value).startswith(
        "convert() made 1 a distnorm.SyncBatchNorm, and now it is a torch.SyncBatchNorm."
    )
    assert "sync_batchnorm=True" in str(caught.value)
    assert "convert_sync_batchnorm after convert()" in str(caught.value)


def test_a_check_after_revert_or_of_one_layer_finds_nothing():
    conversion = convert(plain(), spec(sync_ranks=4))
    conversion.revert()
    conversion.check()
    convert(nn.BatchNorm1d(3), spec(sync_ranks=4)).check()
