"""What a rank exchanges while something runs: kinds and numbers."""

import contextlib

from distnorm import collectives


@contextlib.contextmanager
def listed():
    """List (kind, numbers) of each gather and sum."""
    calls, originals = [], (collectives.gather, collectives.start_sum)

    def gather(values, ranks, what):
        calls.append(("gather", values.numel()))
        return originals[0](values, ranks, what)

    def start_sum(values, ranks, what):
        calls.append(("sum", values.numel()))
        return originals[1](values, ranks, what)

    collectives.gather, collectives.start_sum = gather, start_sum
    try:
        yield calls
    finally:
        collectives.gather, collectives.start_sum = originals
