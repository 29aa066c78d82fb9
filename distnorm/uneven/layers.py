"""Which of torch's layers cannot take an empty batch in training, measured with torch 2.13, and what to use instead."""

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

_INTOLERANT: tuple[tuple[tuple[type[nn.Module], ...], str, str], ...] = (
    (
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        "normalizes each rank alone and counts an empty batch as one it has seen",
        "Convert the model (norm.kind=sync), put SyncBatchNorm(C, sync_ranks=1) in its place",
    ),
    (
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        "raises on an empty batch or makes its running statistics NaN",
        "Use GroupNorm(C, C), that computes the same in training",
    ),
    (
        (nn.PixelShuffle, nn.PixelUnshuffle),
        "raises on an empty batch in its backward",
        "Rearrange with view and permute",
    ),
)


def intolerant_layer(model: nn.Module) -> tuple[str, str, str] | None:
    """Find the first training layer that cannot take an empty batch: its name, why not, what to do instead."""
    for name, module in model.named_modules():
        for kinds, rule, remedy in _INTOLERANT:
            without_trouble = isinstance(module, _InstanceNorm) and not (module.affine or module.track_running_stats)
            if module.training and isinstance(module, kinds) and not without_trouble:
                return f"{name or 'The model'} ({type(module).__name__})", rule, remedy
    return None
