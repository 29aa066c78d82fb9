"""Whether evaluation data fit the statistics they are evaluated with: the inputs of every layer against those.

Legend: C channels, S channels of all layers, R ranks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distnorm import collectives
from distnorm.drift import divergence, summary
from distnorm.drift.capture import Hooks, WatchedNorm, watched_norms
from distnorm.moments import Moments

_FIRST_BATCHES = 4
_START = 0.05
"""A running average that its initial 0 and 1 still make more of is not compared: it fits no data yet."""


class EvaluationShift:
    """Measures what the layers are given in the first batches of an evaluation.

    Args:
        model: the same on every rank; layers with running statistics or constants are measured, in eval mode.
        names: of the layers to measure, in the order of the result; others have nan.
        batches: of each rank to look at.

    Collective: 1 gather of 2S + L float64 numbers, in `finish`; every rank must call it.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batches: int = _FIRST_BATCHES) -> None:
        self._names, self._batches = list(names), batches
        self._norms = [norm for norm in watched_norms(model) if norm.family != "sample" and norm.name in set(names)]
        self._settled = [_has_settled(norm) for norm in self._norms]
        self._moments: list[Moments | None] = [None] * len(self._norms)
        self._samples = [0] * len(self._norms)
        self._references = [norm.running() for norm in self._norms]
        self._seen = 0
        self._hooks = Hooks(self._norms, lambda norm: self._seen < batches and not norm.layer.training)

    def begin_batch(self) -> None:
        """Make ready for a batch."""
        if not self._seen:  # an average of the weights comes in after the evaluation's start
            self._references = [norm.running() for norm in self._norms]
        for norm in self._norms:
            norm.forget()

    def end_batch(self) -> None:
        """Take in what the layers were given."""
        if self._seen >= self._batches:
            return
        self._seen += 1
        for index, norm in enumerate(self._norms):
            if norm.own is not None:
                own, before = Moments.unpack(norm.own), self._moments[index]
                self._moments[index] = own if before is None else before + own
                self._samples[index] += norm.samples

    def finish(self) -> dict[str, list[float]] | None:
        """Compare; the values of `events.Measurement`, `None` off rank 0, and where nothing can be compared.

        The divergence is that of the data from the statistics, less its noise floor: the data's own, and that of a
        running average of batches as large as these.
        """
        self.remove()
        if not self._norms:
            return None
        packed = [self._packed(index) for index in range(len(self._norms))]
        device = packed[0].device
        everyone = tuple(range(collectives.world_size()))
        rows_RK = collectives.gather(torch.cat([part.to(device) for part in packed]), everyone, "the evaluation shift")
        if collectives.rank():
            return None
        columns = torch.split(rows_RK.cpu(), [len(part) for part in packed], 1)
        return self._compared([Moments.unpack(column[:, :-1]).merged() for column in columns], columns)

    def remove(self) -> None:
        """Let go of the model."""
        self._hooks.remove()

    def _packed(self, index: int) -> Tensor:
        norm, moments = self._norms[index], self._moments[index]
        zeros = torch.zeros(2 * norm.channels + 1, dtype=torch.float64, device=norm.device)
        own = zeros if moments is None else moments.pack()
        return torch.cat((own, own.new_tensor([float(self._samples[index])])))

    def _compared(self, whole: list[Moments], columns: Sequence[Tensor]) -> dict[str, list[float]] | None:
        channels = [norm.channels for norm in self._norms]
        excess = [self._excess(*parts) for parts in zip(self._norms, self._references, whole, columns, strict=True)]
        excess = [own if there else own * math.nan for own, there in zip(excess, self._settled, strict=True)]
        found = summary.summarize(torch.cat(excess), channels)
        if bool(found.median.isnan().all()):
            return None
        values: dict[str, list[float]] = {}
        for key, row in {"shift": found.median, "shift.p95": found.p95, "shift.max": found.max}.items():
            by_name = dict(zip([norm.name for norm in self._norms], row.tolist(), strict=True))
            values[key] = [by_name.get(name, torch.nan) for name in self._names]
        return values

    @staticmethod
    def _excess(norm: WatchedNorm, reference: Tensor, data: Moments, column: Tensor) -> Tensor:
        samples, eps = float(column[:, -1].sum()), float(getattr(norm.layer, "eps", 0.0))
        mean, var = reference.cpu().chunk(2)
        floor = divergence.floors(samples, None, ("jeffreys",))["jeffreys"]
        apart_C = divergence.jeffreys(data.mean, data.var + eps, mean, var + eps)
        return (apart_C - floor) if samples else torch.full_like(mean, torch.nan)


def _has_settled(norm: WatchedNorm) -> bool:
    """Tell whether there is something to compare with: constants, or an average that has forgotten its start."""
    if norm.family != "running":
        return norm.family == "constant"
    momentum, seen = getattr(norm.layer, "momentum", None), getattr(norm.layer, "num_batches_tracked", None)
    batches = float(seen.max()) if isinstance(seen, Tensor) else math.inf
    return bool(batches > 0 and (momentum is None or (1 - momentum) ** batches <= _START))
