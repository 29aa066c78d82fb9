"""Weight normalization through torch's own parametrization, initialized from data.

Legend: N samples, C channels, V values of a channel, R ranks.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from distnorm import collectives
from distnorm.errors import ConfigError
from distnorm.moments import Moments
from distnorm.norms.kept import kept
from distnorm.norms.surgery import check_model

Kinds = tuple[type[nn.Module], ...]

_TRANSPOSED: Kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS_AND_LINEARS: Kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
"""What `weight_normalize` takes, if it is not told."""


_Initial = tuple[Tensor, Tensor]
"""Mean and scale [C] of one layer's pre-activation y: (y - mean) · scale has mean 0 and variance 1 on the batch."""


def weight_normalize(model: nn.Module, batch: Any, include: Kinds = CONVOLUTIONS_AND_LINEARS) -> nn.Module:
    """Split the weights of convolutions and linears into length and direction, and initialize them from a batch.

        w = g · v / |v|        g = |v| / std        bias = (bias - mean) / std

    with mean and std of each output channel before the activation, over the batch and all positions. Afterwards every
    such layer gives mean 0 and variance 1 a channel on this batch: each is initialized from inputs that have passed
    through the initialized layers before it, in one forward. A layer that runs several times is initialized by the
    first. One without a bias is given one. Lengths and directions are torch's
    (`torch.nn.utils.parametrizations.weight_norm`), new parameters: make the optimizer afterwards.

    The forward runs without gradients, in the mode that the model is in; buffers and attributes are as before
    afterwards. Nothing is changed unless it succeeds.

    Args:
        model: any module, not wrapped; changed in place.
        batch: what the model takes; a tuple is several arguments.
        include: types of layers; a layer's weight must be its own.

    Returns:
        The model.

    Shape: outputs of convolutions [N, C, *], of linears [*, C].

    Collective: 1 gather of 2C + 1 doubles a layer over all ranks: each brings a batch of its own, that may be empty,
        and all get the initialization of the joined batch. Every rank must call, with the same weights.

    Raises:
        ConfigError: `include` names other layers; the model is wrapped in DDP or FSDP, compiled or scripted; has no
            layer of `include`; one of them is normalized already, shares its weight, is transposed with groups, or did
            not run; the batch is empty; or a channel is the same everywhere. What depends on the batch is found on all
            ranks alike.
        GroupError: a rank did not come. Where the forward raises on one rank, between the exchanges of its layers, the
            others wait there for the group's timeout.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> y = weight_normalize(model, torch.randn(64, 3))(torch.randn(5, 3))
        >>> sorted(name for name, _ in model[0].named_parameters())
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']

    Source: Salimans & Kingma 2016, equation 2 and section 3. There g starts at 1 over the deviation of
        v · x / |v|: the same weights.
    """
    layers = _find(model, include)
    found: dict[nn.Module, _Initial] = {}
    arguments = batch if isinstance(batch, tuple) else (batch,)
    with torch.no_grad(), kept(model), _initialized(layers, found):
        model(*arguments)
    if missed := [name for name, layer in layers.items() if layer not in found]:
        raise ConfigError(
            f"layer {missed[0]!r} did not run when the model took the batch: there is nothing to initialize it from.\n"
            "Give weight_normalize() the part of the model that runs, or only the types of layers that do (include=…).",
        )
    for layer, initial in found.items():
        _apply(layer, initial)
    return model


def _find(model: nn.Module, include: Kinds) -> dict[str, nn.Module]:
    """Collect the layers by name, and refuse what cannot be normalized."""
    check_model(model, "weight_normalize")
    if not (isinstance(include, tuple | list) and include and all(isinstance(kind, type) for kind in include)):
        raise ConfigError(
            f"weight_normalize() got include={include!r:.80}, which must be a tuple of types of layers.\n"
            "Use e.g. include=(nn.Conv2d, nn.Linear)."
        )
    if others := [kind.__name__ for kind in include if not issubclass(kind, CONVOLUTIONS_AND_LINEARS)]:
        raise ConfigError(
            f"include names {', '.join(others)}; weight_normalize() takes convolutions and linears, and their "
            "subclasses.\nUse e.g. include=(nn.Conv2d, nn.Linear).",
        )
    kinds = tuple(include)
    layers = {name or "(the model)": module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not layers:
        names = ", ".join(kind.__name__ for kind in include)
        raise ConfigError(
            f"weight_normalize() found no layer in this {type(model).__name__}: it looks for {names}.\n"
            "Give it a model that has some, or their types in include=(…).",
        )
    owners = Counter(id(value) for module in model.modules() for value in module.parameters(recurse=False))
    for name, layer in layers.items():
        _check(name, layer, owners)
    return layers


def _check(name: str, layer: Any, owners: Counter[int]) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        problem, remedy = "has a weight that is parametrized already", "Call weight_normalize() once"
    elif owners[id(layer.weight)] > 1:
        problem, remedy = "shares its weight with another layer, and would lose it", "Untie them first"
    elif _is_transposed(layer) and layer.groups > 1:
        problem = f"is transposed with groups={layer.groups}, whose lengths torch's weight_norm cannot keep apart"
        remedy = "Use groups=1"
    else:
        return
    raise ConfigError(f"layer {name!r} {problem}.\n{remedy}, or leave its type out of include=(…).")


def _is_transposed(layer: Any) -> bool:
    return isinstance(layer, _TRANSPOSED)


@contextlib.contextmanager
def _initialized(layers: dict[str, nn.Module], found: dict[nn.Module, _Initial]) -> Iterator[None]:
    """Let each layer give what it will give once it is initialized; what that takes is found when it first runs."""

    def hook(name: str) -> Any:
        def initialize(layer: nn.Module, _: Any, y: Tensor) -> Tensor:
            if layer not in found:
                found[layer] = _measure(name, _values_by_channel(layer, y))
            shape = (-1, *[1] * (y.dim() - 1 - _channel_dimension(layer, y)))
            mean_C, scale_C = (t.view(shape) for t in found[layer])
            return ((y - mean_C) * scale_C).to(y.dtype)

        return initialize

    # first of all hooks: the model's own see the initialized layer's output
    handles = [layer.register_forward_hook(hook(name), prepend=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_dimension(layer: Any, y: Tensor) -> int:
    """Where the channels are: last for a linear; before the positions for a convolution, of a batch or one sample."""
    return y.dim() - 1 - len(getattr(layer, "kernel_size", ()))


def _values_by_channel(layer: nn.Module, y: Tensor) -> Tensor:
    """Lay an output out as [V, C]."""
    y = y.movedim(_channel_dimension(layer, y), -1)
    return y.reshape(-1, y.shape[-1])


def _measure(name: str, y_VC: Tensor) -> _Initial:
    """Measure a pre-activation over all ranks."""
    place = collectives.place_of(name, 0, "initialization")
    rows_RK = collectives.gather(Moments.of(y_VC).pack(), tuple(range(collectives.world_size())), place)
    moments = Moments.unpack(rows_RK).merged()
    count = int(moments.count)
    if count == 0:
        raise ConfigError(
            f"weight_normalize() got a batch that gives layer {name!r} 0 values a channel. "
            "Give it a batch with samples, on one rank at the least.",
        )
    std_C = moments.var.sqrt()
    # a constant comes out as one to rounding only
    fine_C = (std_C > 16 * torch.finfo(y_VC.dtype).eps * moments.mean.abs()) & std_C.isfinite()
    if not fine_C.all():
        channel = int((~fine_C).nonzero()[0])
        raise ConfigError(
            f"channel {channel} of layer {name!r} has standard deviation {float(std_C[channel]):.3g} around "
            f"{float(moments.mean[channel]):.3g} over {count} values of the batch; its weight is divided by it.\n"
            "Give a batch of more, and different, samples, or leave its type out of include=(…).",
        )
    return moments.mean, 1 / std_C


@torch.no_grad()
def _apply(layer: Any, initial: _Initial) -> None:
    """Write the initialization down: into the bias, and into the lengths of torch's parametrization."""
    mean_C, scale_C = initial
    bias = layer.weight.new_zeros(len(mean_C)) if layer.bias is None else layer.bias
    moved_C = ((bias - mean_C) * scale_C).to(bias.dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(moved_C, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(moved_C)
    weight_norm(layer, dim=1 if _is_transposed(layer) else 0)
    length = layer.parametrizations.weight.original0
    length.mul_(scale_C.view_as(length))
