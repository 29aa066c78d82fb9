"""What a training forward keeps for backward: the input and O(C), measured twice and independently.

`saved_tensors_hooks` sees what autograd is given to save; the second measure follows every storage that any operation
of the forward makes and asks which still live after it, so that a tensor kept on a context or a module is seen too.
"""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.rows import FORMATS
from distnorm import SyncBatchNorm
from tests import ranks

pytestmark = pytest.mark.unit

SHAPE = (4, 16, 24, 24)
PER_CHANNEL_BYTES = 16 * 1024  # generous: 16 channels of rows for 2 ranks are well below, the input is 144 KiB


class LiveStorages(TorchDispatchMode):
    """Remember every storage that operations give; a storage that was there before is not counted."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def live_bytes(self, *but):
        gc.collect()
        excluded = {tensor.untyped_storage()._cdata for tensor in but}
        return sum(size for key, (ref, size) in self.seen.items() if key not in excluded and not ref.expired())


class KeepsOnContext(torch.autograd.Function):
    """A leak that autograd's hooks cannot see."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x * 2
        return x.clone()

    @staticmethod
    def backward(_, dy):
        return dy


class KeepingOne(SyncBatchNorm):
    def forward(self, x):
        return KeepsOnContext.apply(super().forward(x))


class SavingOne(SyncBatchNorm):
    def forward(self, x):
        return super().forward(x) * (x.detach() > 0)


LAYERS = {"ours": SyncBatchNorm, "keeping": KeepingOne, "saving": SavingOne}


def kept_by_forward(name, memory_format):
    """Body: bytes autograd saved, beside the input and of it, and bytes alive beside output and parameters."""
    layer = LAYERS[name](SHAPE[1])
    x = torch.randn(SHAPE).contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    known = [x, *layer.parameters(), *layer.buffers()]
    with LiveStorages(*known) as storages, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    live = storages.live_bytes(y)
    held_x = saved.pop(x.untyped_storage()._cdata, 0)
    found = {"saved": sum(saved.values()), "live": live, "input": held_x, "seen": len(storages.seen)}
    y.sum().backward()
    return found


@pytest.mark.parametrize("memory_format", FORMATS)
def test_forward_keeps_the_input_and_little_more(memory_format):
    for found in ranks.run(kept_by_forward, "ours", memory_format, world=2):
        assert found["input"] == torch.Size(SHAPE).numel() * 4
        assert found["seen"] > 3, "the measure saw no operation"
        assert found["saved"] <= PER_CHANNEL_BYTES
        assert found["live"] <= PER_CHANNEL_BYTES


@pytest.mark.parametrize(("name", "hooks_see_it"), [("keeping", False), ("saving", True)])
def test_the_measures_see_another_tensor_even_of_booleans(name, hooks_see_it):
    for found in ranks.run(kept_by_forward, name, "contiguous", world=2):
        assert (found["saved"] > PER_CHANNEL_BYTES) is hooks_see_it
        assert found["live"] >= torch.Size(SHAPE).numel()
