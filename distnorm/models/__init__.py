"""Small reference networks with plain batch norms. Any other network comes in by its own class."""

from distnorm.models.convnet import ConvNet as ConvNet
from distnorm.models.resnet import ResNet as ResNet
