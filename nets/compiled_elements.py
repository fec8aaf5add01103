"""What compiled loops for fully connected and for convolutional networks share: activations and losses.

Buffers hold a row of numbers a sample, a multiple of eight of them.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint64

from theory.lanes import (
    LANES,
    add,
    divide,
    is_single,
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

RELU, TANH, SIGMOID = range(3)
SQUARED, CROSS_ENTROPY = range(2)
_COMPILED = {"cache": True, "boundscheck": False, "error_model": "numpy"}


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
    of, single = like.dtype.type, is_single(like)
    most, one, two = spread(of(10 if single else 20)), spread(of(1)), spread(of(2))
    z = multiply(within(x, subtract(zero(like), most), most), spread(of(0.125)))
    square = multiply(z, z)
    before, over, under_before, under = zero(like), z, one, one  # of z/(1 + z²/(3 + z²/(5 + …)))
    for level in range(1, 7 if single else 13):
        odd = spread(of(2 * level + 1))
        before, over = over, multiply_add(square, before, multiply(odd, over))
        under_before, under = under, multiply_add(square, under_before, multiply(odd, under))
    t = divide(over, under)
    over, under = multiply(two, t), multiply_add(t, t, one)
    for _ in range(2):  # of a fraction, so that two of the doublings divide once
        over, under = multiply(two, multiply(over, under)), multiply_add(over, over, multiply(under, under))
    return divide(over, under)


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
def bend(a, y, slope, along, to, n, function):  # type: ignore[no-untyped-def]
    """How a gradient that comes back through σ changes where σ's argument does: σ''/σ' is a function of σ.

    Args:
        slope: the gradient in σ; ``along``: how σ changes; the product of both with σ''/σ' is added ``to`` a buffer.
    """
    y, slope, along, to = uint64(y // LANES), uint64(slope // LANES), uint64(along // LANES), uint64(to // LANES)
    one, two = spread(a.dtype.type(1)), spread(a.dtype.type(2))
    if function == RELU:
        return
    for row in range(uint64(n // LANES)):
        factor = multiply(two, load(a, y + row))
        factor = subtract(zero(a), factor) if function == TANH else subtract(one, factor)
        change = multiply(factor, multiply(load(a, slope + row), load(a, along + row)))
        store(a, to + row, add(load(a, to + row), change))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def loss_slopes(a, places, target, weights, given, loss, losses):  # type: ignore[no-untyped-def]
    """The loss of every sample, and the gradient in the outputs of Σ_i w_i ℓ_i + ⟨s_i, h_i⟩.

    Args:
        places: of the outputs and of their gradients, and the length of their rows; where outputs end nothing changes.
        target: shape (B, outputs); ``weights`` w (B,); ``given`` s (B, outputs), or (0, 0) for zeros.
    """
    (B, count), (outputs, slopes, stride) = target.shape, places
    half = a.dtype.type(0.5)
    for b in range(B):
        h, slope, weight = outputs + b * stride, slopes + b * stride, weights[b]
        value = a.dtype.type(0)
        if loss == SQUARED:
            for c in range(count):
                r = a[h + c] - target[b, c]
                value += half * r * r
                a[slope + c] = weight * r
        else:
            top, total, share = a[h], a.dtype.type(0), a.dtype.type(0)
            for c in range(count):
                top = max(top, a[h + c])
                share += target[b, c]
            for c in range(count):
                a[slope + c] = np.exp(a[h + c] - top)
                total += a[slope + c]
            norm = np.log(total) + top
            share /= total
            for c in range(count):
                value -= target[b, c] * (a[h + c] - norm)
                a[slope + c] = weight * (share * a[slope + c] - target[b, c])
        if len(given) > 0:
            for c in range(count):
                a[slope + c] += given[b, c]
        losses[b] = value
