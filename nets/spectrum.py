"""A whole spectrum from random vectors: trace, Frobenius norm and density of a matrix-free operator.

Vectors are drawn from the stream "random vectors"; every estimate comes with its standard error or its samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nets.curvature import Operator
from nets.lanczos import Eigenpairs
from theory.streams import named_generator


@dataclass(frozen=True)
class Estimated:
    """An estimate and its standard error."""

    value: float
    standard_error: float


def random_signs(operator: Operator, count: int, seed: int) -> Tensor:
    """``count`` vectors of independent ±1, shape (count, p)."""
    if count < 2:
        raise ValueError(f"{count} random vectors leave no standard error: give 2 or more.")
    signs = named_generator(seed, "random vectors").integers(0, 2, (count, operator.p)) * 2 - 1
    return torch.from_numpy(signs).to(device=operator.device, dtype=operator.dtype)


def trace(operator: Operator, vectors: int = 32, known: Eigenpairs | None = None, seed: int = 0) -> Estimated:
    """tr A = Σ_k λ_k + E[zᵀP⊥AP⊥z], z of random signs, P⊥ the complement of the ``known`` eigenvectors.

    Unbiased whatever ``known`` is; the sharpest few eigenvectors take most of the variance 2‖A‖_F² away.
    Source: Hutchinson (1989); Meyer, Musco, Musco, Woodruff (2021), which finds the subspace by one more product each.
    """
    V = _basis(operator, known)
    exact = float(sum(v @ operator.product(v) for v in V.T)) if V.shape[1] else 0.0
    samples = []
    for z in random_signs(operator, vectors, seed):
        rest = z - V @ (V.T @ z)
        samples.append(rest @ operator.product(rest))
    values = torch.stack(samples)
    return Estimated(exact + float(values.mean()), float(values.std() / vectors**0.5))


def frobenius(operator: Operator, vectors: int = 32, seed: int = 0) -> Estimated:
    """‖A‖_F = √(E ‖Az‖²), z of random signs: the square inside the mean, the root outside.

    (The published code averages ‖Az‖ and takes the root of that: 3.8 where the norm is 14.2.)
    """
    squares = torch.stack([operator.product(z).square().sum() for z in random_signs(operator, vectors, seed)])
    value = float(squares.mean().sqrt())
    return Estimated(value, float(squares.std() / vectors**0.5) / (2 * value) if value else 0.0)


@dataclass(frozen=True, eq=False)
class Density:
    """Ritz values and weights of stochastic Lanczos quadrature, shapes (starts, steps); each row's weights sum to 1.

    Σ_j w_j f(x_j), averaged over starts, estimates tr f(A)/p, exactly for polynomials of degree below 2 · steps up to
    the random start.
    """

    values: Tensor
    weights: Tensor

    def mean_of(self, power: int) -> Estimated:
        """tr A^power / p."""
        samples = (self.weights * self.values**power).sum(1)
        return Estimated(float(samples.mean()), float(samples.std() / len(samples) ** 0.5))

    def on(self, grid: Tensor, width: float) -> Tensor:
        """The density smoothed by Gaussians of standard deviation ``width``, shape of ``grid``."""
        z = (grid.unsqueeze(-1) - self.values.flatten()) / width
        bumps = torch.exp(-z.square() / 2) / (width * (2 * torch.pi) ** 0.5)
        return bumps @ self.weights.flatten() / len(self.weights)


def density(operator: Operator, steps: int = 40, starts: int = 8, seed: int = 0) -> Density:
    """Spectral density by stochastic Lanczos quadrature with full reorthogonalisation.

    Source: Ubaru, Chen, Saad (2017); Ghorbani, Krishnan, Xiao (2019).
    """
    steps = min(steps, operator.p)
    if steps < 1:
        raise ValueError(f"{steps} Lanczos steps give no density: choose 1 or more.")
    rows = [_quadrature(operator, z, steps) for z in random_signs(operator, starts, seed)]
    return Density(torch.stack([values for values, _ in rows]), torch.stack([weights for _, weights in rows]))


def _quadrature(operator: Operator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights; when the Krylov space ends early the rest has weight 0."""
    Q = torch.zeros(operator.p, steps, dtype=operator.dtype, device=operator.device)
    T = torch.zeros(steps, steps, dtype=operator.dtype, device=operator.device)
    q = start / start.norm()
    for j in range(steps):
        Q[:, j] = q
        w = operator.product(q)
        size = w.norm()
        T[j, j] = q @ w
        for _ in range(2):
            w = w - Q[:, : j + 1] @ (Q[:, : j + 1].T @ w)
        beta = w.norm()
        if j + 1 == steps or float(beta) <= 1e3 * torch.finfo(w.dtype).eps * float(size):
            break
        T[j, j + 1] = T[j + 1, j] = beta
        q = w / beta
    values, coordinates = torch.linalg.eigh(T)
    if not torch.isfinite(values).all():
        raise ValueError(f"the {operator.name} gives NaN: look at the state before the run diverged.")
    return values, coordinates[0].square()


def _basis(operator: Operator, known: Eigenpairs | None) -> Tensor:
    return torch.empty(operator.p, 0, dtype=operator.dtype, device=operator.device) if known is None else known.vectors
