"""Eight numbers side by side as one value of a compiled loop, and eight such values as a tile.

numba turns a loop over so few numbers into eight separate ones, a quarter as fast; here a value *is* eight numbers and
stays in registers. Arrays are contiguous, float64 or float32, which values then are too; rows hold ``LANES`` numbers,
are counted by unsigned integers and not checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 8
_INDEX, _PLACE = ir.IntType(64), ir.IntType(32)
_FUSED = ("contract", "nsz")  # a product and a sum may become one instruction
_NUMBERS: dict[Any, ir.Type] = {types.float64: ir.DoubleType(), types.float32: ir.FloatType()}


class _Lanes(types.Type):
    """numba's name for such a value."""

    def __init__(self, number: types.Type) -> None:
        self.number, self.vector = number, ir.VectorType(_NUMBERS[number], LANES)
        super().__init__(name=f"Lanes({number})")


class _Tile(types.Type):
    """numba's name for eight of them."""

    def __init__(self, lanes: _Lanes) -> None:
        self.vector = lanes.vector
        super().__init__(name=f"Tile({lanes.name})")


_LANES = {number: _Lanes(number) for number in _NUMBERS}
_TILE = {number: _Tile(lanes) for number, lanes in _LANES.items()}


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: _Lanes) -> None:
        super().__init__(manager, kind, kind.vector)


@register_model(_Tile)
class _TileModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: _Tile) -> None:
        super().__init__(manager, kind, ir.ArrayType(kind.vector, LANES))


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, row: Any) -> Any:
    """Row ``row`` of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_row(context, builder, signature.args[0], *arguments), align=4)

    return _LANES[array.dtype](array, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, row: Any, value: Any) -> Any:
    """Make ``value`` that row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _row(context, builder, signature.args[0], *arguments[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.uint64, _LANES[array.dtype]), generate


@intrinsic  # type: ignore[untyped-decorator]
def spread(typing: Any, number: Any) -> Any:
    """The same number in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _spread(builder, signature.return_type.vector, arguments[0])

    return _LANES[number](number), generate


@intrinsic  # type: ignore[untyped-decorator]
def spread_from(typing: Any, array: Any, place: Any) -> Any:
    """The number at a place of an array, counted through all its axes, in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = _number(context, builder, signature.args[0], *arguments)
        return _spread(builder, signature.return_type.vector, number)

    return _LANES[array.dtype](array, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def add(typing: Any, a: Any, b: Any) -> Any:
    """a + b."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=_FUSED)

    return a(a, a), generate


@intrinsic  # type: ignore[untyped-decorator]
def subtract(typing: Any, a: Any, b: Any) -> Any:
    """a - b."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fsub(*arguments, flags=_FUSED)

    return a(a, a), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply(typing: Any, a: Any, b: Any) -> Any:
    """a · b."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments, flags=_FUSED)

    return a(a, a), generate


@intrinsic  # type: ignore[untyped-decorator]
def divide(typing: Any, a: Any, b: Any) -> Any:
    """a / b."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    return a(a, a), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _multiply_add(builder, *arguments)

    return a(a, a, a), generate


@intrinsic  # type: ignore[untyped-decorator]
def where_positive(typing: Any, gate: Any, value: Any) -> Any:
    """``value`` where ``gate`` > 0, and 0 elsewhere, NaN included."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _where_positive(builder, *arguments)

    return value(value, value), generate


@intrinsic  # type: ignore[untyped-decorator]
def within(typing: Any, value: Any, low: Any, high: Any) -> Any:
    """``value`` brought between ``low`` and ``high``; NaN stays."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, low, high = arguments
        value = builder.select(builder.fcmp_ordered("<", value, low), low, value)
        return builder.select(builder.fcmp_ordered(">", value, high), high, value)

    return value(value, value, value), generate


@intrinsic  # type: ignore[untyped-decorator]
def zero(typing: Any, array: Any) -> Any:
    """0 in every lane, in the precision of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return cgutils.get_null_value(context.get_value_type(signature.return_type))

    return _LANES[array.dtype](array), generate


@intrinsic  # type: ignore[untyped-decorator]
def is_single(typing: Any, array: Any) -> Any:
    """Whether an array is float32, as a constant: loops whose length depends on it are unrolled."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(signature.args[0].dtype == types.float32))

    return types.boolean(array), generate


@intrinsic  # type: ignore[untyped-decorator]
def fill_tile(typing: Any, value: Any) -> Any:
    """A tile of one value eight times."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile = ir.Constant(context.get_value_type(signature.return_type), ir.Undefined)
        for i in range(LANES):
            tile = builder.insert_value(tile, arguments[0], i)
        return tile

    return _TILE[value.number](value), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_tile(typing: Any, array: Any, first: Any, stride: Any) -> Any:
    """The tile of rows ``first`` + i·``stride`` of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first, stride = arguments
        tile = ir.Constant(context.get_value_type(signature.return_type), ir.Undefined)
        for i in range(LANES):
            row = builder.add(first, builder.mul(stride, ir.Constant(_INDEX, i)))
            value = builder.load(_row(context, builder, signature.args[0], array, row), align=4)
            tile = builder.insert_value(tile, value, i)
        return tile

    return _TILE[array.dtype](array, types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_tile_from(typing: Any, array: Any, place: Any, stride: Any) -> Any:
    """The tile of the eight numbers each from places ``place`` + i·``stride`` of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, place, stride = arguments
        tile = ir.Constant(context.get_value_type(signature.return_type), ir.Undefined)
        for i in range(LANES):
            at = builder.add(place, builder.mul(stride, ir.Constant(_INDEX, i)))
            value = builder.load(_numbers(context, builder, signature.args[0], array, at), align=4)
            tile = builder.insert_value(tile, value, i)
        return tile

    return _TILE[array.dtype](array, types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_tile_from(typing: Any, array: Any, place: Any, stride: Any, tile: Any) -> Any:
    """Make the i-th value of the tile the eight numbers from ``place`` + i·``stride`` of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, place, stride, tile = arguments
        for i in range(LANES):
            at = builder.add(place, builder.mul(stride, ir.Constant(_INDEX, i)))
            to = _numbers(context, builder, signature.args[0], array, at)
            builder.store(builder.extract_value(tile, i), to, align=4)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64, _TILE[array.dtype]), generate


@intrinsic  # type: ignore[untyped-decorator]
def turn_tile(typing: Any, tile: Any) -> Any:
    """The tile whose i-th value holds the i-th numbers of the eight values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = [builder.extract_value(arguments[0], i) for i in range(LANES)]
        reach = LANES // 2
        while reach:  # blocks of so many rows and columns change sides
            low = [j if not j & reach else LANES + j - reach for j in range(LANES)]
            high = [j + reach if not j & reach else LANES + j for j in range(LANES)]
            masks = [ir.Constant(ir.VectorType(_PLACE, LANES), lanes) for lanes in (low, high)]
            for i in [i for i in range(LANES) if not i & reach]:
                pair = values[i], values[i + reach]
                values[i], values[i + reach] = (builder.shuffle_vector(*pair, mask) for mask in masks)
            reach //= 2
        tile = ir.Constant(context.get_value_type(signature.return_type), ir.Undefined)
        for i in range(LANES):
            tile = builder.insert_value(tile, values[i], i)
        return tile

    return tile(tile), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_outer(typing: Any, tile: Any, value: Any, array: Any, first: Any, stride: Any) -> Any:
    """The tile with a_i · ``value`` added to its i-th value, a_i an array's number at ``first`` + i·``stride``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, value, array, first, stride = arguments
        for i in range(LANES):
            place = builder.add(first, builder.mul(stride, ir.Constant(_INDEX, i)))
            number = _number(context, builder, signature.args[2], array, place)
            factor = _spread(builder, value.type, number)
            total = _multiply_add(builder, value, factor, builder.extract_value(tile, i))
            tile = builder.insert_value(tile, total, i)
        return tile

    return tile(tile, _LANES[array.dtype], array, types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_rows(typing: Any, tile: Any, value: Any, array: Any, first: Any, stride: Any) -> Any:
    """The tile with ``value`` · row ``first`` + i·``stride`` of an array added to its i-th value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, value, array, first, stride = arguments
        for i in range(LANES):
            row = builder.add(first, builder.mul(stride, ir.Constant(_INDEX, i)))
            factor = builder.load(_row(context, builder, signature.args[2], array, row), align=4)
            total = _multiply_add(builder, value, factor, builder.extract_value(tile, i))
            tile = builder.insert_value(tile, total, i)
        return tile

    return tile(tile, _LANES[array.dtype], array, types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def tile_where_positive(typing: Any, tile: Any) -> Any:
    """The tile's positive numbers, and 0 elsewhere, NaN included.

    In registers: a number that is read, gated and stored where it was becomes a masked store, slow on some processors.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile = arguments[0]
        for i in range(LANES):
            value = builder.extract_value(tile, i)
            tile = builder.insert_value(tile, _where_positive(builder, value, value), i)
        return tile

    return tile(tile), generate


@intrinsic  # type: ignore[untyped-decorator]
def tile_where_rows_positive(typing: Any, tile: Any, array: Any, first: Any, stride: Any) -> Any:
    """The tile where row ``first`` + i·``stride`` of an array is > 0 for its i-th value, and 0 elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, array, first, stride = arguments
        for i in range(LANES):
            row = builder.add(first, builder.mul(stride, ir.Constant(_INDEX, i)))
            gate = builder.load(_row(context, builder, signature.args[1], array, row), align=4)
            value = builder.extract_value(tile, i)
            tile = builder.insert_value(tile, _where_positive(builder, gate, value), i)
        return tile

    return tile(tile, array, types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_tile(typing: Any, array: Any, first: Any, stride: Any, tile: Any) -> Any:
    """Make the i-th value of the tile row ``first`` + i·``stride`` of an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first, stride, tile = arguments
        for i in range(LANES):
            row = builder.add(first, builder.mul(stride, ir.Constant(_INDEX, i)))
            place = _row(context, builder, signature.args[0], array, row)
            builder.store(builder.extract_value(tile, i), place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64, _TILE[array.dtype]), generate


def _row(context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value, row: ir.Value) -> ir.Value:
    return _numbers(context, builder, kind, array, builder.mul(row, ir.Constant(_INDEX, LANES)))


def _numbers(context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value, place: ir.Value) -> ir.Value:
    first = builder.gep(context.make_array(kind)(context, builder, array).data, [place])
    return builder.bitcast(first, _LANES[kind.dtype].vector.as_pointer())


def _number(context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value, place: ir.Value) -> ir.Value:
    return builder.load(builder.gep(context.make_array(kind)(context, builder, array).data, [place]))


def _spread(builder: ir.IRBuilder, vector: ir.Type, number: ir.Value) -> ir.Value:
    single = builder.insert_element(cgutils.get_null_value(vector), number, ir.Constant(_PLACE, 0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_PLACE, LANES), [0] * LANES))


def _where_positive(builder: ir.IRBuilder, gate: ir.Value, value: ir.Value) -> ir.Value:
    zero = ir.Constant(value.type, None)
    return builder.select(builder.fcmp_ordered(">", gate, zero), value, zero)


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)
