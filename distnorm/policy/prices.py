"""What a decision costs: expected accuracy, predicted time, and both for what could be chosen instead."""

import dataclasses
from collections.abc import Callable

from distnorm import evidence
from distnorm.policy.case import Case
from distnorm.policy.rows import FROZEN_SHARE, GHOST_ABOVE
from distnorm.spec import BATCH_KINDS, Alternative, NormSpec

_ALONE = {"group": 0.5, "group_ws": 0.0, "layer": 1.7, "instance": 4.8, "response": 0.4}
"""Points lost whatever the device batch: against batch norm over 32 images (Wu & He 2018; FRN's replication), and over
64 (Qiao et al. 2019, where standardized weights lose none)."""

MOST = 4


@dataclasses.dataclass(frozen=True)
class _Option:
    setting: str
    kind: str
    sync_ranks: int
    why: str
    normalization_batch: int = 1
    frozen_last: float = 0.0


def penalty_of(
    case: Case, kind: str, normalization_batch: int, frozen_last: float = 0.0, sync_ranks: int = 1
) -> float | None:
    """Expect points of top-1 accuracy lost against the best.

    Returns:
        `None` where the measurements do not speak: tasks other than vision, statistics over a part of shards that
        differ, batch renormalization, constants.
    """
    if case.task not in {"classification", "dense"}:
        return None
    if kind not in BATCH_KINDS:
        return _ALONE.get(kind)
    if not case.iid and sync_ranks < case.world_size:
        return None
    if kind == "renorm":
        return None
    if frozen_last >= FROZEN_SHARE:
        return evidence.penalty(normalization_batch, evidence.FROZEN_LATE_CURVE)
    return evidence.penalty(normalization_batch)


def price(case: Case, spec: NormSpec) -> NormSpec:
    """Fill in a decision's penalty and cost, and its alternatives: the least penalty first, then the least cost."""
    penalty = penalty_of(case, spec.kind, spec.normalization_batch, spec.frozen_last, spec.sync_ranks)
    others = [
        Alternative(
            option.setting,
            option.why,
            penalty_of(case, option.kind, option.normalization_batch, option.frozen_last, option.sync_ranks),
            case.cost_of(option.sync_ranks),
        )
        for option in map(_typed_after(case), _options(case))
        if (option.kind, option.sync_ranks, option.normalization_batch) != _key(spec) and _obeys(case, option)
    ]
    ranked = sorted(others, key=lambda a: (a.penalty is None, a.penalty or 0.0, a.cost_ms or 0.0, a.setting))
    return dataclasses.replace(
        spec,
        penalty=penalty,
        cost_ms=case.cost_of(spec.sync_ranks),
        alternatives=(*ranked[:MOST], *_beside(case, spec)),
    )


def _key(spec: NormSpec) -> tuple[str, int, int]:
    return spec.kind, spec.sync_ranks, spec.normalization_batch


def _obeys(case: Case, option: _Option) -> bool:
    """Tell whether an option gives the number that `exact` orders, if it has one."""
    return not case.exact or option.kind not in BATCH_KINDS or option.normalization_batch == case.normalization_batch


def _typed_after(case: Case) -> Callable[[_Option], _Option]:
    """Take back ranks that were asked for and that an option would be refused with."""

    def complete(option: _Option) -> _Option:
        if case.sync_ranks is None or "norm.sync_ranks" in option.setting:
            return option
        return dataclasses.replace(option, setting=f"{option.setting} norm.sync_ranks=null")

    return complete


def _options(case: Case) -> list[_Option]:
    if case.task == "sequence":
        return [_Option("norm=group", "group", 1, "several groups of channels instead of one")]
    if case.task in {"generative", "reinforcement"}:
        return [
            _Option("norm=instance", "instance", 1, "each channel alone, as in generators"),
            _Option("norm=layer", "layer", 1, "all channels together"),
            _Option("norm=none", "none", 1, "no norm at all"),
        ]
    return [*_synchronized(case), *_local(case), *_alone(case)]


def _synchronized(case: Case) -> list[_Option]:
    """Sync over what reaches the aim, over a node, over all."""
    b = case.device_batch
    aim = case.normalization_batch if case.exact else case.aim
    enough = next((g for g in case.divisors if g * b >= aim), case.world_size)
    sizes = {enough, case.in_node[-1], case.world_size} if case.iid else {case.world_size}
    options = []
    for ranks in sorted(g for g in sizes if g > 1 and g * b > 1):
        nodes = case.nodes_of(ranks)
        where = f"over {nodes} nodes" if nodes > 1 else "inside a node"
        setting = f"norm=sync norm.sync_ranks={ranks}"
        options.append(_Option(setting, "sync", ranks, f"{ranks * b} samples, {where}", ranks * b))
    return options


def _local(case: Case) -> list[_Option]:
    """Stay on the device, unless that is what must not be."""
    b, options = case.device_batch, []
    if case.task == "contrastive" or not case.iid:
        return []
    if b > 1:
        options.append(_Option("norm=batch", "batch", 1, f"{b} samples, no exchange", b))
        why = f"{b} samples, statistics constant for the last fifth; folds for inference"
        setting = f"norm=renorm norm.frozen_last={FROZEN_SHARE}"
        options.append(_Option(setting, "renorm", 1, why, b, FROZEN_SHARE))
    size = case.normalization_batch if case.exact else case.aim
    if b > (size if case.exact else GHOST_ABOVE) and b % size == 0 and size > 1:
        setting = f"norm=ghost norm.normalization_batch={size}"
        options.append(_Option(setting, "ghost", 1, f"parts of {size} samples", size))
    return options


def _alone(case: Case) -> list[_Option]:
    frozen = _Option("norm=frozen", "frozen", 1, "the pretrained statistics as constants; nothing to exchange")
    group = _Option("norm=group", "group", 1, "where a GroupNorm checkpoint exists")
    if case.foldable or case.pretrained:
        return [group] * (not case.foldable) + [frozen] * case.pretrained
    why = "any device batch; tune the learning rate anew, inference cannot fold it"
    return [_Option("norm=group_ws", "group_ws", 1, why)]


def _beside(case: Case, spec: NormSpec) -> tuple[Alternative, ...]:
    """Name what goes with a decision rather than replaces it."""
    beside = []
    if spec.kind == "frozen" and case.pretrained:
        setting, why = "'norm.layers={head.*: group}'", "GroupNorm in new heads: +0.9 box AP on COCO"
        beside.append(Alternative(setting, why, cost_ms=0.0))
    if case.memory_bound and spec.kind in BATCH_KINDS:
        why = "recomputes activations instead of keeping them; statistics move once all the same"
        beside.append(Alternative("activation checkpointing", why))
    return tuple(beside)
