"""The networks of the paper in CIFAR form: input ``(N, 3, 32, 32)``, output ``(N, num_classes)``.

Convolutions and linear layers are those of :mod:`wus_ext.nn`, everything else is
:mod:`torch.nn`'s. The last layer gives logits.
"""

from .alexnet import AlexNet, alexnet
from .resnet import ResNet18, resnet18
from .vgg import VGG, vgg11, vgg16

__all__ = ["VGG", "AlexNet", "ResNet18", "alexnet", "resnet18", "vgg11", "vgg16"]
