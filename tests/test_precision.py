"""What rounding may cost: float32 far from zero, half precision, counts beyond it, groups so large that they sum."""

import pytest
import torch

from distnorm import SyncBatchNorm, collectives
from distnorm.norms import pooling
from tests import ranks, reference, steps

pytestmark = pytest.mark.unit

LAYOUTS = [(layout, "contiguous") for layout in steps.LAYOUTS]
FLOAT32_CASES = [
    (16, (), 8, 8),
    (5000, (), 8, 4),
    (8, (40,), 8, 8),
    (8, (6, 6), 8, 8),
    (2, (256, 256), 8, 2),
    (2, (4, 64, 64), 16, 3),
]


def errors_in_float32(x, dy, weight, bias, layouts):
    """Ours a layout, and the largest that the contract allows, by name of the result."""
    exact = reference.batch_norm(torch.cat(x), torch.cat(dy), weight, bias)
    torchs = reference.batch_norm_on_joined(x, dy, weight, bias)
    torchs |= {key: torch.cat(torchs[key]) for key in ("y", "dx")}
    found = ranks.run(steps.train_all, x, dy, weight, bias, layouts, world=len(x))
    wholes = [steps.joined([own[place] for own in found]) for place in range(len(layouts))]

    def error(result, key):
        return reference.relative_error(result[key], exact[key])

    return {key: torch.tensor([error(whole, key) for whole in wholes] + [error(torchs, key)]) for key in exact}


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("rectified", [False, True], ids=["normal", "rectified"])
@pytest.mark.parametrize(("samples", "shape", "channels", "draws"), FLOAT32_CASES)
def test_float32_errs_little_in_every_layout(samples, shape, channels, draws, rectified, offset):
    sizes = [samples // 2 - samples // 8, samples - samples // 2 + samples // 8]
    total = dict.fromkeys(steps.KEYS, 0)
    for seed in range(draws):  # far from zero one draw is luck: how the mean happens to round decides
        parts = steps.shards(sizes, shape, offset, torch.float32, channels, rectified, seed)
        for key, errors in errors_in_float32(*parts, LAYOUTS).items():
            total[key] = total[key] + errors / draws
    for key, (*ours, torchs) in total.items():
        allowed = max(1e-5, 2 * float(torchs)) if offset else 1e-5
        assert max(ours) <= allowed, (key, ours, torchs)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_on_one_rank_the_variance_is_exact_far_from_zero(offset):
    for shape in ((), (6, 6)):
        parts = steps.shards([16], shape, offset, torch.float32, 8)
        assert float(errors_in_float32(*parts, LAYOUTS)["running_var"][:-1].max()) <= 1e-6


def half_step(x, dy, mode, layout):
    """Body: one step of a layer in half precision, of a float32 layer on half inputs, or under autocast."""
    rank, dtype = collectives.rank(), x[0].dtype
    layer = SyncBatchNorm(x[0].shape[1])
    if mode == "module":
        layer.to(dtype)
    own = steps.LAYOUTS[layout](x[rank]).detach().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=mode == "autocast"):
        y = layer(own)
    y.backward(dy[rank])
    kept = layout != "channels_last" or all(
        t.is_contiguous(memory_format=torch.channels_last) and t.stride() == own.stride() for t in (y, own.grad)
    )
    buffers = {layer.running_mean.dtype, layer.running_var.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype}
    return steps.results(layer, own, y), buffers, kept


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("mode", ["module", "input", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "shape"), [([3, 5], (6, 7)), ([4, 0], (6, 7)), ([1, 1], (256, 256))], ids=str)
def test_half_precision_is_measured_in_float32_and_comes_out_rounded(sizes, shape, dtype, mode, layout):
    x, dy, _, _ = steps.shards(sizes, shape, 3.0, dtype)
    truth = reference.batch_norm(torch.cat(x), torch.cat(dy), None, None)
    found = ranks.run(half_step, x, dy, mode, layout, world=2)
    whole = steps.joined([results for results, _, _ in found])
    unit = torch.finfo(dtype).eps
    for key in ("y", "dx"):
        assert whole[key].dtype == dtype
        torch.testing.assert_close(whole[key].double(), truth[key], rtol=unit, atol=unit / 8)
    kept_dtype = dtype if mode == "module" else torch.float32
    rounding = unit if mode == "module" else 2e-6
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(whole[key].double(), truth[key], rtol=rounding, atol=rounding)
    largest = float(truth["dweight"].abs().max() + truth["dbias"].abs().max())
    for key in ("dweight", "dbias"):
        torch.testing.assert_close(whole[key].double(), truth[key], rtol=0, atol=(rounding + 1e-5) * largest)
    for _, dtypes, kept in found:
        assert dtypes == {kept_dtype}
        assert kept


def strides_kept(shape, dtype, masked):
    x = torch.randn(shape).to(dtype)
    x = steps.channels_last(x).detach().requires_grad_()
    between, strides = x * 1, []
    between.register_hook(lambda dx: strides.append(dx.stride()))
    y = SyncBatchNorm(shape[1])(between, mask=torch.rand(shape[0], *shape[2:]) < 0.9 if masked else None)
    y.backward(torch.randn(shape).to(dtype))
    return y.stride() == x.stride(), strides == [x.stride()]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (2, 4, 64, 64), (2, 3, 4, 5, 6)], ids=str)
def test_channels_last_stays_channels_last(shape, masked, world):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert ranks.run(strides_kept, shape, dtype, masked, world=world) == [(True, True)] * world


def train_summed(x, dy, weight, bias):
    """Body: a step of a group that is taken for too large to gather, and what it exchanged."""
    calls, originals = [], (collectives.gather, collectives.start_sum, pooling.GATHER_UP_TO)

    def gather(values, *rest):
        calls.append(("gather", values.numel(), values.dtype))
        return originals[0](values, *rest)

    def start_sum(values, *rest):
        calls.append(("sum", values.numel(), values.dtype))
        return originals[1](values, *rest)

    collectives.gather, collectives.start_sum, pooling.GATHER_UP_TO = gather, start_sum, 2
    try:
        layer = steps.layer_with(weight, bias)
        own = x[collectives.rank()].clone().requires_grad_()
        y = layer(own)
        y.backward(dy[collectives.rank()])
        return steps.results(layer, own, y), calls, layer.rank_moments is None
    finally:
        collectives.gather, collectives.start_sum, pooling.GATHER_UP_TO = originals


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [0, 7, 2, 5]], ids=str)
def test_large_groups_sum_and_equal_the_whole(sizes, offset, dtype):
    offset = offset if dtype != torch.bfloat16 else offset / 1e3
    x, dy, weight, bias = steps.shards(sizes, (6, 6), offset, dtype, channels=4)
    found = ranks.run(train_summed, x, dy, weight, bias, world=4)
    truth = reference.batch_norm(torch.cat(x), torch.cat(dy), weight, bias)
    whole = steps.joined([results for results, _, _ in found])
    # what float32 loses at a mean of 5e3 deviations, as torch's own layer does
    allowed = {torch.float64: 1e-10 * max(1, offset), torch.float32: max(1e-5, offset * 2**-22), torch.bfloat16: 8e-3}
    for key in ("y", "dx", "running_mean", "running_var"):
        assert reference.relative_error(whole[key], truth[key]) <= allowed[dtype], key
    forward = ("gather" if dtype == torch.float64 else "sum", 9, torch.float64)
    backward = ("sum", 8, torch.float64 if dtype == torch.float64 else torch.float32)
    for results, calls, no_rows in found:
        assert calls == [forward, backward]
        assert no_rows == (dtype != torch.float64)
        assert torch.equal(results["running_var"], found[0][0]["running_var"])
