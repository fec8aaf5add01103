"""Activations, sums and means over pixels, eight numbers to an instruction, in buffers of
:mod:`nets.convolutional_plan`.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint64

from nets.convolutional_plan import RELU, TANH
from theory.lanes import (
    LANES,
    add,
    divide,
    load,
    multiply,
    multiply_add,
    spread,
    store,
    subtract,
    where_positive,
    within,
    zero,
)

_COMPILED = {"cache": True, "boundscheck": False, "error_model": "numpy"}


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def add_up(a, x, z, y, n):  # type: ignore[no-untyped-def]
    """y = x + z, n numbers each."""
    x, z, y = uint64(x // LANES), uint64(z // LANES), uint64(y // LANES)
    for row in range(uint64(n // LANES)):
        store(a, y + row, add(load(a, x + row), load(a, z + row)))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def pass_on(a, slope, to, n, again):  # type: ignore[no-untyped-def]
    """The gradient of a sum, to one of its terms."""
    if again:
        add_up(a, slope, to, to, n)
    else:
        for row in range(uint64(n // LANES)):
            store(a, uint64(to // LANES) + row, load(a, uint64(slope // LANES) + row))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def activate(a, x, y, n, function):  # type: ignore[no-untyped-def]
    """y = σ(x), in place where the buffers are one; NaN stays."""
    x, y, rows = uint64(x // LANES), uint64(y // LANES), uint64(n // LANES)
    if function == RELU:
        low, high = zero(a), spread(a.dtype.type(np.inf))
        for row in range(rows):
            store(a, y + row, within(load(a, x + row), low, high))
    elif function == TANH:
        for row in range(rows):
            store(a, y + row, tanh(load(a, x + row), a))
    else:
        half = spread(a.dtype.type(0.5))
        for row in range(rows):
            store(a, y + row, multiply_add(half, tanh(multiply(half, load(a, x + row)), a), half))


@njit(inline="always", **_COMPILED)  # type: ignore[untyped-decorator]
def tanh(x, like):  # type: ignore[no-untyped-def]
    """tanh x to rounding, in the precision of an array: Lambert's continued fraction at x/8, doubled three times."""
    of, single = like.dtype.type, like.itemsize == 4
    most, one, two = spread(of(10 if single else 20)), spread(of(1)), spread(of(2))
    z = multiply(within(x, subtract(zero(like), most), most), spread(of(0.125)))
    square = multiply(z, z)
    before, over, under_before, under = zero(like), z, one, one  # of z/(1 + z²/(3 + z²/(5 + …)))
    for level in range(1, 7 if single else 13):
        odd = spread(of(2 * level + 1))
        before, over = over, multiply_add(square, before, multiply(odd, over))
        under_before, under = under, multiply_add(square, under_before, multiply(odd, under))
    t = divide(over, under)
    for _ in range(3):
        t = divide(multiply(two, t), multiply_add(t, t, one))
    return t


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def activate_back(a, y, slope, to, n, function, again):  # type: ignore[no-untyped-def]
    """σ' is a function of σ."""
    y, slope, to = uint64(y // LANES), uint64(slope // LANES), uint64(to // LANES)
    one = spread(a.dtype.type(1))
    for row in range(uint64(n // LANES)):
        value, g = load(a, y + row), load(a, slope + row)
        if function == RELU:
            g = where_positive(value, g)
        elif function == TANH:
            g = multiply(g, subtract(one, multiply(value, value)))
        else:
            g = multiply(g, multiply(value, subtract(one, value)))
        store(a, to + row, add(g, load(a, to + row)) if again else g)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def average(a, op, B):  # type: ignore[no-untyped-def]
    """Means over the pixels of each image."""
    blocks, pixels, count = uint64(op.x_channels // LANES), uint64(op.x_pixels), spread(a.dtype.type(op.x_pixels))
    x, y = uint64(op.x // LANES), uint64(op.y // LANES)
    for b in range(uint64(B)):
        for o in range(blocks):
            total = zero(a)
            for p in range(pixels):
                total = add(total, load(a, x + (b * pixels + p) * blocks + o))
            store(a, y + b * blocks + o, divide(total, count))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def average_back(a, op, B):  # type: ignore[no-untyped-def]
    """The same slope for every pixel."""
    blocks, pixels, count = uint64(op.x_channels // LANES), uint64(op.x_pixels), spread(a.dtype.type(op.x_pixels))
    to, slope = uint64(op.x_gradient // LANES), uint64(op.y_gradient // LANES)
    for b in range(uint64(B)):
        for o in range(blocks):
            g = divide(load(a, slope + b * blocks + o), count)
            for p in range(pixels):
                row = to + (b * pixels + p) * blocks + o
                store(a, row, add(g, load(a, row)) if op.x_again else g)
