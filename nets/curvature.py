"""Hessian, Gauss-Newton and gradient covariance of any network and loss, as products with vectors.

All three belong to an :class:`nets.objective.Objective`, a fixed evaluation set, at one θ of shape (p,). The graph
that the products differentiate is built once: a product is then one backward pass through it, without a new forward
pass. That keeps activations of the whole set in memory; with ``keep_graph=False`` each product builds its own, chunk
by chunk. BatchNorm is as the objective says (eval mode by default).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nets.mlp_gradient import dense_gradient
from nets.mlp_hessian import hessian_product
from nets.objective import Objective

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Operator:
    """A symmetric linear map of R^p known by its products; ``operator @ v`` for v of shape (p,) or (p, k)."""

    name: str
    p: int
    dtype: torch.dtype
    device: torch.device
    product: Product

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.shape[:1] != (self.p,) or v.ndim > 2 or v.dtype != self.dtype:
            raise ValueError(
                f"{self.name} of {self.p} {self.dtype} parameters cannot multiply {v.dtype} of shape "
                f"{tuple(v.shape)}: give ({self.p},) or ({self.p}, k)."
            )
        if v.ndim == 1:
            return self.product(v)
        return torch.stack([self.product(column) for column in v.T.contiguous()], 1)

    def dense(self) -> Tensor:
        """The matrix, shape (p, p); for small p."""
        return self @ torch.eye(self.p, dtype=self.dtype, device=self.device)

    def __add__(self, other: Operator) -> Operator:
        name = f"{self.name} + {other.name}"
        return Operator(name, self.p, self.dtype, self.device, lambda v: self.product(v) + other.product(v))

    def scaled(self, factor: float, shift: float = 0.0) -> Operator:
        """``factor`` · operator + ``shift`` · I."""
        name = f"{factor:g}·{self.name} + {shift:g}·I"
        return Operator(name, self.p, self.dtype, self.device, lambda v: factor * self.product(v) + shift * v)


def hessian(objective: Objective, theta: Tensor, keep_graph: bool = True) -> Operator:
    """v ↦ ∇²L(θ) v.

    Raises:
        ValueError: θ of the wrong shape or not finite.
    """
    leaf = _leaf(objective, theta, "Hessian")

    def build() -> list[Product]:
        return [_hessian_product(objective, leaf, X, labels) for X, labels in objective.parts()]

    return _operator("Hessian", objective, theta, build, keep_graph)


def gauss_newton(objective: Objective, theta: Tensor, keep_graph: bool = True) -> Operator:
    """v ↦ (1/n) Σ_i J_iᵀ ∇²_h ℓ_i J_i v, J_i the Jacobian of the outputs: the Hessian without its residual part.

    Raises:
        ValueError: θ of the wrong shape or not finite.
    """
    leaf = _leaf(objective, theta, "Gauss-Newton matrix")

    def build() -> list[Product]:
        return [_gauss_newton_product(objective, leaf, X, labels) for X, labels in objective.parts()]

    return _operator("Gauss-Newton", objective, theta, build, keep_graph)


def gradient_covariance(objective: Objective, theta: Tensor, keep_graph: bool = True) -> Operator:
    """v ↦ C v, C = (1/n) Σ_i (g_i - ḡ)(g_i - ḡ)ᵀ: the covariance of one per-sample gradient g_i = ∇ℓ_i(θ).

    A minibatch gradient has covariance C times :meth:`theory.minibatch.Minibatch.variance_factor`.

    Raises:
        ValueError: θ of the wrong shape or not finite; batch statistics, under which there are no per-sample losses.
    """
    if objective.batch_statistics and objective.net.has_batch_norm:
        raise ValueError("per-sample gradients are not defined under batch statistics: use the objective in eval mode.")
    leaf = _leaf(objective, theta, "gradient covariance")

    mean = objective.gradient(theta)

    def build() -> list[Product]:
        return [_second_moment_product(objective, leaf, X, labels) for X, labels in objective.parts()]

    moment = _operator("gradient covariance", objective, theta, build, keep_graph)
    return replace(moment, product=lambda v: moment.product(v) - mean * (mean @ v))


def _leaf(objective: Objective, theta: Tensor, what: str) -> Tensor:
    if theta.shape != (objective.p,):
        raise ValueError(f"θ has shape {tuple(theta.shape)}: give one vector of {objective.p} parameters.")
    if not torch.isfinite(theta).all():
        raise ValueError(f"θ is not finite, so it has no {what}: look at the state before the run diverged.")
    return theta.detach().clone().requires_grad_()


def _operator(
    name: str, objective: Objective, theta: Tensor, build: Callable[[], list[Product]], keep_graph: bool
) -> Operator:
    kept: list[Product] = []

    def product(v: Tensor) -> Tensor:
        if keep_graph and not kept:
            kept.extend(build())
        parts = [part(v) for part in (kept or build())]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    return Operator(name, objective.p, theta.dtype, theta.device, product)


@torch.enable_grad()
def _hessian_product(objective: Objective, leaf: Tensor, X: Tensor, labels: Tensor) -> Product:
    written = dense_gradient(objective.net, objective.loss)
    if written is not None:
        with torch.no_grad():
            product = hessian_product(written, leaf.detach(), X, labels)
        return lambda v: product(v) / objective.n
    loss = objective.loss.values(objective.outputs(leaf, X), labels).sum() / objective.n
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return lambda v: torch.autograd.grad(gradient, leaf, v, retain_graph=True)[0]


@torch.enable_grad()
def _linearized(values: Tensor, leaf: Tensor) -> tuple[Product, Product]:
    """v ↦ Jv and u ↦ Jᵀu of values(θ): Jᵀu is linear in u, so differentiating it in u gives J."""
    dummy = torch.zeros_like(values, requires_grad=True)
    (pulled,) = torch.autograd.grad(values, leaf, dummy, create_graph=True)
    return (
        lambda v: torch.autograd.grad(pulled, dummy, v, retain_graph=True)[0],
        lambda u: torch.autograd.grad(values, leaf, u, retain_graph=True)[0],
    )


@torch.enable_grad()
def _gauss_newton_product(objective: Objective, leaf: Tensor, X: Tensor, labels: Tensor) -> Product:
    outputs = objective.outputs(leaf, X)
    push, pull = _linearized(outputs, leaf)
    free = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(objective.loss.values(free, labels).sum() / objective.n, free, create_graph=True)
    return lambda v: pull(torch.autograd.grad(slope, free, push(v), retain_graph=True)[0])


@torch.enable_grad()
def _second_moment_product(objective: Objective, leaf: Tensor, X: Tensor, labels: Tensor) -> Product:
    push, pull = _linearized(objective.loss.values(objective.outputs(leaf, X), labels), leaf)
    return lambda v: pull(push(v) / objective.n)
