"""Whether the numbers of a study show what it claims."""

import dataclasses
import itertools
import math

from distnorm.errors import DistNormError
from distnorm.study.design import Claim
from distnorm.study.table import Table


class ClaimError(DistNormError):
    """A study ended without showing what it asserts, or some of its runs failed."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim and what the numbers say.

    Attributes:
        claim: what was claimed.
        holds: whether it is so; a missing number or one that is none says no.
        values: the numbers, in the claim's order.
    """

    claim: Claim
    holds: bool
    values: tuple[float, ...]

    def __str__(self) -> str:
        """Say it in one line: `yes  training loss falls with NBS (0.66 > 0.61 > 0.55)`."""
        asserted = "" if self.claim.asserted or self.holds else " (not asserted)"
        return f"{'yes' if self.holds else 'no'}{asserted}  {self.claim.says} ({self._numbers()})"

    def _numbers(self) -> str:
        by = self.claim.by
        texts = [f"{value:.4g}" for value in self.values]
        if self.claim.rule == "falls":
            signs = [">" if a > by * b else "≤" if a <= by * b else "?" for a, b in itertools.pairwise(self.values)]
            times = "" if by == 1 else f" {by:g} ×"
            return texts[0] + "".join(f" {s}{times} {text}" for s, text in zip(signs, texts[1:], strict=True))
        rule = "differ by at most" if self.claim.rule == "within" else "at most"
        return f"{', '.join(texts)}; {rule} {by:g}"


def check(claim: Claim, table: Table) -> Verdict:
    """Hold a claim against the table."""
    values = tuple(table.at(value).value for value in claim.values)
    known = all(math.isfinite(value) for value in values)
    if claim.rule == "falls":
        holds = all(value > claim.by * following for value, following in itertools.pairwise(values))
    elif claim.rule == "within":
        holds = max(values) - min(values) <= claim.by
    else:
        holds = max(values) <= claim.by
    return Verdict(claim, known and holds, values)
