"""The answer to "who shares statistics?" as plain data: what `decide` gives and `convert` takes. No torch."""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any

from distnorm.errors import ConfigError, did_you_mean

KINDS = (
    "auto",
    "batch",
    "sync",
    "ghost",
    "renorm",
    "frozen",
    "group",
    "group_ws",
    "layer",
    "instance",
    "response",
    "none",
)
BATCH_KINDS = ("batch", "sync", "ghost", "renorm")
"""Kinds whose statistics are a batch's; the others' are a sample's own, constants, or none."""

RENORM = {"r_max": 1, "d_max": 0, "warmup": 0, "ramp": 0}
"""Settings of batch renormalization, and the least each may be."""

EVALUATIONS = ("running", "pooled", "precise")

Override = Mapping[str, Any]
"""Fields of a `NormSpec` that differ for some layers: `{"kind": "group", "groups": 8}`."""


@dataclasses.dataclass(frozen=True)
class Alternative:
    """Another decision that would work.

    Attributes:
        setting: what to set, as on the command line: `norm=sync norm.sync_ranks=4`.
        why: what speaks for it, or against.
        penalty: expected points of top-1 accuracy lost against the best; `None` where nobody measured.
        cost_ms: predicted wire time of its synchronization a step; `None` where it depends.
    """

    setting: str
    why: str = ""
    penalty: float | None = None
    cost_ms: float | None = None

    def __str__(self) -> str:
        """Give the setting and why, in one line."""
        return f"{self.setting}: {self.why}" if self.why else self.setting


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """The answer to "who shares statistics?", as plain data that a checkpoint can hold.

    Attributes:
        kind: `batch` (local), `sync` (over ranks), `ghost` (parts of a device batch), `renorm` (batch renormalization),
            `frozen` (constants), `group` (GroupNorm), `group_ws` (GroupNorm, and standardized convolutions before it),
            `layer` (one group), `instance` (a group a channel), `response` (filter response) or `none` (no norm).
        normalization_batch: samples that share one set of statistics; 1 where a sample's statistics are its own.
        sync_ranks: ranks that pool together, in blocks of consecutive ranks; 1 unless `kind` is `sync` or `renorm`.
        ghost_batch: samples that share statistics inside one device, for `ghost`; else `None`.
        groups: the most groups a GroupNorm gets; a layer takes the largest divisor of its channels up to it that leaves
            2 channels a group.
        renorm: the limits of batch renormalization and their schedule: `r_max`, `d_max`, `warmup`, `ramp`; those left
            out are the layer's own.
        momentum: weight of a new batch in the running statistics; `None` keeps each layer's own.
        evaluation: what evaluation normalizes with: `running` statistics, those of all ranks `pooled`, or `precise`
            ones, measured anew with the weights of the moment.
        frozen_last: the share of training, at its end, in which the statistics are constants.
        per_kind: overrides for the layers of one dimension: `{"vector": {"kind": "layer"}}`, the norms of [N, C].
        layers: overrides for the layers whose name matches a glob: `{"layer4.*": {"kind": "group"}}`; the first that
            matches, before `per_kind`.
        include: globs of the layer names that `convert` may change.
        exclude: globs of the names it leaves as they are, though `include` has them.
        device_batch: samples one device sees per forward; what the decision was made for.
        world_size: ranks; likewise.
        reasons: why, in words.
        evidence: what the decision rests on, each `source: number`.
        penalty: expected points of top-1 accuracy lost against the best, on ImageNet's scale; `None` where nobody
            measured.
        cost_ms: predicted wire time of the synchronization a step; `None` where nothing was predicted.
        alternatives: what else would work, the least penalty first.
    """

    kind: str
    normalization_batch: int
    sync_ranks: int = 1
    ghost_batch: int | None = None
    groups: int = 32
    renorm: Mapping[str, float] = dataclasses.field(default_factory=dict)
    momentum: float | None = None
    evaluation: str = "running"
    frozen_last: float = 0.0
    per_kind: Mapping[str, Override] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, Override] = dataclasses.field(default_factory=dict)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    device_batch: int = 0
    world_size: int = 1
    reasons: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    penalty: float | None = None
    cost_ms: float | None = None
    alternatives: tuple[Alternative, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no layer could be.

        Raises:
            ConfigError: an unknown kind, evaluation or limit, a number out of range, or a ghost without its size.
        """
        if self.kind not in KINDS[1:]:
            near = did_you_mean(str(self.kind), KINDS[1:]) or " Use e.g. kind='sync'."
            raise ConfigError(f"NormSpec.kind={self.kind!r} is not one of {', '.join(KINDS[1:])}.{near}")
        if self.evaluation not in EVALUATIONS:
            near = did_you_mean(str(self.evaluation), EVALUATIONS) or " Use e.g. evaluation='running'."
            raise ConfigError(f"NormSpec.evaluation={self.evaluation!r} is not one of {', '.join(EVALUATIONS)}.{near}")
        check_renorm(self.renorm)
        _check_numbers(self)
        if self.kind == "ghost" and self.ghost_batch is None:
            raise ConfigError(
                "NormSpec has kind='ghost' and ghost_batch=None: a ghost has a size.\n"
                "Let decide() make it, or give both."
            )

    def of(self, name: str, dimension: str = "") -> "NormSpec":
        """Give the decision for one layer, with the overrides that hold for it.

        Args:
            name: the layer's, in the model.
            dimension: `vector` for a norm of [N, C], after a linear layer or flattened; else `2d`, `3d` or empty.
        """
        by_name = (change for glob, change in self.layers.items() if fnmatch.fnmatchcase(name, glob))
        change = next(by_name, self.per_kind.get(dimension))
        return self if change is None else dataclasses.replace(self, per_kind={}, layers={}, **change)

    def in_words(self) -> str:
        """Say it in one line: `sync over 4 ranks, normalization batch 32`."""
        over = f"over {self.sync_ranks} rank{'s' if self.sync_ranks > 1 else ''}"
        names = {
            "batch": "local batch norm",
            "sync": f"sync {over}",
            "ghost": f"ghost batches of {self.ghost_batch}",
            "renorm": f"batch renormalization {over}",
            "frozen": "frozen batch norm, constants",
            "group": "GroupNorm, each sample alone",
            "group_ws": "GroupNorm with weight standardization, each sample alone",
            "layer": "LayerNorm, each sample alone",
            "instance": "InstanceNorm, each sample alone",
            "response": "filter response normalization, each sample alone",
            "none": "no normalization",
        }
        by_batch = self.kind in BATCH_KINDS
        return names[self.kind] + (f", normalization batch {self.normalization_batch}" if by_batch else "")

    def __str__(self) -> str:
        """Give the decision and its reasons, one a line, and the first alternative if much better is expected of it."""
        first = self.alternatives[:1]
        better = [f"  or {other}" for other in first if _is_better(other.penalty, self.penalty)]
        return "\n".join([self.in_words(), *(f"  because {text}" for text in self.reasons), *better])

    def to_dict(self) -> dict[str, Any]:
        """Give plain lists, numbers and strings, as JSON and `torch.load(weights_only=True)` want them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NormSpec":
        """Rebuild what `to_dict` wrote, today's or an earlier version's.

        Alternatives were words once, and norms of vectors were called `1d`.

        Raises:
            ConfigError: fields that only a later version has, or none of the decision.
        """
        _check_fields(cls, values, ("kind", "normalization_batch"))
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        others = arguments.get("alternatives", ())
        for other in (other for other in others if isinstance(other, dict)):
            _check_fields(Alternative, other, ("setting",))
        arguments["alternatives"] = tuple(Alternative(**a) if isinstance(a, dict) else Alternative(a) for a in others)
        overrides = arguments.get("per_kind", {})
        arguments["per_kind"] = {("vector" if k == "1d" else k): change for k, change in overrides.items()}
        return cls(**arguments)


def check_renorm(renorm: Any) -> None:
    """Refuse limits that batch renormalization does not have.

    Raises:
        ConfigError: no mapping, an unknown limit, or one below its least.
    """
    rule = ", ".join(f"{key} of at least {least}" for key, least in RENORM.items())
    if not isinstance(renorm, Mapping):
        raise ConfigError(f"norm.renorm={renorm!r:.80} must be limits by name: {rule}. Use e.g. norm.renorm.r_max=3.")
    for name, value in renorm.items():
        if name not in RENORM:
            near = did_you_mean(str(name), RENORM) or " Leave it out."
            raise ConfigError(f"norm.renorm={dict(renorm)} may have {rule}, and has {name!r}.{near}")
        if not _is_number(value) or not RENORM[name] <= value < math.inf:  # nor nan
            example = {"r_max": 3, "d_max": 5, "warmup": 200, "ramp": 800}[name]
            raise ConfigError(
                f"norm.renorm.{name}={value!r} must be a finite number of at least {RENORM[name]}. "
                f"Use e.g. norm.renorm.{name}={example}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_numbers(spec: NormSpec) -> None:
    """Refuse numbers that no decision has."""
    ghost, momentum = spec.ghost_batch, spec.momentum
    frozen = spec.frozen_last
    rules = {
        "normalization_batch": (_is_count(spec.normalization_batch), "a whole number of at least 1", 32),
        "sync_ranks": (_is_count(spec.sync_ranks), "a whole number of at least 1", 4),
        "ghost_batch": (ghost is None or _is_count(ghost, 2), "None or a whole number of at least 2", 16),
        "groups": (_is_count(spec.groups), "a whole number of at least 1", 32),
        "momentum": (momentum is None or (_is_number(momentum) and 0 < momentum <= 1), "None or in (0, 1]", 0.1),
        "frozen_last": (_is_number(frozen) and 0 <= frozen < 1, "a share of training, in [0, 1)", 0.2),
    }
    for name, (holds, rule, example) in rules.items():
        if not holds:
            value = getattr(spec, name)
            raise ConfigError(f"NormSpec.{name}={value!r:.40} must be {rule}. Use e.g. {name}={example}.")


def _check_fields(cls: type, values: Any, needed: tuple[str, ...]) -> None:
    if not isinstance(values, Mapping) or any(name not in values for name in needed):
        raise ConfigError(
            f"{values!r:.80} is no {cls.__name__}: it has no {' and '.join(needed)}. Give what NormSpec.to_dict wrote."
        )
    unknown = sorted(str(name) for name in values.keys() - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise ConfigError(
            f"{cls.__name__} has fields that this distnorm does not know: {', '.join(unknown)}.\n"
            "The distnorm that wrote them is newer. Update distnorm to read it (pip install --upgrade distnorm)."
        )


def _is_better(penalty: float | None, than: float | None) -> bool:
    return penalty is not None and than is not None and penalty <= than - 0.5


def group_count(channels: int, most: int = 32) -> int:
    """Choose GroupNorm's groups: the largest divisor of `channels` up to `most` that leaves 2 channels a group.

    One channel a group would be instance norm, that returns 0 on a 1 × 1 map. A prime number of channels gets one
    group.

    Source: Wu & He 2018, table 3 (32 groups best, 2 channels a group 1.5 points worse than 16).
    """
    return max(g for g in range(1, most + 1) if channels % g == 0 and (channels // g >= 2 or g == 1))
