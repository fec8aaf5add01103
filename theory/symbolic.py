"""Itô calculus in sympy for label-noise SDEs: laws derived from one definition of the model, not transcribed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mpmath  # type: ignore[import-untyped]
import sympy as sp
from torch import Tensor

from theory.lowering import ScalarTorchSDE, to_torch


def relu(z: sp.Expr) -> sp.Expr:
    """(z)₊ = Max(0, z), whose derivative is Heaviside(z)."""
    return sp.Max(0, z)


def simplify_relu(expression: sp.Expr) -> sp.Expr:
    """``sympy.simplify`` that knows Max(0, z) = z·1[z > 0] and 1[z > 0]² = 1[z > 0]; 1[z > 0] is Heaviside(z)."""
    gated = expression.replace(
        lambda e: isinstance(e, sp.Max) and len(e.args) == 2 and 0 in e.args,
        lambda e: sum(e.args) * sp.Heaviside(sum(e.args)),
    )
    gates = {gate: sp.Dummy(f"gate{k}", real=True) for k, gate in enumerate(sorted(gated.atoms(sp.Heaviside), key=str))}
    if not gates:
        return sp.simplify(gated)
    gated = sp.expand(gated.xreplace(gates)).replace(
        lambda e: e.is_Pow and e.base in gates.values() and e.exp.is_Integer and e.exp > 1, lambda e: e.base
    )
    return sp.simplify(gated).xreplace({dummy: gate for gate, dummy in gates.items()})


@dataclass(frozen=True)
class SymbolicSDE:
    """dθ = drift dt + diffusion dW (Itô), with one Brownian motion per sample.

    Attributes:
        parameters: θ, p symbols.
        drift: p expressions.
        diffusion: p × n matrix of expressions; p × 0 without noise.
        residuals: the symbols r_i in the drift.
        amplitudes: the symbols s_i in the diffusion.
        points: the symbols x_ij of sample i, one tuple per sample.
    """

    parameters: tuple[sp.Symbol, ...]
    drift: sp.Matrix
    diffusion: sp.Matrix
    residuals: tuple[sp.Symbol, ...] = ()
    amplitudes: tuple[sp.Symbol, ...] = ()
    points: tuple[tuple[sp.Symbol, ...], ...] = ()

    def ito(self, observable: sp.Expr) -> tuple[sp.Expr, sp.Matrix]:
        """Itô's lemma: the drift ∇f·drift + ½ tr(Gᵀ Hess f G) and the diffusion row ∇f·G of f(θ), simplified."""
        theta = sp.Matrix(self.parameters)
        gradient = sp.Matrix([observable]).jacobian(theta)
        hessian = sp.hessian(observable, theta)
        curvature = (self.diffusion.T * hessian * self.diffusion).trace() / 2
        drift = simplify_relu((gradient * self.drift)[0] + curvature)
        return drift, (gradient * self.diffusion).applyfunc(simplify_relu)


@dataclass(frozen=True)
class SymbolicModel:
    """A model h(θ, x) written once, from which its SDEs, conservation laws and torch function follow.

    Attributes:
        h: the prediction for one input, a sympy expression.
        parameters: θ, p symbols.
        inputs: x, d symbols.

    Raises:
        ValueError: no parameter, a symbol listed twice, a symbol of h that is in neither list.
    """

    h: sp.Expr
    parameters: Sequence[sp.Symbol]
    inputs: Sequence[sp.Symbol]

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", sp.sympify(self.h))
        object.__setattr__(self, "parameters", tuple(self.parameters))
        object.__setattr__(self, "inputs", tuple(self.inputs))
        listed = [*self.parameters, *self.inputs]
        if not self.parameters or len(set(listed)) != len(listed):
            raise ValueError("a model needs parameters, and every symbol once: list θ and x without overlap.")
        if unknown := self.h.free_symbols - set(listed):
            names = ", ".join(sorted(map(str, unknown)))
            raise ValueError(f"{names} is neither a parameter nor an input: list it as one or give it a value.")

    def gradient(self) -> sp.Matrix:
        """∂h/∂θ at the input x, shape (p, 1)."""
        return sp.Matrix([sp.diff(self.h, parameter) for parameter in self.parameters])

    def gradient_flow(self, samples: int) -> SymbolicSDE:
        """dθ = -(1/n) Σ_i r_i Φ_i dt, Φ_i = ∂h/∂θ at x_i: the label-noise SDE without noise.

        Residuals r_i enter as symbols ``r1`` …, the coordinate j of sample i as ``x{i}_{j}``.

        Raises:
            ValueError: fewer than one sample, or a parameter with the name of one of those symbols.
        """
        residuals = self._fresh([f"r{i + 1}" for i in range(samples)], real=True)
        names = [[f"x{i + 1}_{j + 1}" for j in range(len(self.inputs))] for i in range(samples)]
        points = tuple(self._fresh(row, real=True) for row in names)
        if not residuals:
            raise ValueError(f"{samples} samples do not make a loss: give at least one.")
        drift = -self._jacobian(points).T * sp.Matrix(residuals) / samples
        return SymbolicSDE(tuple(self.parameters), drift, sp.zeros(len(drift), 0), residuals, (), points)

    def label_noise_sde(self, samples: int) -> SymbolicSDE:
        """dθ = -(1/n) Σ_i r_i Φ_i dt + Σ_i s_i Φ_i dW_i, Φ_i = ∂h/∂θ at x_i (Itô).

        The noise amplitudes are symbols ``s1`` …; s_i² = 2ηδ/n for label noise at level δ, η r_i²/n for one-sample SGD.
        Raises what :meth:`gradient_flow` does.

        Source: Andriushchenko et al. (2023), SDE section.
        """
        flow = self.gradient_flow(samples)
        amplitudes = self._fresh([f"s{i + 1}" for i in range(samples)], positive=True)
        return replace(flow, diffusion=self._jacobian(flow.points).T * sp.diag(*amplitudes), amplitudes=amplitudes)

    def is_conserved(self, observable: sp.Expr) -> bool:
        """Whether ∇f · Φ vanishes identically, that is, whether gradient flow keeps f(θ) on any data.

        One sample is enough: the drift of f is a sum over samples with arbitrary residuals.

        Raises:
            ValueError: sympy can neither prove nor refute it.
        """
        drift, _ = self.gradient_flow(1).ito(sp.sympify(observable))
        if (verdict := drift.equals(0)) is None:
            raise ValueError(f"sympy cannot decide whether {drift} is zero: write the observable in a simpler form.")
        return bool(verdict)

    def latex(self) -> str:
        """The label-noise SDE for any number of samples in LaTeX, one line per parameter, inputs as x^{(i)}."""
        marked = {x: sp.Symbol(f"{sp.latex(x)}^{{(i)}}", real=True) for x in self.inputs}
        slopes = [rf"\left({sp.latex(slope.subs(marked))}\right) \mathrm{{d}}" for slope in self.gradient()]
        return " \\\\\n".join(
            rf"\mathrm{{d}}{sp.latex(parameter)} = -\frac{{1}}{{n}} \sum_{{i}} r_i {slope}t + \sum_{{i}} s_i {slope}W_i"
            for parameter, slope in zip(self.parameters, slopes, strict=True)
        )

    def to_torch(self) -> Callable[[Tensor, Tensor], Tensor]:
        """h(θ, X) for tensors: θ of shape (p,) and X of shape (n, d) give (n,), leading axes (..., p) give (..., n).

        The function works under ``torch.func`` and fits :class:`theory.sde.ModelSDE` and :func:`nets.sgd.sgd`.

        Raises:
            ValueError: a function in h that torch does not have; on call, shapes that do not fit.
        """
        p, d = len(self.parameters), len(self.inputs)
        lowered = to_torch(self.h, [*self.parameters, *self.inputs])

        def model(theta: Tensor, X: Tensor) -> Tensor:
            if theta.shape[-1:] != (p,) or X.ndim != 2 or X.shape[1] != d:
                got = f"θ of shape {tuple(theta.shape)} and X of shape {tuple(X.shape)}"
                raise ValueError(f"{got} do not fit this model: give (..., {p}) and (n, {d}).")
            return lowered(*theta.split(1, -1), *X.unbind(-1)).expand(*theta.shape[:-1], len(X))

        return model

    def _jacobian(self, points: Sequence[Sequence[sp.Symbol]]) -> sp.Matrix:
        """Φ, shape (n, p)."""
        gradient = self.gradient()
        rows = [gradient.subs(dict(zip(self.inputs, point, strict=True)), simultaneous=True).T for point in points]
        return sp.Matrix.vstack(*rows)

    def _fresh(self, names: Sequence[str], **assumptions: bool) -> tuple[sp.Symbol, ...]:
        if taken := {symbol.name for symbol in self.parameters} & set(names):
            raise ValueError(
                f"{', '.join(sorted(taken))} is kept for residuals, noise and samples: rename that symbol."
            )
        return tuple(sp.Symbol(name, **assumptions) for name in names)


def alpha_decay(samples: int = 3, features: int = 2) -> tuple[list[sp.Expr], list[sp.Matrix], list[sp.Expr]]:
    """Derive the α-decay of the diagonal network from its SDE by Itô's lemma on ln(u_j² - v_j²).

    Returns:
        for each coordinate j the drift of ln α_j, its diffusion row (zero: the decay is deterministic), and the
        law -Σ_i s_i² x_ij² it is claimed to equal.

    Source: Pesme et al. (2021).
    """
    u, v, x = (sp.symbols(f"{name}1:{features + 1}", real=True) for name in "uvx")
    h = sum((u_j * v_j * x_j for u_j, v_j, x_j in zip(u, v, x, strict=True)), sp.Integer(0))
    sde = SymbolicModel(h, [*u, *v], x).label_noise_sde(samples)
    drifts, rows = zip(*(sde.ito(sp.log(u_j**2 - v_j**2)) for u_j, v_j in zip(u, v, strict=True)), strict=True)
    coordinates = zip(*sde.points, strict=True)
    laws = [-sum(s**2 * x_ij**2 for s, x_ij in zip(sde.amplitudes, x_j, strict=True)) for x_j in coordinates]
    return list(drifts), list(rows), laws


def balance_law(samples: int = 2, features: int = 2) -> tuple[sp.Expr, sp.Matrix, sp.Expr]:
    """Derive the motion of β = a² - ‖w‖² of a ReLU unit h = a(⟨w, x⟩)₊, which gradient flow conserves.

    Returns:
        the Itô drift of β, its diffusion row (zero: the motion is deterministic), and the law
        Σ_i s_i² [(⟨w, x_i⟩)₊² - a² 1[⟨w, x_i⟩ > 0] ‖x_i‖²] the drift is claimed to equal.

    Source: Andriushchenko et al. (2023), SDE section, by Itô's lemma as for the diagonal network.
    """
    a = sp.Symbol("a", real=True)
    w, x = sp.symbols(f"w1:{features + 1}", real=True), sp.symbols(f"x1:{features + 1}", real=True)
    dot = sp.Matrix(w).dot(sp.Matrix(x))
    sde = SymbolicModel(a * relu(dot), [a, *w], x).label_noise_sde(samples)
    drift, row = sde.ito(a**2 - sum(w_j**2 for w_j in w))
    bracket = sp.Lambda(x, relu(dot) ** 2 - a**2 * sp.Heaviside(dot) * sum(x_j**2 for x_j in x))
    return drift, row, sum(s**2 * bracket(*x_i) for s, x_i in zip(sde.amplitudes, sde.points, strict=True))


@dataclass(frozen=True)
class ScalarSDE:
    """dy = b(y) dt + g(y) dW in one dimension.

    Attributes:
        variable: y, a symbol declared real.
        drift: b.
        diffusion: g.
        interpretation: how the stochastic integral is read; the analysis below converts to Itô by itself.

    Raises:
        ValueError: a variable that is not declared real, an unknown interpretation.
    """

    variable: sp.Symbol
    drift: sp.Expr
    diffusion: sp.Expr
    interpretation: Literal["ito", "stratonovich"] = "ito"

    def __post_init__(self) -> None:
        if not self.variable.is_real:
            raise ValueError(f"{self.variable} is not declared real: use sympy.Symbol('{self.variable}', real=True).")
        if self.interpretation not in ("ito", "stratonovich"):
            raise ValueError(f"'{self.interpretation}' is no reading of an SDE: choose 'ito' or 'stratonovich'.")
        for part in ("drift", "diffusion"):
            object.__setattr__(self, part, sp.sympify(getattr(self, part)))

    def to_ito(self) -> ScalarSDE:
        """The same process in Itô's form: the Stratonovich drift plus ½ g g'."""
        return self if self.interpretation == "ito" else self._reread(sp.S.Half, "ito")

    def to_stratonovich(self) -> ScalarSDE:
        """The same process in Stratonovich's form: the Itô drift minus ½ g g'."""
        return self if self.interpretation == "stratonovich" else self._reread(-sp.S.Half, "stratonovich")

    def _reread(self, share: sp.Expr, interpretation: Literal["ito", "stratonovich"]) -> ScalarSDE:
        correction = share * self.diffusion * sp.diff(self.diffusion, self.variable)
        return replace(self, drift=sp.expand(self.drift + correction), interpretation=interpretation)

    def stationary_density(self) -> sp.Expr:
        """p ∝ (1/g²) exp(∫ 2b/g² dy), the zero-flux solution of the Fokker-Planck equation, not normalised.

        Constant factors are dropped; whether p can be normalised is for :meth:`normalise` to say.

        Raises:
            ValueError: no noise at all, or an integral sympy cannot do.

        Source: Gardiner, Stochastic Methods, on the stationary solution of one-variable Fokker-Planck equations.
        """
        y, b, g = self.variable, self.to_ito().drift, self.diffusion
        if sp.simplify(g) == 0:
            raise ValueError("without noise there is no stationary density: give a diffusion that is not zero.")
        primitive = sp.integrate(sp.expand(sp.simplify(2 * b / g**2)), y)
        if primitive.has(sp.Integral):
            raise ValueError(f"sympy cannot integrate {2 * b / g**2}: write drift and diffusion in a simpler form.")
        exponent = sp.expand(sp.expand_log(primitive - sp.log(sp.factor(g**2)), force=True))
        exponent = exponent.replace(sp.log, lambda z: sp.log(sp.Abs(z))).as_independent(y, as_Add=True)[1]
        density = sp.Integer(1)
        for logarithm in sorted((atom for atom in exponent.atoms(sp.log) if atom.has(y)), key=str):
            power = exponent.coeff(logarithm)
            exponent -= sp.expand(power * logarithm)
            density *= logarithm.args[0] ** sp.simplify(power)
        return density * sp.exp(sp.expand(exponent))

    def normalise(self, low: sp.Expr = -sp.oo, high: sp.Expr = sp.oo) -> sp.Expr:
        """The stationary density p/∫p on (low, high): by quadrature where all parameters are numbers, else by sympy.

        A closed form with symbols holds where its integral converges, which the caller has to know.

        Raises:
            ValueError: an interval of no length, a density whose integral diverges, or one sympy cannot integrate.
        """
        y, density, low, high = self.variable, self.stationary_density(), sp.sympify(low), sp.sympify(high)
        if not low < high:
            raise ValueError(f"({low}, {high}) is no interval: give low < high.")
        mass = self._quadrature(density, low, high) if density.free_symbols <= {y} else self._mass(density, low, high)
        return density / mass

    def _mass(self, density: sp.Expr, low: sp.Expr, high: sp.Expr) -> sp.Expr:
        """∫p in closed form, each side of zero by itself, where |y| is ±y."""
        side, total = sp.Dummy("side", positive=True), sp.Integer(0)
        for sign, start, end in ((1, sp.Max(low, 0), sp.Max(high, 0)), (-1, sp.Max(-high, 0), sp.Max(-low, 0))):
            if start < end:
                total += sp.integrate(density.subs(self.variable, sign * side), (side, start, end), conds="none")
        if total.has(sp.Integral) or total.is_finite is False:
            raise ValueError(f"sympy cannot normalise {density}: put numbers for its parameters.")
        return sp.simplify(total)

    def _quadrature(self, density: sp.Expr, low: sp.Expr, high: sp.Expr) -> sp.Expr:
        """∫p by tanh-sinh quadrature between the zeros of g, after a look at the power with which p ends there."""
        y = self.variable
        b, g = (sp.nsimplify(part, rational=True) for part in (self.to_ito().drift, self.diffusion))
        slope = sp.simplify(2 * b / g**2 - 2 * sp.diff(g, y) / g)  # (ln p)'
        zeros = sp.solveset(g, y, sp.Interval(low, high))
        inside = sorted(zeros) if isinstance(zeros, sp.FiniteSet) else []
        for zero in inside:
            sides = [side for side, end in (("-", low), ("+", high)) if zero != end]
            if any(sp.limit((y - zero) * slope, y, zero, side) <= -1 for side in sides):
                raise ValueError(f"all mass collapses on {self.variable} = {zero}: there is no density to normalise.")
        if any(end.is_infinite and sp.limit(y * slope, y, end) >= -1 for end in (low, high)):
            raise ValueError("the density does not fall off fast enough: give a finite interval.")
        stops = [mpmath.mpf(str(stop).replace("oo", "inf")) for stop in sorted({low, high, *map(sp.N, inside)})]
        mass, error = mpmath.quad(sp.lambdify(y, density, "mpmath"), stops, error=True)
        if not error < 1e-8 * mass:
            raise ValueError("quadrature of the density does not converge: give a narrower interval.")
        return sp.Float(mass)

    def lyapunov_exponent(self, point: sp.Expr) -> sp.Expr:
        """λ = b'(p) - ½ g'(p)² at an invariant point, b(p) = g(p) = 0: paths near p collapse on it iff λ < 0.

        Raises:
            ValueError: a point that noise or drift leaves.

        Source: Chen et al. (2023), stochastic collapse in one dimension.
        """
        y, b, g = self.variable, self.to_ito().drift, self.diffusion
        if any(sp.simplify(part.subs(y, point)) != 0 for part in (b, g)):
            raise ValueError(f"{y} = {point} is not invariant: choose a point where drift and diffusion vanish.")
        return sp.expand(sp.diff(b, y).subs(y, point) - sp.diff(g, y).subs(y, point) ** 2 / 2)

    def to_sde(self, **values: float) -> ScalarTorchSDE:
        """The Itô SDE for the simulators, with a number for every parameter, e.g. ``to_sde(mu=1.0, zeta=0.5)``.

        Raises:
            ValueError: a parameter without a number, a number without a parameter.
        """
        ito = self.to_ito()
        names = {s.name: s for s in (ito.drift.free_symbols | ito.diffusion.free_symbols) - {self.variable}}
        if set(names) != set(values):
            wanted = ", ".join(sorted(names)) or "none"
            raise ValueError(f"the SDE's parameters are {wanted}: give a number for each of them and for nothing else.")
        at = {names[name]: sp.Float(value, 17) for name, value in values.items()}
        return ScalarTorchSDE(*(to_torch(part.subs(at), [self.variable]) for part in (ito.drift, ito.diffusion)))
