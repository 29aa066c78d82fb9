"""The running statistics that a decision asks for: their momentum, and what evaluation uses."""

from distnorm.evidence import cite
from distnorm.policy.case import Case
from distnorm.spec import BATCH_KINDS, NormSpec

HELD = 1000
"""Samples that a running average shall hold."""

TORCH_MOMENTUM = 0.1
TRUSTED = 16
"""Fewer samples a batch, and running averages do not tell what a batch looks like: measure anew."""


def momentum_of(case: Case, kind: str, normalization_batch: int) -> float | None:
    """Give the momentum of a layer: `auto` scales it to the normalization batch, and not to the world.

        a = 2 / (1000 / NBS + 1), at most 0.1

    A running average at momentum a weighs the last steps as if it held NBS (2 - a) / a samples: at 0.1 only 19 NBS.
    Each group of ranks holds its own 1000; the world does not count, so that other hardware trains the same.
    """
    if kind not in BATCH_KINDS:
        return None
    if isinstance(case.momentum, str):
        return min(TORCH_MOMENTUM, float(f"{2 / (HELD / normalization_batch + 1):.3g}"))
    return case.momentum


def explain_momentum(case: Case, spec: NormSpec) -> tuple[str, ...]:
    """Say what an automatic momentum holds."""
    momentum = spec.momentum
    if case.momentum != "auto" or momentum is None:
        return ()
    a_step = case.device_batch if spec.kind == "ghost" else spec.normalization_batch
    held = _two_digits(a_step * (2 - momentum) / momentum)
    groups = case.world_size // spec.sync_ranks
    pooled = f", those of {groups} pooled {groups * held}" if groups > 1 else ""
    start = "the pretrained ones" if case.pretrained else "its start (0 and 1)"
    forgets = f"and takes about {_two_digits(1 / momentum)} steps to forget {start}"
    return (f"momentum {momentum:.2g}: a running average holds {held} samples{pooled}, {forgets}",)


def explain_no_effect(case: Case, spec: NormSpec) -> tuple[str, ...]:
    """Name what was asked for and has no meaning for layers without batch statistics."""
    if has_batch_statistics(spec):
        return ()
    asked = {
        "momentum": case.momentum if case.momentum != "auto" else None,
        "evaluation": case.evaluation if case.evaluation not in {"auto", "running"} else None,
        "frozen_last": case.frozen_last or None,
        "exact": "true" if case.exact else None,
    }
    named = [f"norm.{name}={value}" for name, value in asked.items() if value is not None]
    have = "has no effect" if len(named) == 1 else "have no effect"
    return (f"{' and '.join(named)} {have}: norm={spec.kind} shares no statistics, and keeps none running",) * bool(
        named
    )


def has_batch_statistics(spec: NormSpec) -> bool:
    """Tell whether any layer normalizes by a batch."""
    return bool(_batch_statistics(spec))


def _two_digits(number: float) -> int:
    return int(float(f"{number:.2g}"))


def evaluation_of(case: Case, spec: NormSpec) -> str:
    """Choose what evaluation normalizes with.

    `precise` where running averages mislead: few samples, weights that move away from pretrained ones, batch
    renormalization. `pooled` where ranks keep different ones. Layers without batch statistics have nothing to repair.
    """
    theirs = _batch_statistics(spec)
    if not theirs or case.evaluation != "auto":
        return case.evaluation if theirs else "running"
    if case.pretrained or any(kind == "renorm" or samples < TRUSTED for kind, _, samples in theirs):
        return "precise"
    return "pooled" if any(ranks < case.world_size for _, ranks, _ in theirs) else "running"


def explain_evaluation(case: Case, spec: NormSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Say why evaluation needs precise statistics, if `auto` has chosen them: the reason, and the evidence."""
    if case.evaluation != "auto" or spec.evaluation != "precise":
        return (), ()
    fewest = min(samples for _, _, samples in _batch_statistics(spec))
    because = (
        f"{fewest} < {TRUSTED} samples a batch" if fewest < TRUSTED else "the pretrained ones belong to other weights"
    )
    if spec.kind == "renorm":
        because = "training itself leans on the running ones"
    return (f"evaluation measures precise statistics: {because}",), cite("precise", "evaluation")


def frozen_last_of(case: Case, spec: NormSpec) -> float:
    """Give the share of training, at its end, with constant statistics: 0 where there are none of a batch."""
    if not _batch_statistics(spec):
        return 0.0
    return spec.frozen_last if case.frozen_last is None else float(case.frozen_last)


def _batch_statistics(spec: NormSpec) -> list[tuple[str, int, int]]:
    """List kind, ranks and samples of each sort of layer with batch statistics."""
    changes = [*spec.per_kind.values(), *spec.layers.values()]
    others = [(change["kind"], change["sync_ranks"], change["normalization_batch"]) for change in changes]
    own = (spec.kind, spec.sync_ranks, spec.normalization_batch)
    return [sort for sort in (own, *others) if sort[0] in BATCH_KINDS]
