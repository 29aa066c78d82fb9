"""What a study asks: the `study:` node of an experiment file, typed and checked before anything runs."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distnorm.errors import ConfigError, did_you_mean

Statistics = Literal["saved", "first_rank", "pooled", "precise", "batch"]
Reference = Annotated[str, Field(pattern=r"^.+/\w+$")]
"""A number of the table: `row/column`."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Strict):
    """One line of the table.

    Attributes:
        set: what it changes of the experiment, as one would type it: `norm=ghost`, `data.device_batch=2`.
        series: its line in the figure, and whose learning rate it takes; `null`: the row's name.
        at: its place on the line.
        seeds: instead of the study's.
        against: a row whose training losses its own are compared with, step by step.
    """

    set: list[str]
    series: str | None = None
    at: float | None = None
    seeds: list[int] | None = None
    against: str | None = None


class Tune(_Strict):
    """Which learning rate each series takes: the one with the lowest validation loss, summed over some of its rows.

    Attributes:
        key: what is varied.
        grid: the values tried, with the first seed.
        rows: series → the rows that are tried; a series that is not named keeps the experiment's value.
    """

    key: str = "optimizer.lr"
    grid: list[float] = Field(min_length=1)
    rows: dict[str, list[str]]


class Probe(_Strict):
    """One more evaluation of the trained weights.

    Attributes:
        statistics: what the norms evaluate with: what the run `saved`, the running statistics of the `first_rank` or
            of all ranks `pooled`, `precise` ones measured anew, or those of each evaluation `batch`.
        data: changes of the data that is evaluated on: `{domain: inverted}`.
        calibrate: the same of the training images that precise statistics are measured on; `null`: those of `data`.
        samples: how many of them, at most all there are; their labels are not used.
        weights: those that the run `saved`, which are averaged with `trainer.ema`, or in any case those it `trained`.
        of: the `error` in per cent, or the mean `loss`.
        label: its column's heading.
    """

    statistics: Statistics = "saved"
    data: dict[str, Any] = {}
    calibrate: dict[str, Any] | None = None
    samples: int = Field(default=1000, ge=1)
    weights: Literal["saved", "trained"] = "saved"
    of: Literal["error", "loss"] = "error"
    label: str | None = None


class Claim(_Strict):
    """What the study is to show.

    Attributes:
        says: in words.
        rule: `falls`: each value is more than `by` times the next; `within`: they differ by at most `by`; `below`: each
            is at most `by`.
        values: numbers of the table, `row/column`.
        by: see `rule`.
        asserted: the study ends with an error where it does not hold.
    """

    says: str
    rule: Literal["falls", "within", "below"]
    values: list[Reference] = Field(min_length=1)
    by: float = 1.0
    asserted: bool = True


class Panel(_Strict):
    """One pair of axes: either a curve of `column` over the rows' `at`, or `bars`: group → bar → `row/column`.

    Attributes:
        y: what it shows, with its unit.
        column: for a curve.
        bars: for bars.
        log: a logarithmic axis.
    """

    y: str
    column: str | None = None
    bars: dict[str, dict[str, Reference]] = {}
    log: bool = False


class Figure(_Strict):
    """What the study draws.

    Attributes:
        title: above all panels.
        x: below them.
        panels: side by side.
        series: those that the curves show, in this order; `null`: all.
    """

    title: str
    x: str = ""
    panels: list[Panel] = Field(min_length=1)
    series: list[str] | None = None


class Design(_Strict):
    """A study: every row with every seed.

    Attributes:
        seeds: of weights, order and augmentation.
        rows: name → what it changes.
        tune: learning rates, tuned before.
        probes: name of a column → one more evaluation.
        figure: what is drawn.
        claims: what is checked.
        workers: processes that train at the same time, one thread each.
        keep: leave the checkpoints of all runs in the folder.
        continues: the folder of this study, ended before its end: what it has is not run again.
    """

    seeds: list[int] = Field(min_length=1)
    rows: dict[str, Row] = Field(min_length=1)
    tune: Tune | None = None
    probes: dict[str, Probe] = {}
    figure: Figure
    claims: list[Claim] = []
    workers: int = Field(default=2, ge=1)
    keep: bool = False
    continues: str | None = None

    def series(self, row: str) -> str:
        """Name the series that a row belongs to."""
        return self.rows[row].series or row


def read(node: dict[str, Any]) -> Design:
    """Read the `study:` node.

    Raises:
        ConfigError: a key or a value that a study does not have, or a name of a row that is none.
    """
    try:
        design = Design.model_validate(node)
    except ValidationError as error:
        raise ConfigError(_in_words(error)) from None
    for place, row in _rows_named(design):
        if row not in design.rows:
            near = did_you_mean(row, design.rows)
            raise ConfigError(f"{place}={row!r} is no row of the study.{near} Its rows: {', '.join(design.rows)}.")
    return design


def _rows_named(design: Design) -> Iterator[tuple[str, str]]:
    for name, row in design.rows.items():
        if row.against is not None:
            yield f"study.rows.{name}.against", row.against
    for series, rows in (design.tune.rows if design.tune else {}).items():
        yield from ((f"study.tune.rows.{series}", row) for row in rows)
    for claim in design.claims:
        yield from (("study.claims.values", value.rpartition("/")[0]) for value in claim.values)
    for panel in design.figure.panels:
        for bars in panel.bars.values():
            yield from (("study.figure.panels.bars", value.rpartition("/")[0]) for value in bars.values())


def _in_words(error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(["study", *map(str, first["loc"])])
    if first["type"] == "extra_forbidden":
        choices = sorted(name for cls in get_args(_PARTS) for name in cls.model_fields)
        near = did_you_mean(str(first["loc"][-1]), choices)
        return f"{path}={first['input']!r}: a study has no such key.{near} Leave it out, or see those in experiment/."
    if first["type"] == "missing":
        return f"{path} is missing, and a study needs it. Add it to the experiment's file; see those in experiment/."
    return f"{path}={first['input']!r}: {first['msg']}. Give {path} such a value; see the files of experiment/."


_PARTS = Design | Row | Tune | Probe | Claim | Panel | Figure
