"""The passes that a batch norm makes over an activation: measure, normalize, and their gradient.

Each is a few fused calls of torch's own. Statistics are float32 or better whatever the activation is. On the CPU the
measuring pass centres the batch in a buffer that then takes the output, so that nothing of the input's size is made
besides the output. A small activation costs what its small operations cost: there are few.

Legend: N samples, C channels, * positions, K = 2C + 1: mean, variance and count of one rank.
"""

import torch
from torch import Tensor

from distnorm.collectives import Pending
from distnorm.moments import Moments, statistics_dtype
from distnorm.norms.transforms import innermost

_MOST_IN_A_ROW = 2048
"""torch's native CPU passes add up the positions of a plane, or channels-last all values, one after the other in
float32. 2048 cost a rectified activation's variance less than 1e-5 of itself; 25,000 cost 1e-4, a million 1e-3."""

_MOST_SIGNED_IN_A_ROW = 2**15
"""The same for sums of gradients, whose signs mix: their errors mostly cancel."""

_FAR_FROM_ZERO = 16.0
"""mean² / variance up to which such a pass may start from raw values: the mean then errs by 1e-6 deviations or so."""

Scratch = tuple[Tensor, Tensor | None]
"""A buffer like the input, free to be written; and the pivot [C], if the buffer still holds input - pivot."""


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Lay a tensor out without gaps, channels innermost where it (or `like`) has them so.

    Shape: x [N, C, *]; result the same.
    """
    like = x if like is None else like
    chosen = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
    if chosen is None or like.is_contiguous() or not like.is_contiguous(memory_format=chosen):
        return x.contiguous()
    return x.contiguous(memory_format=chosen)


def measure(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Scratch | None]:
    """Measure an activation per channel.

    Deviations are summed about a mean that is right to rounding, and the mean is then corrected by their sum: exact to
    float32's digits at any offset, where a plain sum of squares, or the native kernel for channels-last, is not.

    Args:
        x: dense (see `dense`); may be empty.
        mask: which samples and positions count; all, if `None`.

    Shape: x [N, C, *], mask [N, *]; statistics [K] float64: a mean far from zero has more digits than float32 holds.

    Returns:
        Mean, biased variance and count in one tensor, ready to be gathered; and a buffer that `normalize` may use.
    """
    count, dtype = x.numel() // x.shape[1], statistics_dtype(x.dtype)
    if mask is not None or not is_plain(x):
        moments = Moments.of(x, mask)
        return torch.cat((moments.mean, moments.var, moments.count.unsqueeze(0))).double(), None
    count_1 = _constant(float(count), 1, torch.float64, x.device)
    if x.is_cuda:
        return torch.cat((*torch.batch_norm_update_stats(x, None, None, 0.0), count_1)), None
    wide_x = x if x.dtype == dtype else x.to(dtype)
    ready = None if planes_are_contiguous(x) else _measure_rows(wide_x)
    mean_C, var_C, scratch = ready or _measure_deviations(wide_x, 1 / count)
    return torch.cat((mean_C, var_C, count_1)), scratch if wide_x is x else None


def _measure_rows(x: Tensor) -> tuple[Tensor, Tensor, None] | None:
    """Measure with the native kernel for channels-last, on blocks of rows; `None` if the mean is too far from zero."""
    if x.numel() <= _MOST_IN_A_ROW * x.shape[1]:
        mean_C, var_C = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        blocks = x.movedim(1, -1).reshape(-1, x.shape[1]).split(_MOST_IN_A_ROW)
        means, variances = zip(
            *(torch.batch_norm_update_stats(block, None, None, 0.0) for block in blocks), strict=True
        )
        mean_BC, count_B = torch.stack(means), x.new_tensor([len(block) for block in blocks])
        moments = Moments(count_B, mean_BC, torch.stack(variances) * count_B.unsqueeze(-1)).merged()
        mean_C, var_C = moments.mean, moments.var
    near = float(torch.addcmul(var_C, mean_C, mean_C, value=-1 / _FAR_FROM_ZERO).amin()) >= 0  # of nan: no
    return (mean_C, var_C, None) if near else None


def _measure_deviations(x: Tensor, share: float) -> tuple[Tensor, Tensor, Scratch]:
    """Measure about a mean that is right to rounding, whatever the offset."""
    over = all_but_channels(x)
    pivot_C = x.sum(over).mul_(share)
    centred = x - wide(pivot_C, x)
    parts = _parts_of_a_plane(x)
    if parts:
        zeros, ones = (_constant(value, len(pivot_C) * parts, x.dtype, x.device) for value in (0.0, 1.0))
        split = centred.view(x.shape[0], len(pivot_C) * parts, -1) if parts > 1 else centred
        off_C, squares_C = _sums(split, split, zeros, ones)
        if parts > 1:
            off_C, squares_C = off_C.view(-1, parts).sum(1), squares_C.view(-1, parts).sum(1)
    else:
        off_C, squares_C = centred.sum(over), centred.mul_(centred).sum(over)
    mean_C = torch.add(pivot_C.double(), off_C, alpha=share)
    var_C = torch.addcmul(squares_C, off_C, off_C, value=-share).mul_(share)
    return mean_C, var_C, (centred, pivot_C if parts else None)


def _parts_of_a_plane(x: Tensor) -> int:
    """Into how many equal parts a plane falls that a native pass may add up; 0 if none, or if it has no planes."""
    if not planes_are_contiguous(x):
        return 0
    positions = x.shape[2:].numel()
    fewest = -(-positions // _MOST_IN_A_ROW)
    return next((parts for parts in range(fewest, 4 * fewest + 1) if positions % parts == 0), 0)


def normalize(
    x: Tensor,
    exact_mean_C: Tensor,
    mean_C: Tensor,
    invstd_C: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scratch: Scratch | None,
) -> Tensor:
    """Compute (x - mean) · invstd · weight + bias.

    Args:
        x: dense.
        exact_mean_C: of the pooled batch, float64.
        mean_C: the same, of the statistics' dtype.
        invstd_C: 1 / sqrt(var + eps) of the pooled batch, of the statistics' dtype.
        weight: a factor a channel, or `None`.
        bias: a summand a channel, or `None`.
        scratch: what `measure` left; the result takes its place.

    Shape: x [N, C, *]; result the same, of x's dtype and layout.
    """
    dtype = invstd_C.dtype
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if x.is_cuda and is_plain(x):
        return torch.batch_norm_elemt(x, weight, bias, mean_C, invstd_C, 0.0)
    scale_C = invstd_C if weight is None else invstd_C * weight
    source, from_C = x, exact_mean_C  # far from zero the shift is rounded once, at its end
    if scratch is not None and scratch[1] is not None:
        source, from_C = scratch[0], (exact_mean_C - scratch[1]).to(dtype)
    shift_C = -from_C * scale_C if bias is None else torch.addcmul(bias, from_C, scale_C, value=-1)
    return _affine(source, scale_C, shift_C.to(dtype), None if scratch is None else scratch[0])


def gradient_sums(dy: Tensor, x: Tensor, mean_C: Tensor, invstd_C: Tensor) -> tuple[Tensor, Tensor]:
    """Sum dy, and dy · (x - mean) · invstd, over samples and positions.

    Shape: dy, x [N, C, *], dense and alike; mean, invstd and the two sums [C] of the statistics' dtype.
    """
    if not is_plain(x):
        over, wide_dy = all_but_channels(x), dy.to(mean_C.dtype)
        return wide_dy.sum(over), (wide_dy * (x - wide(mean_C, x))).sum(over) * invstd_C
    if x.is_cuda:
        _, _, dy_xhat_C, dy_C = torch.batch_norm_backward_reduce(dy, x, mean_C, invstd_C, None, False, True, True)
        return dy_C, dy_xhat_C
    return _sums(dy, x, mean_C, invstd_C)


def input_gradient(
    dy: Tensor,
    x: Tensor,
    scale_C: Tensor,
    mean_C: Tensor,
    invstd_C: Tensor,
    pending: Pending,
    count: Tensor | float,
) -> Tensor:
    """Compute scale · (dy - sum(dy) / count - xhat · sum(dy · xhat) / count), xhat = (x - mean) · invstd.

    Args:
        dy: gradient of the output.
        x: input.
        scale_C: weight · invstd.
        mean_C: of the pooled batch.
        invstd_C: 1 / sqrt(var + eps) of the pooled batch.
        pending: what `gradient_sums` gave, being summed over the ranks.
        count: values a channel of the pooled batch.

    Shape: dy, x [N, C, *], dense and alike; scale, mean, invstd [C] of the statistics' dtype; result like x.
    """
    dtype = mean_C.dtype
    share = 1 / count.to(dtype).clamp(min=1) if isinstance(count, Tensor) else 1 / max(count, 1.0)
    if x.is_cuda and is_plain(x):
        total = torch.as_tensor(count, dtype=torch.int32, device=x.device).view(1)
        weight_C, dy_C, dy_xhat_C = scale_C / invstd_C, *pending.wait().chunk(2)
        return torch.batch_norm_backward_elemt(dy, x, mean_C, invstd_C, weight_C, dy_C, dy_xhat_C / invstd_C, total)
    mean_scale_C = scale_C * share  # what does not depend on the sums is computed while they travel
    on_x_C = mean_scale_C * invstd_C
    at_mean_C, wide_scale_C = on_x_C * mean_C, wide(scale_C, x)
    dy_C, dy_xhat_C = pending.wait().chunk(2)
    alone_C = torch.addcmul(dy_xhat_C * at_mean_C, dy_C, mean_scale_C, value=-1)
    wide_on_x_C = wide(on_x_C * dy_xhat_C, x)
    if x.dtype != dtype or not is_plain(x):
        return (dy.to(dtype) * wide_scale_C + (wide(alone_C, x) - x.to(dtype) * wide_on_x_C)).to(x.dtype)
    return _affine(dy, scale_C, alone_C, None).addcmul_(x, wide_on_x_C, value=-1)


def is_plain(x: Tensor) -> bool:
    """Tell whether native passes can take a tensor: plain values of a CPU or a CUDA device."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type in ("cpu", "cuda") and x.numel() > 0
    return plain and not torch.compiler.is_compiling() and innermost() is None


def planes_are_contiguous(x: Tensor) -> bool:
    """Tell whether a channel's positions lie together in memory, as torch's default has them."""
    return x.stride(1) != 1 and x.is_contiguous()


def all_but_channels(x: Tensor) -> list[int]:
    """Number the dimensions that a channel's statistics are taken over."""
    return [0, *range(2, x.dim())]


def wide(values_C: Tensor, x: Tensor) -> Tensor:
    """Shape [C] so that it broadcasts over [N, C, *]."""
    return values_C.view(-1, *[1] * (x.dim() - 2))


def _sums(dy: Tensor, x: Tensor, mean_C: Tensor, invstd_C: Tensor) -> tuple[Tensor, Tensor]:
    """Sum dy, and dy · (x - mean) · invstd, in one native pass over both; channels-last in blocks of rows."""
    if x.numel() > _MOST_SIGNED_IN_A_ROW * len(mean_C) and not planes_are_contiguous(x):
        rows = [t.movedim(1, -1).reshape(-1, len(mean_C)).split(_MOST_SIGNED_IN_A_ROW) for t in (dy, x)]
        parts = [_sums(dy_MC, x_MC, mean_C, invstd_C) for dy_MC, x_MC in zip(*rows, strict=True)]
        dy_C, dy_xhat_C = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
        return dy_C, dy_xhat_C
    _, dy_xhat_C, dy_C = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, None, None, mean_C, invstd_C, True, 0.0, (False, True, True)
    )
    return dy_C, dy_xhat_C


def _affine(x: Tensor, scale_C: Tensor, shift_C: Tensor, out: Tensor | None) -> Tensor:
    """Compute x · scale + shift; where a channel's positions lie together, evaluation's native kernel is fastest."""
    if x.is_cuda or not is_plain(x):
        return (x.to(scale_C.dtype) * wide(scale_C, x) + wide(shift_C, x)).to(x.dtype)
    if x.dtype == scale_C.dtype and not planes_are_contiguous(x):
        return torch.addcmul(wide(shift_C, x), x, wide(scale_C, x), out=out)
    zeros_C = _constant(0.0, len(scale_C), scale_C.dtype, x.device)
    ones_C = _constant(1.0, len(scale_C), scale_C.dtype, x.device)
    if out is None:
        return torch.native_batch_norm(x, scale_C, shift_C, zeros_C, ones_C, False, 0.0, 0.0)[0]
    unused = _constant(0.0, 0, scale_C.dtype, x.device)
    return torch.native_batch_norm(x, scale_C, shift_C, zeros_C, ones_C, False, 0.0, 0.0, out=(out, unused, unused))[0]


def _constant(value: float, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Keep the constants that every step needs; nobody may write to them."""
    key = value, length, dtype, device
    constant = _constants.get(key)
    if constant is None:
        with torch.inference_mode(False):
            constant = torch.full((length,), value, dtype=dtype, device=device)
        if len(_constants) > _MOST_CONSTANTS:
            _constants.clear()
        _constants[key] = constant
    return constant


_MOST_CONSTANTS = 4096
_constants: dict[tuple[float, int, torch.dtype, torch.device], Tensor] = {}
