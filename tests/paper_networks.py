"""The networks of the papers with the parameter counts of their code, and how tests make them."""

import pytest
import torch
from torch import Tensor, nn

from kdbench.api import seeded
from kdbench.zoo.cnn import cnn
from kdbench.zoo.distillation import distillation_cifar10, distillation_mnist
from kdbench.zoo.layers import Shape
from kdbench.zoo.mobilenet import mobilenetv2
from kdbench.zoo.preresnet import preresnet_20, preresnet_32, preresnet_44, preresnet_56, preresnet_110
from kdbench.zoo.resnet import resnet_18, resnet_34, resnet_50
from kdbench.zoo.resnext import resnext_29
from kdbench.zoo.shufflenet import shufflenetv2
from kdbench.zoo.takd import (
    takd_plane_2,
    takd_plane_4,
    takd_plane_6,
    takd_plane_8,
    takd_plane_10,
    takd_resnet_8,
    takd_resnet_14,
    takd_resnet_20,
    takd_resnet_26,
    takd_resnet_32,
    takd_resnet_44,
    takd_resnet_56,
    takd_resnet_110,
)
from kdbench.zoo.vgg import vgg_11
from kdbench.zoo.wrn import wrn_16_1, wrn_16_2, wrn_40_2

MNIST, CIFAR, TINY = (1, 28, 28), (3, 32, 32), (3, 64, 64)


# The counts of the published code; where a comment derives one, it is ours.
COUNTS = [
    ("cnn", cnn, CIFAR, 10, 357_514),
    ("cnn", cnn, CIFAR, 100, 369_124),
    # Convolutions with their norms 960 + 18624 + 74112; 128 maps of 8x8 to 128, normed: 8192*128 + 128 + 256; 129 a class.
    ("cnn", cnn, TINY, 200, 93_696 + 1_048_960 + 129 * 200),
    ("preresnet-20", preresnet_20, CIFAR, 10, 272_282),
    ("preresnet-20", preresnet_20, CIFAR, 100, 278_132),
    ("preresnet-20", preresnet_20, TINY, 200, 284_632),
    ("preresnet-32", preresnet_32, CIFAR, 10, 466_714),
    ("preresnet-32", preresnet_32, CIFAR, 100, 472_564),
    ("preresnet-32", preresnet_32, TINY, 200, 479_064),
    # A bottleneck of inner width w on i channels: norms 2i + 4w, convolutions iw + 9w^2 + 4w^2, 4iw for a shortcut.
    # First of each stage (i, w) = (16, 16), (64, 32), (128, 64): 4704 + 23808 + 94720. Others, i = 4w: 4544 + 17792 +
    # 70400 = 92736 for each n - 1. Stem 432, last norm 512, 257 a class.
    ("preresnet-44", preresnet_44, CIFAR, 10, 432 + 123_232 + 6 * 92_736 + 512 + 257 * 10),
    ("preresnet-44", preresnet_44, CIFAR, 100, 432 + 123_232 + 6 * 92_736 + 512 + 257 * 100),
    ("preresnet-56", preresnet_56, CIFAR, 10, 432 + 123_232 + 8 * 92_736 + 512 + 257 * 10),
    ("preresnet-56", preresnet_56, TINY, 200, 432 + 123_232 + 8 * 92_736 + 512 + 257 * 200),
    ("preresnet-110", preresnet_110, CIFAR, 10, 432 + 123_232 + 17 * 92_736 + 512 + 257 * 10),
    ("preresnet-110", preresnet_110, CIFAR, 100, 432 + 123_232 + 17 * 92_736 + 512 + 257 * 100),
    ("resnet-18", resnet_18, CIFAR, 10, 11_173_962),
    ("resnet-18", resnet_18, CIFAR, 100, 11_220_132),
    ("resnet-18", resnet_18, TINY, 200, 11_271_432),
    ("resnet-34", resnet_34, CIFAR, 10, 21_282_122),
    ("resnet-34", resnet_34, CIFAR, 100, 21_328_292),
    ("resnet-34", resnet_34, TINY, 200, 21_379_592),
    ("resnet-50", resnet_50, CIFAR, 10, 23_520_842),
    ("resnet-50", resnet_50, CIFAR, 100, 23_705_252),
    ("resnet-50", resnet_50, TINY, 200, 23_910_152),
    ("resnext-29", resnext_29, CIFAR, 10, 34_426_698),
    ("resnext-29", resnext_29, CIFAR, 100, 34_518_948),
    ("resnext-29", resnext_29, TINY, 200, 34_621_448),
    ("mobilenetv2", mobilenetv2, CIFAR, 10, 2_254_090),
    ("mobilenetv2", mobilenetv2, CIFAR, 100, 2_369_380),
    ("mobilenetv2", mobilenetv2, TINY, 200, 2_497_480),
    ("shufflenetv2", shufflenetv2, CIFAR, 10, 1_268_646),
    ("shufflenetv2", shufflenetv2, CIFAR, 100, 1_360_896),
    ("shufflenetv2", shufflenetv2, TINY, 200, 1_463_396),
    # A wide block from i to o channels: norms 2i + 2o, convolutions 9io + 9oo, io for a shortcut where i is not o.
    # Widths 16, 32, 64: 2 * 4672, then 14432 + 18560, then 57536 + 73984. Stem 432, last norm 128, 65 a class.
    ("wrn-16-1", wrn_16_1, CIFAR, 10, 432 + 9344 + 32_992 + 131_520 + 128 + 65 * 10),
    ("wrn-16-1", wrn_16_1, CIFAR, 100, 432 + 9344 + 32_992 + 131_520 + 128 + 65 * 100),
    # Widths 32, 64, 128: first blocks 14432 (from 16), 57536, 229760; others 18560, 73984, 295424 = 387968 together.
    ("wrn-16-2", wrn_16_2, CIFAR, 10, 432 + 301_728 + 387_968 + 256 + 129 * 10),
    ("wrn-16-2", wrn_16_2, TINY, 200, 432 + 301_728 + 387_968 + 256 + 129 * 200),
    ("wrn-40-2", wrn_40_2, CIFAR, 10, 432 + 301_728 + 5 * 387_968 + 256 + 129 * 10),
    ("wrn-40-2", wrn_40_2, CIFAR, 100, 432 + 301_728 + 5 * 387_968 + 256 + 129 * 100),
    # Convolutions 9io + o: 1792 + 73856 + 295168 + 590080 + 1180160 + 3 * 2359808; norms 2 * 2752; 513 a class.
    ("vgg-11", vgg_11, CIFAR, 10, 9_220_480 + 5504 + 513 * 10),
    ("vgg-11", vgg_11, CIFAR, 100, 9_220_480 + 5504 + 513 * 100),
    ("vgg-11", vgg_11, TINY, 200, 9_220_480 + 5504 + 513 * 200),
    ("takd-plane-2", takd_plane_2, CIFAR, 10, 13_082),
    ("takd-plane-2", takd_plane_2, CIFAR, 100, 215_172),
    # Convolutions with their norms 960 + 9312; 32 maps of 16x16 to 200 classes.
    ("takd-plane-2", takd_plane_2, TINY, 200, 10_272 + 8193 * 200),
    ("takd-plane-4", takd_plane_4, CIFAR, 10, 37_338),
    ("takd-plane-4", takd_plane_4, CIFAR, 100, 475_652),
    ("takd-plane-6", takd_plane_6, CIFAR, 10, 82_778),
    ("takd-plane-6", takd_plane_6, CIFAR, 100, 1_107_204),
    ("takd-plane-8", takd_plane_8, CIFAR, 10, 327_962),
    ("takd-plane-8", takd_plane_8, CIFAR, 100, 1_246_276),
    ("takd-plane-10", takd_plane_10, CIFAR, 10, 2_487_850),
    ("takd-plane-10", takd_plane_10, CIFAR, 100, 2_931_460),
    ("takd-resnet-8", takd_resnet_8, CIFAR, 10, 78_042),
    ("takd-resnet-14", takd_resnet_14, CIFAR, 10, 175_258),
    ("takd-resnet-20", takd_resnet_20, CIFAR, 10, 272_474),
    ("takd-resnet-26", takd_resnet_26, CIFAR, 10, 369_690),
    ("takd-resnet-32", takd_resnet_32, CIFAR, 10, 466_906),
    ("takd-resnet-44", takd_resnet_44, CIFAR, 10, 661_338),
    ("takd-resnet-56", takd_resnet_56, CIFAR, 10, 855_770),
    ("takd-resnet-110", takd_resnet_110, CIFAR, 10, 1_730_714),
    # 65 parameters for each of the 190 further classes; the average leaves 64 maps whatever the size of the image.
    ("takd-resnet-110", takd_resnet_110, TINY, 200, 1_730_714 + 65 * 190),
    ("distillation-mnist", distillation_mnist, MNIST, 10, 312_202),
    ("distillation-cifar10", distillation_cifar10, CIFAR, 10, 1_147_978),
]


FACTORIES = {name: factory for name, factory, *_ in COUNTS}


networks = pytest.mark.parametrize("name", FACTORIES)


def network(name: str, shape: Shape = CIFAR, classes: int = 10, seed: int = 0) -> nn.Module:
    with seeded(seed):
        return FACTORIES[name](shape, classes)


def plan(name: str, shape: Shape = CIFAR, classes: int = 10) -> nn.Module:
    """A network without weights: shapes only, at no cost."""
    with torch.device("meta"):
        return FACTORIES[name](shape, classes)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
