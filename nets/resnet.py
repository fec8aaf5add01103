"""Residual blocks, with or without normalisation, and a residual network small enough for 8x8 grey images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nets.mlp import empty, init_generator

Norm = Literal["none", "batch", "group"]
Activation = Callable[[], nn.Module]
GROUPS = 8


class BasicBlock(nn.Module):
    """x ↦ σ(F(x) + shortcut(x)), F = norm ∘ conv3x3 ∘ σ ∘ norm ∘ conv3x3.

    The shortcut is the identity, or a 1x1 convolution with norm where the shape changes.
    Source: He, Zhang, Ren, Sun (2016), Fig. 5 left.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Norm, activation: Activation, dtype: torch.dtype,
        groups: int = GROUPS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride, norm, dtype)
        self.norm1 = normalization(norm, outputs, dtype, groups)
        self.conv2 = convolution(outputs, outputs, 3, 1, norm, dtype)
        self.norm2 = normalization(norm, outputs, dtype, groups)
        same = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else convolution(inputs, outputs, 1, stride, norm, dtype)
        self.shortcut_norm: nn.Module = nn.Identity() if same else normalization(norm, outputs, dtype, groups)
        self.activation1, self.activation2 = activation(), activation()

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n, outputs, height / stride, width / stride)."""
        inside = self.activation1(self.norm1(self.conv1(x)))
        return self.activation2(self.norm2(self.conv2(inside)) + self.shortcut_norm(self.shortcut(x)))


class PreActivationBlock(nn.Module):
    """x ↦ F(a) + shortcut, F = conv3x3 ∘ σ ∘ norm ∘ conv3x3 and a = σ(norm(x)).

    The shortcut is x itself, or where the shape changes a 1x1 convolution of a, of x with ``raw_shortcut``.
    Source: He, Zhang, Ren, Sun (2016), Fig. 4 (e).
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Norm, activation: Activation, dtype: torch.dtype,
        groups: int = GROUPS, raw_shortcut: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1, self.activation1 = normalization(norm, inputs, dtype, groups), activation()
        self.conv1 = convolution(inputs, outputs, 3, stride, norm, dtype)
        self.norm2, self.activation2 = normalization(norm, outputs, dtype, groups), activation()
        self.conv2 = convolution(outputs, outputs, 3, 1, norm, dtype)
        self._same, self._raw = inputs == outputs and stride == 1, raw_shortcut
        self.shortcut: nn.Module = nn.Identity() if self._same else convolution(inputs, outputs, 1, stride, norm, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n, outputs, height / stride, width / stride)."""
        active = self.activation1(self.norm1(x))
        inside = self.activation2(self.norm2(self.conv1(active)))
        return self.conv2(inside) + self.shortcut(x if self._same or self._raw else active)


def resnet(
    widths: Sequence[int] = (8, 16),
    blocks: Sequence[int] = (1, 1),
    classes: int = 10,
    channels: int = 1,
    norm: Norm = "none",
    activation: Activation = nn.ReLU,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """A 3x3 stem, stages of :class:`BasicBlock` that halve the image from the second on, mean pooling, a linear head.

    Convolutions are He normal, from the stream "initial weights". Without norm the last convolution of each of the N
    residual branches is scaled by 1/√N, so that the output's variance grows by at most (1 + 1/N)^N < e through depth,
    and convolutions have biases (zero at first); the head is N(0, 1/fan_in).

    Args:
        widths: channels of each stage, and
        blocks: number of blocks in each.

    Raises:
        ValueError: widths and blocks of different lengths, a size below 1, an unknown norm.
    """
    if len(widths) != len(blocks) or not widths or min(*widths, *blocks) < 1:
        raise ValueError(
            f"widths {tuple(widths)} and blocks {tuple(blocks)} make no network: give one of each, 1 or more, a stage."
        )
    layers: list[nn.Module] = [
        convolution(channels, widths[0], 3, 1, norm, dtype),
        normalization(norm, widths[0], dtype),
        activation(),
    ]
    for stage, (inputs, outputs) in enumerate(itertools.pairwise([widths[0], *widths])):
        for block in range(blocks[stage]):
            first = block == 0
            stride = 2 if first and stage > 0 else 1
            layers.append(BasicBlock(inputs if first else outputs, outputs, stride, norm, activation, dtype))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), empty(nn.Linear, widths[-1], classes, dtype=dtype)]
    network = nn.Sequential(*layers)
    _initialize(network, init_generator(seed), sum(blocks) if norm == "none" else 1)
    return network


def convolution(inputs: int, outputs: int, size: int, stride: int, norm: Norm, dtype: torch.dtype) -> nn.Module:
    """A convolution that keeps the image size at stride 1; it has a bias where no norm follows."""
    padding, bias = size // 2, norm == "none"
    return empty(nn.Conv2d, inputs, outputs, size, stride=stride, padding=padding, bias=bias, dtype=dtype)


def normalization(norm: Norm, channels: int, dtype: torch.dtype, groups: int = GROUPS) -> nn.Module:
    """BatchNorm, GroupNorm of at most so many groups, or nothing."""
    if norm == "none":
        return nn.Identity()
    if norm == "batch":
        return nn.BatchNorm2d(channels, dtype=dtype)
    if norm == "group":
        return nn.GroupNorm(math.gcd(groups, channels), channels, dtype=dtype)
    raise ValueError(f"there is no norm '{norm}': choose none, batch or group.")


@torch.no_grad()
def _initialize(network: nn.Module, generator: torch.Generator, branches: int) -> None:
    last = {part.conv2 for part in network.modules() if isinstance(part, BasicBlock)}
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            fan_in = part.weight[0].numel()
            scale = (2 / fan_in) ** 0.5 / (branches**0.5 if part in last else 1)
            part.weight.normal_(0, scale, generator=generator)
        elif isinstance(part, nn.Linear):
            part.weight.normal_(0, part.in_features**-0.5, generator=generator)
        if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
            part.bias.zero_()
