"""The synchronized path on one card: torch's layer to rounding, and no device-to-host wait (contract lines 2 and 6)."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distnorm import SyncBatchNorm
from distnorm.norms import BatchRenorm
from tests import steps

pytestmark = [
    pytest.mark.unit,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def group(tmp_path):
    """A one-rank nccl group; through `_normalize_with_ranks` a layer takes the synchronized path in it."""
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@contextlib.contextmanager
def no_host_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_synchronized_path_is_torchs_layer_and_never_waits_for_the_device(dtype, layout):
    x, dy, weight, bias = (
        [t.cuda() for t in part] if isinstance(part, list) else part.cuda()
        for part in steps.shards([8], (9, 10), 1.0, dtype, channels=16)
    )
    parameters_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    ours = steps.layer_with(weight.to(parameters_dtype), bias.to(parameters_dtype)).cuda()
    theirs = nn.BatchNorm2d(16, device="cuda", dtype=parameters_dtype)
    theirs.load_state_dict(ours.state_dict())
    own, other = (steps.LAYOUTS[layout](x[0]).detach().requires_grad_() for _ in range(2))
    grad = steps.LAYOUTS[layout](dy[0])
    ours._normalize_with_ranks((0,), own.detach())  # kernels and constants are there
    ours.load_state_dict(theirs.state_dict())
    with no_host_sync():
        y = ours._normalize_with_ranks((0,), own)
        y.backward(grad)
    truth = theirs(other)
    truth.backward(grad)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)
    for one, expected in ((y, truth), (own.grad, other.grad)):
        torch.testing.assert_close(one, expected, rtol=tolerance, atol=tolerance)
        assert one.stride() == expected.stride()
    for one, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.usefixtures("group")
def test_a_layer_alone_on_a_card_is_torchs_and_never_waits():
    ours, theirs = SyncBatchNorm(4).cuda(), nn.BatchNorm1d(4).cuda()
    x = torch.randn(8, 4, device="cuda")
    ours(x), theirs(x)
    with no_host_sync():
        y = ours(x)
    torch.testing.assert_close(y, theirs(x))


@pytest.mark.usefixtures("group")
def test_renormalization_opens_its_limits_without_waiting():
    ours, truth = BatchRenorm(4, warmup=1, ramp=1).cuda(), BatchRenorm(4, warmup=1, ramp=1)
    x = torch.randn(8, 4, 5)
    own = x.cuda()
    ours(own), truth(x)
    for _ in range(3):
        with no_host_sync():
            y = ours(own)
        torch.testing.assert_close(y.cpu(), truth(x), rtol=1e-5, atol=1e-5)
