"""Initial weights of ReLU networks, one θ per seed, from named streams.

A seed's weights depend on (root seed, seed) alone, not on how many seeds are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from theory.relu_network import ReluNetwork
from theory.streams import named_generator

Layer = tuple[np.ndarray, np.ndarray | None]
STREAM = "initial weights"


def gaussian(network: ReluNetwork, scales: Sequence[float], seeds: Sequence[int], root_seed: int = 0) -> Tensor:
    """W_l = scales[l] · N(0, 1), biases U(-1, 1)/√inputs (torch's default), shape (seeds, p), float64.

    Source: Andriushchenko et al. (2023), teacher-student experiments: scales (0.5, 0) for two layers, 0.8 for three.
    """
    _check_scales(network, scales, network.depth)

    def draw(generator: np.random.Generator) -> list[Layer]:
        return [
            (scale * generator.standard_normal((rows, columns)), _uniform_bias(generator, rows, columns, biased))
            for scale, (rows, columns, biased) in zip(scales, network.shapes, strict=True)
        ]

    return _stack(network, draw, seeds, root_seed)


def balanced(network: ReluNetwork, scale: float, seeds: Sequence[int], root_seed: int = 0) -> Tensor:
    """Two layers with w_j = scale · N(0, I) and a_j = ±‖w_j‖: every unit balanced, shape (seeds, p), float64.

    Source: Andriushchenko et al. (2023), their initialisation for classification.
    """
    _check_two_layers(network)
    _check_scales(network, (scale,), 1)

    def draw(generator: np.random.Generator) -> list[Layer]:
        (rows, columns, biased), (_, _, output_bias) = network.shapes
        w = scale * generator.standard_normal((rows, columns))
        signs = 2.0 * generator.integers(0, 2, rows) - 1
        bias = _uniform_bias(generator, rows, columns, biased)
        return [(w, bias), ((signs * np.linalg.norm(w, axis=1))[None], _uniform_bias(generator, 1, rows, output_bias))]

    return _stack(network, draw, seeds, root_seed)


def kinked(
    network: ReluNetwork, seeds: Sequence[int], scales: tuple[float, float] = (1.0, 1.0), root_seed: int = 0
) -> Tensor:
    """Two layers with w = ±2.5 s₁, b = 2.5 s₁ N(0, 1), a = 4 s₂ N(0, 1), shape (seeds, p), float64.

    For one input the kinks -b/w then lie at ±N(0, 1).
    Source: Blanc et al. (2020), one-dimensional regression; Andriushchenko et al. (2023) use it with scales (1, 1).
    """
    _check_two_layers(network)
    _check_scales(network, scales, 2)

    def draw(generator: np.random.Generator) -> list[Layer]:
        (rows, columns, biased), (_, _, output_bias) = network.shapes
        w = 2.5 * scales[0] * (2.0 * generator.integers(0, 2, (rows, columns)) - 1)
        bias = 2.5 * scales[0] * generator.standard_normal(rows) if biased else None
        a = 4.0 * scales[1] * generator.standard_normal((1, rows))
        return [(w, bias), (a, _uniform_bias(generator, 1, rows, output_bias))]

    return _stack(network, draw, seeds, root_seed)


def _stack(
    network: ReluNetwork, draw: Callable[[np.random.Generator], list[Layer]], seeds: Sequence[int], root_seed: int
) -> Tensor:
    if not len(seeds):
        raise ValueError("no seed was given: pass at least one, e.g. range(32).")
    rows = []
    for seed in seeds:
        layers = draw(named_generator(root_seed, STREAM, seed))
        rows.append(
            network.join([(torch.from_numpy(W), None if b is None else torch.from_numpy(b)) for W, b in layers])
        )
    return torch.stack(rows)


def _uniform_bias(generator: np.random.Generator, rows: int, columns: int, biased: bool) -> np.ndarray | None:
    return generator.uniform(-1, 1, rows) / np.sqrt(columns) if biased else None


def _check_scales(network: ReluNetwork, scales: Sequence[float], number: int) -> None:
    if len(scales) != number or not all(0 <= scale < float("inf") for scale in scales):
        raise ValueError(f"scales {tuple(scales)} do not fit {network.widths}: give {number} numbers >= 0.")


def _check_two_layers(network: ReluNetwork) -> None:
    if network.depth != 2:
        raise ValueError(f"this start is for one hidden layer and the network is {network.widths}: use gaussian().")
