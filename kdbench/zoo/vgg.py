"""VGG: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015."""

from torch import nn

from .layers import Shape, averaging, he_normal, normed

GROUPS = ((64,), (128,), (256, 256), (512, 512), (512, 512))
SMALLEST = 4


def vgg_11(shape: Shape, classes: int) -> nn.Module:
    """VGG-11 with batch norm, as the data-free literature takes it: a global average and one linear layer on top.

    That code halves the image after the first three groups of convolutions, and a 64x64 image after the fourth. Here it
    is halved between groups as long as it is larger than 4x4: the same for those sizes, and other sizes work too.
    """
    inputs, *size = shape
    layers: list[nn.Module] = []
    for widths in GROUPS:
        if layers and min(size) > SMALLEST:
            layers.append(nn.MaxPool2d(2))
            size = [side // 2 for side in size]
        for outputs in widths:
            layers += [*normed(inputs, outputs, 3, bias=True), nn.ReLU(inplace=True)]
            inputs = outputs
    network = averaging(layers, inputs, classes)
    he_normal(network)
    nn.init.normal_(network.classifier.get_parameter("weight"), std=0.01)
    nn.init.zeros_(network.classifier.get_parameter("bias"))
    return network
