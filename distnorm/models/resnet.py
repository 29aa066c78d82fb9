"""A small residual network with plain batch norms: what the experiments train and the tests convert.

Legend: N samples, C channels, H rows, W columns, K classes.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from distnorm.errors import ConfigError


class ResNet(nn.Module):
    """Classify small images: a 3 x 3 stem, stages of basic blocks, the mean over all positions, one linear layer.

    Every norm is a plain `nn.BatchNorm2d` and registered directly after its convolution; convolutions have no bias and
    Kaiming weights. The first block of every stage but the first halves height and width.

    Args:
        num_classes: K.
        in_channels: channels of the input.
        widths: channels of each stage.
        blocks_per_stage: basic blocks (two convolutions each) a stage.
        zero_init_residual: the last norm of each block starts with weight 0, so that a block starts as its shortcut.
            Meant for deep networks and large batches; with three blocks hardly a filter is left at the start, and
            digits take about twice the epochs.

    Shape: input [N, in_channels, H, W] floating; output [N, K], logits.

    Raises:
        ConfigError: a number is below 1 or there is no stage.

    Example:
        >>> import torch
        >>> ResNet(num_classes=10)(torch.zeros(2, 1, 12, 12)).shape
        torch.Size([2, 10])

    Source: He et al., Deep residual learning for image recognition (2015), §4.2; zero weights: Goyal et al. (2017),
    §5.1.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 32, 64),
        blocks_per_stage: int = 1,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        _check(num_classes, in_channels, widths, blocks_per_stage)
        self.conv = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        for stage, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            self.stages.append(_stage(before, width, blocks_per_stage, stride=1 if stage == 0 else 2))
        self.head = nn.Linear(widths[-1], num_classes)
        self._initialize(zero_init_residual)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Compute the logits. Shape: input [N, C, H, W]; output [N, K]."""
        features_NCHW = self.stages(self.bn(self.conv(x_NCHW)).relu())
        logits: Tensor = self.head(features_NCHW.mean((2, 3)))
        return logits

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with norms, added to a shortcut.

        y = relu(x' + bn2(conv2(relu(bn1(conv1(x))))))

    x' is x, or bn(conv1x1(x)) where channels or resolution change.

    Args:
        in_channels: channels of x.
        channels: channels of y.
        stride: 2 halves height and width, 1 keeps them.

    Shape: input [N, in_channels, H, W]; output [N, channels, ⌈H / stride⌉, ⌈W / stride⌉].
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Compute y. Shape: see the class."""
        y_NCHW = self.bn1(self.conv1(x_NCHW)).relu()
        y_NCHW = self.bn2(self.conv2(y_NCHW))
        sum_NCHW: Tensor = y_NCHW + self.shortcut(x_NCHW)
        return sum_NCHW.relu()


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _check(num_classes: int, in_channels: int, widths: tuple[int, ...], blocks_per_stage: int) -> None:
    numbers = {"num_classes": num_classes, "in_channels": in_channels, "blocks_per_stage": blocks_per_stage}
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"model.{name}={number} must be at least 1. Give e.g. model.{name}=1.")
    if not widths or min(widths) < 1:
        raise ConfigError(
            f"model.widths={list(widths)} must name at least one stage, each of at least 1 channel. "
            "Give e.g. model.widths=[16,32,64]."
        )
