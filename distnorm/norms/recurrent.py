"""Batch normalization inside a recurrence: one set of running statistics a time step.

Legend: N samples, C channels, T = t_max time steps with statistics of their own, * positions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distnorm.errors import ConfigError
from distnorm.norms.arguments import check_count
from distnorm.norms.over_ranks import AbstractNormOverRanks

INITIAL_WEIGHT = 0.1
"""At 1 the inputs of tanh are so large that gradients vanish over time (Cooijmans et al. 2017, section 4)."""


class RecurrentBatchNorm(AbstractNormOverRanks):
    """Normalize one time step of a recurrence, with running statistics of that step.

        y_t = (x_t - mean_t) / sqrt(var_t + eps) * weight + bias

    Activations of the first steps differ from those of later ones, so that statistics shared over time would fit none.
    `weight` and `bias` are shared; `weight` starts at 0.1. From step `t_max - 1` on all steps share the last set, also
    in training: sequences may be longer than those trained on. Batch statistics are pooled over `sync_ranks` ranks.

    Args:
        num_features: C, channels of the input.
        t_max: T, time steps with statistics of their own.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; `None` averages all batches equally.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        bias: `False`: learn `weight` only, where what the output is added to has a bias.
        sync_ranks: ranks that pool together, in blocks of consecutive ranks; `None` means all. Must divide the world
            size.
        group_ranks: an arbitrary subset of ranks instead of blocks; the ranks outside it normalize alone.

    Shape: input [N, C, *] floating; N may differ from rank to rank and be 0 on some. output: the same. `running_mean`
        and `running_var` [T, C], `num_batches_tracked` [T].

    Collective: train: 1 gather of 2C + 1 doubles a time step forward (with more than 16 ranks in a group: 1 sum of as
        many), 1 sum of 2C floats backward, over the group. eval: none. Every rank of the group must run the same number
        of time steps: one whose sequences are over goes on with a mask, or with no samples.

    Raises:
        ConfigError: an argument is out of its range, e.g. `t_max` below 1; `time` is below 0; or the ranks are named
            twice.
        ShapeError: dimension 1 is not `num_features`; the input is not floating; the mask does not fit; or the whole
            group has one value a channel.
        GroupError: a rank of the group failed, or did not come within the process group's timeout.

    Example:
        >>> layer = RecurrentBatchNorm(3, t_max=10)
        >>> layer(torch.randn(8, 3), time=0).shape
        torch.Size([8, 3])

    Source: Cooijmans et al. 2017, sections 3 and 4. There statistics beyond the longest training sequence are those of
        its last step; here `t_max` is chosen.
    """

    t_max: int = 1
    _time: int = 0

    def __init__(
        self,
        num_features: int,
        t_max: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        bias: bool = True,
        sync_ranks: int | None = None,
        group_ranks: tuple[int, ...] | None = None,
    ) -> None:
        steps = check_count(self, "t_max", t_max, "the length of the usual training sequence")
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype, bias=bias)
        self.t_max = steps
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value_C = getattr(self, name)
            setattr(self, name, value_C.expand(steps, *value_C.shape).clone())
        self._choose_ranks(sync_ranks, group_ranks)

    def reset_parameters(self) -> None:
        """Set the weight to 0.1, the bias to 0, and forget the running statistics."""
        super().reset_parameters()
        if self.weight is not None:
            nn.init.constant_(self.weight, INITIAL_WEIGHT)

    def extra_repr(self) -> str:
        """Show the time steps beside what torch shows."""
        return f"{super().extra_repr()}, t_max={self.t_max}"

    def forward(self, input: Tensor, time: int, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]  # noqa: A002
        """Normalize with the group's statistics of this step in training, with its running statistics in evaluation.

        Args:
            input: the activation at this step.
            time: the step, from 0.
            mask: `True` where a value counts, e.g. `lengths > time`; all do, if `None`.

        Shape: input [N, C, *] floating; mask boolean [N, *], or its first dimensions; output like input.
        """
        if time < 0:
            raise ConfigError(f"{self.name_in_words()} got time={time}; steps count from 0. Give it time=0 first.")
        self._time = min(time, self.t_max - 1)
        return super().forward(input, mask)

    def _running(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        t, (mean_TC, var_TC, tracked_T) = self._time, super()._running()
        assert mean_TC is not None
        assert var_TC is not None
        assert tracked_T is not None
        return mean_TC[t], var_TC[t], tracked_T[t]
