"""Marks on an accelerator, looked at once they have reached the host: an exchange never waits for the device."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from distnorm.collectives.marks import Gathered, Summed
from distnorm.errors import GroupError

_on_their_way: deque[tuple[Tensor, Any, Gathered | Summed]] = deque()


def look(came: Tensor, marks_of: Gathered | Summed) -> None:
    """Send marks to the host without waiting, and look at those of earlier exchanges that have arrived.

    Inside a CUDA graph's capture nothing is compared.

    Raises:
        GroupError: the ranks of an earlier exchange were not at the same layer.
    """
    with torch.cuda.device(came.device):  # whose stream the exchange is on, whichever device is current
        if torch.cuda.is_current_stream_capturing():
            return
        look_at_arrived()
        on_host = torch.empty(came.shape, dtype=came.dtype, pin_memory=True)
        on_host.copy_(came, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    _on_their_way.append((on_host, event, marks_of))


def look_at_arrived() -> None:
    """Compare the marks that have reached the host, in the order of their exchanges.

    Raises:
        GroupError: they differ.
    """
    while _on_their_way and _on_their_way[0][1].query():
        try:
            on_host, _, marks_of = _on_their_way.popleft()
        except IndexError:  # another thread of autograd's has taken it
            return
        if not marks_of.alike(on_host.tolist()):
            _on_their_way.clear()
            found = marks_of.describe(on_host.tolist())
            raise GroupError(f"{found}\nFound when the device had come so far: that was an earlier exchange.")


def forget_marks() -> None:
    """Forget marks of exchanges of a world that is gone."""
    _on_their_way.clear()
