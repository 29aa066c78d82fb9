"""A torchmetrics.Metric whose states are moments, joined over ranks in one gather.

Legend: N samples, C channels, R parts that are joined, K ranks.
"""

import abc
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from distnorm import collectives
from distnorm.errors import ShapeError
from distnorm.moments import Moments


class AbstractMomentMetric(Metric, abc.ABC):
    """Keeps named `Moments`, and joins them over ranks in one gather.

    Args:
        num_features: C.
        states: how many channels each state has; 0 for a mere count.
        options: of `torchmetrics.Metric`, e.g. `sync_on_compute=False`.
    """

    full_state_update = False

    def __init__(self, num_features: int, states: dict[str, int], **options: Any) -> None:
        super().__init__(**options)
        self.num_features = num_features
        for name, channels in states.items():
            zeros = torch.zeros(2 * channels + 1, dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx=None)

    def _add(self, name: str, more: Moments) -> None:
        """Merge what was measured into a state."""
        setattr(self, name, self._join(torch.stack((getattr(self, name), more.pack().to(self.device)))))

    def _add_one(self, name: str, values: Tensor, there: Tensor, m2: Tensor | None = None) -> None:
        """Merge one measurement into a state, if there is one; decided on the device, without waiting for it."""
        mean = values.double().where(there, 0)
        spread = torch.zeros_like(mean) if m2 is None else m2.double().where(there, 0)
        self._add(name, Moments(there.double(), mean, spread))

    def _of(self, name: str) -> Moments:
        return Moments.unpack(getattr(self, name))

    def _measure(self, batch: Tensor | Moments, mask: Tensor | None) -> Moments:
        channels = batch.mean.shape[-1] if isinstance(batch, Moments) else batch.shape[1] if batch.dim() > 1 else 0
        if channels != self.num_features:
            shape = tuple(batch.mean.shape if isinstance(batch, Moments) else batch.shape)
            raise ShapeError(
                f"{type(self).__name__}(num_features={self.num_features}) got values of shape {shape}, with {channels} "
                f"channels. Channels are dimension 1 of values. Make it with num_features={channels}."
                if channels
                else f"{type(self).__name__}(num_features={self.num_features}) got values of shape {shape}. "
                f"Give it [N, {self.num_features}, *], or Moments."
            )
        return batch if isinstance(batch, Moments) else Moments.of(batch.detach(), mask)

    @staticmethod
    def _join(packed: Tensor) -> Tensor:
        """Join the packed moments of R parts: [R, 2C + 1] to [2C + 1]."""
        return Moments.unpack(packed).merged().pack()

    def _join_ranks(self, packed: Tensor) -> Tensor:
        """Join the packed moments of K ranks."""
        return self._join(packed)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge another's states into these: torchmetrics' hook for `forward` and `merge_state`."""
        for name in self._defaults:
            setattr(self, name, self._join(torch.stack((incoming_state[name], getattr(self, name)))))

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Join all ranks' states: torchmetrics' hook for `sync`; `dist_sync_fn` is not needed."""
        group = process_group or self.process_group
        ranks = tuple(range(collectives.world_size())) if group is None else collectives.adopt(group)
        own = [getattr(self, name) for name in self._defaults]
        gathered = collectives.gather(torch.cat(own), ranks, f"{type(self).__name__}.compute")
        for name, packed in zip(self._defaults, gathered.split([len(state) for state in own], 1), strict=True):
            setattr(self, name, self._join_ranks(packed))
