"""The papers' image networks by name: ``network("resnet18_plain", classes=10)``."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from nets.cnn import VGG11, VGG16, simple_cnn, vgg
from nets.published_resnets import avpf_resnet, ckyg_resnet, jkbfbs_resnet, wide_resnet
from nets.resnet import Activation, Norm

AVPF = "Andriushchenko, Varre, Pillaud-Vivien, Flammarion (2023)"
CKYG = "Chen, Kunin, Yamins, Ganguli (2023)"
JKBFBS = "Jastrzębski, Kenton, Ballas, Fischer, Bengio, Storkey (2019)"


class Builder(Protocol):
    """Makes a network with initial weights of its own law."""

    def __call__(
        self, *, classes: int, channels: int, size: int, width: int, activation: Activation, seed: int,
        dtype: torch.dtype,
    ) -> nn.Sequential:  # fmt: skip
        """See :func:`network`."""


@dataclass(frozen=True)
class Published:
    """A network of a paper: how it is built, the width and activation it was trained with, and what it is."""

    build: Builder
    width: int
    activation: Activation
    source: str


def network(
    name: str, *, classes: int = 10, channels: int = 3, size: int = 32, width: int | None = None,
    activation: Activation | None = None, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> nn.Sequential:  # fmt: skip
    """One of :data:`NETWORKS`, with weights from the stream "initial weights" of ``seed``.

    Args:
        size: side of the square images; residual networks take any, as their features are pooled.
        width: channels of the first stage; the paper's when None. Networks scale with it.
        activation: the paper's when None.

    Raises:
        ValueError: a name that is none of them, sizes that make no network.

    >>> sum(p.numel() for p in network("resnet18_plain").parameters())
    11173962
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, 1)
        hint = f"did you mean '{near[0]}'? choose" if near else "choose"
        raise ValueError(f"there is no network '{name}': {hint} one of {', '.join(NETWORKS)}.")
    published = NETWORKS[name]
    if size < 1:
        raise ValueError(f"images of side {size} are no images: choose 1 or more.")
    return published.build(
        classes=classes, channels=channels, size=size, width=published.width if width is None else width,
        activation=activation or published.activation, seed=seed, dtype=dtype,
    )  # fmt: skip


def _pooled(build: partial[nn.Sequential]) -> Builder:
    """Networks that pool their features, for which the image size does not matter."""

    def any_size(
        *, classes: int, channels: int, size: int, width: int, activation: Activation, seed: int, dtype: torch.dtype
    ) -> nn.Sequential:
        return build(classes=classes, channels=channels, width=width, activation=activation, seed=seed, dtype=dtype)

    return any_size


def _vgg(layout: tuple[int, ...], norm: Norm) -> Builder:
    def build(
        *, classes: int, channels: int, size: int, width: int, activation: Activation, seed: int, dtype: torch.dtype
    ) -> nn.Sequential:
        return vgg(classes, channels, size, width, 8 * width, norm, activation, seed, dtype, layout)

    return build


def _simple_cnn(kernel: int) -> Builder:
    def build(
        *, classes: int, channels: int, size: int, width: int, activation: Activation, seed: int, dtype: torch.dtype
    ) -> nn.Sequential:
        return simple_cnn(classes, channels, size, seed, dtype, width, kernel, activation)

    return build


def _networks() -> dict[str, Published]:
    table = {}
    for name, blocks in (("resnet18", (2, 2, 2, 2)), ("resnet34", (3, 4, 6, 3)), ("resnet_tiny", (1, 1, 1, 1))):
        variants: tuple[tuple[str, bool, Norm, str], ...] = (
            ("", True, "batch", "pre-activation, BatchNorm"),
            ("_plain", False, "batch", "BatchNorm, activations after it"),
            ("_gn", True, "group", "pre-activation, GroupNorm"),
            ("_none", False, "none", "activations after convolutions, no norm; not in the paper"),
        )
        for suffix, preactivation, norm, what in variants:
            build = _pooled(partial(avpf_resnet, blocks, preactivation, norm))
            table[name + suffix] = Published(build, 64, nn.ReLU, f"{AVPF}: {what}")
    table["wrn28"] = Published(_pooled(partial(wide_resnet, 28)), 10, nn.ReLU, f"{AVPF}: wide ResNet-28")
    table["resnet18_gelu"] = Published(
        _pooled(partial(ckyg_resnet)), 64, nn.GELU, f"{CKYG}: BatchNorm and GELU, activations after it"
    )
    for depth in (20, 32, 38, 44, 56, 74, 110):
        for suffix, norm, what in (("", "batch", "BatchNorm"), ("_nobn", "none", "no norm")):
            build = _pooled(partial(jkbfbs_resnet, depth, norm))
            table[f"resnet{depth}{suffix}"] = Published(build, 16, nn.ReLU, f"{JKBFBS}: pre-activation, {what}")
    table["vgg16"] = Published(_vgg(VGG16, "none"), 64, nn.ReLU, f"{CKYG}: no norm")
    table["vgg16_bn"] = Published(
        _vgg(VGG16, "batch"), 64, nn.ReLU, f"{CKYG}: BatchNorm, which the paper has with GELU only"
    )
    table["vgg16_gelu"] = Published(_vgg(VGG16, "none"), 64, nn.GELU, f"{CKYG}: no norm, GELU")
    table["vgg16_bn_gelu"] = Published(_vgg(VGG16, "batch"), 64, nn.GELU, f"{CKYG}: BatchNorm, GELU")
    table["vgg11_bn"] = Published(
        _vgg(VGG11, "batch"), 64, nn.ReLU, f"{JKBFBS}: BatchNorm in the convolutions, no dropout, He's initial law"
    )
    table["simple_cnn"] = Published(_simple_cnn(3), 32, nn.ReLU, f"{JKBFBS}: root configuration")
    table["simple_cnn_medium"] = Published(_simple_cnn(5), 100, nn.ReLU, f"{JKBFBS}: medium configuration")
    return table


NETWORKS = _networks()
"""Every network by name; ``NETWORKS[name].source`` says whose it is and which variant."""
