"""`torch.func` transforms and forward-mode differentiation: whether one is active, and a normalization they can take.

The layers' own autograd functions keep their backward fast, and no transform can look into them. Inside one a layer is
made of torch's plain differentiable operations instead: slower, with the same values. `grad` and `vjp` work over ranks;
`vmap` and `jvp` (and what is made of them: `jacfwd`, `hessian`, `jacrev`'s backward) work on one rank alone, for ranks
could disagree about how often they run a layer, and wait for each other.

Legend: C channels, R ranks, K = 2C + 1: mean, summed squared deviation and count of one rank.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from distnorm import collectives
from distnorm.errors import ConfigError
from distnorm.moments import Moments, statistics_dtype
from distnorm.norms import exchange

innermost = torch._C._functorch.peek_interpreter_stack  # noqa: SLF001
"""The innermost transform of this thread, or `None`; 30 ns."""

_Transform = torch._C._functorch.TransformType  # noqa: SLF001
_BY_SAMPLE = {_Transform.Vmap: "vmap", _Transform.Jvp: "jvp"}


def active() -> bool:
    """Tell whether a `torch.func` transform, or forward-mode differentiation, runs in this thread."""
    if torch.compiler.is_compiling():
        return False
    return innermost() is not None or forward_ad._current_level >= 0  # noqa: SLF001


def inside_vmap() -> bool:
    """Tell whether one of the transforms is `vmap`: no value can be read then."""
    return any(level.key() == _Transform.Vmap for level in _levels())


def check_ranks(ranks: tuple[int, ...], name: str) -> None:
    """Refuse transforms that ranks cannot run together, before they exchange anything.

    Args:
        ranks: who pools.
        name: the layer's, for the error.

    Raises:
        ConfigError: there are several ranks, and a transform is `vmap` or `jvp`, or forward-mode differentiation is on.
    """
    if len(ranks) == 1:
        return
    found = [_BY_SAMPLE[level.key()] for level in _levels() if level.key() in _BY_SAMPLE]
    if not found and forward_ad._current_level >= 0:  # noqa: SLF001
        found = ["forward-mode differentiation (forward_ad)"]
    if found:
        _refuse(ranks, name, found[-1])


def check_backward(dy: Tensor, ranks: tuple[int, ...], name: str) -> None:
    """Refuse a backward of several gradients at a time over ranks, as `is_grads_batched=True` asks for.

    Raises:
        ConfigError: there are several ranks, and the gradient is batched, or as `check_ranks`.
    """
    if len(ranks) > 1 and not torch.compiler.is_compiling():
        if torch._C._functorch.is_legacy_batchedtensor(dy):  # noqa: SLF001
            _refuse(ranks, name, "vmap")
        check_ranks(ranks, name)


def measure(
    x: Tensor, mask: Tensor | None, ranks: tuple[int, ...], whose: exchange.Whose, *affine: Tensor | None
) -> Moments:
    """Measure the joined batch of several ranks, differentiably.

    Args:
        x: the activation.
        mask: which samples and positions count; all, if `None`.
        ranks: who pools.
        whose: the layer's name and order, for the exchange.
        affine: parameters of the layer: a rank that differentiates only by them takes part in the backward too.

    Shape: x [N, C, *], mask [N, *]; moments [C], float64.

    Collective: 1 gather of K doubles over `ranks` forward, 1 sum of R · K doubles backward.
    """
    own = Moments.of(x, mask)
    if len(ranks) == 1:
        return own
    own_K = torch.cat((own.mean, own.m2, own.count.unsqueeze(0)))
    return Moments.unpack(_Gather.apply(own_K, ranks, whose, *affine)).merged()  # type: ignore[no-untyped-call]


def normalize(x: Tensor, moments: Moments, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute (x - mean) / sqrt(var + eps) · weight + bias, in plain operations.

    Shape: x [N, C, *], moments, weight and bias [C]; result like x.
    """
    dtype, wide = statistics_dtype(x.dtype), (-1, *[1] * (x.dim() - 2))
    y = (x - moments.mean.to(dtype).view(wide)) * (moments.var.to(dtype) + eps).rsqrt().view(wide)
    if weight is not None:
        y = y * weight.to(dtype).view(wide)
    if bias is not None:
        y = y + bias.to(dtype).view(wide)
    return y.to(x.dtype)


class _Gather(torch.autograd.Function):
    """One row from each rank; its gradient is the sum of all ranks' gradients, of this rank's row."""

    @staticmethod
    def forward(values_K: Tensor, ranks: tuple[int, ...], whose: exchange.Whose, *_: Tensor | None) -> Tensor:
        return exchange.gather(values_K, ranks, whose, "forward").contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 — torch's signature
        _, ctx.ranks, ctx.whose, *ctx.affine = inputs
        ctx.affine = len(ctx.affine)

    @staticmethod
    def backward(ctx: Any, grad_RK: Tensor) -> tuple[Tensor | None, ...]:
        summed = Sum.apply(grad_RK.reshape(-1), ctx.ranks, ctx.whose, "backward")  # type: ignore[no-untyped-call]
        own = ctx.ranks.index(collectives.rank())
        return summed.view(len(ctx.ranks), -1)[own], None, None, *(None,) * ctx.affine

    @staticmethod
    def vmap(info: Any, in_dims: Any, values_K: Tensor, ranks: tuple[int, ...], whose: Any, *_: Any) -> Any:  # noqa: ARG004
        _refuse(ranks, whose[0], "vmap")


class Sum(torch.autograd.Function):
    """A sum over ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(values: Tensor, ranks: tuple[int, ...], whose: exchange.Whose, kind: str) -> Tensor:
        """Sum values over ranks."""
        return exchange.start_sum(values, ranks, whose, kind).wait().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 — torch's signature
        """Keep who summed."""
        _, ctx.ranks, ctx.whose, ctx.kind = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Sum the gradients over ranks."""
        kind = f"{ctx.kind}, differentiated"
        return Sum.apply(grad, ctx.ranks, ctx.whose, kind), None, None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: Any, values: Tensor, ranks: tuple[int, ...], whose: Any, kind: str) -> Any:  # noqa: ARG004
        """Leave the values of one rank as they are, and refuse to sum over several."""
        if len(ranks) > 1:
            _refuse(ranks, whose[0], "vmap")
        return values, in_dims[0]


def _refuse(ranks: tuple[int, ...], name: str, transform: str) -> NoReturn:
    raise ConfigError(
        f"{name} pools over {len(ranks)} ranks inside {transform}; over ranks torch.func.grad and vjp work, and vmap, "
        "jvp, jacfwd, jacrev and hessian do not.\n"
        "Run it on one rank alone: convert with sync_ranks=1 (norm=batch), or in evaluation: model.eval()."
    )


def _levels() -> list[Any]:
    return torch._C._functorch.get_interpreter_stack() or []  # noqa: SLF001
