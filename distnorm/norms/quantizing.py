"""Quantization knows torch's own layers alone: the message where a converted one meets `torch.ao`."""

import importlib
import itertools
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import Tensor, nn

from distnorm.errors import ConfigError, ShapeError


def _of_torch(module: str, name: str, missing: Any) -> Any:
    """Take an object of torch.ao's, which torch announces to move elsewhere."""
    try:
        return getattr(importlib.import_module(module), name, missing)
    except ImportError:
        return missing


FUSED: type[nn.Module] | None = _of_torch("torch.ao.nn.intrinsic.modules.fused", "_FusedModule", None)
"""What torch.ao's fused modules inherit from; `None` without torch.ao."""

_METHODS: dict[Any, Any] = _of_torch(
    "torch.ao.quantization.fuser_method_mappings", "_DEFAULT_OP_LIST_TO_FUSER_METHOD", {}
)
_REMEDY = (
    "Call conversion.revert() before prepare() and fuse_modules(); a trained model may be folded instead: "
    "distnorm.fold(model)."
)
PRODUCERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Layers of torch's that a batch norm can be merged into."""


def check_not_quantized(name: str, x: Tensor) -> None:
    """Refuse what the layers that `torch.ao.quantization.convert` made give out.

    Raises:
        ShapeError: the input is quantized.
    """
    if x.is_quantized:
        raise ShapeError(
            f"{name} got an input of {x.dtype}; it computes with floating-point values, and torch.ao quantizes torch's "
            f"own layers alone.\n{_REMEDY}"
        )


def refuse_fusing(norm: type[nn.Module], producers: Iterable[type[nn.Module]] = PRODUCERS) -> None:
    """Let `torch.ao.quantization.fuse_modules` name the remedy where it is given a layer of distnorm.

    Its own error names the classes only. The entries are additional ones: no pair of torch's own layers is among them.
    Where torch keeps its table elsewhere, its error stays.

    Args:
        norm: comes second.
        producers: come first.
    """
    for producer, rest in itertools.product(producers, ((), (nn.ReLU,))):
        _METHODS.setdefault((producer, norm, *rest), _refuse)


def _refuse(is_qat: bool, *modules: nn.Module) -> NoReturn:
    verb = "fuse_modules_qat" if is_qat else "fuse_modules"
    raise ConfigError(
        f"{verb}() got {', '.join(type(module).__name__ for module in modules)}: torch.ao fuses torch's own layers "
        f"alone, and convert() made one of these.\n{_REMEDY}"
    )
