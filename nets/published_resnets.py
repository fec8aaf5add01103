"""The residual networks of the three papers, each with its own initial law: parts named stem, block1, …, head.

Blocks are numbered as the papers number them: block k is stage k, and the last one the pooled features that the head
reads. In pre-activation networks the last stage ends with its norm and activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from nets.mlp import empty, init_generator
from nets.resnet import Activation, BasicBlock, Norm, PreActivationBlock, convolution, normalization

Block = Callable[[int, int, int], nn.Module]  # (inputs, outputs, stride) -> a residual block


def avpf_resnet(
    blocks: Sequence[int] = (2, 2, 2, 2), preactivation: bool = True, norm: Norm = "batch", *,
    classes: int = 10, channels: int = 3, width: int = 64, activation: Activation = nn.ReLU, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:  # fmt: skip
    """ResNet-18 (2, 2, 2, 2) and -34 (3, 4, 6, 3) for small images, the tiny ResNet (1, 1, 1, 1): width, 2 width, ….

    Convolutions are N(0, 2/(size² outputs)), He's law in the fan-out; norms start at scale 1, shift 0; the head is
    U(±1/√inputs), its biases 0. Nothing normalises the images. GroupNorm has width/2 groups. Without norm, which the
    paper does not train, convolutions have biases (0 at first) and the last one of each of the N residual branches is
    scaled by 1/√N, so that the output's variance stays bounded through depth.

    Args:
        blocks: number of residual blocks in each stage; stages halve the image from the second on.
        preactivation: norm and activation before each convolution ("resnet18"), or after it ("resnet18_plain").

    Raises:
        ValueError: a size that makes no network, an unknown norm.

    Source: Andriushchenko et al. (2023), deep networks, and their code; He et al. (2015) for the initial law.
    """
    network = _small_image_resnet(blocks, preactivation, norm, classes, channels, width, activation, dtype)
    _draw(network, init_generator(seed), _he_fan_out, _torch_bound)
    if norm == "none":
        with torch.no_grad():
            for part in network.modules():
                if isinstance(part, BasicBlock | PreActivationBlock):
                    part.conv2.get_parameter("weight").mul_(sum(blocks) ** -0.5)
    return network


def wide_resnet(
    depth: int = 28, norm: Norm = "batch", *, classes: int = 10, channels: int = 3, width: int = 10,
    activation: Activation = nn.ReLU, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> nn.Sequential:  # fmt: skip
    """Wide ResNet of depth 6n + 4: a stem of 16 channels, three pre-activation stages of (16, 32, 64) times ``width``.

    36.48 million parameters at depth 28, width 10. Initial laws are those of :func:`avpf_resnet`.

    Raises:
        ValueError: a depth that is not 6n + 4, a size that makes no network, an unknown norm.

    Source: Zagoruyko and Komodakis (2016); Andriushchenko et al. (2023), "wrn28".
    """
    _positive(width=width, channels=channels, classes=classes)
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"there is no wide ResNet of depth {depth}: choose 6n + 4, such as 16, 22, 28 or 40.")

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return PreActivationBlock(inputs, outputs, stride, norm, activation, dtype)

    widths, blocks = [16 * width, 32 * width, 64 * width], [(depth - 4) // 6] * 3
    after = [normalization(norm, widths[-1], dtype), activation()]
    stem = [convolution(channels, 16, 3, 1, norm, dtype)]
    network = _assemble(stem, 16, widths, blocks, block, after, classes, dtype)
    _draw(network, init_generator(seed), _he_fan_out, _torch_bound)
    return network


def ckyg_resnet(
    *, classes: int = 100, channels: int = 3, width: int = 64, activation: Activation = nn.GELU, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:  # fmt: skip
    """ResNet-18 for small images with GELU and BatchNorm, activations after norms: a 3x3 stem, no first pooling.

    As in the paper's code, the stem keeps torch's law U(±1/√fan_in), as does the head with its biases; all other
    convolutions are N(0, 2/(size² outputs)).

    Raises:
        ValueError: a size that makes no network.

    Source: Chen, Kunin et al. (2023), CIFAR-100, and their code.
    """
    network = _small_image_resnet((2, 2, 2, 2), False, "batch", classes, channels, width, activation, dtype)
    generator = init_generator(seed)
    _draw(network, generator, _he_fan_out, _torch_bound)
    fan_ins = {"stem.0.weight": channels * 9, "head.bias": 8 * width}
    with torch.no_grad():
        for name, fan_in in fan_ins.items():
            network.get_parameter(name).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    return network


def jkbfbs_resnet(
    depth: int = 32, norm: Norm = "none", scale: float | None = None, *, classes: int = 10, channels: int = 3,
    width: int = 16, activation: Activation = nn.ReLU, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> nn.Sequential:  # fmt: skip
    """Pre-activation ResNet of depth 6n + 2 (20, 32, 44, 56, 110): three stages of n blocks, ``width`` doubled in each.

    Convolutions, the shortcuts' included, are N(0, 2 ``scale``/fan_in); the head is Glorot uniform, U(±√(6/(fan_in +
    fan_out))); biases are 0. Shortcuts read a block's input itself, before norm and activation. 465 674 parameters at
    depth 32 without norm. With norm, convolutions have no biases here: the norm after them would undo those.

    Args:
        scale: of the variance; without norm 1 over the number of residual blocks by default (1/15 at depth 32; the
            paper also tries 1/32 and 1/64), with norm 1.

    Raises:
        ValueError: a depth that is not 6n + 2, a scale or size that makes no network, an unknown norm.

    Source: Jastrzębski et al. (2019), ResNet-32 without BatchNorm, and their code.
    """
    _positive(width=width, channels=channels, classes=classes)
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"there is no such ResNet of depth {depth}: choose 6n + 2, such as 20, 32, 44, 56 or 110.")
    n = (depth - 2) // 6
    variance = (1 / (3 * n) if norm == "none" else 1.0) if scale is None else scale
    if not 0 < variance < float("inf"):
        raise ValueError(f"scale {variance} makes no initial weights: choose a positive number.")

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return PreActivationBlock(inputs, outputs, stride, norm, activation, dtype, raw_shortcut=True)

    widths, after = [width, 2 * width, 4 * width], [normalization(norm, 4 * width, dtype), activation()]
    stem = [convolution(channels, width, 3, 1, norm, dtype)]
    network = _assemble(stem, width, widths, [n] * 3, block, after, classes, dtype)
    _draw(network, init_generator(seed), lambda part: (2 * variance / part.weight[0].numel()) ** 0.5, _glorot_bound)
    return network


def _small_image_resnet(
    blocks: Sequence[int], preactivation: bool, norm: Norm, classes: int, channels: int, width: int,
    activation: Activation, dtype: torch.dtype,
) -> nn.Sequential:  # fmt: skip
    """The layers of :func:`avpf_resnet` and :func:`ckyg_resnet`, weights not yet drawn."""
    _positive(width=width, channels=channels, classes=classes, blocks=min(blocks, default=0))
    groups, widths = max(width // 2, 1), [width * 2**stage for stage in range(len(blocks))]

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        kind = PreActivationBlock if preactivation else BasicBlock
        return kind(inputs, outputs, stride, norm, activation, dtype, groups)

    stem: list[nn.Module] = [convolution(channels, width, 3, 1, norm, dtype)]
    after = [normalization(norm, widths[-1] if preactivation else width, dtype, groups), activation()]
    if not preactivation:
        stem, after = [*stem, *after], []
    return _assemble(stem, width, widths, blocks, block, after, classes, dtype)


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} {size} makes no network: choose 1 or more.")


def _assemble(
    stem: Sequence[nn.Module], width: int, widths: Sequence[int], blocks: Sequence[int], block: Block,
    after: Sequence[nn.Module], classes: int, dtype: torch.dtype,
) -> nn.Sequential:  # fmt: skip
    """stem, block1, …, the last stage followed by ``after``, the block of pooled features, head."""
    network, inputs = nn.Sequential(), width
    network.add_module("stem", nn.Sequential(*stem))
    for stage, (outputs, count) in enumerate(zip(widths, blocks, strict=True)):
        parts: list[nn.Module] = []
        for k in range(count):
            parts.append(block(inputs, outputs, 2 if k == 0 and stage > 0 else 1))
            inputs = outputs
        network.add_module(f"block{stage + 1}", nn.Sequential(*parts, *(after if stage == len(blocks) - 1 else ())))
    network.add_module(f"block{len(blocks) + 1}", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    network.add_module("head", empty(nn.Linear, inputs, classes, dtype=dtype))
    return network


def _he_fan_out(part: nn.Conv2d) -> float:
    return (2 / (part.weight[0, 0].numel() * part.out_channels)) ** 0.5


def _torch_bound(part: nn.Linear) -> float:
    return part.in_features**-0.5


def _glorot_bound(part: nn.Linear) -> float:
    return (6 / (part.in_features + part.out_features)) ** 0.5


@torch.no_grad()
def _draw(
    network: nn.Module, generator: torch.Generator,
    deviation: Callable[[nn.Conv2d], float], bound: Callable[[nn.Linear], float],
) -> None:  # fmt: skip
    """Convolutions N(0, deviation²), linear layers U(±bound), biases 0, in the order of the modules."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.normal_(0, deviation(part), generator=generator)
        elif isinstance(part, nn.Linear):
            part.weight.uniform_(-bound(part), bound(part), generator=generator)
        if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
            part.bias.zero_()
