"""One-dimensional SDEs to explore, each written once in sympy: drift, diffusion, and what they imply."""

from __future__ import annotations

import sympy as sp

from theory.symbolic import ScalarSDE

_Y = sp.Symbol("y", real=True)


def quartic_well() -> ScalarSDE:
    """dy = (μy - y³) dt + ζy dW: y² is stationary Gamma for ζ² < 2μ, all mass collapses on 0 beyond.

    Source: Chen et al. (2023), Fig. 1.
    """
    mu, zeta = sp.Symbol("mu", real=True), sp.Symbol("zeta", positive=True)
    return ScalarSDE(_Y, mu * _Y - _Y**3, zeta * _Y)


def ornstein_uhlenbeck() -> ScalarSDE:
    """dy = -λy dt + σ dW: stationary N(0, σ²/2λ), the SDE's picture of a direction with curvature λ."""
    rate, sigma = sp.Symbol("rate", positive=True), sp.Symbol("sigma", positive=True)
    return ScalarSDE(_Y, -rate * _Y, sigma)


def geometric_brownian_motion() -> ScalarSDE:
    """dy = μy dt + σy dW: ln y drifts at μ - σ²/2, the multiplicative noise behind α-decay."""
    mu, sigma = sp.Symbol("mu", real=True), sp.Symbol("sigma", positive=True)
    return ScalarSDE(_Y, mu * _Y, sigma * _Y)


def logistic() -> ScalarSDE:
    """dy = 2y(s - y) dt + σy dW: a singular value of a linear network under noise, collapsing for σ² > 4s."""
    s, sigma = sp.Symbol("s", real=True), sp.Symbol("sigma", positive=True)
    return ScalarSDE(_Y, 2 * _Y * (s - _Y), sigma * _Y)
