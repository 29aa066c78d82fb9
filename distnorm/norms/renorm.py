"""Batch renormalization: batch statistics, corrected towards the running ones.

Legend: N samples, C channels, * positions.
"""

import torch
from torch import Tensor

from distnorm.norms.over_ranks import AbstractNormOverRanks
from distnorm.norms.pooling import Pooled
from distnorm.norms.recomputation import Correction, Pass
from distnorm.norms.surgery import register


class BatchRenorm(AbstractNormOverRanks):
    """Normalize with the batch's statistics, and correct them towards the running ones.

    y = ((x - mean) / sqrt(var + eps) * r + d) * weight + bias
    r = clip(std / running_std, 1 / r_max, r_max)        d = clip((mean - running_mean) / running_std, -d_max, d_max)
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 200
    ramp: int = 800

    def _correction(self, pooled: Pooled) -> Correction | None:
        if self.running_mean is None or self.running_var is None:
            return None
        share = (float(self.num_batches_tracked or 0) - self.warmup) / max(self.ramp, 1)
        share = min(max(share, 0.0), 1.0)
        r_max, d_max = 1 + share * (self.r_max - 1), share * self.d_max
        running_std = (self.running_var + self.eps).sqrt()
        r_C = ((pooled.var + self.eps).sqrt() / running_std).clamp(1 / r_max, r_max)
        d_C = ((pooled.mean - self.running_mean) / running_std).clamp(-d_max, d_max)
        return r_C, d_C

    def _gain_and_shift(self, passed: Pass) -> tuple[Tensor | None, Tensor | None]:
        if passed.correction is None:
            return self.weight, self.bias
        r_C, d_C = passed.correction
        if self.weight is None:
            return r_C, d_C
        return self.weight * r_C, torch.addcmul(self.bias, self.weight, d_C)


register(BatchRenorm)
