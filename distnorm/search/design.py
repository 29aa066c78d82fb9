"""What a search asks: the group `search` of conf/, typed and checked before anything runs."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distnorm import validation
from distnorm.errors import ConfigError, did_you_mean
from distnorm.search import scales
from distnorm.search.scales import Dimension

_AtLeastOne = Annotated[int, Field(ge=1, strict=True, description="a whole number of at least 1", examples=[8])]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Standard(_Strict):
    """What is searched where nothing else is asked: ranges by key, and tiers of the keys."""

    space: dict[str, Any]
    tiers: list[list[str]]


class Design(_Strict):
    """A search: which settings, on which scales, how many trials, and what they are compared by.

    Attributes:
        kind: how the trials are chosen.
        name: of the folder, `search-<name>`; `null`: a hash of all this and of the other settings.
        seed: of all draws.
        trials: at most so many in all.
        workers: processes of this command that train at the same time.
        metric: what is compared; of validation.
        mode: whether less of it is better, or more.
        validation: a trial's `best` value, that of the checkpoint that is tested, or its `last`.
        space: key → range or choices.
        tiers: keys by priority: the first tier's are searched first, the others' are at their defaults until their
            turn. `null`: one tier of all keys of the space; where that is not given either, the standard tiers.
        standard: ranges for keys that `space` does not name, and tiers.
        shrink: a zoom's factor: how wide a range is, on its scale, round the best so far, against the one before.
        keep: leave the checkpoints of all trials.
        stale_s: a claim of another machine that has not moved for so long is taken over.
        points: values a key, of a grid; `null`: as many as fit.
        rounds: of coarse to fine, a tier.
        min_resource: epochs before the first rung, of ASHA.
        reduction_factor: one of so many goes on at each rung, of ASHA; the next is so many times as far.
    """

    kind: Literal["grid", "random", "coarse_to_fine", "asha"]
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = Field(
        default=None, description="a folder's name of letters, digits, . _ -", examples=["lr"]
    )
    seed: Annotated[int, Field(ge=0, strict=True)] = Field(description="a whole number from 0 on", examples=[0])
    trials: _AtLeastOne
    workers: _AtLeastOne
    metric: str = Field(description="a name of the record", examples=["val/loss"])
    mode: Literal["min", "max"]
    validation: Literal["best", "last"]
    space: dict[str, Any] | None = Field(
        description="ranges by key", examples=["{optimizer.lr: {low: 0.01, high: 1.0, scale: log}}"]
    )
    tiers: list[list[str]] | None = Field(description="lists of keys of the space", examples=["[[optimizer.lr]]"])
    standard: Standard
    shrink: Annotated[float, Field(gt=0, le=1)] = Field(description="a number in (0, 1]", examples=[0.4])
    keep: bool = Field(description="true or false", examples=["true"])
    stale_s: Annotated[float, Field(gt=0)] = Field(description="seconds, above 0", examples=[600])
    points: _AtLeastOne | None = None
    rounds: _AtLeastOne = 1
    min_resource: _AtLeastOne | None = None
    reduction_factor: Annotated[int, Field(ge=2, strict=True)] | None = Field(
        default=None, description="a whole number of at least 2", examples=[3]
    )

    @property
    def ladder(self) -> list[list[Dimension]]:
        """The tiers, each key with its range."""
        ranges = {**self.standard.space, **(self.space or {})}
        return [[scales.read(key, ranges[key]) for key in tier] for tier in self._order]

    @property
    def keys(self) -> list[str]:
        """All keys that are searched, in the order of their tiers."""
        return [key for tier in self._order for key in tier]

    @property
    def _order(self) -> list[list[str]]:
        if self.tiers is not None:
            return self.tiers
        return self.standard.tiers if self.space is None else [list(self.space)]


class _Whole(_Strict):
    search: Design


def read(node: dict[str, Any]) -> Design:
    """Read the group `search`.

    Raises:
        ConfigError: a key or a value that a search does not have, a range that its scale cannot hold, or a tier of
            other keys than the space's.
    """
    try:
        design = _Whole.model_validate({"search": node}).search
    except ValidationError as error:
        raise ConfigError(validation.in_words(error, _Whole)) from None
    if not design.metric.startswith("val/"):
        raise ConfigError(
            f"search.metric={design.metric!r} is not of the validation set, and a choice by another set would leave "
            "nothing to test on. Use e.g. search.metric=val/loss."
        )
    _check_tiers(design)
    assert design.ladder  # which checks the ranges
    return design


def check_free(design: Design, changes: list[str]) -> None:
    """Refuse a command line that sets what is searched.

    Args:
        design: the search.
        changes: of the command line, as typed.

    Raises:
        ConfigError: it does.
    """
    for change in changes:
        key = change.partition("=")[0].lstrip("+~")
        if key in design.keys:
            raise ConfigError(f"{change}: {key} is searched. Leave {change} out, or name other keys in search.tiers.")


def _check_tiers(design: Design) -> None:
    """Refuse tiers of unknown or repeated keys, and ranges in no tier."""
    ranges, keys = {**design.standard.space, **(design.space or {})}, design.keys
    if unknown := [key for key in keys if key not in ranges]:
        near = did_you_mean(unknown[0], ranges)
        raise ConfigError(
            f"search.tiers has {unknown[0]!r}, and there is no range for it.{near} Ranges: {', '.join(ranges)}."
        )
    if unused := [key for key in design.space or {} if key not in keys]:
        raise ConfigError(
            f"search.space.{unused[0]} is in no tier of search.tiers, and would not be searched. "
            f"Add it, e.g. search.tiers=[[{','.join([*keys, unused[0]])}]]."
        )
    if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
        raise ConfigError(f"search.tiers={design.tiers} has {twice[0]} twice. Name each key once.")
    if not keys or not all(design.tiers or [1]):
        raise ConfigError("A search with an empty tier, or an empty space, has nothing to do. Name at least one key.")
