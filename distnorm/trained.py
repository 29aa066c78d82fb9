"""What a norm has learned, and where it keeps it: nothing yet, statistics, or weight and bias that carry them.

Many detection checkpoints ship norms whose statistics are 0 and 1: weight and bias hold the whole map. As constants
they are right; with statistics of a batch or a sample they compute something else.
"""

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from distnorm.norms.surgery import source_of
from distnorm.spec import BATCH_KINDS, NormSpec

_log = logging.getLogger(__name__)


def saw_no_batch(norm: nn.Module) -> bool:
    """Tell whether a norm does nothing: statistics 0 and 1 that count no batch, and an affine part as it was built."""
    batches = getattr(norm, "num_batches_tracked", None)
    return has_first_statistics(norm) and not has_learned_affine(norm) and (batches is None or not batches.any())


def is_carried_by_weights(norm: nn.Module) -> bool:
    """Tell whether weight and bias carry the statistics: these are 0 and 1, and weight and bias are learned.

    A new model whose biases start at random (RepVGG's) looks the same: what is said of it is for loaded weights.
    """
    return has_first_statistics(norm) and has_learned_affine(norm)


def has_first_statistics(norm: nn.Module) -> bool:
    """Tell whether running statistics are 0 and 1, or so near to 1 that `eps` makes it 1 (as detectron2 has it)."""
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.is_meta:
        return False
    near = 2 * float(getattr(norm, "eps", None) or 0.0)
    return not mean.any() and bool(((var.double() - 1).abs() <= near).all() if near < 0.1 else (var == 1).all())


def has_learned_affine(norm: nn.Module) -> bool:
    """Tell whether weight and bias are learned: initial ones are alike in all channels, or weights alone are random."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    telling = weight if bias is None else bias
    if not isinstance(telling, Tensor) or telling.is_meta or not telling.numel():
        return False
    if telling.numel() == 1:
        return bias is not None and bool(telling.any())
    return bool((telling != telling.flatten()[0]).any())


def warn(norms: Mapping[str, nn.Module], specs: Mapping[str, NormSpec]) -> None:
    """Say once how many norms become constants that no batch has reached, and how many lose what weights carry."""
    frozen = [norms[name] for name, own in specs.items() if own.kind == "frozen"]
    empty = sum(map(saw_no_batch, frozen))
    if empty:
        _log.warning(
            "norm=frozen: %d of %d layers have seen no batch: constants 0 and 1, as if there were no norms. "
            "Load the weights first.",
            empty,
            len(frozen),
        )
    lost = [name for name, own in specs.items() if own.kind != "frozen" and is_carried_by_weights(norms[name])]
    if lost:
        _log.warning(
            "%d of %d layers (%s, …) have statistics 0 and 1, and weights and biases that differ between channels:\n"
            "loaded so, these carry the statistics, and with other statistics the layers compute something else.\n"
            "Keep them as constants (kind='frozen', or exclude=%r), or load weights that come with statistics.",
            len(lost),
            len(specs),
            lost[0],
            lost[:1],
        )


def note_of(norm: nn.Module, spec: NormSpec) -> str:
    """Say what a conversion does to what the norm has learned, where that is not plain; starts with a semicolon."""
    if is_carried_by_weights(norm):
        if spec.kind == "frozen":
            return "; weight and bias carry the statistics (0 and 1)"
        return "; loaded with statistics 0 and 1, weight and bias carry them: it computes something else now"
    if spec.kind == "frozen" or has_first_statistics(norm) or getattr(norm, "running_mean", None) is None:
        return ""
    source, by_batch = source_of(norm), spec.kind in BATCH_KINDS
    note = _of_no_count(norm, spec) if by_batch else ""
    if source is not None and source.frozen:
        note = f"; these were constants: {'training takes batch statistics' if by_batch else 'they are gone'} now{note}"
    return note


def _of_no_count(norm: nn.Module, spec: NormSpec) -> str:
    """Say what becomes of statistics that count no batch, as of a checkpoint that has no `num_batches_tracked`."""
    momentum, batches = getattr(norm, "momentum", 0.1), getattr(norm, "num_batches_tracked", None)
    if batches is not None and (batches.is_meta or batches.any()):
        return ""
    if spec.kind == "renorm":
        return "; its statistics count no batch: no correction in the first steps"
    if momentum is None and spec.momentum is None:
        return "; its statistics count no batch: with momentum=None the first one replaces them"
    return ""
