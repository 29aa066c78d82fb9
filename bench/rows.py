"""What is timed: single layers, a network's worth of layers, and real training steps, forward and backward.

Legend: N samples, C channels, H rows, W columns.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from bench.layers import VARIANTS, with_norms
from distnorm.models.resnet import ResNet

SHAPES = [
    (2, 64, 112, 112),
    (2, 256, 56, 56),
    (2, 512, 28, 28),
    (2, 1024, 14, 14),
    (2, 2048, 7, 7),
    (16, 64, 8, 8),
]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STACK_CROP = 64
Step = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what `--rows` looks in.
        kind: `layer` or `network`; the targets' means are over layers.
        shape: of one rank's input.
        memory_format: a key of `FORMATS`.
        build: makes one step of a variant, that runs one forward and backward.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    memory_format: str
    build: Callable[[str], Step]


def all_rows() -> list[Row]:
    """List every row in the order of the table."""
    stack, digits = (2, 3, STACK_CROP, STACK_CROP), (16, 1, 12, 12)
    rows = []
    for shape in SHAPES:
        for name in FORMATS:
            title = f"{'x'.join(map(str, shape))} {name}"
            rows.append(Row(title, "layer", shape, name, partial(layer_step, shape=shape, memory_format=name)))
    for name in FORMATS:
        step = partial(stack_step, crop=STACK_CROP, memory_format=name)
        rows.append(Row(f"resnet50-norms {name}", "network", stack, name, step))
    for name in FORMATS:
        step = partial(training_step, shape=digits, memory_format=name)
        rows.append(Row(f"digits-training {name}", "network", digits, name, step))
    return rows


def layer_step(variant: str, *, shape: tuple[int, ...], memory_format: str) -> Step:
    """Build forward and backward of one layer: a fixed output gradient; input, weight and bias need theirs."""
    layer = VARIANTS[variant](shape[1])
    x_NCHW, dy_NCHW = (_random(shape, memory_format) for _ in range(2))
    x_NCHW.requires_grad_()

    def step() -> None:
        x_NCHW.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x_NCHW).backward(dy_NCHW)

    return step


def stack_step(variant: str, *, crop: int, memory_format: str) -> Step:
    """Build forward and then backward of the 53 norms of a ResNet-50 at two samples, each on an input of its own."""
    shapes = [(2, *chw) for chw in resnet50_norms(crop)]
    layers = nn.ModuleList(VARIANTS[variant](shape[1]) for shape in shapes)
    inputs = [_random(shape, memory_format).requires_grad_() for shape in shapes]
    gradients = [_random(shape, memory_format) for shape in shapes]

    def step() -> None:
        for x_NCHW in inputs:
            x_NCHW.grad = None
        layers.zero_grad(set_to_none=True)
        outputs = [layer(x_NCHW) for layer, x_NCHW in zip(layers, inputs, strict=True)]
        torch.autograd.backward(outputs, gradients)

    return step


def training_step(variant: str, *, shape: tuple[int, ...], memory_format: str) -> Step:
    """Build a step of SGD on the digits' network under DDP; buffers are not broadcast."""
    network = with_norms(ResNet(in_channels=shape[1]), variant).to(memory_format=FORMATS[memory_format])  # type: ignore[call-overload]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for it that 2.11 has not
        model = DistributedDataParallel(network, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images_NCHW, labels_N = _random(shape, memory_format), torch.arange(shape[0]) % 10

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(images_NCHW), labels_N).backward()
        optimizer.step()

    return step


def resnet50_norms(crop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (C, H, W) of the 53 norms of torchvision's ResNet-50 for square crops of a multiple of 32."""
    yield 64, crop // 2, crop // 2
    before = side = crop // 4
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        side = before // stride
        for block in range(blocks):
            entering = side if block else before  # the stride is in the second convolution
            yield width, entering, entering
            yield width, side, side
            yield 4 * width, side, side
            if block == 0:
                yield 4 * width, side, side
        before = side


def _random(shape: tuple[int, ...], memory_format: str) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=FORMATS[memory_format])
