"""DTensors: whether a tensor is one, how it lies on its mesh, and the way to this rank's part and back.

`torch.distributed.tensor` is loaded by whoever makes a DTensor, never from here.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How a DTensor lies on its mesh.

    Attributes:
        ranks: of the mesh, in ascending order.
        dimensions: of the tensor, each cut along one dimension of the mesh that has several ranks.
        others: placements that do not cut, e.g. `Replicate()`, along such dimensions of the mesh.
    """

    ranks: tuple[int, ...]
    dimensions: tuple[int, ...]
    others: tuple[str, ...]


def is_sharded(x: object) -> bool:
    """Tell whether a tensor is a DTensor, whatever its placements."""
    if torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def layout_of(x: Any) -> Layout:
    """Describe how a DTensor lies on its mesh."""
    mesh, shard = x.device_mesh, _module().Shard
    several = [p for p, size in zip(x.placements, mesh.shape, strict=True) if size > 1]
    cut = [placement for placement in several if type(placement) is shard]
    others = tuple(repr(placement) for placement in several if type(placement) is not shard)
    return Layout(tuple(sorted(mesh.mesh.flatten().tolist())), tuple(p.dim % x.dim() for p in cut), others)


def local_of(x: Any) -> Tensor:
    """Give this rank's part of a DTensor, differentiably."""
    part: Tensor = x.to_local()
    return part


def replica_of(state: Any, x: Any) -> Tensor:
    """Give this rank's copy of a replicated parameter or buffer that normalizes its part of `x`.

    A parameter's gradient is then this rank's share of a sum over the ranks; a buffer shares its memory.
    """
    if not state.requires_grad:
        with torch.no_grad():
            return state.to_local()  # type: ignore[no-any-return]
    tensor = _module()
    shares = [tensor.Partial() if type(p) is tensor.Shard else tensor.Replicate() for p in x.placements]
    return state.to_local(grad_placements=shares)  # type: ignore[no-any-return]


def joined_like(part: Tensor, x: Any) -> Tensor:
    """Make a DTensor that lies as `x` does from this rank's part of it, differentiably."""
    whole = torch.empty(x.shape, device="meta")
    if part.dim() in (4, 5) and not part.is_contiguous():
        whole = whole.contiguous(memory_format=torch.channels_last if part.dim() == 4 else torch.channels_last_3d)
    placed: Tensor = _module().DTensor.from_local(
        part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=whole.stride()
    )
    return placed


def _module() -> Any:
    return sys.modules["torch.distributed.tensor"]
