"""Sharded equals whole, in every memory layout; and what no group of ranks can normalize (design: contract line 1)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm import GhostBatchNorm, ShapeError, SyncBatchNorm, collectives
from tests import ranks, reference, steps

pytestmark = pytest.mark.unit

SIZES = [[7], [4, 4], [3, 5], [0, 6], [0, 5, 2, 1], [1, 4, 2, 1], [2, 0, 0, 0]]
LAYOUTS = [(layout, "contiguous") for layout in steps.LAYOUTS] + [
    ("contiguous", "expanded"),
    ("channels_last", "expanded"),
    ("contiguous", "channels_last"),
    ("channels_last", "transposed"),
    ("sliced", "sliced"),
]


def assert_whole(found, x, dy, weight, bias, tolerance=1e-10):
    """Hold the ranks' results against torch's layer and the paper's formulas, both on the joined batch."""
    whole = reference.batch_norm_on_joined(x, dy, weight, bias)
    whole |= {key: torch.cat(whole[key]) for key in ("y", "dx")}
    for truth in (whole, reference.batch_norm(torch.cat(x), torch.cat(dy), weight, bias)):
        for key, value in steps.joined(found).items():
            torch.testing.assert_close(value, truth[key], rtol=tolerance, atol=tolerance, msg=lambda m: f"{key}: {m}")
    for own in found:
        assert own["tracked"] == 1
        for key in ("running_mean", "running_var"):
            assert torch.equal(own[key], found[0][key])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sharded_equals_whole_in_every_layout(sizes, dimensions, channels):
    x, dy, weight, bias = steps.shards(sizes, steps.POSITIONS[dimensions], 1.0, channels=channels)
    found = ranks.run(steps.train_all, x, dy, weight, bias, LAYOUTS, world=len(sizes))
    for place, (_, dy_layout) in enumerate(LAYOUTS):
        grads = [steps.GRAD_LAYOUTS[dy_layout](part) for part in dy]
        assert_whole([own[place] for own in found], x, grads, weight, bias)


@st.composite
def worlds(draw):
    world = draw(st.sampled_from([1, 2, 4]))
    sizes = draw(st.lists(st.integers(0, 6), min_size=world, max_size=world).filter(lambda sizes: sum(sizes) > 1))
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    offset = draw(st.sampled_from([0.0, 1.0, -1e3, 1e4]))
    return sizes, shape, offset, draw(st.integers(1, 5)), draw(st.integers(0, 2**31)), draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(worlds())
def test_sharded_equals_whole_whatever_the_shards(drawn):
    sizes, shape, offset, channels, seed, rectified = drawn
    x, dy, weight, bias = steps.shards(sizes, shape, offset, channels=channels, seed=seed, rectified=rectified)
    cases = [("contiguous", "contiguous"), ("channels_last", "contiguous")]
    found = ranks.run(steps.train_all, x, dy, weight, bias, cases, world=len(sizes))
    variance = torch.cat(x).transpose(0, 1).flatten(1).var(1, correction=0)
    if float(variance.min()) < 1e-3:
        return  # invstd multiplies what rounding left: nothing to hold float64 to 1e-10 there
    for place in range(len(cases)):
        # at offset 1e4 float64 itself keeps 12 digits less the 4 of the offset, squared in the variance
        assert_whole([own[place] for own in found], x, dy, weight, bias, 1e-10 if abs(offset) <= 1 else 1e-8)


def statistics_of(layer):
    return [layer.running_mean.tolist(), layer.running_var.tolist(), int(layer.num_batches_tracked)]


UNMOVED = [[0.0] * 3, [1.0] * 3, 0]


def all_empty(shape, masked):
    rank = collectives.rank()
    layer = SyncBatchNorm(3)
    x = torch.randn(0 if not masked else rank + 1, *shape, requires_grad=True)
    y = layer(x, mask=torch.zeros(len(x), dtype=torch.bool)) if masked else layer(x)
    y.sum().backward()
    grads = [float(t.abs().sum()) for t in (x.grad, layer.weight.grad, layer.bias.grad, y)]
    return y.shape == x.grad.shape == x.shape, grads, statistics_of(layer)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_ranks_that_are_all_empty_move_nothing(world, masked):
    for shape in ((3,), (3, 2), (3, 2, 2), (3, 2, 2, 2)):
        assert ranks.run(all_empty, shape, masked, world=world) == [(True, [0.0] * 4, UNMOVED)] * world


def one_value(sizes, shape, mask_shape):
    rank = collectives.rank()
    layer = SyncBatchNorm(3, affine=False)
    layer.layer_name = "head.bn"
    mask = None
    if mask_shape is not None:
        mask = torch.zeros(sizes[rank], *mask_shape, dtype=torch.bool)
        mask.view(-1)[: rank == 1] = True
    with pytest.raises(ShapeError) as caught:
        layer(torch.randn(sizes[rank], *shape), mask=mask)
    unmoved = statistics_of(layer)
    y = layer(torch.randn(2, *shape))  # and the ranks are still in step
    return str(caught.value), unmoved, bool(y.isfinite().all()), int(layer.num_batches_tracked)


@pytest.mark.parametrize(
    ("sizes", "shape", "mask_shape"),
    [
        ([1, 0], (3,), None),
        ([0, 1, 0, 0], (3, 1, 1), None),
        ([4, 3], (3,), ()),
        ([0, 2], (3, 4), (4,)),
        ([1], (3, 1), None),
    ],
)
def test_one_value_a_channel_is_refused_on_all_ranks_alike(sizes, shape, mask_shape):
    for message, unmoved, finite, tracked in ranks.run(one_value, sizes, shape, mask_shape, world=len(sizes)):
        alone, together = "and pools over no other rank", f"over its whole group of {len(sizes)} ranks"
        group = alone if len(sizes) == 1 else together
        assert f"head.bn has 1 value per channel {group}; a variance needs 2" in message
        assert "drop_last=True on the DataLoader (data.last_batch=drop)" in message
        assert message.count("\n") <= 2
        assert "data.device_batch, sync_ranks" in message
        assert "norm=group" in message
        assert unmoved == UNMOVED
        assert finite
        assert tracked == 1


@pytest.mark.parametrize("layer", [SyncBatchNorm(3), GhostBatchNorm(3, ghost_batch=2)], ids=["sync", "ghost"])
@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (3, 4), (0, 4), (4, 2, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_does_not_fit_is_refused(layer, shape, training):
    layer.train(training)
    with pytest.raises(ShapeError) as caught:
        layer(torch.randn(shape))
    message = str(caught.value)
    assert f"({3}) got an input of shape {shape}; it normalizes [N, 3, *]" in message
    assert (
        "Give it samples in the first dimension and 3 channels in the second, or build it with the num_features"
        in message
    )


@pytest.mark.parametrize("world", [1, 2])
def test_one_sample_with_positions_is_a_batch(world):
    x, dy, weight, bias = steps.shards([1, 0][:world], (4, 5))
    found = ranks.run(steps.train, x, dy, weight, bias, world=world)
    assert_whole(found, x, dy, weight, bias)


def several_steps(seed, dtype, layout):
    """Body: uneven steps, forward and backward."""
    rank = collectives.rank()
    generator = torch.Generator().manual_seed(100 * seed + rank)
    layer = SyncBatchNorm(5, dtype=dtype)
    bits = []
    for step in range(5):
        size = (3 * step + 7 * rank) % 5
        x = (torch.randn(size, 5, 6, 7, generator=generator) * 3 + 10 * rank).to(dtype)
        x = steps.LAYOUTS[layout](x).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        bits += [y.detach(), x.grad]
    return bits, [layer.weight.grad, layer.bias.grad], [layer.running_mean, layer.running_var]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 4])
def test_the_same_step_gives_the_same_bits_on_all_ranks_and_again(world, dtype, layout):
    once, again = (ranks.run(several_steps, 3, dtype, layout, world=world) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        for one, other in zip(first, second, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first[2], once[0][2], strict=True))
