"""What synchronization costs a step: closed formulas in microseconds, bytes and collectives. No torch, no numpy.

Each layer waits for its exchanges one after the other, so what counts is latency times layers; bytes come second. The
formulas are NCCL's own model of its LL protocol (src/graph/tuning.cc), with hops inside a node and between nodes:

    sum (tree)     6.8 + 2 ((p - 1) h + floor(log2 N) n)          inside one node a ring: 6.6 + 2 (p - 1) h
    gather (ring)  6.6 + (g - N) max(h, 1 if N > 1) + (N - 1) n'

p ranks a node, N nodes, g = p N ranks, hop times h inside a node, n and n' between nodes in a tree and a ring. Healthy
fabrics come within 20 % of it, a mistuned one or one without peer access takes 2.5 times as long.
"""

import dataclasses
import math
from collections.abc import Sequence

from distnorm.errors import ConfigError

GATHER_UP_TO = 16
"""Our layers gather in groups of up to so many ranks, and sum above: `norms.pooling` has the same number."""


def _resnet50() -> tuple[int, ...]:
    """A stem, and 3, 4, 6, 3 bottlenecks of widths w, w, 4w, with a projection in the first of each stage."""
    channels = [64]
    for blocks, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        channels += [width, width, 4 * width, 4 * width] + [width, width, 4 * width] * (blocks - 1)
    return tuple(channels)


RESNET50: tuple[int, ...] = _resnet50()
"""Channels of the 53 batch norms of ResNet-50 (He et al. 2016, table 1), 26560 in all, in the model's order."""


@dataclasses.dataclass(frozen=True)
class Fabric:
    """What a message costs. The default: GPUs on NVLink, nodes on InfiniBand.

    Attributes:
        intra_hop_us: one hop inside a node: 0.6 NVLink, 1.0 PCIe (NCCL).
        tree_hop_us: one hop between nodes in a tree (NCCL: 5.0).
        ring_hop_us: the same in a ring (NCCL: 2.7); one rank a node, `tree_hop_us`.
        tree_base_us: start of a tree (NCCL: 6.8).
        ring_base_us: start of a ring (NCCL: 6.6).
        node_gb_s: bytes inside a node, in GB/s. An NVLink node's order of magnitude; nothing depends on it.
        network_gb_s: bytes between nodes, in GB/s. 20 is what published predictions for up to 4096 ranks imply.
    """

    intra_hop_us: float = 0.6
    tree_hop_us: float = 5.0
    ring_hop_us: float = 2.7
    tree_base_us: float = 6.8
    ring_base_us: float = 6.6
    node_gb_s: float = 200.0
    network_gb_s: float = 20.0

    def with_latency(self, internode_latency_us: float) -> "Fabric":
        """Give the same fabric with other hops between nodes; a ring's hop keeps its share of a tree's."""
        share = internode_latency_us / self.tree_hop_us
        return dataclasses.replace(self, tree_hop_us=internode_latency_us, ring_hop_us=share * self.ring_hop_us)


NVLINK = Fabric()
PCIE = Fabric(intra_hop_us=1.0, node_gb_s=10.0)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What synchronization adds to a step.

    Attributes:
        wire_ms: latency and bytes on a quiet fabric.
        host_ms: what the host needs to issue the collectives.
        skew_ms: waiting for the slowest rank.
        collectives: how many, one after the other: each is a point where ranks wait.
        sent_bytes: what one rank hands in.
    """

    wire_ms: float
    host_ms: float
    skew_ms: float
    collectives: int
    sent_bytes: int

    @property
    def total_ms(self) -> float:
        """Give the sum of the three terms."""
        return self.wire_ms + self.host_ms + self.skew_ms


def sum_us(ranks: int, ranks_per_node: int | None = None, fabric: Fabric = NVLINK) -> float:
    """Give the latency of a sum over ranks; 0 for one.

    Source: NCCL, src/graph/tuning.cc, LL protocol: a ring in one node, a tree over several.
    """
    per_node, nodes = _spread(ranks, ranks_per_node)
    if ranks == 1:
        return 0.0
    if nodes == 1:
        return fabric.ring_base_us + 2 * (per_node - 1) * fabric.intra_hop_us
    hops = (per_node - 1) * fabric.intra_hop_us + math.floor(math.log2(nodes)) * fabric.tree_hop_us
    return fabric.tree_base_us + 2 * hops


def gather_us(ranks: int, ranks_per_node: int | None = None, fabric: Fabric = NVLINK) -> float:
    """Give the latency of a gather over ranks, that NCCL has as a ring only: linear in the ranks; 0 for one.

    Source: NCCL, src/graph/tuning.cc, LL protocol.
    """
    per_node, nodes = _spread(ranks, ranks_per_node)
    if ranks == 1:
        return 0.0
    inside = max(fabric.intra_hop_us, 1.0 if nodes > 1 else 0.0)
    between = fabric.tree_hop_us if per_node == 1 else fabric.ring_hop_us
    return fabric.ring_base_us + (ranks - nodes) * inside + (nodes - 1) * between


def skew_ms(collectives: int, ranks: int, step_jitter_ms: float) -> float:
    """Give the wait for the slowest rank: sqrt(collectives) · jitter · sqrt(2 ln ranks).

    Args:
        collectives: points of a step where ranks wait.
        ranks: who waits.
        step_jitter_ms: standard deviation of a segment of a step between two waits, over ranks.

    Source: the expected largest of independent normal draws, over independent segments.
    """
    return math.sqrt(collectives) * step_jitter_ms * math.sqrt(2 * math.log(ranks))


def step_cost(
    channels: Sequence[int] = RESNET50,
    sync_ranks: int = 1,
    ranks_per_node: int | None = None,
    *,
    fabric: Fabric = NVLINK,
    host_us: float = 0.0,
    step_jitter_ms: float = 0.0,
) -> Cost:
    """Predict what our synchronized layers add to a training step.

    Each layer gathers 2C + 1 float64 numbers forward (with more than 16 ranks: sums them) and sums 2C float32 backward.
    The groups decide, not the world: 8 ranks of a node cost the same in a job of 8 and of 4096.

    Args:
        channels: of each synchronized layer.
        sync_ranks: ranks that pool together.
        ranks_per_node: of those, ranks on one machine; `None`: all.
        fabric: hop times and bandwidths.
        host_us: the host's time a collective. Measure yours: it can exceed the wire's by far.
        step_jitter_ms: for the skew, see `skew_ms`.

    Raises:
        ConfigError: a layer without channels, or no ranks.

    Example:
        >>> cost = step_cost(sync_ranks=8)
        >>> round(cost.wire_ms, 2), cost.collectives
        (1.39, 106)
    """
    _check(channels, sync_ranks, ranks_per_node)
    if sync_ranks == 1:
        return Cost(0.0, 0.0, 0.0, 0, 0)
    forward = [8 * (2 * c + 1) for c in channels]
    if sync_ranks <= GATHER_UP_TO:
        forward_us = gather_us(sync_ranks, ranks_per_node, fabric)
        moved = sync_ranks * sum(forward)
    else:
        forward_us, moved = sum_us(sync_ranks, ranks_per_node, fabric), sum(forward)
    backward = sum(4 * 2 * c for c in channels)
    latency_us = len(channels) * (forward_us + sum_us(sync_ranks, ranks_per_node, fabric))
    wire_ms = (latency_us + _bytes_us(moved + backward, sync_ranks, ranks_per_node, fabric)) / 1e3
    collectives = 2 * len(channels)
    skew = skew_ms(collectives, sync_ranks, step_jitter_ms)
    return Cost(wire_ms, collectives * host_us / 1e3, skew, collectives, sum(forward) + backward)


def torch_step_ms(
    channels: Sequence[int] = RESNET50, ranks: int = 1, ranks_per_node: int | None = None, fabric: Fabric = NVLINK
) -> float:
    """Predict `torch.nn.SyncBatchNorm`'s wire time a step: it gathers 2C + 1 float32 forward whatever the ranks."""
    moved = sum(ranks * 4 * (2 * c + 1) + 4 * 2 * c for c in channels) if ranks > 1 else 0
    latency_us = gather_us(ranks, ranks_per_node, fabric) + sum_us(ranks, ranks_per_node, fabric)
    return (len(channels) * latency_us + _bytes_us(moved, ranks, ranks_per_node, fabric)) / 1e3


def sums_step_ms(
    channels: Sequence[int] = RESNET50, ranks: int = 1, ranks_per_node: int | None = None, fabric: Fabric = NVLINK
) -> float:
    """Predict the wire time a step of float32 sums both ways."""
    moved = sum(4 * (2 * c + 1) + 4 * 2 * c for c in channels) if ranks > 1 else 0
    latency_us = 2 * sum_us(ranks, ranks_per_node, fabric)
    return (len(channels) * latency_us + _bytes_us(moved, ranks, ranks_per_node, fabric)) / 1e3


def _spread(ranks: int, ranks_per_node: int | None) -> tuple[int, int]:
    """Lay a group out: ranks a node, nodes."""
    per_node = min(ranks, ranks_per_node or ranks)
    return per_node, -(-ranks // per_node)


def _bytes_us(moved: int, ranks: int, ranks_per_node: int | None, fabric: Fabric) -> float:
    gb_s = fabric.node_gb_s if _spread(ranks, ranks_per_node)[1] == 1 else fabric.network_gb_s
    return moved / gb_s / 1e3


def _check(channels: Sequence[int], sync_ranks: int, ranks_per_node: int | None) -> None:
    counts = {"sync_ranks": sync_ranks, "ranks_per_node": ranks_per_node or 1, "channels": min(channels, default=1)}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"step_cost({name}={value}): there is at least 1. Give e.g. {name}=8.")
