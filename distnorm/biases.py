"""Biases that do nothing: a norm with batch statistics takes its input's mean out, and a bias right before it too.

A pair counts where `torch.fx` shows, in train and in eval mode, that the layer is called once, that the norm alone
takes its output, and takes nothing else. The order in which a model registers its layers would not do: a residual may
branch off between the two. A model that cannot be traced is looked at child by child.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distnorm.changes import channels_of
from distnorm.flow import PRODUCERS, certain_pairs, is_hooked, tied_parameters, traced_parts


class RemovedBias:
    """A bias that was taken away; the running mean of the norm after it made up for it."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        self.module, self._norm = layer, norm
        self._bias: nn.Parameter = layer.bias  # type: ignore[assignment]
        mean = norm.running_mean
        layer._parameters["bias"] = None  # noqa: SLF001
        self._mean_before = self._mean_after = None
        if isinstance(mean, Tensor):
            self._mean_before = mean.clone()
            mean.sub_(self._bias.detach().to(mean))
            self._mean_after = mean.clone()

    def changed_since(self) -> str:
        """Say so if the layer has a bias again, or the norm no statistics: `fold` merges them."""
        if self.module._parameters.get("bias") is not None:  # noqa: SLF001
            return "has a bias again, and convert() had removed it"
        if self._mean_after is not None and self._norm._buffers.get("running_mean") is None:  # noqa: SLF001
            return f"has lost the norm after it, that is a {type(self._norm).__name__} without statistics now"
        return ""

    def restore(self, follow: Callable[[Tensor], Tensor]) -> None:
        """Put the bias back, and the running mean to where it is with it."""
        bias = follow(self._bias)
        self.module._parameters["bias"] = bias  # type: ignore[assignment]  # noqa: SLF001
        mean, before, after = self._norm._buffers.get("running_mean"), self._mean_before, self._mean_after  # noqa: SLF001
        if mean is None or before is None or after is None:
            return
        after, before = after.to(mean), before.to(mean)
        unmoved = mean == after  # sums in floating point do not give the old bits back
        mean.copy_(torch.where(unmoved, before, mean + bias.detach().to(mean)))


def redundant_biases(model: nn.Module, norms: set[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """Find the layers whose bias does nothing, each with the norm after it.

    Args:
        model: is not changed, nor run.
        norms: those that take batch statistics, once they are converted.
    """
    tied, widths = tied_parameters(model), {channels_of(norm) for norm in norms}
    candidates = {m for m in model.modules() if type(m) in PRODUCERS and m.bias is not None and id(m.bias) not in tied}
    if not any(channels_of(layer) in widths for layer in candidates):
        return []
    return [
        (layer, norm)
        for _, flows in traced_parts(model)
        for layer, norm in certain_pairs(flows)
        if layer in candidates and norm in norms and _is_plain(layer, norm)
    ]


def _is_plain(layer: nn.Module, norm: nn.Module) -> bool:
    """Tell whether all that comes between two layers is the norm's own batch statistics."""
    hooked, agrees = is_hooked(layer) or is_hooked(norm), channels_of(layer) == channels_of(norm)
    return agrees and not hooked and norm.training == layer.training
