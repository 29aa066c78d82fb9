"""What `decide` was asked, checked, and what its ranks can reach."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from distnorm import planner
from distnorm.errors import ConfigError, did_you_mean, divisors_in_words
from distnorm.spec import EVALUATIONS, KINDS, check_renorm

TASKS = ("classification", "dense", "contrastive", "sequence", "generative", "reinforcement")
"""`dense`: detection and segmentation; `contrastive`: the loss compares samples of the batch; `sequence`: recurrent
networks and Transformers; `generative`: GANs and VAEs."""

_OTHER_WORDS = {
    "dense": ("detection", "segmentation", "depth", "pose"),
    "contrastive": ("ssl", "self-supervised", "self_supervised", "simclr", "moco", "metric"),
    "sequence": ("transformer", "rnn", "lstm", "text", "nlp", "language", "speech"),
    "generative": ("gan", "vae", "diffusion", "generation"),
    "reinforcement": ("rl", "reinforcement_learning"),
}

FAST_US = 20.0
"""Hops between nodes up to so long are worth waiting for in every layer."""

MOST_NODES = 4
MOST = 10**9
"""Larger counts are mistakes."""

REFERENCE_STEP_MS = 44.0
"""A step of ResNet-50 over 32 images on one V100 (NVIDIA DeepLearningExamples, 5815.8 images/s on 8): the measure of
the overhead, where no other is given."""

_UNITS = {
    "device_batch": "samples one device sees per forward",
    "world_size": "ranks",
    "ranks_per_node": "ranks on one machine",
    "normalization_batch": "samples that share statistics",
    "min_normalization_batch": "samples that share statistics",
    "groups": "groups of channels",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of `decide`, under their own names; see there."""

    device_batch: int
    world_size: int
    kind: str
    normalization_batch: int
    min_normalization_batch: int
    exact: bool
    sync_ranks: int | None
    ranks_per_node: int | None
    task: str
    pretrained: bool
    iid: bool
    foldable: bool
    memory_bound: bool
    max_overhead: float
    internode_latency_us: float
    step_ms: float | None
    channels: Sequence[int] | None
    momentum: float | str | None
    evaluation: str
    frozen_last: float | None
    groups: int
    renorm: Mapping[str, float] | None
    layers: Mapping[str, Any] | None
    include: Sequence[str]
    exclude: Sequence[str]

    @property
    def least(self) -> int:
        """The fewest samples worth batch statistics; one has no variance."""
        return max(self.min_normalization_batch, 2)

    @property
    def aim(self) -> int:
        """Samples that shall share statistics."""
        return max(self.normalization_batch, self.least)

    @property
    def reachable(self) -> int:
        """Samples of all ranks."""
        return self.device_batch * self.world_size

    @functools.cached_property
    def divisors(self) -> list[int]:
        """Sizes of groups that part the world evenly."""
        return divisors(self.world_size)

    @functools.cached_property
    def in_node(self) -> list[int]:
        """Sizes of groups, of which none crosses the border of a node."""
        node = self.ranks_per_node or self.world_size
        return [g for g in self.divisors if node % g == 0 or node >= self.world_size]

    @functools.cached_property
    def across_nodes(self) -> list[int]:
        """Sizes of larger groups, over 2 to 4 nodes, that the latency and the allowed overhead permit."""
        if self.internode_latency_us > FAST_US:
            return []
        few = [g for g in self.divisors if g > self.in_node[-1] and self.nodes_of(g) <= MOST_NODES]
        return [g for g in few if self.overhead_of(g) <= self.max_overhead]

    def nodes_of(self, ranks: int) -> int:
        """Bound the nodes that a block of so many consecutive ranks touches; exact where blocks fit nodes."""
        node = min(self.ranks_per_node or self.world_size, self.world_size)
        # Blocks start on multiples of `ranks`, so the latest place in a node is this; one block alone starts at 0.
        latest = 0 if ranks == self.world_size else node - math.gcd(ranks, node)
        return (latest + ranks - 1) // node + 1

    def cost_of(self, ranks: int) -> float:
        """Predict the wire time of synchronizing over so many ranks, in ms a step."""
        per_node = -(-ranks // self.nodes_of(ranks))
        fabric = planner.NVLINK.with_latency(self.internode_latency_us)
        channels = planner.RESNET50 if self.channels is None else self.channels
        return round(planner.step_cost(channels, ranks, per_node, fabric=fabric).wire_ms, 2)

    def overhead_of(self, ranks: int) -> float:
        """Give that time as a share of a step."""
        return self.cost_of(ranks) / (self.step_ms or REFERENCE_STEP_MS)

    def is_too_far(self, ranks: int) -> bool:
        """Tell whether so many ranks are of several nodes, and latency or the allowed overhead speak against it."""
        slow = self.internode_latency_us > FAST_US or self.overhead_of(ranks) > self.max_overhead
        return self.nodes_of(ranks) > 1 and slow

    def group_for(self, aim: int, least: int) -> int | None:
        """Choose the ranks that pool: the fewest for `aim`; a whole node rather than two, if it reaches `least`.

        Returns:
            `None` where no group that is allowed reaches `least`.
        """
        nodes = self.in_node if self.in_node[-1] * self.device_batch >= least else self.across_nodes
        enough = [g for g in nodes if g * self.device_batch >= aim]
        largest = nodes[-1] if nodes else 0
        if not enough and largest * self.device_batch < least:
            return None
        return enough[0] if enough else largest


def divisors(number: int) -> list[int]:
    """List the divisors, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def check(case: Case) -> None:
    """Refuse what has no answer.

    Raises:
        ConfigError: a number out of range, an unknown word, a flag that is none.
    """
    _check_words(case)
    _check_counts(case)
    check_renorm({} if case.renorm is None else case.renorm)
    _check_flags(case)
    _check_ranges(case)
    if case.sync_ranks is not None:
        check_sync_ranks(case.sync_ranks, case.world_size, case.kind)
    if case.channels is not None:
        _check_channels(case.channels)


def check_sync_ranks(sync_ranks: Any, world_size: int, kind: str) -> None:
    """Refuse ranks that cannot pool so."""
    if kind not in {"auto", "sync", "renorm"}:
        raise ConfigError(
            f"norm.sync_ranks={sync_ranks} has no meaning for norm.kind={kind}: its layers do not synchronize.\n"
            "Use norm=sync, or leave norm.sync_ranks out.",
        )
    if type(sync_ranks) is not int or sync_ranks < 1 or world_size % sync_ranks:
        raise ConfigError(
            f"norm.sync_ranks={sync_ranks!r} does not divide world_size={world_size}. "
            f"Use {divisors_in_words(world_size)}."
        )


def suggest(key: str, value: Any, choices: Sequence[str]) -> str:
    """Suggest what a word stands for that is none of the choices: a task's common name, or the nearest spelling."""
    word = str(value).lower()
    meant = [task for task, words in _OTHER_WORDS.items() if word in words and key.endswith("task")]
    return f" Use {key}={meant[0]}." if meant else did_you_mean(word, choices)


def check_word(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not one of the choices, and suggest the nearest."""
    if value not in choices:
        near = suggest(key, value, choices) if isinstance(value, str) else ""
        near = near or f" Use e.g. {key}={choices[0]}."
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(choices)}.{near}")


def _check_words(case: Case) -> None:
    check_word("norm.kind", case.kind, KINDS)
    check_word("norm.task", case.task, TASKS)
    check_word("norm.evaluation", case.evaluation, ("auto", *EVALUATIONS))


def _check_counts(case: Case) -> None:
    for name, unit in _UNITS.items():
        value = getattr(case, name)
        if name == "ranks_per_node" and value is None:
            continue
        if type(value) is not int or not 1 <= value <= MOST:
            rule = "a whole number" if type(value) is not int or value < 1 else f"and at most {MOST}"
            raise ConfigError(
                f"{name}={value!r:.40} must be at least 1, {rule}. Give a number of {unit}, e.g. {name}=16."
            )


def _check_flags(case: Case) -> None:
    for name in ("exact", "pretrained", "iid", "foldable", "memory_bound"):
        if not isinstance(getattr(case, name), bool):
            raise ConfigError(f"{name}={getattr(case, name)!r} must be true or false. Use e.g. {name}=False.")


def _check_ranges(case: Case) -> None:
    momentum = 0.1 if case.momentum in (None, "auto") else case.momentum
    _check_range("momentum", momentum, "in (0, 1]: the weight of a new batch", 0.1, lambda v: 0 < v <= 1)
    frozen = 0 if case.frozen_last is None else case.frozen_last
    _check_range("frozen_last", frozen, "in [0, 1): a share of training", 0.2, lambda v: 0 <= v < 1)
    _check_range("max_overhead", case.max_overhead, "0 or more: a share of a step", 0.1, lambda v: v >= 0)
    _check_range("internode_latency_us", case.internode_latency_us, "above 0, microseconds", 5.0, lambda v: v > 0)
    step = REFERENCE_STEP_MS if case.step_ms is None else case.step_ms
    _check_range("step_ms", step, "above 0, milliseconds a step", 50.0, lambda v: v > 0)


def _check_range(name: str, value: Any, rule: str, example: float, holds: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not holds(value):
        raise ConfigError(f"{name}={value!r} must be {rule}. Use e.g. {name}={example}.")


def _check_channels(channels: Any) -> None:
    is_list = isinstance(channels, Sequence)
    if not is_list or not all(type(count) is int and 1 <= count <= MOST for count in channels):
        raise ConfigError(
            f"channels={channels!r:.80} must be a list of whole numbers from 1 on, one a batch norm. "
            "Leave it out for ResNet-50's."
        )
