"""BatchNorm and GroupNorm, eight channels to an instruction, in buffers of :mod:`nets.convolutional_plan`."""

from __future__ import annotations

import numpy as np
from numba import njit, uint64

from theory.lanes import LANES, add, load, multiply, multiply_add, store, subtract, zero

_COMPILED = {"cache": True, "boundscheck": False, "error_model": "numpy"}


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _spans(op, B):  # type: ignore[no-untyped-def]
    """How many sets of rows are normalised by themselves, rows in each, channels in a group."""
    return op.spans, B // op.spans * op.x_pixels, max(op.group, 1)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _sum_of_rows(a, first, stride, count):  # type: ignore[no-untyped-def]
    """Σ of rows, four sums side by side: an addition need not wait for the last one."""
    four, three = uint64(4), uint64(3)
    s, t, u, v, whole = zero(a), zero(a), zero(a), zero(a), count // four * four
    for p in range(uint64(0), whole, four):
        row = first + p * stride
        s, t = add(s, load(a, row)), add(t, load(a, row + stride))
        u, v = add(u, load(a, row + uint64(2) * stride)), add(v, load(a, row + three * stride))
    for p in range(whole, count):
        s = add(s, load(a, first + p * stride))
    return add(add(s, t), add(u, v))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _sum_of_squares(a, first, stride, count, mean):  # type: ignore[no-untyped-def]
    """Σ (row - mean)², likewise."""
    four, three = uint64(4), uint64(3)
    s, t, u, v, whole = zero(a), zero(a), zero(a), zero(a), count // four * four
    for p in range(uint64(0), whole, four):
        row = first + p * stride
        w, x = subtract(load(a, row), mean), subtract(load(a, row + stride), mean)
        y, z = subtract(load(a, row + uint64(2) * stride), mean), subtract(load(a, row + three * stride), mean)
        s, t, u, v = multiply_add(w, w, s), multiply_add(x, x, t), multiply_add(y, y, u), multiply_add(z, z, v)
    for p in range(whole, count):
        w = subtract(load(a, first + p * stride), mean)
        s = multiply_add(w, w, s)
    return add(add(s, t), add(u, v))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _average_groups(a, place, channels, group, rows):  # type: ignore[no-untyped-def]
    """Each channel's sum ↦ the mean over its group's channels and ``rows``."""
    for first in range(place, place + channels, group):
        total = a.dtype.type(0)
        for c in range(first, first + group):
            total += a[c]
        total /= a.dtype.type(rows * group)
        for c in range(first, first + group):
            a[c] = total


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _load_scales(a, op, theta):  # type: ignore[no-untyped-def]
    """γ and β, zeros where channels end."""
    for c in range(op.x_channels):
        there = c < op.inputs
        a[op.own + c] = theta[op.weight + c] if there else theta.dtype.type(0)
        a[op.own + op.x_channels + c] = theta[op.bias + c] if there else theta.dtype.type(0)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def rescale(a, op, theta, B):  # type: ignore[no-untyped-def]
    """γ(x - m)/√(v + ε) + β with m and v that θ holds, in place where the buffers are one."""
    C, one = op.x_channels, theta.dtype.type(1)
    for c in range(op.inputs):
        mean, variance = theta[op.statistics + c], theta[op.statistics + op.inputs + c]
        scale = theta[op.weight + c] * (one / np.sqrt(variance + a.dtype.type(op.epsilon)))
        a[op.own + c], a[op.own + C + c] = scale, theta[op.bias + c] - mean * scale
    blocks, x, y, own = uint64(C // LANES), uint64(op.x // LANES), uint64(op.y // LANES), uint64(op.own // LANES)
    for o in range(blocks):
        scale, shift = load(a, own + o), load(a, own + blocks + o)
        for p in range(uint64(B * op.x_pixels)):
            store(a, y + p * blocks + o, multiply_add(load(a, x + p * blocks + o), scale, shift))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def normalize(a, op, theta, B):  # type: ignore[no-untyped-def]
    """γ(x - m)/√(v + ε) + β, m and v over a minibatch or over a group's channels of an image."""
    C, (spans, rows, group) = op.x_channels, _spans(op, B)
    _load_scales(a, op, theta)
    blocks, count, own = uint64(C // LANES), uint64(rows), uint64(op.own // LANES)
    for span in range(spans):
        x, y = uint64((op.x + span * rows * C) // LANES), uint64((op.y + span * rows * C) // LANES)
        statistics = op.statistics + 2 * span * C
        at = uint64(statistics // LANES)
        for o in range(blocks):
            store(a, at + o, _sum_of_rows(a, x + o, blocks, count))
        _average_groups(a, statistics, op.inputs, group, rows)
        for o in range(blocks):
            store(a, at + blocks + o, _sum_of_squares(a, x + o, blocks, count, load(a, at + o)))
        _average_groups(a, statistics + C, op.inputs, group, rows)
        for c in range(statistics + C, statistics + C + op.inputs):
            a[c] = 1 / np.sqrt(a[c] + a.dtype.type(op.epsilon))
        for o in range(blocks):
            mean, shift = load(a, at + o), load(a, own + blocks + o)
            scale = multiply(load(a, own + o), load(a, at + blocks + o))
            for p in range(count):
                apart = subtract(load(a, x + p * blocks + o), mean)
                store(a, y + p * blocks + o, multiply_add(apart, scale, shift))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def normalize_back(a, op, theta, out, B):  # type: ignore[no-untyped-def]
    """∂x = s (γg - ⟨γg⟩ - (x - m) s² ⟨γg(x - m)⟩), s = 1/√(v + ε), ⟨⟩ the mean over what was normalised together."""
    C, (spans, rows, group) = op.x_channels, _spans(op, B)
    _load_scales(a, op, theta)
    blocks, count, own = uint64(C // LANES), uint64(rows), uint64(op.own // LANES)
    level, tilt = op.own + 2 * C, op.own + 3 * C
    for span in range(spans):
        x, slope = uint64((op.x + span * rows * C) // LANES), uint64((op.y_gradient + span * rows * C) // LANES)
        to = uint64((op.x_gradient + span * rows * C) // LANES)
        at = uint64((op.statistics + 2 * span * C) // LANES)
        for o in range(blocks):
            along, more, mean, pairs = zero(a), zero(a), load(a, at + o), count // uint64(2) * uint64(2)
            for p in range(uint64(0), pairs, uint64(2)):
                row, next_ = p * blocks + o, (p + uint64(1)) * blocks + o
                along = multiply_add(load(a, slope + row), subtract(load(a, x + row), mean), along)
                more = multiply_add(load(a, slope + next_), subtract(load(a, x + next_), mean), more)
            for p in range(pairs, count):
                row = p * blocks + o
                along = multiply_add(load(a, slope + row), subtract(load(a, x + row), mean), along)
            store(a, own + uint64(2) * blocks + o, _sum_of_rows(a, slope + o, blocks, count))
            store(a, own + uint64(3) * blocks + o, add(along, more))
        for c in range(op.inputs):
            scale = a[op.statistics + (2 * span + 1) * C + c]
            out[op.weight + c] += a[tilt + c] * scale
            out[op.bias + c] += a[level + c]
            a[level + c] *= a[op.own + c]
            a[tilt + c] *= a[op.own + c] * scale * scale
        _average_groups(a, level, op.inputs, group, rows)
        _average_groups(a, tilt, op.inputs, group, rows)
        for o in range(blocks):
            mean, scale, factor = load(a, at + o), load(a, at + blocks + o), load(a, own + o)
            lower, turn = load(a, own + uint64(2) * blocks + o), load(a, own + uint64(3) * blocks + o)
            for p in range(count):
                apart = subtract(load(a, x + p * blocks + o), mean)
                rest = subtract(multiply(factor, load(a, slope + p * blocks + o)), lower)
                rest = multiply(scale, subtract(rest, multiply(apart, turn)))
                if op.x_again:
                    rest = add(rest, load(a, to + p * blocks + o))
                store(a, to + p * blocks + o, rest)
