"""The reference network: its structure, its arithmetic against plain functional calls, and that it learns."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from distnorm.data import DigitsData
from distnorm.errors import ConfigError
from distnorm.models import ConvNet, ResNet

pytestmark = pytest.mark.unit


def normalized(x_NCHW, state, name):
    """Batch norm with batch statistics, from the formula."""
    mean = x_NCHW.mean((0, 2, 3), keepdim=True)
    var = ((x_NCHW - mean) ** 2).mean((0, 2, 3), keepdim=True)
    weight, bias = state[f"{name}.weight"][:, None, None], state[f"{name}.bias"][:, None, None]
    return (x_NCHW - mean) / (var + 1e-5).sqrt() * weight + bias


def test_forward_is_the_residual_network_of_the_paper():
    torch.manual_seed(0)
    model = ResNet(num_classes=3, in_channels=2, widths=(4, 6)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(5, 2, 6, 8, dtype=torch.float64)
    s = model.state_dict()
    y = normalized(functional.conv2d(x, s["conv.weight"], padding=1), s, "bn").clamp(min=0)
    for block, stride in (("stages.0.0", 1), ("stages.1.0", 2)):
        z = functional.conv2d(y, s[f"{block}.conv1.weight"], stride=stride, padding=1)
        z = normalized(z, s, f"{block}.bn1").clamp(min=0)
        z = normalized(functional.conv2d(z, s[f"{block}.conv2.weight"], padding=1), s, f"{block}.bn2")
        if stride == 2:
            y = functional.conv2d(y, s[f"{block}.shortcut.0.weight"], stride=2)
            y = normalized(y, s, f"{block}.shortcut.1")
        y = (z + y).clamp(min=0)
    expected = y.mean((2, 3)) @ s["head.weight"].T + s["head.bias"]
    assert y.shape == (5, 6, 3, 4)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("widths", [(8,), (8, 8), (4, 8, 16)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_every_convolution_is_followed_by_its_plain_norm(widths, blocks):
    model = ResNet(widths=widths, blocks_per_stage=blocks)
    leaves = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    convolutions, norms = leaves[::2], leaves[1::2]
    assert all(type(module) is nn.Conv2d and module.bias is None for module in convolutions)
    assert all(type(module) is nn.BatchNorm2d for module in norms)
    assert [c.out_channels for c in convolutions] == [n.num_features for n in norms]
    shortcuts = len(widths) - 1
    assert len(convolutions) == 1 + 2 * blocks * len(widths) + shortcuts


def test_every_parameter_gets_a_gradient_and_in_eval_mode_an_empty_batch_passes():
    model = ResNet(zero_init_residual=False)
    model(torch.randn(4, 1, 12, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.eval()(torch.zeros(0, 1, 12, 12)).shape == (0, 10)


def test_zero_init_makes_a_block_its_shortcut():
    model = ResNet(widths=(4,), zero_init_residual=True)
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(model.stages[0](x), x.relu(), rtol=0, atol=0)
    assert not torch.equal(ResNet(widths=(4,)).stages[0](x), x.relu())


def test_convolutions_start_with_kaiming_weights():
    torch.manual_seed(0)
    for conv in ResNet(widths=(64, 64)).modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_digits_are_learnt_in_three_epochs():
    torch.manual_seed(0)
    data, model = DigitsData(device_batch=32, augmentation="none"), ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for inputs, targets in data.train_dataloader():
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = [model(inputs).argmax(1) == targets for inputs, targets in data.test_dataloader()]
    assert torch.cat(right).float().mean() > 0.9


@pytest.mark.parametrize(
    ("arguments", "value", "remedy"),
    [
        ({"num_classes": 0}, "model.num_classes=0", "model.num_classes=1"),
        ({"in_channels": -1}, "model.in_channels=-1", "model.in_channels=1"),
        ({"blocks_per_stage": 0}, "model.blocks_per_stage=0", "model.blocks_per_stage=1"),
        ({"widths": ()}, "model.widths=[]", "model.widths=[16,32,64]"),
        ({"widths": (16, 0)}, "model.widths=[16, 0]", "model.widths=[16,32,64]"),
    ],
)
def test_impossible_shapes_are_refused(arguments, value, remedy):
    with pytest.raises(ConfigError) as error:
        ResNet(**arguments)
    assert value in str(error.value)
    assert remedy in str(error.value)


def test_the_plain_network_has_a_norm_after_each_convolution_and_learns_in_all_of_them():
    torch.manual_seed(0)
    model = ConvNet(num_classes=3, in_channels=2, widths=(4, 6), strides=(1, 2))
    assert [type(layer).__name__ for layer in model.features] == ["Conv2d", "BatchNorm2d", "ReLU"] * 2
    assert [layer.num_features for layer in model.features if isinstance(layer, nn.BatchNorm2d)] == [4, 6]
    x = torch.randn(5, 2, 9, 7)
    assert model.features(x).shape == (5, 6, 5, 4)
    features = model.features(x)
    torch.testing.assert_close(model(x), model.head(features.flatten(2).mean(2)))
    functional.cross_entropy(model(x), torch.arange(5) % 3).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "value", "remedy"),
    [
        ({"num_classes": 0}, "model.num_classes=0", "model.num_classes=1"),
        ({"widths": (4,)}, "model.widths=[4] and model.strides=[1, 2, 1, 2, 1, 2, 1]", "model.strides=[1,2]"),
        ({"widths": (4,), "strides": (0,)}, "model.strides=[0]", "model.strides=[1,2]"),
        ({"widths": (), "strides": ()}, "model.widths=[]", "model.widths=[16,32]"),
    ],
)
def test_an_impossible_plain_network_is_refused(arguments, value, remedy):
    with pytest.raises(ConfigError) as error:
        ConvNet(**arguments)
    assert value in str(error.value)
    assert remedy in str(error.value)
    assert str(error.value).count("\n") <= 2
