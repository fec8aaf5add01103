"""Data of the collapse experiments: the single neuron's samples, the two-unit toy's, linear teacher and student."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from theory.problem import Regression
from theory.streams import named_generator


def neuron_data(m: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x ~ N(0, 1) and y = x + noise·N(0, 1), m of each, from the stream "single neuron"."""
    draws = named_generator(seed, "single neuron")
    x = draws.standard_normal(m)
    return x, x + noise * draws.standard_normal(m)


def toy_data() -> Regression:
    """The eight samples of Chen et al.'s two-unit toy, x and y independent N(0, 1): torch's stream of seed 0."""
    generator = torch.Generator().manual_seed(0)
    x, x_test, y, y_test = (torch.randn(8, 1, generator=generator).double() for _ in range(4))
    return Regression(x, y[:, 0], x_test, y_test[:, 0], name="two-unit toy")


@dataclass(frozen=True, eq=False)
class LinearTeacher:
    """Noisy linear data with orthonormal inputs, seen in the frame of XᵀY = V diag(S) U, where gradient flow decouples.

    Attributes:
        singular: S*, descending, shape (m,).
        diagonal: diag(Vᵀ W Uᵀ) of the teacher W, shape (m,).
        teacher_power: ‖W‖²_F.
        target_power: ‖Y‖²_F.
        scale: Var(y)·N·m, by which losses are divided.
    """

    singular: Tensor
    diagonal: Tensor
    teacher_power: float
    target_power: float
    scale: float

    def train_loss(self, s: Tensor) -> Tensor:
        """½‖Y - XŴ‖²/scale for Ŵ = V diag(s) U: ½(‖Y‖² - ‖S*‖² + ‖s - S*‖²), of s (..., m), shape (...)."""
        floor = self.target_power - float(self.singular.square().sum())
        return (floor + (s - self.singular).square().sum(-1)) / (2 * self.scale)

    def test_loss(self, s: Tensor) -> Tensor:
        """Mean squared entry of Ŵ - W over ``scale``, as published (so N·m divides twice), shape (...)."""
        gap = self.teacher_power - 2 * (s * self.diagonal).sum(-1) + s.square().sum(-1)
        return gap / (len(self.singular) ** 2 * self.scale)


def linear_teacher(n: int = 1024, width: int = 64, rank: int = 8, noise: float = 0.5, seed: int = 0) -> LinearTeacher:
    """Teacher of ``rank`` singular values from ½ to 1, XᵀX = I, Y = XW + noise·N(0, 1)/√width.

    The draws are those of Chen et al.'s script (numpy's legacy stream; Haar matrices by QR).

    Raises:
        ValueError: rank above width, or width above n.
    """
    if not 1 <= rank <= width <= n:
        raise ValueError(f"rank {rank}, width {width}, n {n} do not fit: choose 1 <= rank <= width <= n.")
    draws = np.random.RandomState(seed)

    def haar(size: int) -> np.ndarray:
        q, r = np.linalg.qr(draws.normal(size=(size, size)))
        return q * np.sign(np.diag(r))

    left, right = haar(width), haar(width)
    W = left[:, :rank] * np.linspace(0.5, 1, rank) @ right[:rank]
    left, right = haar(n), haar(width)
    X = left[:, :width] @ right
    Y = X @ W + noise * draws.standard_normal((n, width)) / np.sqrt(width)
    V, S, U = np.linalg.svd(X.T @ Y)
    return LinearTeacher(
        torch.from_numpy(S), torch.from_numpy(np.diag(V.T @ W @ U.T).copy()), float((W**2).sum()),
        float((Y**2).sum()), float(Y.var() * n * width),
    )  # fmt: skip
