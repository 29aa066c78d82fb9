"""Probes of the optimization: how smooth the loss is along its gradient, and how layers shift each other's gradients.

Legend: P numbers in all trained parameters, K numbers.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.drift.losses import Inquiry, Loss
from distnorm.errors import ConfigError, did_you_mean
from distnorm.norms.kept import undisturbed
from distnorm.recording import batch_norms, held_norms, refusing_one_value, use_batch_statistics


@dataclass(frozen=True)
class Landscape:
    """The loss and its gradient g along that gradient, x' = x - η' g, for step sizes η' from lr / 2 to 4 lr.

    Attributes:
        loss_range: smallest and largest loss at x'.
        gradient_predictiveness: smallest and largest ‖g(x) - g(x')‖₂.
        smoothness: largest ‖g(x) - g(x')‖₂ / ‖x - x'‖₂, the effective β; nan where the gradient is 0.
    """

    loss_range: tuple[float, float]
    gradient_predictiveness: tuple[float, float]
    smoothness: float


@dataclass(frozen=True)
class Shift:
    """What the step of the preceding layers does to the gradient G of a layer: G' is taken after it.

    Attributes:
        distance: ‖G - G'‖₂, the internal covariate shift; 0 without it.
        cosine: of the angle between G and G'; 1 without it, nan where one of them is 0.
        relative: `distance` / ‖G‖₂; nan where G is 0.
    """

    distance: float
    cosine: float
    relative: float


def landscape(model: nn.Module, batch: Any, loss: Loss, lr: float, steps: int = 8) -> Landscape:
    """Walk along the gradient of a batch's loss, and see how far loss and gradient are what they were.

    Norms use their batch's statistics, as in training, unless they are held in eval mode while the model trains. All
    else is in eval mode: with dropout the loss would be another function at each step. The step is that of plain
    gradient descent on every parameter that requires a gradient. The model is left as it was, whatever happens, to the
    bit; its `.grad` is neither used nor changed.

    Args:
        model: not wrapped in DDP; the same on every rank.
        batch: this rank's. Ranks may have different numbers of samples, or none: gradients and losses are those of the
            mean over the samples of all ranks.
        loss: of a batch; see `Loss`.
        lr: learning rate of the moment.
        steps: step sizes, equally far apart from lr / 2 to 4 lr.

    Collective: 1 + `steps` times 1 sum of P + 3 numbers over all ranks, and what the model's layers exchange forward
        and backward. Every rank must call; one without samples runs the model only where its layers exchange.

    Raises:
        ConfigError: the model is wrapped in DDP or has nothing to train; `lr` is not above 0; `steps` is below 1; no
            rank has samples; a layer gets 1 value a channel; or the loss is no single number.
        GroupError: (on all ranks alike) the model or the loss of some ranks raised. Where that happens between the
            exchanges of its layers, the others wait there for the group's timeout.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> found = landscape(model, torch.ones(4, 1), lambda model, x: model(x).square().mean(), lr=0.1)
        >>> round(found.smoothness, 3)
        2.0

    Source: Santurkar et al. 2018, section 3.2 and figure 4.
    """
    inquiry = Inquiry("landscape()", model, batch, loss)
    _check_step("landscape()", lr, lr > 0, "above 0")
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"landscape() got steps={steps!r}; it needs 1 step size or more. Give e.g. 8.")
    parameters = _trained("landscape()", model)
    losses, distances, slopes = [], [], []
    with _training(model, "landscape()"):
        _, own_P = _gradient(inquiry, parameters)
        length = _norm(own_P)
        for factor in torch.linspace(0.5, 4, steps).tolist():
            with _stepped(parameters, _parts(own_P, parameters), factor * lr):
                value, there_P = _gradient(inquiry, parameters)
            losses.append(value)
            distances.append(_norm(there_P - own_P))
            slopes.append(distances[-1] / (factor * lr * length) if length else math.nan)
    return Landscape((min(losses), max(losses)), (min(distances), max(distances)), max(slopes))


def covariate_shift(model: nn.Module, batch: Any, loss: Loss, lr: float, layers: Sequence[str]) -> dict[str, Shift]:
    """Measure how the gradient of a layer changes once the layers before it have taken their step.

        G  = ∇_i L(W_1, …, W_k);   G' = ∇_i L(W_1 - lr g_1, …, W_{i-1} - lr g_{i-1}, W_i, …, W_k)

    The batch is the same. Layers precede one another in the order in which they run first. Modes, gradients and what is
    left behind are as in `landscape`.

    Args:
        model: likewise.
        batch: likewise.
        loss: likewise.
        lr: learning rate of the moment; 0 gives a shift of 0.
        layers: names of modules with parameters to train, of submodules too; each costs a forward and a backward.

    Collective: 1 sum of P + 3 numbers over all ranks, then 1 of the layer's parameters + 3 for each layer, and what the
        model's layers exchange. Every rank must call.

    Raises:
        ConfigError: as `landscape`; `lr` is below 0; or a name is no layer with parameters to train, or the forward
            does not run it.
        GroupError: as `landscape`.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> found = covariate_shift(model, torch.ones(4, 1), lambda model, x: model(x).mean(), 0.0, ["1"])
        >>> found["1"].distance
        0.0

    Source: Santurkar et al. 2018, definition 2.1; there the step is the optimizer's own, here that of plain gradient
        descent.
    """
    inquiry = Inquiry("covariate_shift()", model, batch, loss)
    _check_step("covariate_shift()", lr, lr >= 0, "not below 0")
    parameters = _trained("covariate_shift()", model)
    probed = {name: _layer_called(name, model) for name in layers}
    with _training(model, "covariate_shift()"):
        with _order_of_forward(model) as order:
            _, own_P = _gradient(inquiry, parameters)
        gradients = dict(zip(parameters, _parts(own_P, parameters), strict=True))
        return {name: _shift_of(inquiry, name, layer, gradients, order, lr) for name, layer in probed.items()}


def _shift_of(
    inquiry: Inquiry,
    name: str,
    layer: nn.Module,
    gradients: dict[nn.Parameter, Tensor],
    order: list[nn.Module],
    lr: float,
) -> Shift:
    own = [parameter for parameter in layer.parameters() if parameter in gradients]

    @contextlib.contextmanager
    def preceding_stepped() -> Iterator[None]:
        moved = [p for p in _before(name, layer, order) if p in gradients]
        with _stepped(moved, [gradients[p] for p in moved], lr):
            yield

    before_K = torch.cat([gradients[parameter].flatten() for parameter in own])
    _, after_K = _gradient(inquiry, own, preceding_stepped)
    distance, before, after = _norm(after_K - before_K), _norm(before_K), _norm(after_K)
    dot = float(before_K.double() @ after_K.double())
    return Shift(
        distance,
        max(-1.0, min(1.0, dot / (before * after))) if before * after else math.nan,
        distance / before if before else math.nan,
    )


def _gradient(
    inquiry: Inquiry,
    parameters: list[nn.Parameter],
    inside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> tuple[float, Tensor]:
    """Give the mean loss over all ranks' samples, and its gradient in one flat tensor.

    Each rank derives the *sum* over its samples: what synchronized layers exchange backward is of one loss then.
    """

    def measure() -> Tensor:
        with inside(), torch.enable_grad():
            mean, _ = inquiry.ask()
            total = mean * inquiry.samples
            parts = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.to(like_K).flatten() for part in (total.detach(), *parts)])

    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    like_K = torch.zeros(1 + sum(p.numel() for p in parameters), dtype=dtype, device=inquiry.device())
    found_K = inquiry.over_ranks(measure, like_K)
    return float(found_K[0]), found_K[1:]


def _parts(flat_P: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    split = flat_P.split([parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(split, parameters, strict=True)]


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


@contextlib.contextmanager
def _stepped(parameters: list[nn.Parameter], gradients: list[Tensor], lr: float) -> Iterator[None]:
    """Move parameters down their gradients, and back to the bit.

    They get other storage for a while: written in place, they could end graphs that wait for their backward.
    """
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, data, gradient in zip(parameters, own, gradients, strict=True):
            parameter.data = data - (lr * gradient).to(data)
        yield
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data


@contextlib.contextmanager
def _training(model: nn.Module, asked: str) -> Iterator[None]:
    """Let norms train that would, and all else evaluate."""
    held, layers = held_norms(model), batch_norms(model)
    with undisturbed(model), refusing_one_value(layers, asked):
        for name, layer in layers.items():
            use_batch_statistics(layer)
            layer.training = name not in held
        yield


@contextlib.contextmanager
def _order_of_forward(model: nn.Module) -> Iterator[list[nn.Module]]:
    """List modules with parameters of their own in the order in which they run first."""
    order: dict[nn.Module, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, _: order.setdefault(module))
        for module in model.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    listed: list[nn.Module] = []
    try:
        yield listed
    finally:
        for handle in handles:
            handle.remove()
        listed.extend(order)


def _before(name: str, layer: nn.Module, order: list[nn.Module]) -> list[nn.Parameter]:
    """Find the parameters of what ran before a layer, without the layer's own."""
    within = set(layer.modules())
    place = next((place for place, module in enumerate(order) if module in within), None)
    if place is None:
        raise ConfigError(
            f"covariate_shift() was asked for layer {name!r}, that this forward does not run.\n"
            "Leave it out, or give a loss that runs it.",
        )
    own = set(layer.parameters())
    found = [parameter for module in order[:place] for parameter in module.parameters(recurse=False)]
    return [parameter for parameter in dict.fromkeys(found) if parameter not in own]


def _layer_called(name: str, model: nn.Module) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    layer = modules.get(name)
    if layer is None or not any(p.requires_grad for p in layer.parameters()):
        trained = [n for n, module in modules.items() if n and any(p.requires_grad for p in module.parameters(False))]
        what = "the model does not have" if layer is None else "has no parameter to train"
        raise ConfigError(
            f"covariate_shift() was asked for layer {name!r}, that {what}.{did_you_mean(str(name), trained)}\n"
            f"Name layers with parameters that require gradients, e.g. {', '.join(map(repr, trained[:3]))}.",
        )
    return layer


def _trained(asked: str, model: nn.Module) -> list[nn.Parameter]:
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ConfigError(
            f"{asked} found no parameter to train in {type(model).__name__}: there is no gradient to follow.\n"
            "Give a model with parameters that require gradients.",
        )
    return found


def _check_step(asked: str, lr: float, is_fine: bool, rule: str) -> None:
    if not is_fine or not math.isfinite(lr):
        raise ConfigError(f"{asked} got lr={lr!r}; it must be {rule}. Give the learning rate of the moment.")
