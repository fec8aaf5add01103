"""From sympy expressions to functions of batched torch tensors that torch.func can differentiate and batch."""

# sympy finds printing methods by the names of its classes.
# ruff: noqa: N802, N815

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
from sympy.core.relational import Relational
from sympy.functions.elementary.piecewise import ExprCondPair
from sympy.logic.boolalg import BooleanAtom
from sympy.printing.pytorch import TorchPrinter
from torch import Tensor

TorchFunction = Callable[..., Tensor]

_UNIT = "unit"  # a 0-d tensor 1 in the dtype and on the device of the inputs, the first argument of lowered code
_ELEMENTWISE = (
    sp.Abs, sp.sign, sp.floor, sp.ceiling, sp.exp, sp.log, sp.sin, sp.cos, sp.tan, sp.asin, sp.acos, sp.atan, sp.atan2,
    sp.sinh, sp.cosh, sp.tanh, sp.asinh, sp.acosh, sp.atanh, sp.erf, sp.loggamma,
)  # fmt: skip
_STRUCTURE = (
    sp.Symbol, sp.Add, sp.Mul, sp.Pow, sp.Max, sp.Min, sp.Heaviside, sp.Piecewise, ExprCondPair,
    sp.And, sp.Or, sp.Not, Relational, BooleanAtom,
)  # fmt: skip


class _Printer(TorchPrinter):  # type: ignore[misc]
    """sympy's torch printer with constants as Python numbers, so that the inputs' dtype decides, and without ties.

    Max(0, z) becomes relu and Heaviside(z) its derivative, 0 at z = 0.
    """

    def _print(self, expr: Any, **options: Any) -> str:
        if isinstance(expr, sp.Expr) and expr.is_number and not expr.is_Integer:
            return _literal(expr)
        return super()._print(expr, **options)

    def _tensor(self, expr: sp.Expr) -> str:
        text = self._print(expr)
        return f"({text}*{_UNIT})" if expr.is_number else text

    def _print_Function(self, expr: sp.Expr) -> str:
        return f"{self.mapping[type(expr)]}({', '.join(self._tensor(arg) for arg in expr.args)})"

    _print_sign = _print_Function
    _print_Abs = _print_Function
    _print_log = _print_Function
    _print_floor = _print_Function
    _print_ceiling = _print_Function
    _print_loggamma = _print_Function

    def _print_Pow(self, expr: sp.Pow, **_: Any) -> str:
        base, exponent = self._print(expr.base), expr.exp
        if exponent == sp.S.Half:
            return f"torch.sqrt({base})"
        if exponent == -sp.S.Half:
            return f"(1/torch.sqrt({base}))"
        return f"(({base})**({self._print(exponent)}))"

    def _print_Max(self, expr: sp.Max) -> str:
        return self._extremum(expr, "torch.maximum", "min")

    def _print_Min(self, expr: sp.Min) -> str:
        return self._extremum(expr, "torch.minimum", "max")

    def _extremum(self, expr: sp.Expr, function: str, bound: str) -> str:
        numbers, terms = [a for a in expr.args if a.is_number], [self._print(a) for a in expr.args if not a.is_number]
        text = terms[0]
        for term in terms[1:]:
            text = f"{function}({text}, {term})"
        for number in numbers:
            relu = number == 0 and isinstance(expr, sp.Max)
            text = f"torch.relu({text})" if relu else f"torch.clamp({text}, {bound}={self._print(number)})"
        return text

    def _print_Heaviside(self, expr: sp.Heaviside) -> str:
        z, at_zero = expr.args
        if at_zero == sp.S.Half:  # sympy's default, what differentiating Max(0, z) gives
            at_zero = sp.S.Zero
        return self._print(sp.Piecewise((1, z > 0), (at_zero, sp.Eq(z, 0)), (0, z < 0)) if at_zero else _step(z))

    def _print_Piecewise(self, expr: sp.Piecewise) -> str:
        text = f"({_UNIT}*float('nan'))"
        for branch, condition in reversed(expr.args):
            here = self._tensor(branch)
            text = here if condition == sp.true else f"torch.where({self._print(condition)}, {here}, {text})"
        return text

    def _print_Relational(self, expr: Any) -> str:
        return f"({self._tensor(expr.lhs)} {expr.rel_op} {self._tensor(expr.rhs)})"

    def _print_And(self, expr: Any) -> str:
        return "(" + " & ".join(self._print(arg) for arg in expr.args) + ")"

    def _print_Or(self, expr: Any) -> str:
        return "(" + " | ".join(self._print(arg) for arg in expr.args) + ")"

    def _print_Not(self, expr: Any) -> str:
        return f"(~{self._print(expr.args[0])})"


def _step(z: sp.Expr) -> sp.Piecewise:
    return sp.Piecewise((1, z > 0), (0, True))


def _literal(number: sp.Expr) -> str:
    value = float(number)
    return repr(value) if math.isfinite(value) else f"float('{value}')"


def _check(expression: sp.Expr, symbols: Sequence[sp.Symbol]) -> None:
    """One sentence on why an expression cannot be lowered, if it cannot."""
    missing = expression.free_symbols - set(symbols)
    if missing:
        names = ", ".join(sorted(map(str, missing)))
        raise ValueError(f"{names} would be left without a value: list every symbol of the expression.")
    pending = [expression]
    while pending:
        node = pending.pop()
        if isinstance(node, sp.Expr) and node.is_number:
            if node.is_extended_real is False or node is sp.nan:
                raise ValueError(f"the constant {node} is not a real number: write the expression in real ones.")
            continue
        if not isinstance(node, (*_STRUCTURE, *_ELEMENTWISE)):
            raise ValueError(f"{type(node).__name__} has no counterpart in torch here: rewrite {node} without it.")
        pending.extend(node.args)


def to_torch(
    expressions: sp.Expr | Sequence[sp.Expr] | sp.Matrix, symbols: Sequence[sp.Symbol], *, cse: bool = True
) -> TorchFunction:
    """The expressions as a function of tensors, one per symbol, elementwise over their broadcast shape.

    Known are sums, products, powers, Max, Min, Heaviside, Piecewise and the elementary functions. Max(0, z) has the
    derivative Heaviside(z), and Heaviside(0) = 0 unless its second argument says otherwise. Results have the dtype
    and device of the inputs; Python numbers among the inputs follow the tensors. The function can be used under
    ``torch.func``. A branch of a Piecewise that is not taken must be finite for gradients to be.

    Args:
        expressions: one expression, a list of k, a row or column matrix of k, or a k × m matrix.
        symbols: the arguments, in order.
        cse: compute common subexpressions once.

    Returns:
        a function of ``len(symbols)`` tensors; with their broadcast shape (...), it returns shape (...) for one
        expression, (..., k) for a list, row or column, and (..., k, m) for a matrix.

    Raises:
        ValueError: a symbol left without a value, a symbol given twice, a function or constant torch does not have;
            on call, a number of arguments that does not fit, or no tensor among them.
    """
    given = tuple(symbols)
    if len(set(given)) != len(given):
        raise ValueError(f"a symbol is listed twice in {', '.join(map(str, given))}: list each once.")
    flat, shape = _flatten(expressions)
    for expression in flat:
        _check(expression, given)
    # Own names: a user's symbol may be no identifier, or equal one that cse introduces.
    renamed = {symbol: sp.Symbol(f"a{k}", real=True) for k, symbol in enumerate(given)}
    code = sp.lambdify(
        [sp.Symbol(_UNIT), *renamed.values()], [e.xreplace(renamed) for e in flat],
        modules=[{"torch": torch}], printer=_Printer({"fully_qualified_modules": True}), cse=cse,
    )  # fmt: skip

    def lowered(*arguments: Tensor | float) -> Tensor:
        tensors = _as_tensors(arguments, given)
        batch = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        unit = tensors[0].new_ones(())
        values = [(value * unit).expand(batch) for value in code(unit, *tensors)]
        if shape is None:
            return values[0]
        return torch.stack(values, -1).unflatten(-1, shape) if shape else torch.stack(values, -1)

    return lowered


def _flatten(expressions: Any) -> tuple[list[sp.Expr], tuple[int, ...] | None]:
    """The scalar expressions, and the shape to give them: None for one, () for a flat list, (k, m) for a matrix."""
    if isinstance(expressions, sp.MatrixBase):
        return list(expressions), () if 1 in expressions.shape else tuple(expressions.shape)
    if isinstance(expressions, (list, tuple)):
        if not expressions:
            raise ValueError("there is no expression to lower: give at least one.")
        return [sp.sympify(expression) for expression in expressions], ()
    return [sp.sympify(expressions)], None


def _as_tensors(arguments: Sequence[Tensor | float], symbols: Sequence[sp.Symbol]) -> list[Tensor]:
    if len(arguments) != len(symbols):
        names = ", ".join(map(str, symbols))
        raise ValueError(
            f"{len(arguments)} arguments were given for {len(symbols)} symbols: give one for each: {names}."
        )
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if not tensors or not all(tensor.is_floating_point() for tensor in tensors):
        raise ValueError(
            "a lowered expression needs floating-point tensors: convert the arguments, e.g. with .double()."
        )
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [torch.as_tensor(argument, dtype=dtype, device=tensors[0].device) for argument in arguments]


@dataclass(frozen=True, eq=False)
class ScalarTorchSDE:
    """dy = b(y) dt + g(y) dW (Itô) for states of shape (paths, 1), in the form :class:`theory.sde.SDE` asks for."""

    drift: TorchFunction
    diffusion: TorchFunction

    noise_type = "diagonal"
    sde_type = "ito"
    channels = 1

    def f(self, t: float, y: Tensor) -> Tensor:
        """b(y), shape (paths, 1)."""
        return self.drift(y)

    def g(self, t: float, y: Tensor) -> Tensor:
        """g(y), shape (paths, 1)."""
        return self.diffusion(y)

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        """g(y) v for v of shape (paths, 1)."""
        return self.diffusion(y) * v

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.drift(y), self.diffusion(y) * v
