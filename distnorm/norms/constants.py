"""Norms by what they hold and compute, whatever their class: the frozen batch norms of detection libraries.

Hugging Face's DETR, detectron2, maskrcnn-benchmark and others each have a class of their own: four buffers, no
parameter, and a forward that scales and shifts. Some keep `eps` in an attribute, some in the code, some have none.

Legend: N samples, C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from distnorm.norms.kept import undisturbed

_HELD = ("weight", "bias", "running_mean", "running_var")
_EPS = (1e-5, 0.0, 1e-3, 1e-6, 1e-4, 1e-8, 1e-12)
_SHAPES: tuple[tuple[int, ...], ...] = ((3, 3), (), (4,), (2, 2, 2))


def looks_like_constants(module: nn.Module) -> bool:
    """Tell whether a module holds what a frozen batch norm does: the affine part and statistics as buffers [C]."""
    buffers = module._buffers  # noqa: SLF001
    if module._parameters or module._modules or isinstance(module, _NormBase):  # noqa: SLF001
        return False
    shapes = {None if (held := buffers.get(name)) is None else held.shape for name in _HELD}
    return len(shapes) == 1 and None not in shapes and len(next(iter(shapes))) == 1 and is_own(module)  # type: ignore[arg-type]


def is_own(module: nn.Module) -> bool:
    """Tell whether a module's class is neither torch's, nor distnorm's, nor scripted."""
    ours = type(module).__module__.startswith(("torch.nn.", "distnorm.", "torch.fx."))
    return not ours and not isinstance(module, torch.jit.ScriptModule)


def eps_of(norm: nn.Module) -> float | None:
    """Find the `eps` with which a module's evaluation forward is that of a batch norm with its values.

    The forward runs on noise, with noise for its values, without hooks, and leaves no trace.

    Returns:
        `eps`; `None` if the module computes something else, or is on the meta device.

    Collective: none.
    """
    held: dict[str, Any] = {name: getattr(norm, name, None) for name in _HELD}
    mean, var = held["running_mean"], held["running_var"]
    if not (isinstance(mean, Tensor) and isinstance(var, Tensor) and mean.is_floating_point()):
        return None
    if mean.is_meta or any(tensor.shape != (mean.numel(),) for tensor in held.values() if isinstance(tensor, Tensor)):
        return None
    own = getattr(norm, "eps", None)
    tries = [float(own)] if isinstance(own, int | float) else _EPS
    with undisturbed(norm):
        generator = torch.Generator().manual_seed(0)
        before = {name: tensor.detach().clone() for name, tensor in held.items() if isinstance(tensor, Tensor)}
        for name, tensor in held.items():
            if isinstance(tensor, Tensor):  # a variance so small that eps shows
                noise = torch.rand(tensor.shape, generator=generator).to(tensor)
                tensor.copy_(noise * 1e-3 + 1e-4 if name == "running_var" else noise + 0.5)
        try:
            return next((eps for eps in tries if _is_batch_norm(norm, held, eps)), None)
        finally:
            for name, tensor in before.items():
                held[name].copy_(tensor)


def _is_batch_norm(norm: nn.Module, held: dict[str, Any], eps: float) -> bool:
    mean: Tensor = held["running_mean"]
    for positions in _SHAPES:
        x = torch.randn(3, len(mean), *positions, generator=torch.Generator().manual_seed(1)).to(mean)
        try:
            y = type(norm).forward(norm, x.clone())
        except Exception:  # noqa: BLE001 — a forward may raise anything on a shape that it does not take
            continue
        mean_C, var_C, weight_C, bias_C = (
            None if held[name] is None else held[name].double()
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        expected = functional.batch_norm(x.double(), mean_C, var_C, weight_C, bias_C, training=False, eps=eps)
        tolerance = max(1e-4, 8 * torch.finfo(mean.dtype).eps) * float(expected.abs().max())
        return isinstance(y, Tensor) and y.shape == x.shape and float((y.double() - expected).abs().max()) < tolerance
    return False
