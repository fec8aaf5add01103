"""Itô calculus in sympy for label-noise SDEs: laws derived, not transcribed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy as sp


@dataclass(frozen=True)
class SymbolicSDE:
    """dθ = drift dt + diffusion dW (Itô), with one Brownian motion per sample.

    Attributes:
        parameters: θ, a list of p symbols.
        drift: p expressions.
        diffusion: p × n matrix of expressions.
    """

    parameters: tuple[sp.Symbol, ...]
    drift: sp.Matrix
    diffusion: sp.Matrix

    def ito(self, observable: sp.Expr) -> tuple[sp.Expr, sp.Matrix]:
        """Itô's lemma: the drift ∇f·drift + ½ tr(Gᵀ Hess f G) and the diffusion row ∇f·G of f(θ), simplified."""
        theta = sp.Matrix(self.parameters)
        gradient = sp.Matrix([observable]).jacobian(theta)
        hessian = sp.hessian(observable, theta)
        curvature = (self.diffusion.T * hessian * self.diffusion).trace() / 2
        drift = sp.simplify((gradient * self.drift)[0] + curvature)
        return drift, (gradient * self.diffusion).applyfunc(sp.simplify)


def label_noise_sde(
    model: sp.Expr, parameters: Sequence[sp.Symbol], inputs: Sequence[sp.Symbol], samples: int
) -> tuple[SymbolicSDE, list[sp.Symbol], list[sp.Symbol], list[list[sp.Symbol]]]:
    """The label-noise SDE of a model h(θ, x): dθ = -(1/n) Σ_i r_i Φ_i dt + Σ_i s_i Φ_i dW_i, Φ_i = ∂h/∂θ at x_i.

    Residuals r_i and noise amplitudes s_i enter as symbols (s_i² = 2ηδ/n for label noise at level δ).

    Returns:
        the SDE, the symbols r_i, the symbols s_i, and the sample symbols x_ij.
    """
    r = list(sp.symbols(f"r1:{samples + 1}", real=True))
    noise = list(sp.symbols(f"s1:{samples + 1}", positive=True))
    points = [list(sp.symbols(f"x{i + 1}_1:{len(inputs) + 1}", real=True)) for i in range(samples)]
    columns = [
        sp.Matrix([sp.diff(model, p) for p in parameters]).subs(dict(zip(inputs, point, strict=True)))
        for point in points
    ]
    drift = sum((-r_i * column / samples for r_i, column in zip(r, columns, strict=True)), sp.zeros(len(parameters), 1))
    diffusion = sp.Matrix.hstack(*(s_i * column for s_i, column in zip(noise, columns, strict=True)))
    return SymbolicSDE(tuple(parameters), drift, diffusion), r, noise, points


def alpha_decay(samples: int = 3, features: int = 2) -> tuple[list[sp.Expr], list[sp.Matrix], list[sp.Expr]]:
    """Derive the α-decay of the diagonal network from its SDE by Itô's lemma on ln(u_j² - v_j²).

    Returns:
        for each coordinate j the drift of ln α_j, its diffusion row (zero: the decay is deterministic), and the
        law -Σ_i s_i² x_ij² it is claimed to equal.

    Source: Pesme et al. (2021), Sec. 3.
    """
    u, v = sp.symbols(f"u1:{features + 1}", real=True), sp.symbols(f"v1:{features + 1}", real=True)
    x = sp.symbols(f"x1:{features + 1}", real=True)
    model = sum((u_j * v_j * x_j for u_j, v_j, x_j in zip(u, v, x, strict=True)), sp.Integer(0))
    sde, _, noise, points = label_noise_sde(model, [*u, *v], x, samples)
    drifts, rows, laws = [], [], []
    for j in range(features):
        drift, row = sde.ito(sp.log(u[j] ** 2 - v[j] ** 2))
        drifts.append(drift)
        rows.append(row)
        laws.append(-sum((s**2 * point[j] ** 2 for s, point in zip(noise, points, strict=True)), sp.Integer(0)))
    return drifts, rows, laws
