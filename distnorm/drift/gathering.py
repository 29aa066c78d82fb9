"""Bring what all ranks caught in one step together on rank 0's host: one gather over the ranks, one copy to the host.

Legend: R ranks, L layers, C channels of one layer, S channels of all layers, G layers that join the gather.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distnorm import collectives
from distnorm.drift.capture import WatchedNorm


@dataclass(frozen=True)
class Caught:
    """What the ranks' layers saw in one step, on the host, in float64; count 0 where a layer was not reached.

    Attributes:
        count: values a channel.
        samples: of one normalization batch, as far as a rank has it.
        mean: of each rank's values.
        m2: their summed squared deviation.
        running_mean: before the step; nan for norms of single samples.
        running_var: likewise.
        weight: as they are now; nan where a layer has none.
        bias: likewise.
        apart: of `WatchedNorm`; nan with several ranks.

    Shape: count, samples [R, L]; mean, m2, running_mean, running_var [R, S]; weight, bias, apart [S].
    """

    count: Tensor
    samples: Tensor
    mean: Tensor
    m2: Tensor
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor
    apart: Tensor


class Gathering:
    """Gathers from layers that do not gather from all ranks themselves; the others hand over what they have.

    Args:
        norms: in the model's order.
        carries_word: gather also where no layer needs it, so that rank 0 can tell the others something.

    Attributes:
        norms: in the order of `Caught`.
    """

    def __init__(self, norms: Sequence[WatchedNorm], *, carries_word: bool) -> None:
        self._joining = [norm for norm in norms if not norm.gathers_itself]
        self._free = [norm for norm in norms if norm.gathers_itself]
        self.norms = [*self._joining, *self._free]
        self._carries_word = carries_word
        self._ranks = tuple(range(collectives.world_size()))

    def start(self, word: float = 0.0) -> "PendingCatch":
        """Start to gather what the layers caught.

        Args:
            word: what rank 0 tells the others.

        Collective: 1 gather of 4S + 2G + 1 float64 numbers, S channels of G layers that do not gather from all ranks;
            none where there are no such layers, unless it carries word.
        """
        pending = None
        if self._joining or self._carries_word:
            pending = collectives.start_gather(self._packed(word), self._ranks, "the drift monitor")
        free = [(norm.rank_moments(), _reference(norm), norm.samples) for norm in self._free]
        is_first = collectives.rank() == 0
        own = [_own(norm, name) for name in ("weight", "bias", "apart") for norm in self.norms] if is_first else []
        return PendingCatch(self, pending, free, own)

    def _packed(self, word: float) -> Tensor:
        moments = [norm.own_moments() for norm in self._joining]
        references = [_reference(norm) for norm in self._joining]
        device = moments[0].device if moments else _device_of(self._free)
        numbers = [*(norm.samples for norm in self._joining), word]
        parts = [m[: len(m) // 2] for m in moments] + [m[len(m) // 2 : -1] for m in moments] + [m[-1:] for m in moments]
        parts += [torch.tensor(numbers, dtype=torch.float64, device=device)]
        parts += [r[: len(r) // 2] for r in references] + [r[len(r) // 2 :] for r in references]
        return torch.cat([part.to(device) for part in parts])

    def unpack(self, rows_RK: Tensor | None, free: Sequence[tuple[Tensor, Tensor, int]], own: list[Tensor]) -> Caught:
        """Copy to the host at once, and sort out."""
        num_ranks = len(self._ranks)
        parts = [] if rows_RK is None else [rows_RK]
        parts += [part for moments, reference, _ in free for part in (moments, reference)] + own
        device = parts[0].device
        flat = torch.cat([part.to(device, torch.float64, non_blocking=True).flatten() for part in parts]).cpu()
        found = iter(torch.split(flat, [part.numel() for part in parts]))
        sections = [[], [], [], [], [], []] if rows_RK is None else self._sections(next(found).view(num_ranks, -1))
        columns: list[list[Tensor]] = [list(section) for section in sections]
        for _, _, samples in free:
            moments_RK, reference = next(found).view(num_ranks, -1), next(found).expand(num_ranks, -1)
            channels = moments_RK.shape[1] // 2
            here = moments_RK[0, -1].clamp(min=1)
            columns[0].append(moments_RK[:, :channels])
            columns[1].append(moments_RK[:, channels:-1])
            columns[2].append(moments_RK[:, -1:])
            columns[3].append(moments_RK[:, -1:] * (samples / here))  # as many positions on every rank as here
            columns[4].append(reference[:, :channels])
            columns[5].append(reference[:, channels:])
        mean, m2, count, samples_RL, running_mean, running_var = (torch.cat(column, 1) for column in columns)
        return Caught(count, samples_RL, mean, m2, running_mean, running_var, *torch.cat(list(found)).chunk(3))

    def _sections(self, rows_RK: Tensor) -> list[list[Tensor]]:
        channels, layers = sum(norm.channels for norm in self._joining), len(self._joining)
        mean, m2, count, samples, _, running_mean, running_var = rows_RK.split(
            (channels, channels, layers, layers, 1, channels, channels), 1
        )
        return [[mean], [m2], [count], [samples], [running_mean], [running_var]]

    def word_in(self, rows_RK: Tensor) -> float:
        """Read what rank 0 told the others; waits for the device."""
        channels, layers = sum(norm.channels for norm in self._joining), len(self._joining)
        return float(rows_RK[0, 2 * channels + 2 * layers])


class PendingCatch:
    """A gather that is under way, and what needs none."""

    def __init__(
        self,
        gathering: Gathering,
        pending: collectives.Pending | None,
        free: list[tuple[Tensor, Tensor, int]],
        own: list[Tensor],
    ) -> None:
        self._gathering, self._pending, self._free, self._own = gathering, pending, free, own
        self._rows: Tensor | None = None

    def word(self) -> float:
        """Wait, and hear what rank 0 told when this was started."""
        rows = self._wait()
        return 0.0 if rows is None else self._gathering.word_in(rows)

    def finish(self) -> Caught | None:
        """Wait, and bring all to rank 0's host; `None` on the other ranks."""
        rows = self._wait()
        return None if collectives.rank() else self._gathering.unpack(rows, self._free, self._own)

    def _wait(self) -> Tensor | None:
        if self._pending is not None:
            self._rows = self._pending.wait()
            self._pending = None
        return self._rows


class ArrivedCatch:
    """A gather that was under way when a checkpoint was saved: what it brought."""

    def __init__(self, told: float, caught: Caught | None) -> None:
        self._told, self._caught = told, caught

    def word(self) -> float:
        """Give what rank 0 had told."""
        return self._told

    def finish(self) -> Caught | None:
        """Give what was caught; `None` on the other ranks."""
        return self._caught


def _reference(norm: WatchedNorm) -> Tensor:
    if norm.family == "sample":
        return torch.full((2 * norm.channels,), torch.nan, dtype=torch.float64, device=norm.device)
    return norm.running() if norm.reference is None else norm.reference


def _own(norm: WatchedNorm, name: str) -> Tensor:
    """Copy the weight, the bias or what is `apart` [C]; nan where there is none, or none that is whole on this rank."""
    found = norm.apart if name == "apart" else getattr(norm.layer, name, None)
    if isinstance(found, Tensor) and found.numel() == norm.channels and not hasattr(found, "full_tensor"):
        return found.detach().to(torch.float64, copy=True)
    return torch.full((norm.channels,), torch.nan, dtype=torch.float64, device=norm.device)


def _device_of(norms: Sequence[WatchedNorm]) -> torch.device:
    return norms[0].device if norms else torch.device("cpu")
