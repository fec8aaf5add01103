"""Fully connected networks with an initialisation from a generator of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from theory.streams import named_generator


def init_generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """torch's generator for initial weights, seeded from the stream "initial weights"; no global one is touched."""
    key = int(named_generator(seed, "initial weights").integers(2**63))
    return torch.Generator(device).manual_seed(key)


def empty(layer: type[nn.Module], *sizes: int, **options: object) -> nn.Module:
    """A layer whose parameters are allocated but not drawn, so that no global generator moves."""
    return nn.utils.skip_init(layer, *sizes, **options)


def mlp(
    widths: Sequence[int] = (64, 32, 10),
    activation: Callable[[], nn.Module] = nn.Tanh,
    seed: int = 0,
    gain: float = 1.0,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """x ↦ W_L σ(… σ(W_1 x + b_1)) + b_L on flattened inputs; ``widths`` from inputs to classes.

    Weights and biases are U(±gain/√fan_in), torch's own law at gain 1, drawn from the stream "initial weights".

    Raises:
        ValueError: fewer than two widths, or one below 1.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths {tuple(widths)} make no network: give at least two sizes of 1 or more.")
    generator, parts = init_generator(seed), list[nn.Module]([nn.Flatten()])
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layer = empty(nn.Linear, inputs, outputs, bias=bias, dtype=dtype)
        with torch.no_grad():
            for p in layer.parameters():
                p.uniform_(-gain / inputs**0.5, gain / inputs**0.5, generator=generator)
        parts += [layer] if i == len(widths) - 2 else [layer, activation()]
    return nn.Sequential(*parts)
