"""`decide`: from what is asked and what is there to a `NormSpec`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from distnorm.errors import ConfigError
from distnorm.evidence import cite
from distnorm.policy.case import Case, check
from distnorm.policy.layers import by_dimension, by_name
from distnorm.policy.prices import price
from distnorm.policy.requests import obey, obey_ranks, reach_exactly
from distnorm.policy.rows import decide_by_row
from distnorm.policy.statistics import (
    evaluation_of,
    explain_evaluation,
    explain_momentum,
    explain_no_effect,
    frozen_last_of,
    momentum_of,
)
from distnorm.spec import NormSpec, Override


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
    task: str = "classification",
    pretrained: bool = False,
    iid: bool = True,
    foldable: bool = False,
    memory_bound: bool = False,
    max_overhead: float = 0.10,
    internode_latency_us: float = 5.0,
    step_ms: float | None = None,
    channels: Sequence[int] | None = None,
    momentum: float | str | None = "auto",
    evaluation: str = "auto",
    frozen_last: float | None = None,
    groups: int = 32,
    renorm: Mapping[str, float] | None = None,
    layers: Mapping[str, str | Override] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> NormSpec:
    """Decide which samples share statistics.

    Asked for a kind, that kind is the answer. `exact` gives the asked normalization batch, exactly, or refuses with the
    numbers that can be had. Else `auto` goes down this list, b samples a device:

    1. Sequences: LayerNorm. Generative models, reinforcement: GroupNorm.
    2. Contrastive: sync over at least 256 samples. Shards that differ: sync over all ranks, or GroupNorm.
    3. Pretrained: sync over `normalization_batch` samples; constants, where fewer than the least can share.
    4. b above 256: ghost batches. b of at least `min_normalization_batch`: local batch norm.
    5. Sync over the fewest ranks of a node that give `normalization_batch`, or a whole node if that gives the least;
       over 2 to 4 nodes, where latency and overhead allow.
    6. Else, where norms must fold, batch renormalization, or GroupNorm with standardized weights.

    Args:
        device_batch: samples one device sees per forward, at least 1.
        world_size: ranks, at least 1.
        kind: one of `KINDS`.
        normalization_batch: samples that shall share one set of statistics.
        min_normalization_batch: the fewest that are still worth batch statistics.
        exact: take `normalization_batch` as an order, so that other hardware trains the same.
        sync_ranks: ranks that pool together; for `sync` (`None`: all), `renorm` (`None`: 1) and `auto` (`None`:
            derived).
        ranks_per_node: ranks on one machine; `None`: all on one.
        task: one of `TASKS`: what is trained.
        pretrained: the weights come from a batch norm model and are fine-tuned.
        iid: every rank's samples come from the same distribution; `False` for sorted shards or a domain a rank.
        foldable: inference needs norms that fold into the layer before them.
        memory_bound: activations fill the memory: adds what saves some.
        max_overhead: the largest share of a step that exchanges between nodes may take.
        internode_latency_us: one hop between nodes; up to 20 is fast.
        step_ms: a step without synchronization; `None`: 44, ResNet-50 over 32 images on a V100.
        channels: of each batch norm of the model; `None`: ResNet-50's 53.
        momentum: for the running statistics; `auto`: they hold 1000 samples; `None` keeps each layer's own.
        evaluation: `running`, `pooled`, `precise`, or `auto`.
        frozen_last: the share of training, at its end, with constant statistics; `None`: as decided.
        groups: the most groups of a GroupNorm.
        renorm: limits of batch renormalization and their schedule: `r_max`, `d_max`, `warmup`, `ramp`.
        layers: what layers get instead, by name: `{"layer4.*": "group", "head.*": {"kind": "sync", "sync_ranks": 2}}`.
        include: globs of the names of layers that may be converted.
        exclude: globs of those that stay as they are.

    Returns:
        The decision, with its reasons, evidence, price and alternatives.

    Raises:
        ConfigError: a number out of range, an unknown word, ranks that cannot be grouped so, an exact number out of
            reach, overrides that contradict themselves.

    Example:
        >>> decide(8, 4).in_words()
        'sync over 4 ranks, normalization batch 32'
        >>> decide(2, 4, pretrained=True).kind
        'frozen'
    """
    case = Case(**locals())
    check(case)
    spec = _answer(case)
    per_kind, why = by_dimension(case, spec)
    spec = dataclasses.replace(
        spec,
        per_kind=per_kind,
        layers=by_name(case, spec),
        groups=groups,
        renorm=dict(renorm or {}),
        include=_globs("include", include),
        exclude=_globs("exclude", exclude),
        momentum=momentum_of(case, spec.kind, spec.normalization_batch),
        device_batch=device_batch,
        world_size=world_size,
        reasons=spec.reasons + why,
    )
    return price(case, _with_statistics(case, spec))


def _answer(case: Case) -> NormSpec:
    if case.kind != "auto":
        return obey(case)
    if case.sync_ranks is not None:
        return obey_ranks(case)
    if case.exact:
        return reach_exactly(case)
    return decide_by_row(case)


def _with_statistics(case: Case, spec: NormSpec) -> NormSpec:
    spec = dataclasses.replace(spec, evaluation=evaluation_of(case, spec), frozen_last=frozen_last_of(case, spec))
    why, evidence = explain_evaluation(case, spec)
    momentum = explain_momentum(case, spec)
    evidence += cite("window") if momentum else ()
    return dataclasses.replace(
        spec,
        reasons=(*spec.reasons, *why, *momentum, *explain_no_effect(case, spec)),
        evidence=spec.evidence + evidence,
    )


def _globs(name: str, given: Any) -> tuple[str, ...]:
    globs = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if not all(isinstance(glob, str) and glob for glob in globs) or (name == "include" and not globs):
        raise ConfigError(f'{name}={given!r} must be globs of layer names. Use e.g. {name}=["layer4.*"].')
    return globs
