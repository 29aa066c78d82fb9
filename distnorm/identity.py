"""Start a norm as the identity, so that a pretrained network does not notice that it was inserted.

Legend: N samples, C channels.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distnorm import collectives
from distnorm.changes import channels_of
from distnorm.errors import ConfigError, ShapeError
from distnorm.moments import Moments
from distnorm.norms.constants import eps_of
from distnorm.norms.recurrent import RecurrentBatchNorm
from distnorm.norms.surgery import computes_otherwise, looks_like_batch_norm, source_of

Layer = TypeVar("Layer", bound=nn.Module)


@torch.no_grad()
def identity_init(layer: Layer, batch: Tensor) -> Layer:
    """Set a batch norm's weight to the deviation of a batch, and its bias to the mean, and its statistics likewise.

        weight = sqrt(var + eps)    bias = running_mean = mean    running_var = var

    What comes in goes out: of the running statistics in eval mode, of a layer of constants always; in train mode, for
    this batch, as far as its samples are normalized together. Ghosts, and ranks that do not share statistics, differ by
    what their own statistics do. A norm of each sample alone (group, layer, instance, response) has other statistics
    for each, that no weight and bias undo: it is refused.

    Args:
        layer: a batch norm of torch's or distnorm's, a registered one, or constants; with weight and bias.
        batch: what the layer will see; on several ranks each one's own, and all are pooled.

    Shape: batch [N, C, *] floating; N may be 0 on some ranks.

    Returns:
        The layer.

    Collective: 1 agreement over all ranks: every rank calls it.

    Raises:
        ConfigError: the layer is no batch norm, has code or a set of statistics a time step of its own, or has no
            weight and bias.
        ShapeError: (on every rank alike) a rank's batch does not fit the layer, or there is no value at all.

    Example:
        >>> x = torch.randn(64, 3, 4, 4) * 5 + 2
        >>> torch.allclose(identity_init(nn.BatchNorm2d(3), x)(x), x, atol=1e-5)
        True
    """
    held: Any = _check_layer(layer)
    eps: Any = held.eps if hasattr(held, "eps") else eps_of(held)
    problem = _misfit(channels_of(layer), batch)
    own_K = torch.zeros(0) if problem else Moments.of(batch.detach().double()).pack().cpu()
    answers = collectives.agree((problem, own_K), "identity_init")
    if problem := next((found for found, _ in answers if found), ""):
        raise ShapeError(problem)
    moments = Moments.unpack(torch.stack([packed_K for _, packed_K in answers])).merged()
    if not moments.count:
        raise ShapeError(
            "identity_init() got a batch without values on every rank. Give it one that the layer will see."
        )
    held.weight.copy_((moments.var + eps).sqrt())
    held.bias.copy_(moments.mean)
    if held.running_mean is not None:
        held.running_mean.copy_(moments.mean)
        held.running_var.copy_(moments.var)
    if getattr(held, "num_batches_tracked", None) is not None:
        held.num_batches_tracked.fill_(1)  # for momentum=None: this batch is the first of the average
    return layer


def _check_layer(layer: object) -> nn.Module:
    name = layer.__name__ if isinstance(layer, type) else type(layer).__name__
    if isinstance(layer, RecurrentBatchNorm):
        raise ConfigError(
            f"identity_init() got a {name}, whose statistics differ from time step to time step: one weight and bias "
            "undo those of one step only.\n"
            "Insert a norm that all steps share, e.g. nn.BatchNorm1d."
        )
    if isinstance(layer, nn.Module) and (
        (source_of(layer) is None and looks_like_batch_norm(layer)) or computes_otherwise(layer)
    ):
        raise ConfigError(
            f"identity_init() got a {name}, a batch norm with code of its own, that may compute something else.\n"
            f"If it only applies submodules afterwards, name them: distnorm.register_norm({name}, after=(…))."
        )
    if isinstance(layer, type) or not isinstance(layer, nn.Module) or source_of(layer) is None:
        raise ConfigError(
            f"identity_init() got {'the class ' if isinstance(layer, type) else ''}{name}, that is no batch norm: only "
            "statistics that all samples share can be undone by a weight and a bias.\n"
            "Give it one layer, e.g. nn.BatchNorm2d(64) or model.bn1."
        )
    missing = [which for which in ("weight", "bias") if getattr(layer, which, None) is None]
    if missing:
        raise ConfigError(
            f"identity_init() got a {name} without {' and '.join(missing)}, that could undo the normalization.\n"
            "Build it with affine=True and a bias."
        )
    return layer


def _misfit(channels: int, batch: object) -> str:
    if not isinstance(batch, Tensor):
        return f"identity_init() got a batch of {type(batch).__name__}. Give it a tensor [N, {channels}, *]."
    if batch.dim() < 2 or batch.shape[1] != channels:
        return (
            f"identity_init() got a batch of shape {tuple(batch.shape)} for a layer of {channels} channels.\n"
            f"Give it what the layer sees: [N, {channels}, *]."
        )
    if not batch.is_floating_point():
        return (
            f"identity_init() got a batch of {batch.dtype}; a norm takes floating-point values. Give it batch.float()."
        )
    return ""
