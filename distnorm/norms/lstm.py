"""An LSTM cell with batch normalization where it does not disturb the memory.

Legend: N samples, I input features, H hidden features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distnorm.errors import ShapeError
from distnorm.norms.arguments import check_count, check_dtype
from distnorm.norms.leaf import TracedAsLeaf
from distnorm.norms.recurrent import RecurrentBatchNorm

State = tuple[Tensor, Tensor]


class BatchNormLSTMCell(TracedAsLeaf, nn.Module):
    """One step of an LSTM whose two matrix products, and whose output, are batch normalized.

        i, f, g, o = BN(W_ih x) + BN(W_hh h) + bias
        c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h' = sigmoid(o) * tanh(BN(c'))

    The three norms are apart, with statistics of each time step (`RecurrentBatchNorm`); the two of the products have no
    bias of their own; the cell state itself is never normalized, so that the gradient flows through time as in an LSTM.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        t_max: time steps with running statistics of their own; later ones share the last.
        eps: added to the variances.
        momentum: weight of the new batch in the running statistics; `None` averages all batches equally.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        sync_ranks: ranks that pool together, in blocks of consecutive ranks; `None` means all.
        group_ranks: an arbitrary subset of ranks instead of blocks; the ranks outside it normalize alone.

    Shape: input [N, I]; h, c [N, H]; both results [N, H]. `weight_ih` [4H, I], `weight_hh` [4H, H] and `bias` [4H] have
        the order and the initial weights of `nn.LSTMCell`; the bias starts at 0.

    Collective: train: 3 gathers a time step forward, of 8H + 1, 8H + 1 and 2H + 1 doubles, 3 sums backward, over the
        group. eval: none. Every rank of the group must run the same number of time steps.

    Raises:
        ConfigError: an argument is out of its range, e.g. `t_max` below 1; `time` is below 0; or the ranks are named
            twice.
        ShapeError: the input is not [N, I], or the state not [N, H]; or the whole group has one sample.

    Example:
        >>> cell, state = BatchNormLSTMCell(3, 5, t_max=4), None
        >>> for time, x in enumerate(torch.randn(6, 8, 3)):
        ...     state = cell(x, state, time)
        >>> state[0].shape
        torch.Size([8, 5])

    Source: Cooijmans et al. 2017, equations 6 to 8.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        t_max: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        sync_ranks: int | None = None,
        group_ranks: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        input_size = check_count(self, "input_size", input_size, "the number of features of the input")
        hidden_size = check_count(self, "hidden_size", hidden_size, "the number of features of the state")
        check_dtype(self, dtype)
        self.input_size, self.hidden_size = input_size, hidden_size
        place: Any = {"device": device, "dtype": dtype}
        ranks: Any = {"sync_ranks": sync_ranks, "group_ranks": group_ranks}
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size, **place))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, **place))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size, **place))
        self.norm_ih = RecurrentBatchNorm(4 * hidden_size, t_max, eps, momentum, bias=False, **place, **ranks)
        self.norm_hh = RecurrentBatchNorm(4 * hidden_size, t_max, eps, momentum, bias=False, **place, **ranks)
        self.norm_c = RecurrentBatchNorm(hidden_size, t_max, eps, momentum, **place, **ranks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.LSTMCell` does, and set the bias to 0; the norms reset themselves."""
        bound = self.hidden_size**-0.5
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.input_size}, {self.hidden_size}"

    def forward(self, input: Tensor, state: State | None, time: int) -> State:  # noqa: A002
        """Take one step.

        Args:
            input: this step's.
            state: (h, c) of the step before; zeros, if `None`.
            time: the step, from 0.

        Returns:
            (h, c) of this step.
        """
        if state is None:
            zeros = input.new_zeros(input.shape[0], self.hidden_size)
            state = zeros, zeros
        h, c = state
        self._check(input, h, c)
        gates = self.norm_ih(functional.linear(input, self.weight_ih), time)
        gates = gates + self.norm_hh(functional.linear(h, self.weight_hh), time) + self.bias
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.norm_c(c, time).tanh(), c

    def _check(self, x: Tensor, h: Tensor, c: Tensor) -> None:
        sizes = (x.shape[0] if x.dim() else 0, self.input_size, self.hidden_size)
        if x.shape != sizes[:2] or h.shape != sizes[::2] or c.shape != sizes[::2]:
            raise ShapeError(
                f"{type(self).__name__}({self.input_size}, {self.hidden_size}) got an input of {tuple(x.shape)} and a "
                f"state of {tuple(h.shape)} and {tuple(c.shape)};\nit takes one time step [N, {self.input_size}] and a "
                f"state [N, {self.hidden_size}] twice. Give it x[:, time], or build it with the sizes of its input.",
            )
