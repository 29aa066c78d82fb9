"""Arguments of a layer's constructor: the check of each, with the value, the rule and the remedy.

torch checks few of them: `nn.BatchNorm2d(3, eps=-1)` and `momentum=2` are built, and fail or go astray in a forward.
"""

import itertools
import math
import numbers
import operator
from typing import Any, NoReturn

import torch

from distnorm.errors import ConfigError

STATISTICS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Floating-point types that torch computes with; float8 types only store numbers."""


def check_batch_norm(
    owner: object, num_features: Any, eps: Any, momentum: Any, affine: Any, track_running_stats: Any, bias: Any
) -> int:
    """Check the arguments that every batch norm shares with torch's, and return `num_features` as `int`.

    Args:
        owner: the layer that is built, whose class errors carry; or the beginning of their sentence.
        num_features: channels of the input.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics, or `None`.
        affine: whether there is a weight.
        track_running_stats: whether there are running statistics.
        bias: whether there is a bias, where there is a weight.

    Raises:
        ConfigError: one of them is out of its range, or of another type.
    """
    check_eps(owner, eps)
    check_momentum(owner, momentum)
    for name, value in (("affine", affine), ("track_running_stats", track_running_stats), ("bias", bias)):
        check_flag(owner, name, value)
    return check_count(owner, "num_features", num_features, "the number of channels of the input")


def check_count(owner: object, name: str, value: Any, meaning: str) -> int:
    """Check that an argument is a whole number of at least 1, and return it as `int`.

    Args:
        owner: the layer that is built.
        name: of the argument.
        value: of the argument.
        meaning: what the argument counts, for the remedy.

    Raises:
        ConfigError: it is not.
    """
    number = _as_count(value)
    if number < 1:
        refuse(owner, name, value, f"a whole number of at least 1. Give {meaning}")
    return number


def check_eps(owner: object, value: Any, *, zero: bool = True, remedy: str = "Use e.g. eps=1e-5") -> None:
    """Check an `eps`: a finite number of at least 0.

    0 is allowed where torch allows it, for constants in evaluation; a training forward refuses it, as torch's does.

    Args:
        owner: the layer that is built.
        value: of the argument.
        zero: whether 0 is allowed.
        remedy: a value that works.

    Raises:
        ConfigError: it is none.
    """
    if not is_number(value) or not (0 <= value < math.inf) or (value == 0 and not zero):  # nor nan
        refuse(owner, "eps", value, f"a finite number {'of at least' if zero else 'above'} 0. {remedy}")


def check_momentum(owner: object, value: Any) -> None:
    """Check a `momentum`: `None`, or the share of the new batch in the running statistics, in [0, 1].

    Raises:
        ConfigError: it is neither.
    """
    if value is not None and not (is_number(value) and 0 <= value <= 1):
        rule = "None or a number in [0, 1], the weight of the new batch. Use e.g. momentum=0.1, or 1 - decay"
        refuse(owner, "momentum", value, rule)


def check_flag(owner: object, name: str, value: Any) -> None:
    """Check that an argument is `True` or `False`.

    Raises:
        ConfigError: it is neither.
    """
    if not (isinstance(value, bool) or (isinstance(value, numbers.Integral) and value in (0, 1))):
        refuse(owner, name, value, f"True or False. Give {name}=True, or {name}=False")


def check_dtype(owner: object, dtype: Any) -> None:
    """Check the dtype of parameters and running statistics.

    Raises:
        ConfigError: torch does not compute with it, or it is not a dtype.
    """
    if dtype is not None and dtype not in STATISTICS_DTYPES:
        rule = "torch.float32, bfloat16, float16, float64, or None for the default. Use e.g. dtype=torch.float32"
        refuse(owner, "dtype", dtype, rule)


def check_ranks(owner: object, sync_ranks: Any, group_ranks: Any) -> tuple[int | None, tuple[int, ...] | None]:
    """Check the ranks that a layer pools over, and return them as plain integers.

    Raises:
        ConfigError: `sync_ranks` is not a number of ranks, or `group_ranks` are not ranks in ascending order.
    """
    if sync_ranks is not None:
        number = _as_count(sync_ranks)
        if number < 1:
            raise ConfigError(
                f"sync_ranks={sync_ranks!r:.60} must be at least 1. Give a number of ranks, or None for all."
            )
        sync_ranks = number
    return sync_ranks, None if group_ranks is None else _check_group(owner, group_ranks)


def _check_group(owner: object, group_ranks: Any) -> tuple[int, ...]:
    try:
        ranks = [-1 if isinstance(rank, bool) else operator.index(rank) for rank in group_ranks]
    except TypeError:
        ranks = []
    if not ranks or ranks[0] < 0 or any(low >= high for low, high in itertools.pairwise(ranks)):
        known = sorted({rank for rank in ranks if rank >= 0})
        rule = "different rank numbers of at least 0, in ascending order"
        refuse(owner, "group_ranks", group_ranks, f"{rule}. Use e.g. group_ranks={tuple(known) or (0, 1)}")
    return tuple(ranks)


def _as_count(value: Any) -> int:
    """Read a whole number; 0 where it is none."""
    try:
        return 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return 0


def is_number(value: Any) -> bool:
    """Tell whether a value is a real number, of Python or numpy; a tensor, a string or a truth value is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def refuse(owner: object, name: str, value: Any, rule: str) -> NoReturn:
    """Raise what every check raises.

    Raises:
        ConfigError: always, with the layer, the value, and the rule with its remedy.
    """
    subject = owner if isinstance(owner, str) else f"{type(owner).__name__} got"
    raise ConfigError(f"{subject} {name}={value!r:.60}, which must be {rule}.")
