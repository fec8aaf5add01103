"""Regression problems of the ReLU experiments: targets of a small ReLU teacher on the sphere, and twelve points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from theory.problem import Regression
from theory.relu_network import ReluNetwork
from theory.streams import named_generator


def two_layer_teacher(n: int = 15, d: int = 2, teachers: int = 3, n_test: int = 1000, seed: int = 0) -> Regression:
    """y = Σ_j s_j ⟨w_j, x⟩₊ of ``teachers`` units with unit weights w_j and signs s_j = ±1, x uniform on the sphere.

    Raises:
        ValueError: a size below 1.

    Source: Andriushchenko et al. (2023), two-layer teacher-student; Chizat, Oyallon, Bach (2019).
    """
    generator = named_generator(seed, "two-layer teacher")
    X, X_test = _sphere(generator, n, d), _sphere(generator, n_test, d)
    network = ReluNetwork((d, teachers, 1))
    weights = _unit_rows(torch.from_numpy(generator.standard_normal((teachers, d))))
    signs = torch.from_numpy(2.0 * generator.integers(0, 2, (1, teachers)) - 1)
    return taught(network, network.join([(weights, None), (signs, None)]), X, X_test, f"{teachers} ReLU teachers")


def multi_layer_teacher(
    n: int = 50, d: int = 5, hidden: Sequence[int] = (2, 2), n_test: int = 1000, seed: int = 0
) -> Regression:
    """y = h(x) of a ReLU network with Gaussian weights and biases U(-1, 1)/√inputs, x uniform on the sphere.

    Raises:
        ValueError: a size below 1.

    Source: Andriushchenko et al. (2023), three-layer teacher-student.
    """
    generator = named_generator(seed, "multi-layer teacher")
    X, X_test = _sphere(generator, n, d), _sphere(generator, n_test, d)
    network = ReluNetwork((d, *hidden, 1), (True,) * (len(hidden) + 1))
    layers: list[tuple[Tensor, Tensor | None]] = []
    for rows, columns, _ in network.shapes:
        weight, bias = generator.standard_normal((rows, columns)), generator.uniform(-1, 1, rows) / np.sqrt(columns)
        layers.append((torch.from_numpy(weight), torch.from_numpy(bias)))
    return taught(network, network.join(layers), X, X_test, f"ReLU teacher {network.widths}")


def twelve_points() -> Regression:
    """Twelve fixed points on a line, x = (-5.5, …, 5.5)/4 + 0.07; held-out and training data are the same.

    Source: Blanc et al. (2020); Andriushchenko et al. (2023), one-dimensional regression.
    """
    x = torch.arange(-5.5, 6, dtype=torch.float64) / 4 + 0.07
    y = torch.tensor([-2, 1.5, 0, 0, 2, 1, 0, -1, 0, 1, 2, -1], dtype=torch.float64) + 0.345
    return Regression(x.unsqueeze(1), y, x.unsqueeze(1), y, name="twelve points")


def taught(network: ReluNetwork, theta: Tensor, X: Tensor, X_test: Tensor, name: str) -> Regression:
    """The noiseless problem whose targets are h(θ, x)."""
    return Regression(X, network(theta, X), X_test, network(theta, X_test), name=f"{name}, n={len(X)}, d={X.shape[1]}")


def _sphere(generator: np.random.Generator, n: int, d: int) -> Tensor:
    if n < 1 or d < 1:
        raise ValueError(f"{n} points in {d} dimensions are no data: choose both 1 or more.")
    return _unit_rows(torch.from_numpy(generator.standard_normal((n, d))))


def _unit_rows(points: Tensor) -> Tensor:
    return points / torch.linalg.vector_norm(points, dim=1, keepdim=True)
