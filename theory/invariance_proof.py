"""Proof in sympy that gradients on a sign or permutation set stay in it, for a given activation and layer.

A layer is written out with few units, inputs, outputs and places (samples or positions), every symbol free. What reads
its outputs f is arbitrary: the loss enters through free symbols for ∂ℓ/∂f alone, and what feeds it through free inputs.
Components of other widths have the same form as those written out. A linear subspace that holds every gradient holds
SGD, with momentum, weight decay and minibatches, for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import sympy as sp
from sympy.core.function import AppliedUndef

Activation = Callable[[sp.Expr], sp.Expr]
_EPSILON = sp.Symbol("epsilon", positive=True)


@dataclass(frozen=True)
class Layer:
    """A layer to write out.

    Attributes:
        reading: ``dense`` (every place is a sample), ``conv`` (places are positions, read with two taps) or
            ``flattened`` (places are positions, one weight each).
        norm: no statistics, those of a unit over places (``batch``) or of a group of units over places (``group``;
            LayerNorm is one group at one place).
        affine: whether the normalisation has γ, β.
        frozen: statistics are free symbols, as in eval mode (``batch`` only).
        norm_last: the normalisation comes after the activation.
    """

    reading: Literal["dense", "conv", "flattened"] = "dense"
    norm: Literal["none", "batch", "group"] = "none"
    affine: bool = True
    frozen: bool = False
    norm_last: bool = False
    units: int = 3
    groups: int = 1
    inputs: int = 1
    places: int = 2

    def __post_init__(self) -> None:
        if self.units < 2 or self.units % self.groups or self.places < (2 if self.reading == "conv" else 1):
            raise ValueError("a layer takes 2 or more units in equal groups and, for a convolution, 2 or more places.")
        if self.frozen and self.norm != "batch":
            raise ValueError("only the statistics of norm='batch' can be frozen: set frozen=False.")


@dataclass(frozen=True)
class Invariance:
    """Whether a set is invariant, and the gradient components across it that do not vanish, by parameter."""

    holds: bool
    across: dict[str, sp.Expr]


def prove_sign_set(activation: Activation, layer: Layer | None = None) -> Invariance:
    """Unit 0 with w_in = b = w_out = 0, or γ = β = w_out = 0 under a normalisation, see :mod:`theory.invariant_sets`.

    An undefined activation, ``sympy.Function("sigma")``, leaves the condition for any activation in ``across``.

    >>> prove_sign_set(sp.tanh).holds, prove_sign_set(sp.cosh).holds
    (True, False)
    >>> sorted(map(str, prove_sign_set(sp.Function("sigma")).across.values()))[0]
    '(g0_0 + g0_1)*sigma(0)'
    """
    layer = layer or Layer()
    parameters, loss = _written_out(activation, layer)
    kinds = "w b a" if layer.norm == "none" else "gamma beta a" if layer.affine else "w a"
    across = [p for kind in kinds.split() for p in parameters[kind][0]]
    return _verdict({str(p): sp.diff(loss, p).subs(dict.fromkeys(across, 0)) for p in across})


def prove_permutation_set(
    activation: Activation, layer: Layer | None = None, pair: tuple[int, int] = (0, 1)
) -> Invariance:
    """Two units alike in every parameter (and, where they are frozen, in their statistics).

    >>> prove_permutation_set(sp.Function("sigma")).holds
    True
    """
    layer = layer or Layer()
    parameters, loss = _written_out(activation, layer)
    first, second = pair
    alike = {q: p for kind in parameters.values() for p, q in zip(kind[first], kind[second], strict=True)}
    trained = [kind for kind in parameters if kind != "statistics"]
    pairs = [pq for kind in trained for pq in zip(parameters[kind][first], parameters[kind][second], strict=True)]
    return _verdict({f"{p} - {q}": (sp.diff(loss, p) - sp.diff(loss, q)).subs(alike) for p, q in pairs})


def _verdict(components: dict[str, sp.Expr]) -> Invariance:
    across = {}
    for name, component in components.items():
        if _is_nonzero_somewhere(component):
            across[name] = sp.factor_terms(component)
        elif not _is_zero(component):
            raise ValueError(f"sympy cannot prove that {component} vanishes: write the activation in a simpler form.")
    return Invariance(not across, across)


def _is_zero(expression: sp.Expr) -> bool:
    try:
        return bool(expression == 0 or sp.factor_terms(expression) == 0 or expression.equals(0))
    except ValueError:  # sympy's Max does not take the points that equals() tries
        return bool(sp.simplify(expression) == 0)


def _is_nonzero_somewhere(expression: sp.Expr) -> bool:
    """Whether some point refutes that the expression vanishes; values of an undefined function count as free."""
    for kind in (sp.Subs, sp.Derivative, AppliedUndef):
        unknown = sorted(expression.atoms(kind), key=str)
        expression = expression.xreplace({value: sp.Dummy(real=True) for value in unknown})
    free = sorted(expression.free_symbols, key=str)
    for trial in range(8):
        sizes = [sp.Rational((7 * k + 3 * trial) % 11 + 2, 5 + k % 3) for k in range(len(free))]
        signs = [1 if symbol.is_positive else (-1) ** ((k * k + k * trial) % 3) for k, symbol in enumerate(free)]
        point = {symbol: sign * size for symbol, sign, size in zip(free, signs, sizes, strict=True)}
        value = sp.N(expression.subs(point), 40)
        if value.is_number and abs(value) > sp.Float("1e-25"):
            return True
    return False


def _written_out(activation: Activation, layer: Layer) -> tuple[dict[str, list[list[sp.Symbol]]], sp.Expr]:
    """Parameters by kind and unit, and Σ g f: its derivatives are the loss's for ∂ℓ/∂f = g."""
    units, places = range(layer.units), range(layer.places)

    def symbols(kind: str, count: int) -> list[list[sp.Symbol]]:
        return [[sp.Symbol(f"{kind}{u}_{k}", real=True) for k in range(count)] for u in units]

    taps = {"dense": 1, "conv": 2, "flattened": layer.places}[layer.reading]
    parameters = {"w": symbols("w", layer.inputs), "b": symbols("b", 1), "a": symbols("a", taps)}
    if layer.norm != "none" and layer.affine:
        parameters |= {"gamma": symbols("gamma", 1), "beta": symbols("beta", 1)}
    if layer.frozen:
        parameters["statistics"] = symbols("m", 2)
    x = [[sp.Symbol(f"x{c}_{p}", real=True) for p in places] for c in range(layer.inputs)]
    w, b, a = parameters["w"], parameters["b"], parameters["a"]
    z = [[sum(w[u][c] * x[c][p] for c in range(layer.inputs)) + b[u][0] for p in places] for u in units]
    if layer.norm_last:
        h = _normalized([[activation(value) for value in row] for row in z], layer, parameters)
    else:
        h = [[activation(value) for value in row] for row in _normalized(z, layer, parameters)]
    if layer.reading == "dense":
        f = [sum(a[u][0] * h[u][p] for u in units) for p in places]
    elif layer.reading == "conv":
        f = [sum(a[u][o] * h[u][q + o] for u in units for o in range(2)) for q in range(layer.places - 1)]
    else:
        f = [sum(a[u][p] * h[u][p] for u in units for p in places)]
    return parameters, sum(sp.Symbol(f"g0_{q}", real=True) * value for q, value in enumerate(f))


def _normalized(
    z: list[list[sp.Expr]], layer: Layer, parameters: dict[str, list[list[sp.Symbol]]]
) -> list[list[sp.Expr]]:
    if layer.norm == "none":
        return z
    per_group = layer.units // layer.groups if layer.norm == "group" else 1
    result = []
    for u, row in enumerate(z):
        group = z[u // per_group * per_group :][:per_group]
        together = [value for member in group for value in member]
        mean = sum(together) / len(together)
        variance = sum((value - mean) ** 2 for value in together) / len(together)
        if layer.frozen:
            mean, variance = parameters["statistics"][u][0], parameters["statistics"][u][1] ** 2
        scaled = [(value - mean) / sp.sqrt(variance + _EPSILON) for value in row]
        if layer.affine:
            scaled = [parameters["gamma"][u][0] * value + parameters["beta"][u][0] for value in scaled]
        result.append(scaled)
    return result
