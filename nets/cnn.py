"""Convolutional networks without shortcuts, as the papers train them: VGG and SimpleCNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nets.mlp import empty, init_generator
from nets.resnet import Activation, Norm, convolution, normalization

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Output channels of each 3x3 convolution; 0 halves the image by max pooling."""
VGG11 = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)


def vgg(
    classes: int = 10,
    channels: int = 3,
    size: int = 32,
    width: int = 64,
    hidden: int = 512,
    norm: Norm = "none",
    activation: Activation = nn.GELU,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layout: Sequence[int] = VGG16,
) -> nn.Sequential:
    """VGG: convolutions in five pooled stages (13 in VGG-16), then three linear layers, ``hidden`` wide inside.

    Weights are He normal in the fan-in (variance 2/fan_in), from the stream "initial weights"; biases are 0.

    Args:
        size: side of the square images, a multiple of 32.
        width: channels of the first convolution (64 in the paper); all others scale with it.
        layout: :data:`VGG16`, :data:`VGG11` or one's own with five poolings.

    Raises:
        ValueError: a size that cannot be halved five times, a width below 1.

    Source: Simonyan and Zisserman (2015), configuration D; Chen, Kunin et al. (2023) with GELU and no norm.
    """
    if size < 32 or size % 32:
        raise ValueError(f"images of side {size} cannot be halved five times: choose a multiple of 32.")
    if width < 1 or hidden < 1:
        raise ValueError(f"width {width} and hidden {hidden} make no network: choose 1 or more.")
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in layout:
        if outputs == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        outputs = max(outputs * width // 64, 1)
        layers += [convolution(inputs, outputs, 3, 1, norm, dtype), normalization(norm, outputs, dtype), activation()]
        inputs = outputs
    inputs *= (size // 32) ** 2
    layers += [
        nn.Flatten(),
        empty(nn.Linear, inputs, hidden, dtype=dtype), activation(),
        empty(nn.Linear, hidden, hidden, dtype=dtype), activation(),
        empty(nn.Linear, hidden, classes, dtype=dtype),
    ]  # fmt: skip
    return _he_normal(nn.Sequential(*layers), seed)


def simple_cnn(
    classes: int = 10,
    channels: int = 3,
    size: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    filters: int = 32,
    kernel: int = 3,
    activation: Activation = nn.ReLU,
) -> nn.Sequential:
    """SimpleCNN: 3x3 convolutions 32 (same), 32 (valid), pool, 64 (same), 64 (valid), pool, 128 hidden units, ReLU.

    Glorot uniform weights (bound √(6/(fan_in + fan_out))), zero biases; 361 898 parameters with ten classes. The
    paper's "medium" has 100 ``filters`` (200 in the second half) of ``kernel`` 5: 2 399 518 parameters.

    Raises:
        ValueError: images too small for two unpadded convolutions and two poolings, an even kernel, no filter.

    Source: Jastrzębski et al. (2019), root and medium configuration of SimpleCNN.
    """
    if filters < 1 or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{filters} filters of side {kernel} make no network: choose 1 or more, and an odd side.")
    side = ((size - kernel + 1) // 2 - kernel + 1) // 2
    if side < 1:
        raise ValueError(f"images of side {size} are too small for this network: choose {3 * kernel + 1} or more.")
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in (filters, 2 * filters):
        layers += [
            empty(nn.Conv2d, inputs, outputs, kernel, padding=kernel // 2, dtype=dtype), activation(),
            empty(nn.Conv2d, outputs, outputs, kernel, dtype=dtype), activation(),
            nn.MaxPool2d(2),
        ]  # fmt: skip
        inputs = outputs
    layers += [
        nn.Flatten(),
        empty(nn.Linear, inputs * side**2, 128, dtype=dtype), activation(),
        empty(nn.Linear, 128, classes, dtype=dtype),
    ]  # fmt: skip
    network, generator = nn.Sequential(*layers), init_generator(seed)
    with torch.no_grad():
        for part in network:
            if isinstance(part, nn.Conv2d | nn.Linear):
                fan_out, fan_in = (part.weight.shape[k] * part.weight[0, 0].numel() for k in (0, 1))
                bound = (6 / (fan_in + fan_out)) ** 0.5
                part.weight.uniform_(-bound, bound, generator=generator)
                if part.bias is not None:
                    part.bias.zero_()
    return network


@torch.no_grad()
def _he_normal(network: nn.Sequential, seed: int) -> nn.Sequential:
    generator = init_generator(seed)
    for part in network:
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.weight.normal_(0, (2 / part.weight[0].numel()) ** 0.5, generator=generator)
            if part.bias is not None:
                part.bias.zero_()
    return network
