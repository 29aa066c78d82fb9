"""The drift measures: what each is called, its unit, what is normal, when it is alarming and what to do then.

The one place that the monitor, the alarms, the report, wandb and docs/drift.md agree on. Plain data, no torch.
"""

import dataclasses
from typing import Literal

Tier = Literal["light", "full", "probe"]


@dataclasses.dataclass(frozen=True)
class Limit:
    """When a measure is alarming.

    Attributes:
        at: the value that must not be crossed.
        clear: where the alarm ends: on the healthy side of `at`, so that noise does not raise it again and again.
        side: which side of `at` is alarming.
        times: measurements in a row that must be beyond `at`.
        meaning: what it means, a clause.
        remedy: what to do, one or two sentences in the imperative, with the setting to type.
    """

    at: float
    clear: float
    side: Literal["above", "below"]
    times: int
    meaning: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measure of a layer.

    Attributes:
        key: its name in events, logs and files.
        title: its name for people.
        unit: of its values; empty for a plain number.
        tier: `light` and `full` measures are of every interval, the latter with `drift=full`; `probe`: rarely.
        healthy: the value without drift.
        span: from `healthy` to here goes the colour scale of the report, shared by all runs.
        normal: what is normal, a clause.
        over_channels: whether it has a median (the value itself), `.p95`, `.max` and a worst channel.
        limit: when it is alarming; `None`: never.
    """

    key: str
    title: str
    unit: str
    tier: Tier
    healthy: float
    span: float
    normal: str
    over_channels: bool = False
    limit: Limit | None = None


# fmt: off
MEASURES: tuple[Measure, ...] = (
    Measure("jeffreys", "batch against running statistics", "nats", "light", 0.0, 1.0,
        "about 0: sampling noise is taken off", over_channels=True),
    Measure("between_ranks", "between-rank ratio", "", "light", 1.0, 10.0,
        "0.3 to 2; more by chance with few ranks", over_channels=True,
        limit=Limit(2.0, 1.5, "above", 3, "shards differ by rank",
            "Shuffle before sharding (data.shards=shuffled), or use norm=sync.")),
    Measure("lag", "lag of the running mean", "σ", "light", 0.0, 0.5,
        "under 0.1 once the learning rate falls", over_channels=True,
        limit=Limit(0.25, 0.15, "above", 5, "the running average lags behind the weights",
            "Raise norm.momentum, lower the learning rate, or use norm.evaluation=precise.")),
    Measure("effective_samples", "samples a batch is worth", "samples", "light", 100.0, 2.0,
        "about the normalization batch, or more", over_channels=True,
        limit=Limit(13.0, 16.0, "below", 3, "too few samples share statistics",
            "Raise norm.normalization_batch with norm=sync, or use norm=group_ws.")),
    Measure("rank_spread", "ranks' running statistics apart", "nats", "light", 0.0, 1.0,
        "0 where synchronized; else under 0.1", over_channels=True,
        limit=Limit(0.5, 0.3, "above", 3, "each rank has running statistics of its own, and a checkpoint keeps one's",
            "Use norm.evaluation=pooled, or norm=sync.")),
    Measure("dead_channels", "dead channels", "share", "light", 0.0, 0.5, "0",
        limit=Limit(0.1, 0.05, "above", 3, "channels carry nothing",
            "Lower the learning rate or the norms' weight decay; look at the layer's initialization.")),
    Measure("dead_relus", "dead ReLUs, if one follows", "share", "light", 0.0, 0.5, "0",
        limit=Limit(0.1, 0.05, "above", 3, "a ReLU behind these channels gives 0 for every input",
            "Lower the learning rate, or warm it up longer (task.warmup_fraction).")),
    Measure("non_finite", "channels that are nan or inf", "channels", "light", 0.0, 1.0, "0",
        limit=Limit(0.0, 0.0, "above", 1, "statistics overflowed",
            "Lower the learning rate, or clip gradients: trainer.gradient_clip_val=1.")),
    Measure("kl", "KL of the batch from the running statistics", "nats", "full", 0.0, 1.0,
        "about 0", over_channels=True),
    Measure("wasserstein", "squared Wasserstein distance / variance", "", "full", 0.0, 1.0,
        "about 0", over_channels=True),
    Measure("bhattacharyya", "Bhattacharyya distance", "nats", "full", 0.0, 0.25,
        "about 0", over_channels=True),
    Measure("cv_mean", "noise of the batch mean", "σ", "full", 0.0, 1.0,
        "about 1 / √(normalization batch)", over_channels=True),
    Measure("cv_var", "noise of the batch variance", "relative", "full", 0.0, 1.0,
        "about √(2 / normalization batch)", over_channels=True),
    Measure("design_effect", "values that count as one", "values", "full", 1.0, 1000.0,
        "1 for vectors; up to the number of positions for maps", over_channels=True),
    Measure("f", "F of one step between ranks", "", "full", 1.0, 10.0,
        "about 1", over_channels=True),
    Measure("icc", "intraclass correlation of ranks", "", "full", 0.0, 1.0,
        "about 0", over_channels=True),
    Measure("estimator_sd", "noise of the running mean", "σ", "full", 0.0, 0.5,
        "under 0.06", over_channels=True),
    Measure("estimator_samples", "samples the running average holds", "samples", "full", 1000.0, 10.0,
        "300 or more",
        limit=Limit(100.0, 150.0, "below", 3, "evaluation rests on few samples",
            "Lower norm.momentum, or use norm.evaluation=precise.")),
    Measure("precise_jeffreys", "running against precise statistics", "nats", "full", 0.0, 1.0,
        "about 0", over_channels=True),
    Measure("precise_ratio", "running / precise variance", "", "full", 1.0, 2.0,
        "0.8 to 1.25", over_channels=True),
    Measure("weight_drift", "change of the weights γ", "relative", "full", 0.0, 1.0,
        "falls with the learning rate"),
    Measure("bias_drift", "change of the biases β", "σ", "full", 0.0, 1.0,
        "falls with the learning rate"),
    Measure("shift", "evaluation data against running statistics", "nats", "full", 0.0, 5.0,
        "about 0 for data like the training's", over_channels=True,
        limit=Limit(2.5, 1.5, "above", 3,
            "the statistics do not fit the evaluation data: another domain, or an average that lags",
            "Measure some on these data (distnorm calibrate RUN data.… --name NAME), or use norm.evaluation=precise.")),
    Measure("gap_share", "share of the train/eval gap", "loss", "probe", 0.0, 1.0,
        "about 0"),
    Measure("covariate_shift", "internal covariate shift", "relative", "probe", 0.0, 1.0,
        "of the order of the gradient itself"),
)
# fmt: on
"""Measures of a layer, in the order in which they are shown."""

BY_KEY = {measure.key: measure for measure in MEASURES}


@dataclasses.dataclass(frozen=True)
class ModelMeasure:
    """One measure of the whole model, logged as `drift/model/<key>`."""

    key: str
    title: str
    unit: str
    normal: str
    limit: Limit | None = None


# fmt: off
OF_THE_MODEL: tuple[ModelMeasure, ...] = (
    ModelMeasure("gap", "train/eval gap: loss with running less loss with batch statistics", "loss", "about 0"),
    ModelMeasure("gap_relative", "train/eval gap / loss with batch statistics", "", "under 0.2",
        limit=Limit(3.0, 1.5, "above", 2, "the model evaluates with other statistics than it trains with",
            "Evaluate with norm.evaluation=precise, or freeze late: norm.frozen_last=0.2.")),
    ModelMeasure("flip_rate", "predictions that change with the statistics", "share", "under 0.05"),
    ModelMeasure("loss_range", "loss range along the gradient", "loss", "small where training is smooth"),
    ModelMeasure("gradient_predictiveness", "change of the gradient along itself", "",
        "small where training is smooth"),
    ModelMeasure("smoothness", "effective β-smoothness", "", "small where training is smooth"),
)
# fmt: on
"""Measures of the model."""
