"""Eight doubles side by side as one value of a compiled loop.

numba turns a loop over so few numbers into eight separate ones, a quarter as fast; here a value *is* eight numbers, one
a path, and stays in registers. Arrays are contiguous float64 with rows of ``LANES``; rows are counted by unsigned
integers and not checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 8
_VECTOR, _INDEX = ir.VectorType(ir.DoubleType(), LANES), ir.IntType(64)
_FUSED = ("contract", "nsz")  # a product and a sum may become one instruction


class _Lanes(types.Type):
    """numba's name for such a value."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


lanes = _Lanes()


@register_model(_Lanes)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: types.Type) -> None:
        super().__init__(manager, kind, _VECTOR)


def _place(context: Any, builder: ir.IRBuilder, kind: types.Type, array: ir.Value, row: ir.Value) -> ir.Value:
    data = context.make_array(kind)(context, builder, array).data
    first = builder.gep(data, [builder.mul(row, ir.Constant(_INDEX, LANES))])
    return builder.bitcast(first, _VECTOR.as_pointer())


def _zero() -> ir.Constant:
    return ir.Constant(_VECTOR, [0.0] * LANES)


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, row: Any) -> Any:
    """Row ``row`` of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, signature.args[0], *arguments), align=8)

    return lanes(array, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, row: Any, value: Any) -> Any:
    """Make ``value`` that row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _place(context, builder, signature.args[0], *arguments[:2]), align=8)
        return context.get_dummy_value()

    return types.void(array, types.uint64, lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def spread(typing: Any, number: Any) -> Any:
    """The same number in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        single = builder.insert_element(cgutils.get_null_value(_VECTOR), arguments[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))

    return lanes(types.float64), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply(typing: Any, a: Any, b: Any) -> Any:
    """a · b."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments, flags=_FUSED)

    return lanes(lanes, lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c = arguments
        return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)

    return lanes(lanes, lanes, lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def where_positive(typing: Any, gate: Any, value: Any) -> Any:
    """``value`` where ``gate`` > 0, and 0 elsewhere, NaN included."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        gate, value = arguments
        return builder.select(builder.fcmp_ordered(">", gate, _zero()), value, _zero())

    return lanes(lanes, lanes), generate
