"""Running statistics of several ranks as one: pooled for evaluation and checkpoints, never written into training.

Each rank that normalizes alone (or in a group) keeps running statistics of its own samples. Their truth is the pooled
distribution, whose variance has the term between the ranks that no average of variances has. Pooling *in place* would
equalize the means and lose that term a step later (N(0,1) and N(4,1) pooled every step end at variance 1.4, not 5): so
the pooled values are handed out, swapped in for evaluation, and swapped out again.

Legend: R ranks, C channels, T rows of running statistics (time steps; else 1).
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distnorm import collectives
from distnorm.convert import normalization_layers
from distnorm.errors import ConfigError
from distnorm.norms.apart import note_load
from distnorm.norms.surgery import check_module

_log = logging.getLogger(__name__)
_said = False

Statistics = dict[str, Tensor]
"""Running statistics by `state_dict` key: `layer1.bn.running_mean` → [C]."""


def own_running_stats(model: nn.Module) -> Statistics:
    """Copy this rank's running statistics and batch counts, by `state_dict` key.

    Collective: none.
    """
    return {key: buffer.detach().clone() for key, buffer in _buffers(model)}


def gather_running_stats(model: nn.Module, own: Statistics | None = None) -> list[Statistics]:
    """Collect every rank's running statistics.

    Args:
        model: with layers that keep running statistics, the same on every rank.
        own: this rank's, if others are in the model.

    Returns:
        One dictionary a rank, in rank order, on every rank.

    Collective: 1 gather of 2C + 1 float64 numbers a layer, all layers in one.
    """
    own = own_running_stats(model) if own is None else own
    if not own:
        return [{} for _ in range(collectives.world_size())]
    flat = torch.cat([tensor.double().flatten() for tensor in own.values()])
    rows = collectives.gather(flat, tuple(range(collectives.world_size())), "the gathering of running statistics")
    if collectives.rank() == 0:
        _warn_of_fresh_ranks(model, [_unflatten(row, own) for row in rows.cpu()])
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
    check_module(model, "pool_running_stats")
    return pooled(gather_running_stats(model))


def pooled(ranks: list[Statistics]) -> Statistics:
    """Pool running statistics that were gathered before: [C] a layer, or [T, C]; no collective."""
    result: Statistics = {}
    for mean_key in (key for key in ranks[0] if key.endswith("running_mean")):
        var_key, count_key = (
            mean_key.removesuffix("running_mean") + name for name in ("running_var", "num_batches_tracked")
        )
        like = ranks[0][mean_key]
        mean_RTC, var_RTC = (
            torch.stack([rank[key].double().view(-1, like.shape[-1]) for rank in ranks]) for key in (mean_key, var_key)
        )
        weight_RT1 = mean_RTC.new_ones(len(ranks), 1, 1)
        if count_key in ranks[0]:
            counts_RT = torch.stack([rank[count_key].view(-1) for rank in ranks])
            result[count_key] = counts_RT.amax(0).view_as(ranks[0][count_key])
            saw_RT = counts_RT > 0
            weight_RT1 = (saw_RT | ~saw_RT.any(0)).unsqueeze(-1).double()  # all, where none saw a batch
        weight_RT1 = weight_RT1 / weight_RT1.sum(0)
        mean_TC = mean_RTC[0] + ((mean_RTC - mean_RTC[0]) * weight_RT1).sum(0)
        var_TC = ((var_RTC + (mean_RTC - mean_TC).square()) * weight_RT1).sum(0)
        result |= {key: found.view_as(like).to(like.dtype) for key, found in ((mean_key, mean_TC), (var_key, var_TC))}
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
    for _, layer in normalization_layers(model):
        note_load(layer)
    return before


def check_statistics(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Hold statistics against the model that is to use them.

    Collective: none.

    Raises:
        ConfigError: they are no statistics; a key that the model's batch norms do not have, or another shape.
    """
    if not isinstance(statistics, Mapping):
        raise ConfigError(
            f"evaluation_statistics() got {statistics!r}, that is no dictionary of statistics. Give it those of "
            "calibrate(), or load_statistics(path)[name].",
        )
    buffers = dict(_buffers(model))
    wrong = []
    for key, value in statistics.items():
        if key not in buffers:
            wrong.append(f"{key} is not in the model")
        elif not isinstance(value, Tensor):
            wrong.append(f"{key} is a {type(value).__name__}, no tensor")
        elif value.shape != buffers[key].shape:
            wrong.append(f"{key} is {list(value.shape)}, in the model {list(buffers[key].shape)}")
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        remedy = "Use those of calibrate() on the same model, with the same name for every layer."
        if all(key not in buffers and str(key).removeprefix("module.") in buffers for key in statistics):
            remedy = (
                "They are of a wrapper round it, e.g. an AveragedModel: calibrate(wrapper.module, …), or give both it."
            )
        raise ConfigError(
            f"The statistics do not fit {type(model).__name__}: {'; '.join(wrong[:4])}{more}.\n{remedy}",
        )


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
def evaluation_statistics(model: nn.Module, statistics: Statistics | None = None) -> Iterator[Statistics]:
    """Evaluate with other statistics, and go on training with one's own: for training loops in plain torch.

    Args:
        model: with layers that keep running statistics.
        statistics: from `calibrate`, or one of those that `load_statistics` gives; `None` pools the ranks' own.
            A layer that they leave out keeps its own.

    Yields:
        The statistics; `{**model.state_dict(), **statistics}` is what to save.

    Collective: none where `statistics` are given; else 1 gather of 2C + 1 float64 numbers a layer on entry, and every
        rank must enter.

    Raises:
        ConfigError: `statistics` are not this model's.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> with evaluation_statistics(model, {"0.running_mean": torch.tensor([3.0])}):
        ...     model[0].running_mean
        tensor([3.])
        >>> model[0].running_mean
        tensor([0.])
    """
    check_module(model, "evaluation_statistics")
    if statistics is None:
        statistics = pool_running_stats(model)
    else:
        check_statistics(model, statistics)
    before = swap_in(model, statistics)
    try:
        yield statistics
    finally:
        swap_in(model, before)


def _warn_of_fresh_ranks(model: nn.Module, ranks: list[Statistics]) -> None:
    """Say once if a checkpoint seems to have been loaded on some ranks only.

    DDP's construction does not send statistics that belong to each rank. A rank that lacks the loaded ones starts from
    0 and 1, and its average needs about 3 / momentum batches to forget them. Loaders of uneven length do not give one
    rank ten times the batches of another, nor that many more so early.
    """
    global _said  # noqa: PLW0603
    if _said:
        return
    fresh: dict[str, tuple[int, int]] = {}
    for name, layer in normalization_layers(model):
        key = f"{name}.num_batches_tracked".lstrip(".")
        if key in ranks[0] and layer.momentum:
            counts = [int(rank[key].max()) for rank in ranks]
            least, most = min((count for count in counts if count), default=0), max(counts)
            memory = 3 / layer.momentum
            if 0 < least < memory and most >= 10 * memory:
                fresh[name or "(the model)"] = (counts.index(least), least)
    if fresh:
        _said = True
        name, (rank, least) = next(iter(fresh.items()))
        _log.warning(
            "The running statistics of %d layers are still near 0 and 1 on some ranks: layer %r saw %d batches on rank "
            "%d, and ten times as many or more on another.\nIf a checkpoint was loaded on some ranks only, load it on "
            "every rank. DDP does not send statistics that belong to each rank.",
            len(fresh),
            name,
            least,
            rank,
        )


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, layer in normalization_layers(model):
        for name, buffer in layer.named_buffers(recurse=False):
            if not is_lazy(buffer):  # a lazy layer has no statistics before its first batch
                yield f"{prefix}.{name}".lstrip("."), buffer


def _unflatten(row: Tensor, like: Statistics) -> Statistics:
    sizes = [tensor.numel() for tensor in like.values()]
    parts = zip(like.items(), torch.split(row, sizes), strict=True)
    return {key: part.view(tensor.shape).to(tensor.dtype) for (key, tensor), part in parts}
