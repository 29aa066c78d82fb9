"""Overrides: what single layers get, by name as the user asks, and by dimension where the decision does not fit."""

from collections.abc import Mapping
from typing import Any

from distnorm.errors import ConfigError, did_you_mean
from distnorm.policy.case import Case, check_sync_ranks, check_word
from distnorm.policy.requests import ghost_size
from distnorm.policy.statistics import momentum_of
from distnorm.spec import BATCH_KINDS, KINDS, NormSpec

FIELDS = ("kind", "sync_ranks", "ghost_batch", "normalization_batch", "groups", "momentum")
"""What an override may name."""

FEWEST_VECTORS = 4
"""Samples below which a vector's batch norm gives out little more than its sign: of 2, exactly ±1."""


def by_name(case: Case, base: NormSpec) -> dict[str, dict[str, Any]]:
    """Bring the user's overrides to full fields that agree with one another.

    Args:
        case: its `layers`: `{"layer4.*": "group"}` or `{"layer4.*": {"kind": "sync", "sync_ranks": 2}}`.
        base: what the other layers get.

    Raises:
        ConfigError: not so written, an unknown field or kind, or numbers that do not go together.
    """
    if case.layers is None:
        return {}
    if not isinstance(case.layers, Mapping) or not all(isinstance(glob, str) and glob for glob in case.layers):
        raise ConfigError(
            f"norm.layers={case.layers!r:.80} must map globs of layer names to kinds. "
            "Use e.g. 'norm.layers={layer4.*: group}'."
        )
    return {glob: _full(case, base, glob, given) for glob, given in case.layers.items()}


def by_dimension(case: Case, base: NormSpec) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Override norms of vectors [N, C] (after a linear layer or flattened), that have no positions to average over.

    Returns:
        `per_kind` of the decision, and the reasons.
    """
    if base.kind in {"group", "group_ws", "instance", "response"}:
        why = "norms of vectors become LayerNorm: a channel has 1 value and a group as few as 2, and 2 come out as ±1"
        return {"vector": override(case, "layer")}, (why,)
    samples, ranks = base.normalization_batch, 1
    if base.kind == "batch" and case.kind == "auto" and samples < case.aim:
        enough = (g for g in case.in_node if g * case.device_batch >= case.aim)
        ranks = next(enough, case.in_node[-1])
        samples = ranks * case.device_batch
    if base.kind in BATCH_KINDS and samples < FEWEST_VECTORS:
        return {"vector": override(case, "layer")}, (
            f"norms of vectors become LayerNorm: statistics over {samples} < {FEWEST_VECTORS} give little but signs",
        )
    if ranks > 1:
        why = f"norms of vectors sync over {ranks} ranks, {samples} samples: there are no positions to average over"
        return {"vector": override(case, "sync", ranks)}, (why,)
    return {}, ()


def override(case: Case, kind: str, sync_ranks: int = 1, ghost_batch: int | None = None) -> dict[str, Any]:
    """Give all fields that depend on the kind, so that no layer takes one from the decision for the others."""
    samples = ghost_batch or (sync_ranks * case.device_batch if kind in BATCH_KINDS else 1)
    return {
        "kind": kind,
        "sync_ranks": sync_ranks,
        "ghost_batch": ghost_batch,
        "normalization_batch": samples,
        "momentum": momentum_of(case, kind, samples),
    }


def _full(case: Case, base: NormSpec, glob: str, given: Any) -> dict[str, Any]:
    asked = {"kind": given} if isinstance(given, str) else given
    key = f"norm.layers[{glob!r}]"
    if not isinstance(asked, Mapping):
        raise ConfigError(
            f"{key}={given!r} must be a kind, or fields with one. "
            f"Use e.g. 'norm.layers={{{glob}: {{kind: sync, sync_ranks: 2}}}}'."
        )
    for unknown in (name for name in asked if name not in FIELDS):
        near = did_you_mean(str(unknown), FIELDS)
        raise ConfigError(f"{key}.{unknown} is not one of {', '.join(FIELDS)}.{near} Leave it out.")
    kind = asked.get("kind", base.kind)
    check_word(f"{key}.kind", kind, KINDS[1:])
    full = override(case, kind, _ranks(case, key, kind, asked), _ghost(case, key, kind, asked))
    _check_samples(key, asked, full)
    return full | _own_groups(key, asked) | _own_momentum(key, asked)


def _ranks(case: Case, key: str, kind: str, asked: Mapping[str, Any]) -> int:
    ranks = asked.get("sync_ranks")
    if ranks is None:
        return case.world_size if kind == "sync" else 1
    if kind in {"sync", "renorm"} or ranks != 1:
        try:
            check_sync_ranks(ranks, case.world_size, kind)
        except ConfigError as error:
            raise ConfigError(str(error).replace("norm.sync_ranks", f"{key}.sync_ranks")) from None
    return int(ranks)


def _ghost(case: Case, key: str, kind: str, asked: Mapping[str, Any]) -> int | None:
    size = asked.get("ghost_batch")
    if kind != "ghost":
        if size is not None:
            raise ConfigError(
                f"{key}.ghost_batch={size!r} has no meaning for kind={kind}. Use kind=ghost, or leave it out."
            )
        return None
    if size is None:
        size = asked.get("normalization_batch", min(case.normalization_batch, case.device_batch))
    if type(size) is not int or size < 1:
        raise ConfigError(f"{key}.ghost_batch={size!r} must be at least 2, a whole number. Use e.g. ghost_batch=16.")
    return ghost_size(key, case, size)


def _check_samples(key: str, asked: Mapping[str, Any], full: Mapping[str, Any]) -> None:
    samples = asked.get("normalization_batch", full["normalization_batch"])
    if samples != full["normalization_batch"]:
        raise ConfigError(
            f"{key}.normalization_batch={samples!r}, and its kind={full['kind']} with sync_ranks={full['sync_ranks']} "
            f"gives {full['normalization_batch']}.\nLeave normalization_batch out, or change sync_ranks."
        )


def _own_groups(key: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    groups = asked.get("groups")
    if groups is None:
        return {}
    if type(groups) is not int or groups < 1:
        raise ConfigError(f"{key}.groups={groups!r} must be at least 1, a whole number. Use e.g. groups=32.")
    return {"groups": groups}


def _own_momentum(key: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    momentum = asked.get("momentum")
    if momentum is None:
        return {}
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 < momentum <= 1:
        raise ConfigError(f"{key}.momentum={momentum!r} must be in (0, 1]. Use e.g. momentum=0.1.")
    return {"momentum": momentum}
