"""What distnorm raises: messages that say what failed, the values, the rule and the remedy, in at most 3 lines."""

import difflib
from collections.abc import Iterable


class DistNormError(Exception):
    """Any mistake that distnorm can name. `train.py` prints it without a traceback and ends with `exit_code`."""

    exit_code = 2
    aloud = True
    """Whether this process prints it; a mistake that all ranks share is printed by the first alone."""


class ConfigError(DistNormError, ValueError):
    """A setting, an argument or a combination of them that cannot work."""


class ShapeError(DistNormError, ValueError):
    """A tensor whose shape a layer cannot normalize."""


class GroupError(DistNormError, RuntimeError):
    """Ranks that do not find together: a collective that failed or timed out, or a group that cannot be made."""

    exit_code = 3


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Suggest the choice nearest to `word`.

    Args:
        word: what the user wrote.
        choices: what is valid.

    Returns:
        `" Did you mean 'sync'?"`, or an empty string where nothing is near.
    """
    near = difflib.get_close_matches(word, sorted(choices), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def divisors_in_words(number: int) -> str:
    """Spell the divisors of `number`: `"1, 2 or 4"`."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Name ranks: `"rank 2"`, `"ranks 0, 1, 3"`, and of more than 8 the runs: `"ranks 0-6, 8-1023"`."""
    found = sorted(ranks)
    if len(found) > 8:
        there = set(found)
        first = [r for r in found if r - 1 not in there]
        last = [r for r in found if r + 1 not in there]
        names = [str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True)]
    else:
        names = [str(r) for r in found]
    return f"rank{'s' if len(found) > 1 else ''} {', '.join(names)}"
