"""Values of running statistics as they are now, for a backward that may come after they moved in place."""

import torch
from torch import Tensor


def snapshot(*values: Tensor) -> tuple[Tensor, ...]:
    """Copy tensors of one shape; in a compiled graph opaquely, or its backward would read the originals again.

    A trace by `torch.jit.trace`, which is evaluated, keeps the originals.

    Shape: any; results the same.
    """
    if torch.jit.is_tracing():
        return values
    if torch.compiler.is_compiling():
        copies: tuple[Tensor, ...] = torch.ops.distnorm.computed_once(torch.stack(values)).unbind()
        return copies
    return tuple(value.clone() for value in values)


@torch.library.custom_op("distnorm::computed_once", mutates_args=())
def _computed_once(values: Tensor) -> Tensor:
    return values.clone()


@_computed_once.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)
