"""Count, mean and summed squared deviation: what a norm measures, ranks pool and the drift monitor compares.

Numerics. Everything is kept as deviations from a mean. E[x²] - E[x]² is never formed: in float32 at mean 1e3 and
standard deviation 0.1 it gives a variance of -0.125. Half precision is measured in float32. A count travels as a float
of the statistics' dtype: exact to 2^24 in float32, and beyond that right to its 24 bits.

Legend: N samples, C channels, L positions, R parts that are merged (ranks, chunks, batches).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a set of values per channel.

    Shape: count is [] or [C], mean and m2 are [C]; for R parts that are not merged yet [R, 1] or [R], [R, C], [R, C].

    Attributes:
        count: number of values a channel, as a float.
        mean: their mean; 0 where count is 0.
        m2: their summed squared deviation from `mean`.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> "Moments":
        """Measure `x` per channel, over samples and positions.

        Args:
            x: values, channels in dimension 1.
            mask: which samples and positions count; all, if `None`.

        Shape: x [N, C, *] floating, N may be 0; mask [N, *] or anything that broadcasts to it, boolean.
        """
        x_CM = x.transpose(0, 1).flatten(1).to(statistics_dtype(x.dtype))
        if mask is not None:
            return cls._of_masked(x_CM, mask.expand(x.shape[0], *x.shape[2:]).flatten())
        count = torch.full((), float(x_CM.shape[1]), dtype=x_CM.dtype, device=x_CM.device)
        if x_CM.shape[1] == 0:
            return cls(count, x_CM.new_zeros(x_CM.shape[0]), x_CM.new_zeros(x_CM.shape[0]))
        var_C, mean_C = torch.var_mean(x_CM, 1, correction=0)
        return cls(count, mean_C, var_C * count)

    @classmethod
    def _of_masked(cls, x_CM: Tensor, mask_M: Tensor) -> "Moments":
        weight_M = mask_M.to(x_CM.dtype)
        count = weight_M.sum()
        mean_C = (x_CM * weight_M).sum(1) / count.clamp(min=1)
        deviation_CM = (x_CM - mean_C[:, None]) * weight_M
        return cls(count, mean_C, deviation_CM.square().sum(1))

    @classmethod
    def unpack(cls, packed: Tensor) -> "Moments":
        """Read what `pack` wrote: [..., 2C + 1]."""
        channels = packed.shape[-1] // 2
        return cls(packed[..., 2 * channels], packed[..., :channels], packed[..., channels : 2 * channels])

    def pack(self) -> Tensor:
        """Write mean, m2 and count into one tensor [..., 2C + 1], ready to be gathered."""
        return torch.cat((self.mean, self.m2, self.count.unsqueeze(-1)), -1)

    def merged(self) -> "Moments":
        """Merge R parts exactly, as if their values had been measured together.

            N = sum n_r;  mean = sum n_r mean_r / N;  m2 = sum m2_r + sum n_r (mean_r - mean)²

        The mean is summed as deviations from the unweighted mean, so that equal large means lose no digits. A part with
        count 0 changes nothing, whatever its mean.

        Source: Chan, Golub & LeVeque 1983, equation 2.1, for R parts at once.
        """
        count_R1 = self.count.unsqueeze(-1)
        total = self.count.sum(-1)
        pivot_C = (self.mean * (count_R1 > 0)).sum(-2) / (count_R1 > 0).sum(-2).clamp(min=1)
        share_R1 = count_R1 / total.clamp(min=1).unsqueeze(-1).unsqueeze(-1)
        mean_C = pivot_C + ((self.mean - pivot_C.unsqueeze(-2)) * share_R1).sum(-2)
        between_C = ((self.mean - mean_C.unsqueeze(-2)).square() * count_R1).sum(-2)
        return Moments(total, torch.where(total.unsqueeze(-1) > 0, mean_C, 0.0), self.m2.sum(-2) + between_C)

    def __add__(self, other: "Moments") -> "Moments":
        """Merge two sets of moments exactly."""
        return Moments(
            torch.stack((self.count.to(self.mean.dtype), other.count.to(other.mean.dtype))),
            torch.stack((self.mean, other.mean)),
            torch.stack((self.m2, other.m2)),
        ).merged()

    @property
    def var(self) -> Tensor:
        """Biased variance: m2 / n; 0 where count is 0."""
        return self.m2 / self._divisor(0)

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance: m2 / (n - 1); m2, that is 0, where count is at most 1."""
        return self.m2 / self._divisor(1)

    def _divisor(self, correction: int) -> Tensor:
        count = (self.count - correction).clamp(min=1)
        return count if count.dim() == self.m2.dim() else count.unsqueeze(-1)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what dtype values of `dtype` are measured: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
