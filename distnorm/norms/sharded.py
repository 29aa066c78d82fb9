"""DTensor inputs: a layer normalizes this rank's shard of a batch, and its result lies on the mesh as its input does.

A shard of the samples or of the positions is this rank's part of the joined batch, as a plain tensor is. A replicated
input would count every value several times, and one cut along its channels does not fit the layer: both are refused,
before any exchange, and alike on all ranks of the mesh.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import Tensor, nn

from distnorm.collectives import shards
from distnorm.errors import ShapeError, ranks_in_words
from distnorm.norms.inputs import name_in_words

is_sharded = shards.is_sharded


def on_shard(layer: Any, forward: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """Run a layer's forward on this rank's shard of a DTensor.

    Args:
        layer: parameters and buffers of its own may be replicated DTensors, as `distribute_module` makes them.
        forward: of its class, with the layer as first argument.
        x: a DTensor.
        rest: more arguments; DTensors among them become this rank's part too.

    Returns:
        A DTensor with the placements of `x`.

    Raises:
        ShapeError: `x` is not cut along its samples or positions alone, or its mesh is not the layer's group.
    """
    _check(layer, x)
    with _local_state(layer, x):
        part = forward(layer, shards.local_of(x), *(shards.local_of(t) if is_sharded(t) else t for t in rest))
    return shards.joined_like(part, x)


def _check(layer: Any, x: Tensor) -> None:
    layout = shards.layout_of(x)
    if layout.others:
        rule = "it takes one that is cut along its samples or positions, where each rank holds values of its own"
        _refuse(layer, x, rule, "Give it x.redistribute(placements=[Shard(0)]), or this rank's part: x.to_local()")
    if 1 in layout.dimensions:
        rule = f"it normalizes all {layer.num_features} channels on each rank"
        _refuse(layer, x, rule, "Give it x.redistribute(placements=[Shard(0)]), or the part, x.to_local(), to its own")
    if any(dimension > 1 for dimension in layout.dimensions) and getattr(layer, "takes_whole_samples", False):
        rule = "its statistics are those of whole samples on one device"
        _refuse(layer, x, rule, "Give it x.redistribute(placements=[Shard(0)]), or this rank's part: x.to_local()")
    group = layer.members() if layer.training and hasattr(layer, "members") else layout.ranks
    if layout.ranks != group:
        rule = f"the mesh has {ranks_in_words(layout.ranks)}, and the layer pools over {ranks_in_words(group)}"
        remedy = f"Build it with group_ranks={layout.ranks}, or give it this rank's part: x.to_local()"
        _refuse(layer, x, rule, remedy)


@contextlib.contextmanager
def _local_state(layer: nn.Module, x: Tensor) -> Iterator[None]:
    """Let the layer, and what it applies to its output, see this rank's copies of replicated parameters and buffers."""
    tables: list[dict[str, Any]] = []
    for module in layer.modules():
        tables += [module._parameters, module._buffers]  # noqa: SLF001
    whole = [(table, key, value) for table in tables for key, value in table.items() if is_sharded(value)]
    for _, key, value in whole:
        layout = shards.layout_of(value)
        if layout.dimensions or any(placement != "Replicate()" for placement in layout.others):
            rule = f"its {key} is {value.placements} itself"
            _refuse(layer, x, rule, f"Replicate it: {key}.redistribute(placements=[Replicate()]), as distribute_module")
    try:
        for table, key, value in whole:
            table[key] = shards.replica_of(value, x)
        yield
    finally:
        for table, key, value in whole:
            table[key] = value


def _refuse(layer: Any, x: Any, rule: str, remedy: str) -> NoReturn:
    raise ShapeError(
        f"{name_in_words(layer)} got a DTensor of {tuple(x.shape)} with {x.placements} on a mesh of "
        f"{tuple(x.device_mesh.shape)}; {rule}.\n{remedy}."
    )
