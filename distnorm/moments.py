"""Count, mean and summed squared deviation: what a norm measures, ranks pool and the drift monitor compares.

Numerics. Everything is kept as deviations from a mean. E[x²] - E[x]² is never formed: in float32 at mean 1e3 and
standard deviation 0.1 it gives a variance of -0.125. Deviations are summed in float32 or better; counts, means and what
is merged are float64, of which there are few: a float32 mean of 1e4 has lost the digits that ranks differ in.

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
        values, over = x.to(statistics_dtype(x.dtype)), [0, *range(2, x.dim())]
        shape = (-1, *[1] * (x.dim() - 2))
        weight = None
        if mask is not None:
            weight = mask.expand(x.shape[0], *x.shape[2:]).unsqueeze(1)
            values = values.masked_fill(~weight, 0)  # padding may be anything, also nan
            count = weight.sum(dtype=torch.float64)
        else:
            count = torch.full((), float(x.numel() // max(1, x.shape[1])), dtype=torch.float64, device=x.device)
        divisor = count.to(values.dtype).clamp(min=1)
        rough_C = values.sum(over) / divisor
        deviations = values - rough_C.view(shape)
        if weight is not None:
            deviations = deviations.masked_fill(~weight, 0)
        off_C = deviations.sum(over) / divisor  # what rounding left of the mean
        m2_C = deviations.square().sum(over) - divisor * off_C.square()
        return cls(count, rough_C.double() + off_C, m2_C.clamp(min=0).double())

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

        Computed, and returned, in float64: of C numbers a part that costs nothing, and equal large means lose no
        digits. A part with count 0 changes nothing, whatever its mean.

        Source: Chan, Golub & LeVeque 1983, equation 2.1, for R parts at once.
        """
        count_R1, mean_RC = self.count.double().unsqueeze(-1), self.mean.double()
        total = count_R1.sum(-2)
        mean_C = (mean_RC * (count_R1 / total.clamp(min=1).unsqueeze(-1))).sum(-2)
        off_RC = mean_RC - mean_C.unsqueeze(-2)
        return Moments(total.squeeze(-1), mean_C, torch.addcmul(self.m2.double(), off_RC, off_RC * count_R1).sum(-2))

    def __add__(self, other: "Moments") -> "Moments":
        """Merge two sets of moments exactly; the result is in float64."""
        return Moments(
            torch.stack((self.count.double(), other.count.double())),
            torch.stack((self.mean.double(), other.mean.double())),
            torch.stack((self.m2.double(), other.m2.double())),
        ).merged()

    def sums(self) -> Tensor:
        """Write sums that ranks can add up: of the values, of their squares, and the count, in one float64 [2C + 1].

        Float64 keeps a float32 activation's variance to 6 digits and more at a mean of 1e4 deviations.
        """
        count, mean = self.count.double(), self.mean.double()
        return torch.cat((count * mean, torch.addcmul(self.m2.double(), count * mean, mean), count.unsqueeze(-1)))

    @classmethod
    def of_sums(cls, sums: Tensor) -> "Moments":
        """Read what `sums` wrote, added up over ranks or not."""
        total_C, squares_C, count = sums.tensor_split((len(sums) // 2, len(sums) - 1))
        mean_C = total_C / count.clamp(min=1)
        return cls(count.squeeze(0), mean_C, torch.addcmul(squares_C, total_C, mean_C, value=-1).clamp(min=0))

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
