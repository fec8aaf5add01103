"""Any ``torch.nn.Module`` as a loss L(θ) of its flat parameter vector, and gradient flow on it.

Weighted sums of per-sample gradients take one backward pass and memory for a few vectors of p numbers beyond it; no
Jacobian and no covariance is formed. States have shape (paths, p).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

Gradients = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss per sample: ``values(outputs, y)`` of shape (n,), and ``check(outputs, y)``, given some of the outputs."""

    name: str
    values: Callable[[Tensor, Tensor], Tensor]
    check: Callable[[Tensor, Tensor], None]


def _squared(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs.reshape(len(y), -1) - y.reshape(len(y), -1)).square().sum(1) / 2


def _check_targets(outputs: Tensor, y: Tensor) -> None:
    if y.dtype != outputs.dtype:
        raise ValueError(f"the targets are {y.dtype} and the outputs {outputs.dtype}: convert y to {outputs.dtype}.")
    if y[0].numel() != outputs[0].numel():
        raise ValueError(
            f"the module has {outputs[0].numel()} outputs a sample and y {y[0].numel()} targets: give as many."
        )
    if not torch.isfinite(y).all():
        raise ValueError("the targets y have NaN or infinite entries: remove those samples.")


def _cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def _check_classes(outputs: Tensor, y: Tensor) -> None:
    if outputs.ndim != 2:
        raise ValueError(f"outputs of shape {tuple(outputs.shape)} are not class scores: make them (samples, classes).")
    if y.dtype != torch.int64 or y.ndim != 1:
        raise ValueError(
            f"class labels of {y.dtype} and shape {tuple(y.shape)} were given: make y int64 of shape (n,)."
        )
    if int(y.min()) < 0 or int(y.max()) >= outputs.shape[1]:
        raise ValueError(
            f"class labels run from {int(y.min())} to {int(y.max())} and the module has {outputs.shape[1]} classes: "
            f"number them 0 to {outputs.shape[1] - 1}."
        )


SQUARED = Loss("squared", _squared, _check_targets)  # ½‖h(x) - y‖²
CROSS_ENTROPY = Loss("cross-entropy", _cross_entropy, _check_classes)  # integer labels


class Network:
    """L(θ) = (1/n) Σ_i ℓ_i(θ) of a module, as a function of the flat vector θ of its trainable parameters.

    A copy of the module is used: the one given keeps its parameters, buffers and mode.

    Args:
        module: any module with one output row per input row.
        X: inputs, shape (n, ...), and
        y: targets, shape (n,) or (n, outputs), or int64 class labels; both where the parameters are.
        loss: :data:`SQUARED`, :data:`CROSS_ENTROPY` or one's own.
        weight_decay: λ, which adds λθ to every gradient (L itself is reported without it).
        chunk_size: at most so many samples a backward pass; all at once by default.
        batch_statistics: BatchNorms normalise by the samples of each call (and keep no running statistics): then only
            losses of whole minibatches mean anything, which is enough for SVAG and not for the SDEs.
        gradients: :meth:`weighted_gradient` found in another way than by automatic differentiation, a function of θ
            (paths, p), X and y of each path's samples (paths, m, ...) or of all paths' (1, m, ...), w, c and how many
            minibatches the samples are.

    Raises:
        ValueError: a module without per-sample losses (BatchNorm on batch statistics, dropout), or bad data.
    """

    def __init__(
        self,
        module: nn.Module,
        X: Tensor,
        y: Tensor,
        loss: Loss = SQUARED,
        weight_decay: float = 0.0,
        chunk_size: int | None = None,
        batch_statistics: bool = False,
        gradients: Gradients | None = None,
    ) -> None:
        check_module(module, batch_statistics)
        if batch_statistics and chunk_size is not None:
            raise ValueError("batch statistics of a set in chunks are not the set's: leave chunk_size out.")
        self.batch_statistics = batch_statistics
        self._module = copy.deepcopy(module)
        trained = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        check_data(list(trained.values()), X, y)
        if not (weight_decay >= 0 and math.isfinite(weight_decay)):
            raise ValueError(f"weight decay {weight_decay} is not usable: give 0 or a positive number.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunks of {chunk_size} samples were asked for: give 1 or more.")
        self.X, self.y, self.n, self.loss, self.weight_decay = X, y, len(X), loss, weight_decay
        self._chunk, self._gradients = chunk_size or len(X), gradients
        self._shapes = {name: p.shape for name, p in trained.items()}
        self._sizes = [p.numel() for p in trained.values()]
        self.p = sum(self._sizes)
        self.theta = torch.cat([p.detach().reshape(-1) for p in trained.values()])
        with torch.no_grad():
            some = self.outputs(self.theta, X[:2])
        if len(some) != len(X[:2]):
            raise ValueError(f"the module maps {len(X[:2])} samples to {len(some)} rows: return one row per sample.")
        loss.check(some, y)
        self.output_dim = some[0].numel()

    def outputs(self, theta: Tensor, X: Tensor) -> Tensor:
        """h_θ(X) for one θ of shape (p,)."""
        parts = zip(self._shapes.items(), theta.split(self._sizes), strict=True)
        return torch.func.functional_call(self._module, {name: part.view(shape) for (name, shape), part in parts}, (X,))

    def module_at(self, theta: Tensor) -> nn.Module:
        """The module with parameters θ of shape (p,), to look at: the next call overwrites it."""
        values, own = theta.detach().split(self._sizes), dict(self._module.named_parameters())
        with torch.no_grad():
            for (name, shape), value in zip(self._shapes.items(), values, strict=True):
                own[name].copy_(value.view(shape))
        return self._module

    def on_module(self, function: Callable[[nn.Module], Tensor]) -> Callable[[Tensor], Tensor]:
        """A probe of the module turned into one of the states (paths, p): values of shape (paths, ...)."""
        return lambda theta: torch.stack([function(self.module_at(row)).detach() for row in theta])

    @torch.no_grad()
    def losses(self, theta: Tensor) -> Tensor:
        """L of every path, shape (paths,)."""
        rows = []
        for row in theta:
            parts = [self.loss.values(self.outputs(row, self.X[s]), self.y[s]).sum() for s in self._parts(self.n)]
            rows.append(torch.stack(parts).sum() / self.n)
        return torch.stack(rows)

    def gradient(self, theta: Tensor) -> Tensor:
        """∇L + λθ, shape (paths, p)."""
        mean = torch.full((len(theta), self.n), 1 / self.n, dtype=theta.dtype, device=theta.device)
        return self.weighted_gradient(theta, mean) + self.weight_decay * theta

    def weighted_gradient(
        self, theta: Tensor, weights: Tensor | None, cotangent: Tensor | None = None, rows: Tensor | None = None,
        minibatches: int = 1,
    ) -> Tensor:  # fmt: skip
        """∇_θ [Σ_i w_i ℓ_i(θ) + Σ_i ⟨c_i, h_θ(x_i)⟩] in one backward pass (a few with ``chunk_size``).

        Args:
            theta: states, shape (paths, p); several paths are batched by ``torch.func.vmap``.
            weights: w of either sign, shape (paths, m), or None for w = 0.
            cotangent: c, shape (paths, m, outputs).
            rows: the samples meant, shape (paths, m); all n by default.
            minibatches: so many of equal size, one after the other in ``rows``: with ``batch_statistics`` each is
                normalised by itself.

        Returns:
            shape (paths, p); no weight decay.
        """
        if minibatches > 1 and self.batch_statistics and rows is not None:
            return self._of_minibatches(theta, weights, cotangent, rows, minibatches)
        alone = len(theta) == 1 and self._gradients is None
        gradient = self._gradient_of_one if alone else self._gradients_of_many
        total = None
        for part in self._parts(self.n if rows is None else rows.shape[1]):
            w, c = (None if a is None else a[:, part] for a in (weights, cotangent))
            summand = gradient(theta, w, c, part if rows is None else rows[:, part])
            total = summand if total is None else total.add_(summand)
        return torch.zeros_like(theta) if total is None else total

    def _of_minibatches(
        self, theta: Tensor, w: Tensor | None, c: Tensor | None, rows: Tensor, minibatches: int
    ) -> Tensor:
        if rows.shape[1] % minibatches:
            raise ValueError(
                f"{rows.shape[1]} samples do not make {minibatches} minibatches of equal size: give as many of each."
            )
        if self._gradients is not None:
            return self._gradients(theta.detach(), self.X[rows], self.y[rows], w, c, minibatches)
        w, c = (None if a is None else a.unflatten(1, (minibatches, -1)).flatten(0, 1) for a in (w, c))
        each = rows.unflatten(1, (minibatches, -1)).flatten(0, 1)
        apart = self.weighted_gradient(theta.repeat_interleave(minibatches, 0), w, c, each)
        return apart.unflatten(0, (-1, minibatches)).sum(1)

    def _gradient_of_one(self, theta: Tensor, w: Tensor | None, c: Tensor | None, rows: slice | Tensor) -> Tensor:
        rows = rows if isinstance(rows, slice) else rows[0]
        with torch.enable_grad():
            leaf = theta[0].detach().requires_grad_()
            w, c = (None if a is None else a[0] for a in (w, c))
            return torch.autograd.grad(self._value(leaf, self.X[rows], self.y[rows], w, c), leaf)[0].unsqueeze(0)

    def _gradients_of_many(self, theta: Tensor, w: Tensor | None, c: Tensor | None, rows: slice | Tensor) -> Tensor:
        X, y = self.X[rows], self.y[rows]
        if self._gradients is not None:
            if isinstance(rows, slice):
                X, y = X.unsqueeze(0), y.unsqueeze(0)
            return self._gradients(theta.detach(), X, y, w, c, 1)
        data = None if isinstance(rows, slice) else 0
        axes = (0, data, data, None if w is None else 0, None if c is None else 0)
        # The forward pass is batched, the backward pass follows it: faster than batching both.
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            values = torch.func.vmap(self._value, axes)(leaf, X, y, w, c)
            return torch.autograd.grad(values.sum(), leaf)[0]

    def _value(self, theta: Tensor, X: Tensor, y: Tensor, w: Tensor | None, c: Tensor | None) -> Tensor:
        outputs = self.outputs(theta, X)
        value = theta.new_zeros(()) if w is None else (w * self.loss.values(outputs, y)).sum()
        return value if c is None else value + (c * outputs.reshape(c.shape)).sum()

    def _parts(self, m: int) -> Iterator[slice]:
        return (slice(first, min(first + self._chunk, m)) for first in range(0, m, self._chunk))


def check_module(module: nn.Module, batch_statistics: bool = False) -> None:
    """One sentence on why a module has no per-sample losses, if it has none and they are needed."""
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and batch_statistics:
            if part.running_mean is not None:
                raise ValueError(
                    f"'{name or 'the module'}' is a BatchNorm with running statistics: give a module that has none."
                )
        elif isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            raise ValueError(
                f"'{name or 'the module'}' is a BatchNorm on batch statistics, where per-sample losses are not "
                "defined: call .eval() or use another norm."
            )
        if isinstance(part, _DropoutNd) and part.training and part.p > 0:
            raise ValueError(f"'{name or 'the module'}' is a dropout in train mode, a second noise: call .eval().")


def check_data(trained: list[nn.Parameter], X: Tensor, y: Tensor) -> None:
    """One sentence on what is wrong with parameters or data, if anything is."""
    if not trained:
        raise ValueError("the module has no trainable parameter: set requires_grad on some.")
    kinds = {(p.dtype, p.device) for p in trained}
    if len(kinds) > 1:
        raise ValueError("the parameters have several dtypes or devices: move the module to one with .to(...).")
    dtype, device = kinds.pop()
    if X.ndim < 1 or y.ndim < 1 or len(X) != len(y) or len(X) < 1:
        raise ValueError(
            f"X of shape {tuple(X.shape)} and y of shape {tuple(y.shape)} do not pair up: give n rows each."
        )
    if X.device != device or y.device != device:
        raise ValueError(f"X and y are on {X.device} and {y.device}, the parameters on {device}: move them together.")
    if X.is_floating_point() and X.dtype != dtype:
        raise ValueError(f"X is {X.dtype} and the parameters are {dtype}: convert one of them.")
    if not torch.isfinite(X).all():
        raise ValueError("the inputs X have NaN or infinite entries: remove those samples.")


def gradient_flow(
    network: Network,
    theta0: Tensor,
    times: Sequence[float],
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_steps: int = 1_000_000,
) -> Tensor:
    """θ(t) of dθ/dt = -(∇L + λθ) from θ(0) = θ0 of shape (p,), at ascending ``times``, shape (len(times), p).

    Adaptive Runge-Kutta 3(2): the fourth stage is the next step's first, so a step costs three gradients. Times
    between steps are read off the cubic Hermite interpolant, which is of the same order. At the kinks of a ReLU the
    order drops to one and steps shrink with the tolerance: hundreds of gradients at rtol 1e-3, 10^4 at 1e-5.
    Source: Bogacki, Shampine (1989); step control as in Hairer, Nørsett, Wanner, section II.4.

    Raises:
        ValueError: unusable times, tolerances or start; a flow that leaves the finite numbers or takes too long.
    """
    if list(times) != sorted(times) or not times or times[0] < 0 or not math.isfinite(times[-1]):
        raise ValueError("the times asked for are not usable: give finite ones that ascend from 0 or later.")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"tolerances rtol={rtol}, atol={atol} are not usable: give positive ones.")
    if theta0.shape != (network.p,) or not torch.isfinite(theta0).all():
        raise ValueError(f"the start of shape {tuple(theta0.shape)} is not usable: give {network.p} finite numbers.")
    rtol = max(rtol, 10 * torch.finfo(theta0.dtype).eps)

    def norm(a: Tensor, size: Tensor) -> float:
        return float((a / (atol + rtol * size)).square().mean().sqrt())

    def slope(at: Tensor) -> Tensor:
        return -network.gradient(at.unsqueeze(0))[0]

    t, y, k1, found = 0.0, theta0, slope(theta0), list[Tensor]()
    h = 0.01 * max(norm(y, y.abs()), 1e-5) / max(norm(k1, y.abs()), 1e-5)
    for _ in range(max_steps):
        h = min(h, times[-1] - t) if times[-1] > t else h
        k2 = slope(y + h / 2 * k1)
        k3 = slope(y + 3 * h / 4 * k2)
        end = y + h * (2 / 9 * k1 + 1 / 3 * k2 + 4 / 9 * k3)
        k4 = slope(end)
        error = norm(h * (-5 / 72 * k1 + 1 / 12 * k2 + 1 / 9 * k3 - 1 / 8 * k4), torch.maximum(y.abs(), end.abs()))
        if error <= 1:  # false for NaN
            reached = t + h if times[-1] - t > h else times[-1]
            while len(found) < len(times) and times[len(found)] <= reached:
                found.append(_hermite((times[len(found)] - t) / h, h, (y, k1), (end, k4)))
            if len(found) == len(times):
                return torch.stack(found)
            t, y, k1 = reached, end, k4
        h *= min(max(0.9 * error ** (-1 / 3), 0.2), 5.0) if 0 < error < math.inf else 5.0 if error == 0 else 0.2
        if h <= 4 * math.ulp(t):
            raise ValueError(f"gradient flow stopped being finite or smooth at t = {t:.6g}: ask for times before that.")
    raise ValueError(f"gradient flow was at t = {t:.6g} after {max_steps} steps: loosen rtol or ask for earlier times.")


def _hermite(s: float, h: float, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
    """The cubic through two values with two slopes, at the fraction s of the step h."""
    (y0, k0), (y1, k1) = start, end
    rise = y1 - y0
    return y0 + s * rise + s * (s - 1) * ((1 - 2 * s) * rise + h * ((s - 1) * k0 + s * k1))
