"""Do all ranks train the same layers? Asked once, before the first step: later a difference is a hang, or garbage.

gloo aborts on an exchange of different lengths, or lets a rank go on with garbage; so the ranks exchange the table of
their batch norms beside the training collectives, and every rank compares all of them and raises the same error.
"""

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm import collectives, positions
from distnorm.convert import normalization_layers
from distnorm.errors import ConfigError, ranks_in_words
from distnorm.norms.base import AbstractBatchStatisticsNorm, name_layer, set_order
from distnorm.norms.over_ranks import AbstractNormOverRanks
from distnorm.norms.surgery import check_module

WHAT = "the check that all ranks have the same layers"
Table = dict[str, dict[str, Any]]
"""Of each layer's path, in the model's order, its name in messages and what must be alike on all ranks."""
_NAME = "name"


def check_ranks(model: nn.Module, *, folder: str | Path | None = None, debug: bool = False) -> None:
    """Check, before training starts, that all ranks have the same batch norms; and prepare the diagnosis of a hang.

    Call it once on every rank, after the process group exists and the model is converted and in training mode, before
    DDP wraps it (whose constructor has a check of its own, that names no layer).

    Args:
        model: all that trains, with its layers as they will train; they are named after their places in it. A second
            call replaces the first one's folder and debugging: put several models into one `nn.ModuleList`.
        folder: keep every rank's position there, so that a timeout's error says who left before which layer (and in
            which step, if `distnorm.positions.at_step(step)` was told); the cost is half a microsecond an exchange. One
            folder for all ranks. `None` keeps none.
        debug: compare all ranks before every exchange of a layer, and raise at once on all of them where they differ.
            It takes 2 more exchanges each: slow.

    Collective: 2 gathers over a gloo side group of all ranks. Every group that the layers pool over is made here.

    Raises:
        ConfigError: the ranks' layers differ; the same on every rank, naming layer and ranks.
        GroupError: a rank never came, within the process group's timeout.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> check_ranks(model)  # torchrun has started the ranks, init_process_group has run
    """
    check_module(model, "check_ranks")
    name_layers(model, anew=True)
    started = compare(model, modes=True, debug=debug)
    prepare(model, None if folder is None else Path(folder), started, debug=debug)


def compare(model: nn.Module, *, modes: bool, debug: bool = False, complaint: str | None = None) -> float:
    """Exchange the ranks' tables, and raise the same error on all of them where they differ.

    Args:
        model: the layers to be compared.
        modes: compare which layers train and which evaluate, too.
        debug: whether this rank will debug: all must, or none.
        complaint: what this rank has found wrong by itself, to be raised on all.

    Returns:
        Rank 0's clock, in seconds since 1970: a time stamp that all ranks share.

    Collective: 2 gathers over a gloo side group of all ranks.

    Raises:
        ConfigError: a rank complains, or the ranks differ.
        GroupError: a rank never came.
    """
    own = time.time(), complaint, debug, layer_table(model, modes=modes)
    answers = collectives.agree(own, WHAT, call_roll=True)
    clocks, complaints, debugs, tables = zip(*answers, strict=True)
    for complains in filter(None, complaints):
        of = [rank for rank, said in enumerate(complaints) if said == complains]
        raise ConfigError(complains if len(of) == len(answers) else f"{ranks_in_words(of)}: {complains}")
    for difference in (*differences(tables), *_difference_in("debug", dict(enumerate(debugs)))):
        raise ConfigError(difference)
    return float(clocks[0])


def prepare(model: nn.Module, folder: Path | None, started: float, *, debug: bool) -> None:
    """Make the groups of the model's layers, switch debugging, and start to keep positions.

    Args:
        model: the layers that will train.
        folder: where positions are kept; `None` keeps none.
        started: what `compare` answered; it marks the files of this run.
        debug: compare the ranks before every exchange of a layer.

    Collective: makes one group for each that the layers pool over, two with `debug`.
    """
    collectives.set_debug(debug)
    for name, layer in model.named_modules():
        if isinstance(layer, AbstractNormOverRanks):
            set_order(layer, collectives.order_of_checked(f"{started} {name}"))
            collectives.members(layer.sync_ranks, layer.group_ranks, of_user=layer.has_users_group)
    if debug:  # a group that the user made is known on its members alone
        named = [
            layer.group_ranks
            for layer in model.modules()
            if isinstance(layer, AbstractNormOverRanks) and layer.group_ranks
        ]
        everyones = collectives.agree(named, "the groups of the layers")
        collectives.make_twins(sorted({ranks for own in everyones for ranks in own}))
    positions.stop()
    if folder is None or collectives.world_size() == 1:
        return
    try:
        positions.keep(folder, collectives.rank(), collectives.world_size(), started)
    except OSError as error:
        warnings.warn(f"no positions are kept in '{folder}': {error}. A hang will not be explained.", stacklevel=2)


def name_layers(model: nn.Module, *, anew: bool = False) -> None:
    """Give each distnorm layer without a name, or all of them `anew`, its place in the model: errors carry it."""
    for name, layer in _inner(model).named_modules():
        if isinstance(layer, AbstractBatchStatisticsNorm) and (anew or not layer.layer_name):
            name_layer(layer, name)


def layer_table(model: nn.Module, *, modes: bool) -> Table:
    """Describe the batch norms of a model, ours and torch's, that exchange statistics or have them pooled.

    Args:
        model: wrapped by DDP or not.
        modes: say of the layers that synchronize whether they train.
    """
    table: Table = {}
    kept = {id(layer) for _, layer in normalization_layers(model)}
    for name, layer in _inner(model).named_modules():
        if isinstance(layer, AbstractBatchStatisticsNorm) or id(layer) in kept:
            assert isinstance(layer, _BatchNorm)
            table[name] = {_NAME: getattr(layer, "layer_name", "") or name, **_row(layer, modes)}
    return table


def _row(layer: _BatchNorm, modes: bool) -> dict[str, Any]:
    tensor = next((t for t in (layer.weight, layer.running_mean) if t is not None), None)
    row: dict[str, Any] = {
        "class": f"{type(layer).__module__.partition('.')[0]}.{type(layer).__name__}",
        "channels": layer.num_features,
        "dtype": "none" if tensor is None else str(tensor.dtype).removeprefix("torch."),
        "running statistics": layer.running_mean is not None,
    }
    if isinstance(layer, AbstractNormOverRanks):
        row |= {"sync_ranks": layer.sync_ranks, "group_ranks": layer.group_ranks}
        row |= {"mode": "training" if layer.training else "evaluation"} if modes else {}
    return row


def differences(tables: Sequence[Table]) -> Iterator[str]:
    """Say how ranks differ, one message a difference, in the model's order; missing layers come first.

    Args:
        tables: one a rank, in rank order.
    """
    yield from _missing_layers(tables)
    orders = [list(table) for table in tables]
    for place, names in enumerate(zip(*orders, strict=False)):
        if len(set(names)) > 1:
            at = _who_has({rank: tables[rank][name][_NAME] for rank, name in enumerate(names)}, "{}")
            yield f"Layer {place} of the model is {at}.\nBuild the model in the same order on every rank."
            return
    for path in orders[0]:
        rows = [table[path] for table in tables if path in table]
        for field in list(rows[0])[1:] if len(rows) == len(tables) else ():  # all but the name
            values = {rank: row.get(field) for rank, row in enumerate(rows)}
            if field != "group_ranks" or not _is_a_partition(values):
                yield from _difference_in(field, values, rows[0][_NAME])


def _is_a_partition(groups: Mapping[int, tuple[int, ...] | None]) -> bool:
    """Tell whether each rank is in its own group, and its group is that of all its members: process groups by hand."""
    return all(
        own is not None and rank in own and {groups.get(r) for r in own} == {own} for rank, own in groups.items()
    )


def _missing_layers(tables: Sequence[Table]) -> Iterator[str]:
    for path in dict.fromkeys(path for table in tables for path in table):
        have = [rank for rank, table in enumerate(tables) if path in table]
        if len(have) < len(tables):
            lack = sorted(set(range(len(tables))) - set(have))
            name = tables[have[0]][path][_NAME]
            yield (
                f"{name} is in the model of {ranks_in_words(have)} and not of {ranks_in_words(lack)}.\n"
                "Build the same model on every rank: does its configuration, or a random choice, depend on the rank?"
            )


_SAME_MODEL = "Build the same model on every rank: does its configuration, or a random choice, depend on the rank?"
_SAME_SPEC = "Convert the model with the same NormSpec on every rank."
_WORDS = {
    "class": ("is a {}", _SAME_SPEC),
    "channels": ("has {} channels", _SAME_MODEL),
    "dtype": ("is kept in {}", "Cast the same layers on every rank."),
    "running statistics": ("has track_running_stats={}", _SAME_MODEL),
    "sync_ranks": ("has sync_ranks={}", _SAME_SPEC),
    "group_ranks": ("has group_ranks={}", "Name the same ranks on every rank, also on those outside the group."),
    "mode": ("is in {} mode", "Freeze the same layers on every rank, and call model.train() on all of them."),
    "debug": ("debug={}", "Give every rank the same."),
}


def _difference_in(field: str, values: Mapping[int, Any], name: str = "") -> Iterator[str]:
    if len(set(values.values())) > 1:
        words, remedy = _WORDS[field]
        yield f"{name} {_who_has(values, words)}.\n{remedy}".lstrip()


def _who_has(values: Mapping[int, Any], words: str) -> str:
    """`has 64 channels on ranks 0, 1, 3 and 32 on rank 2`: the words once, what most ranks have first."""
    ranks_of: dict[Any, list[int]] = defaultdict(list)
    for rank, value in values.items():
        ranks_of[value].append(rank)
    (first, at), *rest = sorted(ranks_of.items(), key=lambda item: -len(item[1]))
    parts = [f"{words.format(first)} on {ranks_in_words(at)}"]
    return " and ".join([*parts, *(f"{value} on {ranks_in_words(of)}" for value, of in rest)])


def _inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
