"""Running statistics of several ranks as one: pooled for evaluation and checkpoints, never written into training.

Each rank that normalizes alone (or in a group) keeps running statistics of its own samples. Their truth is the pooled
distribution, whose variance has the term between the ranks that no average of variances has. Pooling *in place* would
equalize the means and lose that term a step later (N(0,1) and N(4,1) pooled every step end at variance 1.4, not 5): so
the pooled values are handed out, swapped in for evaluation, and swapped out again.

Legend: R ranks, C channels.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from distnorm import collectives
from distnorm.convert import normalization_layers

Statistics = dict[str, Tensor]
"""Running statistics by `state_dict` key: `layer1.bn.running_mean` → [C]."""


def own_running_stats(model: nn.Module) -> Statistics:
    """Copy this rank's running statistics and batch counts, by `state_dict` key.

    Collective: none.
    """
    return {key: buffer.detach().clone() for key, buffer in _buffers(model)}


def gather_running_stats(model: nn.Module) -> list[Statistics]:
    """Collect every rank's running statistics.

    Returns:
        One dictionary a rank, in rank order, on every rank.

    Collective: 1 gather of 2C + 1 float64 numbers a layer, all layers in one.
    """
    own = own_running_stats(model)
    if not own:
        return [{} for _ in range(collectives.world_size())]
    flat = torch.cat([tensor.double().flatten() for tensor in own.values()])
    rows = collectives.gather(flat, tuple(range(collectives.world_size())), "the gathering of running statistics")
    return [_unflatten(row, own) for row in rows]


def pool_running_stats(model: nn.Module) -> Statistics:
    """Pool the running statistics of all ranks, as those of one population.

        mean = sum w_r mean_r;  var = sum w_r (var_r + (mean_r - mean)²);  w_r equal over the ranks that saw a batch

    Args:
        model: with layers that keep running statistics, the same on every rank. It is not changed.

    Returns:
        Pooled statistics by `state_dict` key, the same on every rank, for `swap_in` or for a checkpoint; empty where no
        layer keeps any.

    Collective: 1 gather of 2C + 1 float64 numbers a layer, all layers in one; every rank must call.
    """
    return pooled(gather_running_stats(model))


def pooled(ranks: list[Statistics]) -> Statistics:
    """Pool running statistics that were gathered before; no collective."""
    result: Statistics = {}
    for mean_key in (key for key in ranks[0] if key.endswith("running_mean")):
        var_key, count_key = (
            mean_key.removesuffix("running_mean") + name for name in ("running_var", "num_batches_tracked")
        )
        mean_RC = torch.stack([rank[mean_key].double() for rank in ranks])
        var_RC = torch.stack([rank[var_key].double() for rank in ranks])
        counts = [int(rank[count_key]) if count_key in rank else 1 for rank in ranks]
        saw_R = [float(count > 0) for count in counts] if any(counts) else [1.0] * len(ranks)
        weight_R1 = mean_RC.new_tensor(saw_R)[:, None] / sum(saw_R)
        mean_C = mean_RC[0] + ((mean_RC - mean_RC[0]) * weight_R1).sum(0)
        var_C = ((var_RC + (mean_RC - mean_C).square()) * weight_R1).sum(0)
        result[mean_key], result[var_key] = mean_C.to(ranks[0][mean_key].dtype), var_C.to(ranks[0][var_key].dtype)
        if count_key in ranks[0]:
            result[count_key] = ranks[0][count_key].new_tensor(max(counts))
    return result


def swap_in(model: nn.Module, statistics: Mapping[str, Tensor]) -> Statistics:
    """Write statistics into the model's buffers.

    Returns:
        What was there before, to be swapped in again.

    Collective: none.
    """
    before = own_running_stats(model)
    with torch.no_grad():
        for key, buffer in _buffers(model):
            if key in statistics:
                buffer.copy_(statistics[key])
    return before


def write_into(state_dict: dict[str, Tensor], model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Replace the running statistics in a `state_dict` of `model`, under every name that a shared layer goes by.

    Collective: none.
    """
    keys = {buffer.data_ptr(): key for key, buffer in _buffers(model)}
    for name, tensor in state_dict.items():
        key = keys.get(tensor.data_ptr()) if isinstance(tensor, Tensor) else None
        if key is not None and key in statistics:
            state_dict[name] = statistics[key]


@contextlib.contextmanager
def evaluation_statistics(model: nn.Module) -> Iterator[Statistics]:
    """Evaluate with pooled statistics, and go on training with one's own: for training loops in plain torch.

    Yields:
        The pooled statistics; `{**model.state_dict(), **statistics}` is what to save.

    Collective: 1 gather of 2C + 1 float64 numbers a layer on entry; every rank must enter.
    """
    statistics = pool_running_stats(model)
    before = swap_in(model, statistics)
    try:
        yield statistics
    finally:
        swap_in(model, before)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, layer in normalization_layers(model):
        for name, buffer in layer.named_buffers(recurse=False):
            yield f"{prefix}.{name}".lstrip("."), buffer


def _unflatten(row: Tensor, like: Statistics) -> Statistics:
    sizes = [tensor.numel() for tensor in like.values()]
    parts = zip(like.items(), torch.split(row, sizes), strict=True)
    return {key: part.view(tensor.shape).to(tensor.dtype) for (key, tensor), part in parts}
