"""Who shares statistics? `decide` answers with a `NormSpec`: integers, thresholds and the reasons in words. No torch.

The thresholds: statistics over 16 to 128 samples cost at most 0.3 points of ImageNet accuracy against the best, over 8
about 1.1, over 4 about 3.5 and over 2 about 10 (Wu & He 2018, tables 1-2; Wu & Johnson 2021, figure 4); more than 32
gain nothing more. So 32 is the aim and 16 the least.
"""

import dataclasses

from distnorm.errors import ConfigError, did_you_mean, divisors_in_words
from distnorm.spec import BATCH_KINDS, KINDS, NormSpec


def decide(
    device_batch: int,
    world_size: int,
    *,
    kind: str = "auto",
    normalization_batch: int = 32,
    min_normalization_batch: int = 16,
    exact: bool = False,
    sync_ranks: int | None = None,
    ranks_per_node: int | None = None,
    pretrained: bool = False,
    momentum: float | None = None,
) -> NormSpec:
    """Decide which samples share statistics.

    Asked for a kind, that kind is the answer. `auto` goes down this list:

    1. `exact`: the asked normalization batch, exactly, or a `ConfigError` with the numbers that can be had.
    2. The device batch is at least `min_normalization_batch`: local batch norm.
    3. All ranks together reach it: sync over as few ranks as give `normalization_batch`, inside a node if that does.
    4. Else GroupNorm: with weight standardization from scratch, plain for pretrained weights.

    Args:
        device_batch: samples one device sees per forward, at least 1.
        world_size: ranks, at least 1.
        kind: one of `KINDS`.
        normalization_batch: samples that shall share one set of statistics.
        min_normalization_batch: the fewest that are still worth batch statistics.
        exact: take `normalization_batch` as an order, so that other hardware trains the same.
        sync_ranks: ranks that pool together; for `sync` (`None`: all) and `auto` (`None`: derived).
        ranks_per_node: ranks on one machine; `None`: all on one.
        pretrained: the weights come from a batch norm model and must be kept.
        momentum: for the running statistics; `None` keeps each layer's own.

    Returns:
        The decision, with its reasons.

    Raises:
        ConfigError: a number out of range, an unknown kind, ranks that cannot be grouped so, an exact number out of
            reach.

    Example:
        >>> decide(8, 4).in_words()
        'sync over 4 ranks, normalization batch 32'
    """
    _check_kind(kind)
    for name, value in {
        "device_batch": device_batch,
        "world_size": world_size,
        "normalization_batch": normalization_batch,
        "min_normalization_batch": min_normalization_batch,
        "ranks_per_node": world_size if ranks_per_node is None else ranks_per_node,
    }.items():
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"{name}={value!r} must be at least 1, a whole number. Give a number of {_UNITS[name]}, e.g. {name}=16."
            )
    if momentum is not None and not 0 < momentum <= 1:
        raise ConfigError(f"momentum={momentum} must be in (0, 1]: the weight of a new batch. Use e.g. momentum=0.1.")
    if sync_ranks is not None:
        _check_sync_ranks(sync_ranks, world_size, kind)
    case = _Case(device_batch, world_size, normalization_batch, min_normalization_batch, ranks_per_node or world_size)
    if kind == "auto":
        spec = _derive(case, exact=exact, sync_ranks=sync_ranks, pretrained=pretrained)
    else:
        spec = _obey(case, kind, sync_ranks, exact=exact)
    local = world_size > 1 and spec.kind in BATCH_KINDS and spec.sync_ranks < world_size
    return dataclasses.replace(
        spec,
        momentum=momentum,
        evaluation="pooled" if local else "running",
        device_batch=device_batch,
        world_size=world_size,
    )


_UNITS = {
    "device_batch": "samples one device sees per forward",
    "world_size": "ranks",
    "ranks_per_node": "ranks on one machine",
    "normalization_batch": "samples that share statistics",
    "min_normalization_batch": "samples that share statistics",
}


@dataclasses.dataclass(frozen=True)
class _Case:
    device_batch: int
    world_size: int
    asked: int
    least: int
    ranks_per_node: int

    @property
    def reachable(self) -> int:
        return self.device_batch * self.world_size


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"norm.kind={kind!r} is not one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")


def _check_sync_ranks(sync_ranks: int, world_size: int, kind: str) -> None:
    if kind not in {"auto", "sync"}:
        raise ConfigError(
            f"norm.sync_ranks={sync_ranks} has no meaning for norm.kind={kind}: its layers do not synchronize.\n"
            "Use norm=sync, or leave norm.sync_ranks out.",
        )
    if sync_ranks < 1 or world_size % sync_ranks:
        raise ConfigError(
            f"norm.sync_ranks={sync_ranks} does not divide world_size={world_size}. "
            f"Use {divisors_in_words(world_size)}."
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _derive(case: _Case, *, exact: bool, sync_ranks: int | None, pretrained: bool) -> NormSpec:
    """Answer `auto`, first match first."""
    if sync_ranks is not None:
        spec = _obey(case, "sync", sync_ranks, exact=exact)
        return dataclasses.replace(spec, reasons=spec.reasons[1:])  # the ranks were asked for, the kind was not
    if exact:
        return _reach_exactly(case)
    if case.device_batch >= case.least:
        return _stay_local(case)
    if case.reachable >= case.least:
        return _sync_enough(case)
    return _group(case, pretrained=pretrained)


def _stay_local(case: _Case) -> NormSpec:
    b = case.device_batch
    why = f"device batch {b} ≥ least normalization batch {case.least}"
    why += ": more samples would gain at most 0.3 points" if b >= 16 else ""
    more = f"norm.min_normalization_batch={case.asked}, or norm.exact=true, to insist on the {case.asked} asked for"
    return NormSpec("batch", b, reasons=(why,), alternatives=(more,) if b < case.asked <= case.reachable else ())


def _sync_enough(case: _Case) -> NormSpec:
    """Take the fewest ranks that give the asked number; a whole node rather than two, if it gives the least."""
    b, node, aim = case.device_batch, case.ranks_per_node, max(case.asked, case.least)
    in_node = [g for g in _divisors(case.world_size) if node % g == 0]
    enough = [g for g in in_node if g * b >= aim]
    if not enough and in_node[-1] * b < case.least:
        enough = [g for g in _divisors(case.world_size) if g * b >= aim]
        in_node = _divisors(case.world_size)
    ranks = enough[0] if enough else in_node[-1]
    reached = ranks * b
    why = f"device batch {b} < least normalization batch {case.least}"
    if reached >= aim:
        how = f"{ranks} × {b} = {reached} ≥ normalization batch {aim}"
    else:
        place = "all ranks" if ranks == case.world_size else f"{ranks} ranks of a node"
        how = f"{place} together reach {reached}: under the asked {case.asked}, but ≥ {case.least}"
    return NormSpec("sync", reached, sync_ranks=ranks, reasons=(why, how))


def _group(case: _Case, *, pretrained: bool) -> NormSpec:
    reach = f"all {case.world_size} ranks reach" if case.world_size > 1 else "one rank reaches"
    product = f"device batch {case.device_batch} × {case.world_size} = {case.reachable}"
    why = (
        f"{product}: {reach} a normalization batch of {case.reachable} < {case.least}",
        "pretrained weights are kept as they are"
        if pretrained
        else "from scratch, standardized weights make GroupNorm as good as batch norm at 32",
    )
    instead = [f"a larger data.device_batch: {-(-case.least // case.world_size)} reaches {case.least}"]
    if case.reachable > 1:
        instead.insert(0, f"norm.min_normalization_batch={case.reachable} accepts what is reachable")
    return NormSpec("group" if pretrained else "group_ws", 1, reasons=why, alternatives=tuple(instead))


def _reach_exactly(case: _Case) -> NormSpec:
    b, asked = case.device_batch, case.asked
    if asked == b:
        return NormSpec("batch", b, reasons=(f"device batch {b} is exactly the normalization batch asked for",))
    if b % asked == 0:
        why = f"exact: device batch {b} is split in {b // asked} ghost batches of {asked}"
        return NormSpec("ghost", asked, ghost_batch=asked, reasons=(why,))
    if asked % b == 0 and case.world_size % (asked // b) == 0:
        why = f"exact: {asked // b} ranks × device batch {b} = {asked}"
        return NormSpec("sync", asked, sync_ranks=asked // b, reasons=(why,))
    by_ghosts = {d for d in _divisors(b) if d > 1 or b == 1}
    by_sync = {b * g for g in _divisors(case.world_size)}
    numbers = ", ".join(map(str, sorted(by_ghosts | by_sync)))
    raise ConfigError(
        f"norm.normalization_batch={asked} cannot be hit exactly with device_batch={b} on {case.world_size} ranks: "
        f"ghosts need a divisor of {b}, sync a multiple that divides the ranks.\nUse {numbers}; or norm.exact=false.",
    )


def _obey(case: _Case, kind: str, sync_ranks: int | None, *, exact: bool) -> NormSpec:
    """Answer a request for one kind, and say what it means for the normalization batch."""
    b, asked = case.device_batch, f"norm.kind={kind} was asked for"
    if kind == "sync":
        ranks = case.world_size if sync_ranks is None else sync_ranks
        how = "over all ranks" if sync_ranks is None else f"norm.sync_ranks={ranks}"
        spec = NormSpec("sync", ranks * b, sync_ranks=ranks, reasons=(asked, f"{how}: {ranks} × {b} = {ranks * b}"))
    elif kind == "ghost":
        ghost = min(case.asked, b)
        if b % ghost:
            raise ConfigError(
                f"norm.kind=ghost cannot part device_batch={b} into ghosts of norm.normalization_batch={ghost}.\n"
                f"Use a divisor of {b}: {divisors_in_words(b)}.",
            )
        spec = NormSpec("ghost", ghost, ghost_batch=ghost, reasons=(asked, f"device batch {b} in ghosts of {ghost}"))
    elif kind == "batch":
        spec = NormSpec("batch", b, reasons=(asked, f"each rank normalizes over its own {b} samples"))
    else:
        return NormSpec(kind, 1, reasons=(asked,))
    if exact and spec.normalization_batch != case.asked:
        raise ConfigError(
            f"norm.kind={kind} gives a normalization batch of {spec.normalization_batch}, and norm.exact=true orders "
            f"norm.normalization_batch={case.asked}.\n"
            f"Use norm=auto, or norm.normalization_batch={spec.normalization_batch}.",
        )
    if kind == "batch" and b < case.least:
        warning = f"{b} < {case.least} samples: expect a worse model; norm=auto would choose otherwise"
        spec = dataclasses.replace(spec, alternatives=(warning,))
    return spec
