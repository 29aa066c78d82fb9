"""The table of decisions: which normalization for what, first match wins.

Statistics over 16 to 128 samples cost at most 0.3 points of ImageNet accuracy against the best, over 8 about 1.1, over
4 about 3.5 and over 2 about 10 (`distnorm.evidence`); more than 32 gain little. So 32 is the aim and 16 the least.

A row is a function: the decision, or `None` where its condition does not hold.
"""

from collections.abc import Callable

from distnorm.evidence import cite
from distnorm.policy.case import FAST_US, MOST_NODES, REFERENCE_STEP_MS, Case, divisors
from distnorm.spec import NormSpec

CONTRAST = 256
"""Samples that a contrastive loss needs in one group; 512 have been shown to be enough."""

GHOST_ABOVE = 256
FROZEN_SHARE = 0.2


def decide_by_row(case: Case) -> NormSpec:
    """Give the first row's decision that holds; the last always does."""
    for row in ROWS[:-1]:
        spec = row(case)
        if spec is not None:
            return spec
    return _standardize(case)


def _leave_sequences(case: Case) -> NormSpec | None:
    if case.task != "sequence":
        return None
    why = "sequences: batch statistics of text and of time steps fluctuate; existing LayerNorms stay as they are"
    return NormSpec("layer", 1, reasons=(why,), evidence=cite("text", "recurrent"))


def _normalize_alone(case: Case) -> NormSpec | None:
    if case.task not in {"generative", "reinforcement"}:
        return None
    why = f"{case.task}: the other samples of a batch are noise to the loss, so each is normalized alone"
    return NormSpec("group", 1, reasons=(why,), evidence=cite("alone", "group"))


def _share_contrast(case: Case) -> NormSpec | None:
    """Sync over so many ranks that none can tell its own samples by their statistics."""
    if case.task != "contrastive":
        return None
    b = case.device_batch
    leak = "contrastive: statistics of one device's samples would tell the loss which belong together"
    if case.reachable < case.least:
        few = "one rank with one sample has no batch" if case.reachable == 1 else f"{_all_reach(case)} < {case.least}"
        return NormSpec("group", 1, reasons=(leak, f"{few}: each sample alone"), evidence=cite("alone"))
    if case.world_size == 1:
        why = "contrastive: one rank, so all samples share statistics and none leaks"
        return NormSpec("batch", b, reasons=(why,), evidence=cite("leak"))
    aim = max(CONTRAST, case.aim)
    shared = [g for g in case.divisors if g > 1]
    ranks = next((g for g in shared if g * b >= aim and case.iid), case.world_size)
    if case.is_too_far(ranks):
        far = f"{_too_far(case, ranks)}: each sample alone (norm=sync insists)"
        return NormSpec("group", 1, reasons=(leak, far), evidence=cite("alone", *_costs(case, ranks)))
    how = f"{ranks} × {b} = {ranks * b} ≥ {aim}"
    if ranks * b < aim:
        how = f"all {ranks} ranks reach {ranks * b} samples, {aim - ranks * b} short of {aim}: enlarge the device batch"
    return NormSpec("sync", ranks * b, sync_ranks=ranks, reasons=(leak, how), evidence=cite("contrast", "leak"))


def _mix_domains(case: Case) -> NormSpec | None:
    """Never let a rank, or a node, normalize by its own kind of samples."""
    if case.iid:
        return None
    first = "shards differ: shuffle them first (fix the sampler); statistics of a part would fit that part only"
    found = cite("sorted")
    is_far = case.is_too_far(case.world_size)
    if case.world_size > 1 and case.reachable >= case.least and not is_far:
        how = f"all {case.world_size} ranks together, {case.reachable} samples, see the whole mixture"
        return NormSpec("sync", case.reachable, sync_ranks=case.world_size, reasons=(first, how), evidence=found)
    why = "one rank alone sees its own order" if case.world_size == 1 else f"{_all_reach(case)} < {case.least}"
    if case.reachable >= case.least and is_far:
        why = f"{_too_far(case, case.world_size)} (norm=sync insists)"
        found += cite(*_costs(case, case.world_size))
    kind = "group" if case.pretrained else "group_ws"
    return NormSpec(kind, 1, reasons=(first, f"{why}: each sample alone"), evidence=found + cite("alone"))


def _freeze(case: Case) -> NormSpec | None:
    if not case.pretrained or case.group_for(case.aim, case.least) is not None:
        return None
    why = "pretrained: the statistics learned before are better than those of so few samples"
    return NormSpec("frozen", 1, reasons=(*out_of_reach(case), why), evidence=cite("unfrozen", "head"))


def _fine_tune(case: Case) -> NormSpec | None:
    ranks = case.group_for(case.aim, case.least) if case.pretrained else None
    if ranks is None:
        return None
    reached = ranks * case.device_batch
    why = f"pretrained, and {ranks} × {case.device_batch} = {reached} ≥ {case.least} samples can share statistics"
    kind = "batch" if ranks == 1 else "sync"
    return NormSpec(kind, reached, sync_ranks=ranks, reasons=(why,), evidence=cite("fine-tune", "scratch"))


def _part_in_ghosts(case: Case) -> NormSpec | None:
    """Part a device batch that is larger than good for generalization."""
    b = case.device_batch
    sizes = [d for d in divisors(b) if case.aim <= d <= 2 * case.aim and d < b] if b > GHOST_ABOVE else []
    if not sizes:
        return None
    why = f"device batch {b} > {GHOST_ABOVE}: parts of {sizes[-1]} regularize, and cost no exchange"
    return NormSpec("ghost", sizes[-1], ghost_batch=sizes[-1], reasons=(why,), evidence=cite("curve", "ghost"))


def _stay_local(case: Case) -> NormSpec | None:
    b = case.device_batch
    if b < case.least:
        return None
    why = f"device batch {b} ≥ least normalization batch {case.least}"
    why += ": more samples would gain at most 0.3 points" if 16 <= b <= 128 else ""
    if b < case.normalization_batch <= case.reachable:
        why += f" (norm.min_normalization_batch={case.normalization_batch} or norm.exact=true insists)"
    return NormSpec("batch", b, reasons=(why,), evidence=cite("batch-size", "curve", "mlperf-local"))


def _sync_in_node(case: Case) -> NormSpec | None:
    """Take the fewest ranks of a node that give the asked number, or the whole node if that gives the least."""
    ranks = case.group_for(case.aim, case.least)
    if ranks is None or ranks not in case.in_node:
        return None
    reached = ranks * case.device_batch
    if reached >= case.aim:
        how, found = f"{ranks} × {case.device_batch} = {reached} ≥ normalization batch {case.aim}", "mlperf-sync"
    else:
        place = "all ranks" if ranks == case.world_size else f"{ranks} ranks of a node"
        how, found = f"{place} together reach {reached}: under the asked {case.aim}, but ≥ {case.least}", "scratch"
    evidence = cite("batch-size", found, "cost")
    return NormSpec("sync", reached, sync_ranks=ranks, reasons=(_too_few(case), how), evidence=evidence)


def _sync_over_nodes(case: Case) -> NormSpec | None:
    ranks = case.group_for(case.aim, case.least)
    if ranks is None:
        return None
    reached, nodes = ranks * case.device_batch, case.nodes_of(ranks)
    budget = f"{_price(case, ranks)} ≤ {case.max_overhead:.0%}"
    how = f"{ranks} × {case.device_batch} = {reached}, over {nodes} nodes: {budget}"
    evidence = cite("batch-size", *_costs(case, ranks))
    return NormSpec("sync", reached, sync_ranks=ranks, reasons=(_too_few(case), how), evidence=evidence)


def _renormalize(case: Case) -> NormSpec | None:
    """Keep a batch norm that folds into the layer before it, and mend what its few samples break."""
    ranks, b = [*case.in_node, *case.across_nodes][-1], case.device_batch
    if not case.foldable or ranks * b < 2:
        return None
    why = "inference must fold the norms, and GroupNorm cannot: batch renormalization, frozen for the last fifth"
    return NormSpec(
        "renorm",
        ranks * b,
        sync_ranks=ranks,
        frozen_last=FROZEN_SHARE,
        reasons=(*out_of_reach(case), why),
        evidence=cite("folding", "renorm", "frozen-late"),
    )


def _standardize(case: Case) -> NormSpec:
    why = "from scratch, standardized weights make GroupNorm as good as batch norm at 32 (tune the learning rate anew)"
    evidence = cite("group", "standardized", "group-cost")
    return NormSpec("group_ws", 1, reasons=(*out_of_reach(case), why), evidence=evidence)


ROWS: tuple[Callable[[Case], NormSpec | None], ...] = (
    _leave_sequences,
    _normalize_alone,
    _share_contrast,
    _mix_domains,
    _freeze,
    _fine_tune,
    _part_in_ghosts,
    _stay_local,
    _sync_in_node,
    _sync_over_nodes,
    _renormalize,
    _standardize,
)


def out_of_reach(case: Case) -> tuple[str, ...]:
    """Say why no group of ranks gives enough samples: there are too few, or they are too far apart."""
    if case.reachable < case.least:
        accept = f" (norm.min_normalization_batch={case.reachable} would accept it)" if case.reachable > 1 else ""
        return (f"{_all_reach(case)} < {case.least}{accept}",)
    ranks = next(g for g in case.divisors if g * case.device_batch >= case.least)
    nodes = case.nodes_of(ranks)
    needs = f"{case.least} samples would take {ranks} ranks of {nodes} nodes"
    if nodes > MOST_NODES:
        return (f"{needs}, more than {MOST_NODES}",)
    if case.internode_latency_us > FAST_US:
        return (f"{needs}, {case.internode_latency_us:g} µs a hop > {FAST_US:g} µs",)
    return (f"{needs}: {_price(case, ranks)} > {case.max_overhead:.0%}",)


def _price(case: Case, ranks: int) -> str:
    step = f"{case.step_ms:g} ms step" if case.step_ms else f"{REFERENCE_STEP_MS:g} ms step (assumed; norm.step_ms)"
    return f"{case.cost_of(ranks):.1f} ms are {case.overhead_of(ranks):.0%} of a {step}"


def _too_far(case: Case, ranks: int) -> str:
    """Say what synchronizing over so many ranks of several nodes would take, and the limit that it passes."""
    needs = f"sync over {ranks} ranks of {case.nodes_of(ranks)} nodes: {_price(case, ranks)}"
    if case.internode_latency_us > FAST_US:
        return f"{needs}, {case.internode_latency_us:g} µs a hop > {FAST_US:g} µs"
    return f"{needs} > {case.max_overhead:.0%}"


def _costs(case: Case, ranks: int) -> tuple[str, ...]:
    """Find the evidence of what exchanges take: inside a node, or over several."""
    return ("cost-nodes",) if case.nodes_of(ranks) > 1 else ("cost",)


def _too_few(case: Case) -> str:
    return f"device batch {case.device_batch} < least normalization batch {case.least}"


def _all_reach(case: Case) -> str:
    reach = f"all {case.world_size} ranks reach" if case.world_size > 1 else "one rank reaches"
    product = f"device batch {case.device_batch} × {case.world_size} = {case.reachable}"
    return f"{product}: {reach} a normalization batch of {case.reachable}"
