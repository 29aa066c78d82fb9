"""Samples of a masked batch: how many there are, and the mean of each.

Legend: N samples, C channels, L positions.
"""

import torch
from torch import Tensor


def num_samples(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many samples have a value that counts."""
    number = x.shape[0] if mask is None else _full(mask, x).flatten(1).any(1).sum()
    return torch.as_tensor(number, dtype=torch.float64, device=x.device)


def position_means(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Mean over its positions of each sample, and which samples have any that count: [N, C] and [N]."""
    positions = x.shape[2:].numel()  # not -1: there may be no samples to tell it from
    values_NCL = x.double().reshape(*x.shape[:2], positions)
    if mask is None:
        return values_NCL.mean(2), None
    weight_N1L = _full(mask, x).reshape(len(x), 1, positions)
    count_N1 = weight_N1L.sum(2)
    return values_NCL.masked_fill(~weight_N1L, 0).sum(2) / count_N1.clamp(min=1), count_N1[:, 0] > 0


def _full(mask: Tensor, x: Tensor) -> Tensor:
    return mask.expand(x.shape[0], *x.shape[2:])
