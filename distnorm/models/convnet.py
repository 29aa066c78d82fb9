"""A plain convolutional network with a batch norm after each convolution: small enough to train in seconds.

Legend: N samples, C channels, H rows, W columns, K classes.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from distnorm.errors import ConfigError


class ConvNet(nn.Module):
    """Classify small images: 3 x 3 convolutions, each with its norm and ReLU, the mean over all positions, one linear.

    Every norm is a plain `nn.BatchNorm2d` and registered directly after its convolution; convolutions have no bias and
    Kaiming weights. Without shortcuts every layer sees what the norm before it does: a model to compare norms with.

    Args:
        num_classes: K.
        in_channels: channels of the input.
        widths: channels of each convolution.
        strides: of each convolution; 2 halves height and width.

    Shape: input [N, in_channels, H, W] floating; output [N, K], logits.

    Raises:
        ConfigError: a number is below 1, there is no convolution, or there are not as many strides as widths.

    Example:
        >>> import torch
        >>> ConvNet(num_classes=10)(torch.zeros(2, 1, 12, 12)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 32, 32, 64, 64, 64, 64),
        strides: Sequence[int] = (1, 2, 1, 2, 1, 2, 1),
    ) -> None:
        super().__init__()
        _check(num_classes, in_channels, widths, strides)
        self.features = nn.Sequential()
        for before, width, stride in zip((in_channels, *widths[:-1]), widths, strides, strict=True):
            conv = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.features.extend([conv, nn.BatchNorm2d(width), nn.ReLU()])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Compute the logits. Shape: input [N, C, H, W]; output [N, K]."""
        features_NCHW: Tensor = self.features(x_NCHW)
        logits: Tensor = self.head(features_NCHW.mean((2, 3)))
        return logits


def _check(num_classes: int, in_channels: int, widths: Sequence[int], strides: Sequence[int]) -> None:
    for name, number in {"num_classes": num_classes, "in_channels": in_channels}.items():
        if number < 1:
            raise ConfigError(f"model.{name}={number} must be at least 1. Give e.g. model.{name}=1.")
    if not widths or len(widths) != len(strides) or min(*widths, *strides) < 1:
        raise ConfigError(
            f"model.widths={list(widths)} and model.strides={list(strides)} must name at least one convolution, each "
            "with a width and a stride of at least 1.\nGive e.g. model.widths=[16,32] model.strides=[1,2]."
        )
