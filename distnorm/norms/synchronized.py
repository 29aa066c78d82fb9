"""The gradient of a normalization whose mean and variance depend on other ranks' samples too, and the gradient of that.

With xhat = (x - mean) · invstd, and sums over the pooled batch of n values a channel:

    dx      = weight · invstd · (dy - sum(dy) / n - xhat · sum(dy · xhat) / n)
    dweight = this rank's sum(dy · xhat)          dbias = this rank's sum(dy)

`weight` and `bias` get this rank's own share: DDP adds the ranks up. Saved for backward: the input and O(C).

Source: Ioffe & Szegedy 2015, section 3. Second order: the same expression in differentiable pieces, where mean and
invstd are functions of all ranks' inputs (`_Statistics`) and a sum over ranks has itself as gradient (`Sum`).

Legend: C channels.
"""

from typing import Any

import torch
from torch import Tensor

from distnorm.moments import statistics_dtype
from distnorm.norms import exchange, kernels, transforms
from distnorm.norms.pooling import Pooled
from distnorm.norms.recomputation import Pass
from distnorm.norms.transforms import Sum


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pooled: Pooled,
    eps: float,
    ranks: tuple[int, ...],
    whose: exchange.Whose,
    scratch: kernels.Scratch | None = None,
    passed: Pass | None = None,
) -> Tensor:
    """Normalize with pooled statistics, differentiably, through them too.

    Args:
        x: dense (`kernels.dense`).
        weight: a factor a channel, or `None`.
        bias: a summand a channel, or `None`.
        pooled: statistics of all ranks' inputs, this one's among them.
        eps: added to the variance.
        ranks: who pooled.
        whose: the layer's name and order, for the exchange.
        scratch: what `kernels.measure` left.
        passed: lives as long as the graph of the result.

    Shape: x [N, C, *]; result the same.

    Collective: forward none; backward 1 sum of 2C numbers over `ranks`, whether this rank's input needs a gradient or
        not: ranks that disagreed about it would hang.
    """
    invstd_C = (pooled.var + eps).rsqrt_()
    # Dynamo takes no tensor twice, and in float64 the exact mean is the mean.
    exact_mean_C = None if torch.compiler.is_compiling() else pooled.exact_mean
    statistics = (exact_mean_C, pooled.mean, invstd_C, pooled.count)
    y: Tensor = _Normalize.apply(x, weight, bias, *statistics, ranks, whose, scratch, passed)  # type: ignore[no-untyped-call]
    return y


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        exact_mean_C: Tensor | None,
        mean_C: Tensor,
        invstd_C: Tensor,
        count: Tensor | float,
        ranks: tuple[int, ...],
        whose: exchange.Whose,
        scratch: kernels.Scratch | None,
        passed: Pass | None,
    ) -> Tensor:
        _save(ctx, x, weight, mean_C, invstd_C, count)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.ranks, ctx.whose, ctx.passed = ranks, whose, passed
        exact_mean_C = mean_C if exact_mean_C is None else exact_mean_C
        return kernels.normalize(x, exact_mean_C, mean_C, invstd_C, weight, bias, scratch)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.passed is not None:
            ctx.passed.used += 1
        transforms.check_backward(dy, ctx.ranks, ctx.whose[0])
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dx, dweight, dbias = (_gradient_to_differentiate if twice else _gradient)(ctx, dy)
        return dx, dweight, dbias, *(None,) * 8


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight, mean_C, invstd_C, count = _saved(ctx)
    dy = kernels.dense(dy, like=x)
    dy_C, dy_xhat_C = kernels.gradient_sums(dy, x, mean_C, invstd_C)
    pending = exchange.start_sum(torch.cat((dy_C, dy_xhat_C)), ctx.ranks, ctx.whose, "backward")
    dweight = dy_xhat_C.to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None
    dbias = dy_C.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    if not ctx.needs_input_grad[0]:
        pending.wait()
        return None, dweight, dbias
    scale_C = invstd_C if weight is None else invstd_C * weight.to(invstd_C.dtype)
    return kernels.input_gradient(dy, x, scale_C, mean_C, invstd_C, pending, count), dweight, dbias


def _gradient_to_differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight, mean_C, invstd_C, count = _saved(ctx)
    mean_C, invstd_C = _Statistics.apply(x, mean_C, invstd_C, count, ctx.ranks, ctx.whose)  # type: ignore[no-untyped-call]
    over, dtype = kernels.all_but_channels(x), statistics_dtype(x.dtype)
    xhat = (x - kernels.wide(mean_C, x)) * kernels.wide(invstd_C, x)
    dy_C, dy_xhat_C = dy.to(xhat.dtype).sum(over), (dy * xhat).sum(over)
    sums_2C = Sum.apply(torch.cat((dy_C, dy_xhat_C)), ctx.ranks, ctx.whose, "backward")  # type: ignore[no-untyped-call]
    mean_dy_C, mean_dy_xhat_C = (sums_2C / _divisor(count)).chunk(2)
    scale_C = invstd_C if weight is None else invstd_C * weight
    dx = (dy - kernels.wide(mean_dy_C, x) - xhat * kernels.wide(mean_dy_xhat_C, x)) * kernels.wide(scale_C, x)
    return (
        dx.to(dtype).to(x.dtype),
        dy_xhat_C.to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None,
        dy_C.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
    )


class _Statistics(torch.autograd.Function):
    """Mean and invstd of the pooled batch, known already, as functions of this rank's input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,  # noqa: ARG004 — what the statistics are a function of
        mean_C: Tensor,
        invstd_C: Tensor,
        count: Tensor | float,  # noqa: ARG004
        ranks: tuple[int, ...],  # noqa: ARG004
        whose: exchange.Whose,  # noqa: ARG004
    ) -> tuple[Tensor, Tensor]:
        return mean_C.clone(), invstd_C.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004
        x, mean_C, invstd_C, count, ctx.ranks, ctx.whose = inputs
        _save(ctx, x, None, mean_C, invstd_C, count)

    @staticmethod
    def backward(ctx: Any, dmean_C: Tensor, dinvstd_C: Tensor) -> tuple[Tensor | None, ...]:
        x, _, mean_C, invstd_C, count = _saved(ctx)
        if torch.is_grad_enabled():
            mean_C, invstd_C = _Statistics.apply(x, mean_C, invstd_C, count, ctx.ranks, ctx.whose)  # type: ignore[no-untyped-call]
        both_2C = torch.cat((dmean_C, dinvstd_C))
        summed_2C = Sum.apply(both_2C, ctx.ranks, ctx.whose, "double backward")  # type: ignore[no-untyped-call]
        from_mean_C, from_invstd_C = (summed_2C / _divisor(count)).chunk(2)
        on_xmu_C = -from_invstd_C * invstd_C**3
        dx = kernels.wide(from_mean_C, x) + (x - kernels.wide(mean_C, x)) * kernels.wide(on_xmu_C, x)
        return dx.to(x.dtype), None, None, None, None, None


def _save(ctx: Any, x: Tensor, weight: Tensor | None, mean_C: Tensor, invstd_C: Tensor, count: Tensor | float) -> None:
    """Save for backward; a count that the host knows is no tensor."""
    ctx.known_count = None if isinstance(count, Tensor) else count
    ctx.save_for_backward(x, weight, mean_C, invstd_C, count if isinstance(count, Tensor) else None)


def _saved(ctx: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | float]:
    x, weight, mean_C, invstd_C, count = ctx.saved_tensors
    return x, weight, mean_C, invstd_C, ctx.known_count if count is None else count


def _divisor(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)
