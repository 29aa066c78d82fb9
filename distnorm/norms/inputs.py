"""Inputs that a layer can normalize, and the remedy for each kind that it cannot.

Legend: N samples, C channels, * positions.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from distnorm.errors import ShapeError
from distnorm.norms.arguments import STATISTICS_DTYPES
from distnorm.norms.quantizing import check_not_quantized

WITHOUT_LAST_BATCH = (
    "If it is an epoch's last batch, leave it out: drop_last=True on the DataLoader (data.last_batch=drop)"
)
"""The first remedy for a batch of too few samples."""


def name_in_words(layer: Any) -> str:
    """Name a layer in a message: its place in the model, or its class where it has none."""
    return layer.layer_name or f"{type(layer).__name__}({layer.num_features})"


def check_input(layer: Any, x: Any) -> None:
    """Refuse an input that is not dense, floating and [N, num_features, *].

    Raises:
        ShapeError: it is not.
    """
    dense = isinstance(x, Tensor) and not x.is_nested and x.layout == torch.strided
    if not (dense and x.dtype in STATISTICS_DTYPES and x.dim() > 1 and 0 < x.shape[1] == layer.num_features):
        _refuse(layer, x)


def _refuse(layer: Any, x: Any) -> NoReturn:
    name, channels = name_in_words(layer), layer.num_features
    if not isinstance(x, Tensor):
        raise ShapeError(
            f"{name} got a {type(x).__name__}; it normalizes a tensor [N, {channels}, *]. "
            "Give it torch.as_tensor(input)."
        )
    if x.is_nested:
        raise ShapeError(
            f"{name} got a nested tensor; it normalizes dense values [N, {channels}, *].\n"
            "Give it torch.nested.to_padded_tensor(input, 0.0); SyncBatchNorm and BatchRenorm take mask= too."
        )
    if x.layout != torch.strided:
        raise ShapeError(f"{name} got an input of {x.layout}; it normalizes dense values. Give it input.to_dense().")
    if x.dim() < 2 or not 0 < x.shape[1] == channels:
        raise ShapeError(
            f"{name} got an input of shape {tuple(x.shape)}; it normalizes [N, {channels}, *].\n"
            f"Give it samples in the first dimension and {channels} channels in the second, or build it with the "
            "num_features of its input.",
        )
    check_not_quantized(name, x)
    raise ShapeError(
        f"{name} got an input of {x.dtype}; it normalizes floating-point values. Give it {_dtype_remedy(x)}.",
    )


def _dtype_remedy(x: Tensor) -> str:
    if x.is_complex():
        return "torch.cat((input.real, input.imag), 1), and build it with twice the num_features"
    return "input.bfloat16(), to which float8 is widened" if x.is_floating_point() else "input.float()"
