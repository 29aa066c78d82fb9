"""Answers to a request for one kind of norm, for ranks, or for an exact number of samples."""

import dataclasses
import re

from distnorm.errors import ConfigError, divisors_in_words
from distnorm.policy.case import Case, divisors
from distnorm.spec import BATCH_KINDS, NormSpec


def obey_ranks(case: Case) -> NormSpec:
    """Answer `auto` with ranks: the ranks were asked for, the kind was not."""
    reached = int(case.sync_ranks or 1) * case.device_batch
    if case.exact and reached != case.normalization_batch:
        raise ConfigError(
            f"norm.sync_ranks={case.sync_ranks} gives a normalization batch of {reached}, and norm.exact=true orders "
            f"norm.normalization_batch={case.normalization_batch}.\n"
            f"Leave norm.sync_ranks out, or use norm.normalization_batch={reached}.",
        )
    spec = obey(dataclasses.replace(case, kind="sync"))
    return dataclasses.replace(spec, reasons=spec.reasons[1:])


def obey(case: Case) -> NormSpec:
    """Answer a request for one kind, and say what it means for the normalization batch.

    Raises:
        ConfigError: a ghost that does not part the device batch, an exact number that this kind does not give.
    """
    asked = f"norm.kind={case.kind} was asked for"
    if case.kind not in BATCH_KINDS:
        constants = "constants 0 and 1, as without norms, unless the model's statistics were learned (norm.pretrained)"
        is_fresh = case.kind == "frozen" and not case.pretrained
        return NormSpec(case.kind, 1, reasons=(asked, *(constants,) * is_fresh))
    b, ranks = case.device_batch, _ranks(case)
    if case.kind == "ghost":
        ghost = ghost_size("norm.kind=ghost", case, min(case.normalization_batch, b))
        why = f"device batch {b} in ghosts of {ghost}"
        spec = NormSpec("ghost", ghost, ghost_batch=ghost, reasons=(asked, why))
    elif case.kind == "batch":
        spec = NormSpec("batch", b, reasons=(asked, f"each rank normalizes over its own {b} samples"))
    else:
        how = f"norm.sync_ranks={ranks}" if case.sync_ranks is not None or case.kind == "renorm" else "over all ranks"
        why = f"{how}: {ranks} × {b} = {ranks * b}"
        spec = NormSpec(case.kind, ranks * b, sync_ranks=ranks, reasons=(asked, why))
    return _held_to_exact(case, spec)


def _ranks(case: Case) -> int:
    """Read the ranks of a request: all for `sync`, one for `renorm`, if not given."""
    if case.sync_ranks is not None:
        return case.sync_ranks
    return case.world_size if case.kind == "sync" else 1


def ghost_size(setting: str, case: Case, ghost: int) -> int:
    """Check that ghosts of this size part the device batch, with a variance each."""
    b = case.device_batch
    if b < 2:
        raise ConfigError(
            f"{setting} with device_batch={b}: a ghost needs 2 samples of one device.\n"
            "Use a data.device_batch of at least 2, or norm=instance, that normalizes each sample alone.",
        )
    if b % ghost:
        raise ConfigError(
            f"{setting} cannot part device_batch={b} into ghosts of norm.normalization_batch={ghost}.\n"
            f"Use a divisor of {b}: {re.sub('^1(, | or )', '', divisors_in_words(b))}.",
        )
    if ghost < 2:
        raise ConfigError(
            f"{setting} with norm.normalization_batch={ghost} and device_batch={b}: a ghost needs 2 samples.\n"
            "Use at least 2, or norm=instance, that normalizes each sample alone.",
        )
    return ghost


def _held_to_exact(case: Case, spec: NormSpec) -> NormSpec:
    if case.exact and spec.normalization_batch != case.normalization_batch:
        without = " without norm.sync_ranks" if case.sync_ranks is not None else ""
        raise ConfigError(
            f"norm.kind={case.kind} gives a normalization batch of {spec.normalization_batch}, and norm.exact=true "
            f"orders norm.normalization_batch={case.normalization_batch}.\n"
            f"Use norm=auto{without}, or norm.normalization_batch={spec.normalization_batch}.",
        )
    return spec


def reach_exactly(case: Case) -> NormSpec:
    """Give the asked normalization batch by local batch norm, ghosts or sync.

    Raises:
        ConfigError: none gives it; with the numbers that can be had.
    """
    b, asked = case.device_batch, case.normalization_batch
    if asked == b > 1:
        why = f"device batch {b} is exactly the normalization batch asked for"
        return NormSpec("batch", b, reasons=(why, *_overridden(case, 1)))
    if b % asked == 0 and asked > 1:
        why = f"exact: device batch {b} is split in {b // asked} ghost batches of {asked}"
        return NormSpec("ghost", asked, ghost_batch=asked, reasons=(why, *_overridden(case, 1)))
    if asked % b == 0 and asked > 1 and case.world_size % (asked // b) == 0:
        ranks = asked // b
        why = f"exact: {ranks} ranks × device batch {b} = {asked}"
        return NormSpec("sync", asked, sync_ranks=ranks, reasons=(why, *_overridden(case, ranks)))
    possible = {d for d in divisors(b) if d > 1} | {b * g for g in case.divisors if b * g > 1}
    numbers = ", ".join(map(str, sorted(possible))) or "a larger data.device_batch"
    raise ConfigError(
        f"norm.normalization_batch={asked} cannot be hit exactly with device_batch={b} on {case.world_size} ranks: "
        f"ghosts need a divisor of {b} from 2 on, sync a multiple that divides the ranks.\n"
        f"Use {numbers}; or norm.exact=false.",
    )


def _overridden(case: Case, ranks: int) -> tuple[str, ...]:
    """Warn of what an exact number comes before, and what that costs."""
    if ranks == case.world_size > 1:
        return ()
    part = f"{case.normalization_batch} samples of {ranks} of {case.world_size} ranks share statistics"
    sorted_shards = f"norm.exact=true comes before norm.iid=false: {part}, and fit that part of the mixture only"
    contrast = f"norm.exact=true comes before norm.task=contrastive: {part}, and the loss can read them"
    compares = case.task == "contrastive" and case.world_size > 1
    return (sorted_shards,) * (not case.iid) + (contrast,) * compares
