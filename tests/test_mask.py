"""A padding mask gives the unpadded result (design: contract line 10)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm import Moments, ShapeError, SyncBatchNorm
from distnorm.norms import kernels
from tests import ranks, reference, steps

pytestmark = pytest.mark.unit

FILLS = [0.0, 1e30, float("nan"), float("inf"), -float("inf")]


def masks_for(sizes, shape, mask_dimensions, seed=0, keep=0.6, empty_rank=None):
    """Masks a rank: [N, *] or its first dimensions; a rank may be masked as a whole."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(n, *shape[: mask_dimensions - 1], generator=generator) < keep for n in sizes]
    masks[-1][:2] = True
    if empty_rank is not None:
        masks[empty_rank][:] = False
    return masks


def full(mask, x):
    return mask.reshape(*mask.shape, *[1] * (x.dim() - 1 - mask.dim())).expand(x[:, 0].shape)


def assert_unpadded(found, x, dy, weight, bias, masks, tolerance=1e-10):
    whole_mask = torch.cat([full(mask, part) for mask, part in zip(masks, x, strict=True)])
    truth = reference.batch_norm(torch.cat(x), torch.cat(dy), weight, bias, whole_mask)
    for key, value in steps.joined(found).items():
        torch.testing.assert_close(value.double(), truth[key], rtol=tolerance, atol=tolerance, msg=f"{key}: {value}")
    outside = ~whole_mask.unsqueeze(1).expand_as(torch.cat(x))
    for key in ("y", "dx"):
        assert torch.equal(steps.joined(found)[key][outside], torch.zeros(int(outside.sum()), dtype=x[0].dtype))


def train_filled(x, dy, weight, bias, masks, fills, layouts, options):
    found = []
    for fill in fills:
        for layout in layouts:
            padded = [
                part.masked_fill(~full(mask, part).unsqueeze(1), fill) for part, mask in zip(x, masks, strict=True)
            ]
            grads = [
                part.masked_fill(~full(mask, part).unsqueeze(1), 7.0) for part, mask in zip(dy, masks, strict=True)
            ]
            found.append(steps.train(padded, grads, weight, bias, layout, masks=masks, **options))
    return found


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("sizes", "empty_rank"),
    [([5], None), ([3, 4], None), ([3, 4], 0), ([2, 0, 4, 3], None), ([2, 3, 4, 3], 1)],
    ids=str,
)
def test_padded_equals_unpadded_on_all_ranks(sizes, empty_rank, dimensions):
    shape = steps.POSITIONS[dimensions]
    for mask_dimensions in range(1, dimensions):
        x, dy, weight, bias = steps.shards(sizes, shape, 3.0)
        masks = masks_for(sizes, shape, mask_dimensions, empty_rank=empty_rank)
        layouts = ["contiguous", "channels_last", "sliced"]
        found = ranks.run(train_filled, x, dy, weight, bias, masks, FILLS, layouts, {}, world=len(sizes))
        for place in range(len(FILLS) * len(layouts)):
            assert_unpadded([own[place] for own in found], x, dy, weight, bias, masks)


@pytest.mark.parametrize("world", [1, 2])
def test_padded_equals_unpadded_in_float32(world):
    sizes = [4, 6][:world]
    x, dy, weight, bias = steps.shards(sizes, (30,), 0.0, torch.float32)
    masks = masks_for(sizes, (30,), 2)
    found = ranks.run(train_filled, x, dy, weight, bias, masks, FILLS, ["contiguous"], {}, world=world)
    for place in range(len(FILLS)):
        assert_unpadded([own[place] for own in found], x, dy, weight, bias, masks, 1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=2), st.integers(0, 2**31), st.sampled_from([0.2, 0.8, 1.0]))
def test_padded_equals_unpadded_whatever_the_mask(sizes, seed, keep):
    x, dy, weight, bias = steps.shards(sizes, (4,), 2.0, seed=seed)
    masks = masks_for(sizes, (4,), 2, seed, keep)
    masks[0][0, 0] = True
    found = ranks.run(train_filled, x, dy, weight, bias, masks, [float("nan")], ["contiguous"], {}, world=2)
    assert_unpadded([own[0] for own in found], x, dy, weight, bias, masks)


def test_a_mask_that_keeps_all_changes_nothing():
    x, dy, weight, bias = steps.shards([3, 4], (5,))
    masks = [torch.ones(3, 5, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)]
    masked = ranks.run(train_filled, x, dy, weight, bias, masks, [0.0], ["contiguous"], {}, world=2)
    plain = ranks.run(steps.train, x, dy, weight, bias, world=2)
    for one, other in zip(masked, plain, strict=True):
        for key in steps.KEYS:
            torch.testing.assert_close(one[0][key], other[key], rtol=1e-12, atol=1e-12)


def evaluate(x, mask, track):
    layer = SyncBatchNorm(3, track_running_stats=track, dtype=x.dtype)
    layer(torch.randn(8, 3, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(1)))
    layer.eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    own = x.masked_fill(~mask.unsqueeze(1), float("nan")).requires_grad_()
    y = layer(own, mask=mask)
    y.sum().backward()
    unmoved = all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    plain = layer(x)
    return y.detach(), own.grad, plain.detach(), unmoved


@pytest.mark.parametrize("world", [1, 2])
def test_in_eval_mode_running_statistics_are_used_and_padding_is_0(world):
    x, mask = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, 5) < 0.5
    for y, dx, plain, unmoved in ranks.run(evaluate, x, mask, True, world=world):
        outside = ~mask.unsqueeze(1)
        torch.testing.assert_close(y, plain.masked_fill(outside, 0))
        assert not dx.masked_fill(~outside, 0).any()
        assert dx.isfinite().all()
        assert unmoved


def test_without_running_statistics_evaluation_masks_too():
    x, mask = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, 5) < 0.7
    y, *_ = evaluate(x, mask, False)
    truth = reference.batch_norm(x, x, None, None, mask)
    torch.testing.assert_close(y, truth["y"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("mask", "remedy"),
    [
        (torch.ones(4, 5), "Give it mask.bool()."),
        (torch.ones(4, 5, dtype=torch.uint8), "Give it mask.bool()."),
        (torch.ones(5, 4, dtype=torch.bool), "Of lengths, make one: torch.arange(T) < lengths[:, None]."),
        (torch.ones(4, 3, 5, dtype=torch.bool), "Give it mask[:, 0].bool(), if its channels are alike."),
        (torch.ones(4, 1, dtype=torch.bool), "Of lengths, make one: torch.arange(T) < lengths[:, None]."),
        (torch.tensor([5, 3, 2, 1]), "Of lengths, make one: torch.arange(T) < lengths[:, None]."),
        (torch.tensor(True), "Of lengths, make one: torch.arange(T) < lengths[:, None]."),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_that_does_not_fit_is_refused(mask, remedy, training):
    layer = SyncBatchNorm(3).train(training)
    layer.layer_name = "encoder.bn"
    with pytest.raises(ShapeError) as caught:
        layer(torch.randn(4, 3, 5), mask=mask)
    message = str(caught.value)
    assert f"encoder.bn got a mask of {mask.dtype} {tuple(mask.shape)} for an input of (4, 3, 5)" in message
    assert "it must be torch.bool (4, 5), or its first dimensions" in message
    assert message.endswith(remedy)
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (0, 3, 5)])
def test_what_is_measured_with_a_mask_is_what_moments_measure(shape):
    x = torch.randn(*shape, dtype=torch.float64)
    mask = torch.rand(shape[0], *shape[2:]) < 0.5
    packed, scratch = kernels.measure(x, mask)
    moments = Moments.of(x, mask)
    assert scratch is None
    assert torch.equal(packed, torch.cat((moments.mean, moments.var, moments.count.view(1))))
