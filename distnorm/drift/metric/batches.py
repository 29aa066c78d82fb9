"""Batches against running statistics: how far off, how noisy, how far behind.

Legend: N samples, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from distnorm.drift import averages, noise
from distnorm.drift.divergence import excess
from distnorm.drift.metric.base import AbstractMomentMetric
from distnorm.drift.metric.samples import num_samples
from distnorm.moments import Moments


class Divergence(AbstractMomentMetric):
    """Divergence of batches from running statistics beyond what chance alone gives; 0 while nothing drifts.

    Batches since the last reset, on all ranks, count as one joined batch. Their references, where they differ, count as
    an equal mixture. With a momentum, reset after each step: the floor is that of a running average over batches as
    large as the joined one. Many batches are to be compared with one reference, and without a momentum.

    Args:
        num_features: C.
        momentum: of the running statistics; `None` for a reference without noise, such as precise statistics.
        eps: added to all variances, as in the layer.
        options: of `torchmetrics.Metric`.

    Shape: `update(batch, mean, var, mask=None, samples=None)`: batch [N, C, *], N may be 0, or `Moments`; mean and
        var [C], the running statistics *before* they took the batch; mask [N, *] says what counts; samples, independent
        ones in the batch: N, or those with a position that counts, or the count of `Moments`.
        `compute()`: excess `jeffreys`, `kl`, `wasserstein` and `bhattacharyya`, [C] each; nan under 4 samples.

    Collective: `update` none; `compute` 1 gather of 4C + 3 numbers over all ranks, or over `process_group`.

    Raises:
        ShapeError: a batch has other channels than `num_features`.

    Example:
        >>> metric = Divergence(2)
        >>> x = torch.arange(32.0).reshape(16, 2)
        >>> metric.update(x, torch.tensor([15.0, 16.0]), x.var(0))
        >>> [round(value, 2) for value in metric.compute()["jeffreys"].tolist()]
        [-0.16, -0.16]

    Source: see `distnorm.drift.divergence`.
    """

    divergence_batch: Tensor
    divergence_reference: Tensor
    divergence_samples: Tensor

    def __init__(self, num_features: int, momentum: float | None = 0.1, eps: float = 1e-5, **options: Any) -> None:
        states = {"divergence_batch": num_features, "divergence_reference": num_features, "divergence_samples": 0}
        super().__init__(num_features, states, **options)
        self.momentum, self.eps = momentum, eps

    def update(
        self,
        batch: Tensor | Moments,
        mean: Tensor,
        var: Tensor,
        mask: Tensor | None = None,
        samples: float | None = None,
    ) -> None:
        """Take a batch and its reference."""
        measured = self._measure(batch, mask)
        own = measured.count.double() if isinstance(batch, Moments) else num_samples(batch, mask)
        count = own if samples is None else torch.full_like(own, float(samples))
        nothing, there = measured.mean[:0].double(), measured.count > 0
        self._add("divergence_batch", measured)
        self._add("divergence_samples", Moments(count, nothing, nothing))
        self._add_one("divergence_reference", mean, there, m2=var)

    def compute(self) -> dict[str, Tensor]:
        """Give the excess divergences of all batches on all ranks."""
        batch, reference = self._of("divergence_batch"), self._of("divergence_reference")
        found = excess(
            (batch.mean, batch.var + self.eps),
            (reference.mean, reference.var + self.eps),
            self._of("divergence_samples").count,
            self.momentum,
        )
        return {str(kind): value for kind, value in found.items()}


class NoiseScale(AbstractMomentMetric):
    """How noisy batch statistics are, and how many independent samples a batch is worth.

    Each update is one measurement; those of all ranks count together. Where ranks share statistics, give every rank the
    shared `Moments`.

    Args:
        num_features: C.
        momentum: of the running statistics; `None` for a cumulative average.
        options: of `torchmetrics.Metric`.

    Shape: `update(batch, mean, var, mask=None)` as in `Divergence`; an empty batch changes nothing.
        `compute()`: `effective_samples`, `cv_mean`, `cv_var` and `design_effect`, [C] each; nan before 2 updates.

    Collective: `update` none; `compute` 1 gather of 4C + 5 numbers over all ranks, or over `process_group`.

    Raises:
        ShapeError: a batch has other channels than `num_features`.

    Example:
        >>> metric = NoiseScale(1, momentum=None)
        >>> for batch in torch.tensor([[[0.0], [2.0]], [[1.0], [5.0]]]):
        ...     metric.update(batch, torch.zeros(1), torch.ones(1))
        >>> {key: round(float(value), 2) for key, value in metric.compute().items()}
        {'effective_samples': 0.5, 'cv_mean': 1.41, 'cv_var': 0.85, 'design_effect': 4.0}

    Source: see `distnorm.drift.noise`.
    """

    noise_gaps: Tensor
    noise_variances: Tensor
    noise_values: Tensor

    def __init__(self, num_features: int, momentum: float | None = 0.1, **options: Any) -> None:
        states = {"noise_gaps": num_features, "noise_variances": num_features, "noise_values": 1}
        super().__init__(num_features, states, **options)
        self.momentum = momentum

    def update(self, batch: Tensor | Moments, mean: Tensor, var: Tensor, mask: Tensor | None = None) -> None:
        """Take a batch, and the running statistics before it."""
        measured = self._measure(batch, mask)
        there = measured.count > 0
        self._add_one("noise_gaps", _gap(measured, mean, var), there)
        self._add_one("noise_variances", measured.var, there)
        self._add_one("noise_values", measured.count.reshape(1), there)

    def compute(self) -> dict[str, Tensor]:
        """Give the noise measured over all updates on all ranks."""
        effective = noise.effective_samples(self._of("noise_gaps"), self.momentum)
        return {
            "effective_samples": effective,
            "cv_mean": noise.cv_mean(effective),
            "cv_var": noise.cv_var(self._of("noise_variances")),
            "design_effect": noise.design_effect(self._of("noise_values").mean, effective),
        }


class RunningAverage(AbstractMomentMetric):
    """How far a running mean lags behind, and how noisy it is.

    Each update is one measurement; those of all ranks count together. Where ranks share statistics, give every rank the
    shared `Moments`.

    Args:
        num_features: C.
        momentum: of the running statistics.
        options: of `torchmetrics.Metric`.

    Shape: `update(batch, mean, var, mask=None)` as in `Divergence`; an empty batch changes nothing.
        `compute()`: `lag` and `estimator_sd` in standard deviations, and `estimator_samples`; [C] each; nan before 2
        updates.

    Collective: `update` none; `compute` 1 gather of 2C + 1 numbers over all ranks, or over `process_group`.

    Raises:
        ShapeError: a batch has other channels than `num_features`.

    Example:
        >>> metric = RunningAverage(1, momentum=0.5)
        >>> for batch in torch.tensor([[[2.0], [4.0]], [[3.0], [3.0]]]):
        ...     metric.update(batch, torch.zeros(1), torch.ones(1))
        >>> float(metric.compute()["lag"])
        1.5

    Source: see `distnorm.drift.averages`.
    """

    average_gaps: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1, **options: Any) -> None:
        super().__init__(num_features, {"average_gaps": num_features}, **options)
        self.momentum = momentum

    def update(self, batch: Tensor | Moments, mean: Tensor, var: Tensor, mask: Tensor | None = None) -> None:
        """Take a batch, and the running statistics before it."""
        measured = self._measure(batch, mask)
        self._add_one("average_gaps", _gap(measured, mean, var), measured.count > 0)

    def compute(self) -> dict[str, Tensor]:
        """Give the quality of the average over all updates on all ranks."""
        gaps = self._of("average_gaps")
        effective = noise.effective_samples(gaps, self.momentum)
        return {
            "lag": averages.lag(gaps, self.momentum),
            "estimator_sd": averages.estimator_sd(effective, self.momentum),
            "estimator_samples": averages.estimator_samples(effective, self.momentum),
        }


def _gap(batch: Moments, mean: Tensor, var: Tensor) -> Tensor:
    return (batch.mean - mean.double()) / var.double().sqrt()
