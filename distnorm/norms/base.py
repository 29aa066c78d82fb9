"""What every layer of the batch-statistics family shares: torch's parameters and buffers, and how they take a batch.

Legend: N samples, C channels, * positions.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm import collectives
from distnorm.norms import apart, arguments, sharded, transforms
from distnorm.norms.inputs import check_input, name_in_words
from distnorm.norms.leaf import TracedAsLeaf
from distnorm.norms.recomputation import Pass, Passes, inside_backward
from distnorm.norms.snapshots import snapshot

OF_ONE_STEP = ("_rank_rows", "_passes")
"""Attributes that no copy keeps, and no layer of another class."""


def name_layer(layer: Any, name: str) -> None:
    """Give a layer the name that errors carry, and by which other ranks know whose numbers it brings.

    Args:
        layer: one of distnorm's.
        name: its place in the model; empty where nobody knows it.
    """
    layer.layer_name = name
    set_order(layer, collectives.count_layer(name_in_words(layer)))


def set_order(layer: Any, order: int) -> None:
    """Give a layer its order among those of its name; what is kept of its exchanges goes with it."""
    layer.layer_order = order
    weakref.finalize(layer, collectives.forget_layer, name_in_words(layer), order).atexit = False


def reset_batch_norm(layer: nn.Module) -> None:
    """Initialize a layer's own batch norm parameters and buffers, whichever it has, as its constructor does."""
    initial = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    with torch.no_grad():
        for name, value in initial.items():
            if (values := getattr(layer, name, None)) is not None:
                values.fill_(value)


def followed(layer: Any, y: Tensor) -> Tensor:
    """Apply the submodules that a layer names in `after`."""
    for name in layer.after:
        y = getattr(layer, name)(y)
    return y


class AbstractBatchStatisticsNorm(TracedAsLeaf, _BatchNorm):
    """A batch norm whose statistics come from more, or fewer, samples than one device's batch.

    Subclasses torch's own base class, so that FSDP, SWA and `update_bn` treat it as a batch norm, and keeps its
    `state_dict` keys, so that checkpoints load before and after a conversion. Every attribute has a class-level
    default: `convert` swaps the class of a living layer and never runs `__init__`.

    The running statistics move once a training forward: not again when activation checkpointing repeats it.

    Attributes:
        layer_name: how the model calls this layer; errors carry it.
        layer_order: which of the layers of this name it is, see `name_layer`.
        after: names of submodules that are applied to the output: the activation of a layer that had one built in.
    """

    layer_name: str = ""
    layer_order: int = 0
    after: tuple[str, ...] = ()
    _passes: Passes | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        num_features = arguments.check_batch_norm(self, num_features, eps, momentum, affine, track_running_stats, bias)
        arguments.check_dtype(self, dtype)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # `bias=` came with torch 2.13
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Set weight, bias and running statistics to what a new layer has: 1, 0, and 0 and 1 after no batch."""
        reset_batch_norm(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalize with batch statistics in training, with running statistics in evaluation.

        Shape: input [N, C, *] floating; output: the same.
        """
        if type(input) is not Tensor and sharded.is_sharded(input):
            return sharded.on_shard(self, AbstractBatchStatisticsNorm.forward, input)
        self._check_input_dim(input)
        self._keep_statistics_apart()
        if self.training or self.running_mean is None:
            return followed(self, self._normalize_with_batch(input))
        return followed(self, self._normalize_with_running(input))

    def _normalize_with_batch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _normalize_with_running(self, x: Tensor) -> Tensor:
        mean, var, _ = self._running()
        assert mean is not None
        assert var is not None
        if torch.is_grad_enabled() and not torch.compiler.is_exporting():
            mean, var = snapshot(mean, var)
        return functional.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)

    def _running(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Give the running statistics of this forward, to be read or moved: mean and variance [C], and their count."""
        return self.running_mean, self.running_var, self.num_batches_tracked

    def _keep_statistics_apart(self) -> None:
        """Keep this rank's own running statistics, if the forward is one of a DDP that sends rank 0's around."""
        if self.training and self.running_mean is not None:
            apart.watch(self)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        apart.note_load(self)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        check_input(self, input)
        if not self.eps > 0:  # nor nan; it may have been set after construction
            arguments.check_eps(f"{self.name_in_words()} has", self.eps, zero=not self.training)

    def name_in_words(self) -> str:
        """Name the layer in a message: its place in the model, or its class where it has none."""
        return name_in_words(self)

    def _repeated(self, own: Tensor | None = None) -> Pass | None:
        """Find the pass that this forward repeats, if activation checkpointing runs it again."""
        if torch.compiler.is_compiling() or self._passes is None or not inside_backward():
            return None
        return self._passes.repeated_by(own)

    def _keep(self, passed: Pass, y: Tensor) -> None:
        if self._passes is None:
            self._passes = Passes()
        self._passes.keep(passed, has_graph=y.grad_fn is not None)

    def _keep_with(self, y: Tensor, passed: Pass) -> None:
        """Remember a pass that only has to be known again, as long as the graph of its output lives."""
        if torch.compiler.is_compiling() or transforms.active():
            return
        if y.grad_fn is not None:
            y.grad_fn.metadata["distnorm"] = passed  # type: ignore[index]  # a property, that torch declares a method
        self._keep(passed, y)

    def _take_batch(self, mean_C: Tensor, var_C: Tensor, count: Tensor | float) -> None:
        """Move the running statistics towards a batch; one without values leaves them where they are.

        Called without gradients. A count on an accelerator is not read back: the decision is a factor.

        Args:
            mean_C: of the batch.
            var_C: of the batch, biased; the running variance takes the unbiased one.
            count: values a channel.
        """
        mean, var, tracked = self._running()
        if not self.track_running_stats or mean is None or var is None:
            return
        factor: Tensor | float
        if isinstance(count, Tensor):
            factor = (count > 0).to(mean.dtype)
            if tracked is not None:
                tracked.add_(count > 0)
            if self.momentum is not None:
                factor = factor * self.momentum
            elif tracked is not None:
                factor = factor / tracked.clamp(min=1)
            unbiased_C = var_C * (count / (count - 1).clamp(min=1))
            if transforms.active():  # vmap has no rule for lerp_, and says so
                mean.add_((mean_C.to(mean.dtype) - mean) * factor)
                var.add_((unbiased_C.to(var.dtype) - var) * factor)
            else:
                mean.lerp_(mean_C.to(mean.dtype), factor)
                var.lerp_(unbiased_C.to(var.dtype), factor)
        elif count:
            if tracked is not None:
                tracked.add_(1)
            factor = 1.0 / float(tracked or 1) if self.momentum is None else self.momentum
            mean.lerp_(mean_C.to(mean.dtype), factor)
            var.mul_(1 - factor).add_(var_C, alpha=factor * count / max(count - 1, 1.0))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one step."""
        return {key: value for key, value in self.__dict__.items() if key not in OF_ONE_STEP}
