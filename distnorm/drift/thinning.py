"""Which rows of a long record stay, when there are too many."""

from collections.abc import Sequence

_EDGE = 10


def kept(steps: Sequence[int], limit: int) -> list[int]:
    """Choose `limit` rows or fewer of one kind, evenly over the steps.

    The first and the last tenth of `limit` stay. Between them the last row stays of each cell of 2ᵏ steps, with the
    smallest k that is enough. Cells of one size lie in cells of the next, so a record that is thinned again and again
    has what it would have if it were thinned once: the same distance everywhere, not the longest ago the fewest. Of
    rows of one step, that a requeue has written twice, the later one stays.

    Args:
        steps: of the rows, in the order of the file.
        limit: 3 or more.

    Returns:
        Indices, rising.

    Example:
        >>> kept([10, 20, 30, 40, 50, 60, 70, 80, 90], 6)
        [0, 2, 5, 7, 8]
    """
    if len(steps) <= limit:
        return list(range(len(steps)))
    edge = max(1, limit // _EDGE)
    middle, k, cells = range(edge, len(steps) - edge), 0, {}
    while len(cells := {steps[row] >> k: row for row in middle}) > limit - 2 * edge:
        k += 1
    return sorted({*range(edge), *cells.values(), *range(len(steps) - edge, len(steps))})
