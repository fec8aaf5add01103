"""Gradients of many convolutional networks as one compiled loop (CPU, float32 or float64).

A network's minibatch goes forward and back before the next one's turn, in buffers that stay in cache. Its numbers are
the same to the bit however many run beside it and on any number of threads. Operations are those of
:mod:`nets.convolutional_plan`; eight channels are one value, and a convolution sums for eight images at once.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange, uint64

from nets.convolutional_plan import ACTIVATION, CONVOLUTION, NORM, RELU, SUM, TANH
from theory.lanes import (
    LANES,
    add,
    add_outer,
    fill_tile,
    load,
    load_tile,
    multiply,
    multiply_add,
    spread_from,
    store,
    store_tile,
    subtract,
    where_positive,
    zero,
)  # fmt: skip

SQUARED, CROSS_ENTROPY = range(2)
_LANES, _ONE = uint64(LANES), uint64(1)
_COMPILED = {"cache": True, "boundscheck": False, "error_model": "numpy"}
_ZERO, _SHIFTED, _AGAIN = range(3)  # what a sum begins with: nothing, the bias, what is there


@njit(parallel=True, **_COMPILED)  # type: ignore[untyped-decorator]
def gradients(theta, X, targets, weights, slopes, plan, size, loss, threads, out, losses):  # type: ignore[no-untyped-def]
    """∂/∂θ of Σ_i w_i ℓ_i + ⟨s_i, h_i⟩ of every network, and ℓ.

    Args:
        theta: shape (R, p).
        X: shape (R or 1, B, pixels, channels).
        targets: shape (R or 1, B, outputs).
        weights, slopes: w, shape (R, B), and s, shape (R, B, outputs); s may have length 0.
        plan: operations, starts, products.
        out, losses: shapes (R, p), zeros, and (R, B).
    """
    operations, starts, products = plan
    R, B = losses.shape
    for thread in prange(threads):
        a = np.zeros(size, theta.dtype)
        for r in range(thread, R, threads):
            _forward(a, theta[r], X[min(r, len(X) - 1)], operations, starts, products)
            last = operations[-1]
            given = slopes[r] if len(slopes) else np.zeros((B, last.outputs), theta.dtype)
            target = targets[min(r, len(targets) - 1)]
            _slopes(a, last, target, weights[r], given, loss, losses[r])
            for i in range(len(operations) - 1, -1, -1):
                _back(a, operations[i], theta[r], out[r], starts, products, B)


@njit(parallel=True, **_COMPILED)  # type: ignore[untyped-decorator]
def outputs(theta, X, plan, size, threads, out):  # type: ignore[no-untyped-def]
    """What every network puts out, shape (R, B, outputs); arguments as for :func:`gradients`."""
    operations, starts, products = plan
    R, B, classes = out.shape
    for thread in prange(threads):
        a = np.zeros(size, theta.dtype)
        for r in range(thread, R, threads):
            _forward(a, theta[r], X[min(r, len(X) - 1)], operations, starts, products)
            last = operations[-1]
            for b in range(B):
                first = last.y + b * last.y_channels
                out[r, b] = a[first : first + classes]


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _forward(a, theta, X, operations, starts, products):  # type: ignore[no-untyped-def]
    B, padded = len(X), -(-len(X) // LANES) * LANES
    a[: X.size] = X.reshape(-1)
    for i in range(len(operations)):
        op = operations[i]
        n = B * op.y_pixels * op.y_channels
        if op.kind == CONVOLUTION:
            _pack(a, op, theta)
            bias = op.own + 3 * _packed(op)
            _sum_taps(
                a, uint64(op.x), uint64(op.x_pixels * op.x_channels), uint64(op.x_channels), uint64(op.own),
                uint64(op.taps), uint64(bias), uint64(op.y), uint64(op.y_pixels), uint64(op.y_channels // LANES),
                starts, products, uint64(op.forward), uint64(padded), _SHIFTED,
            )  # fmt: skip
        elif op.kind == NORM:
            _normalize(a, op, theta, B)
        elif op.kind == ACTIVATION:
            _activate(a[op.x : op.x + n], a[op.y : op.y + n], op.function)
        elif op.kind == SUM:
            y, x, z = a[op.y : op.y + n], a[op.x : op.x + n], a[op.z : op.z + n]
            for j in range(n):
                y[j] = x[j] + z[j]
        else:
            _average(a, op, B)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _back(a, op, theta, out, starts, products, B):  # type: ignore[no-untyped-def]
    """From the gradient in y to those in x, z and θ."""
    n = B * op.y_pixels * op.y_channels
    if op.kind == CONVOLUTION:
        _convolution_back(a, op, theta, out, starts, products, B)
    elif op.kind == NORM:
        _normalize_back(a, op, theta, out, B)
    elif op.kind == ACTIVATION:
        y, slope = a[op.y : op.y + n], a[op.y_gradient : op.y_gradient + n]
        _activate_back(y, slope, a[op.x_gradient : op.x_gradient + n], op.function, op.x_again)
    elif op.kind == SUM:
        slope = a[op.y_gradient : op.y_gradient + n]
        _pass_on(slope, a[op.z_gradient : op.z_gradient + n], op.z_again)
        if op.x_gradient != op.y_gradient:
            _pass_on(slope, a[op.x_gradient : op.x_gradient + n], op.x_again)
    else:
        _average_back(a, op, B)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _slopes(a, last, target, weights, given, loss, losses):  # type: ignore[no-untyped-def]
    """The loss of every sample, and the gradient in the outputs."""
    classes = target.shape[1]
    for b in range(len(target)):
        h = a[last.y + b * last.y_channels : last.y + b * last.y_channels + classes]
        slope = a[last.y_gradient + b * last.y_channels : last.y_gradient + (b + 1) * last.y_channels]
        slope[classes:] = 0
        if loss == SQUARED:
            losses[b] = 0
            for c in range(classes):
                r = h[c] - target[b, c]
                losses[b] += r * r / 2
                slope[c] = weights[b] * r + given[b, c]
        else:
            top = h.max()
            norm = np.log(np.exp(h - top).sum()) + top
            share = target[b].sum()
            losses[b] = 0
            for c in range(classes):
                losses[b] -= target[b, c] * (h[c] - norm)
                slope[c] = weights[b] * (share * np.exp(h[c] - norm) - target[b, c]) + given[b, c]


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _packed(op):  # type: ignore[no-untyped-def]
    return op.taps * max(op.x_channels, LANES) * op.y_channels


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _pack(a, op, theta):  # type: ignore[no-untyped-def]
    """The kernel by eight outputs, (blocks, taps, inputs, 8), its transpose (…, taps, outputs, 8), and the bias."""
    K, C, O = uint64(op.taps), uint64(op.x_channels), uint64(op.y_channels)  # noqa: E741
    here, there, bias = uint64(op.own), uint64(op.own + _packed(op)), uint64(op.own + 3 * _packed(op))
    inputs, outputs, weight, zeros = uint64(op.inputs), uint64(op.outputs), uint64(op.weight), theta.dtype.type(0)
    if inputs < C or outputs < O:
        a[here:bias] = 0
    for o in range(outputs):
        for c in range(inputs):
            place = weight + (o * inputs + c) * K
            at = here + ((o // _LANES * K) * C + c) * _LANES + o % _LANES
            for k in range(K):
                a[at + k * C * _LANES] = theta[place + k]
    if op.x_gradient >= 0:
        for c in range(inputs):
            for o in range(outputs):
                place = weight + (o * inputs + c) * K
                at = there + ((c // _LANES * K) * O + o) * _LANES + c % _LANES
                for k in range(K):
                    a[at + k * O * _LANES] = theta[place + k]
    for o in range(O):
        a[bias + o] = theta[uint64(op.bias) + o] if op.bias >= 0 and o < outputs else zeros


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _sum_taps(  # type: ignore[no-untyped-def]
    a, source, image, C, weight, K, bias, out, pixels, blocks, starts, products, table, images, begin
):
    """Sums over taps and channels for all images, eight of them and eight output channels at a time."""
    whole = C // _LANES * _LANES
    for first in range(uint64(0), images, _LANES):
        for o in range(blocks):
            kernel = weight // _LANES + o * K * C
            for p in range(pixels):
                to = out // _LANES + (first * pixels + p) * blocks + o
                if begin == _AGAIN:
                    total = load_tile(a, to, pixels * blocks)
                else:
                    total = fill_tile(load(a, bias // _LANES + o) if begin == _SHIFTED else zero(a))
                for j in range(starts[table + p], starts[table + p + _ONE]):
                    row, place = kernel + products[j, 0], source + first * image + products[j, 1]
                    for c in range(uint64(0), whole, _LANES):
                        for i in range(_LANES):  # unrolled
                            total = add_outer(total, load(a, row + c + i), a, place + c + i, image)
                    for c in range(whole, C):
                        total = add_outer(total, load(a, row + c), a, place + c, image)
                store_tile(a, to, pixels * blocks, total)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _convolution_back(a, op, theta, out, starts, products, B):  # type: ignore[no-untyped-def]
    K, C, blocks, padded = op.taps, op.x_channels, op.y_channels // LANES, -(-B // LANES) * LANES
    sums = op.own + 2 * _packed(op)
    _sum_pixels(
        a, uint64(op.x), uint64(op.x_pixels * C), uint64(C), uint64(op.y_gradient), uint64(op.y_pixels),
        uint64(blocks), uint64(sums), uint64(K), starts, products, uint64(op.by_tap), uint64(B),
    )  # fmt: skip
    for o in range(op.outputs):
        first = sums + o // LANES * K * C * LANES + o % LANES
        for c in range(op.inputs):
            place = op.weight + (o * op.inputs + c) * K
            for k in range(K):
                out[place + k] = a[first + (k * C + c) * LANES]
    if op.bias >= 0:
        for o in range(uint64(blocks)):
            row, total = uint64(op.y_gradient // LANES) + o, zero(a)
            for p in range(uint64(B * op.y_pixels)):
                total = add(total, load(a, row + p * uint64(blocks)))
            store(a, uint64(sums // LANES) + o, total)
        out[op.bias : op.bias + op.outputs] = a[sums : sums + op.outputs]
    if op.x_gradient >= 0:
        _sum_taps(
            a, uint64(op.y_gradient), uint64(op.y_pixels * op.y_channels), uint64(op.y_channels),
            uint64(op.own + _packed(op)), uint64(K), uint64(0), uint64(op.x_gradient), uint64(op.x_pixels),
            uint64(C // LANES), starts, products, uint64(op.backward), uint64(padded),
            _AGAIN if op.x_again else _ZERO,
        )  # fmt: skip


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _sum_pixels(  # type: ignore[no-untyped-def]
    a, source, image, C, slope, pixels, blocks, out, K, starts, products, table, B
):
    """Sums over images and pixels for every tap, eight input by eight output channels at a time."""
    whole = C // _LANES * _LANES
    for k in range(K):
        begin, end = starts[table + k], starts[table + k + _ONE]
        for o in range(blocks):
            to = out // _LANES + (o * K + k) * C
            for c in range(uint64(0), whole, _LANES):
                total = fill_tile(zero(a))
                for b in range(B):
                    row, place = slope // _LANES + b * pixels * blocks + o, source + b * image + c
                    for j in range(begin, end):
                        total = add_outer(total, load(a, row + products[j, 0]), a, place + products[j, 1], _ONE)
                store_tile(a, to + c, _ONE, total)
            for c in range(whole, C):
                value = zero(a)
                for b in range(B):
                    row, place = slope // _LANES + b * pixels * blocks + o, source + b * image + c
                    for j in range(begin, end):
                        factor = spread_from(a, place + products[j, 1])
                        value = multiply_add(load(a, row + products[j, 0]), factor, value)
                store(a, to + c, value)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _spans(op, B):  # type: ignore[no-untyped-def]
    """How many sets of rows are normalised by themselves, rows in each, channels in a group."""
    if op.group:
        return B, op.x_pixels, op.group
    return 1, B * op.x_pixels, 1


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _average_groups(sums, group, rows):  # type: ignore[no-untyped-def]
    """Each channel's sum ↦ the mean over its group's channels and ``rows``."""
    if group == 1:
        sums /= sums.dtype.type(rows)
    else:
        for first in range(0, len(sums) // group * group, group):
            sums[first : first + group] = sums[first : first + group].sum() / sums.dtype.type(rows * group)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _load_scales(a, op, theta):  # type: ignore[no-untyped-def]
    C = op.x_channels
    a[op.own : op.own + 2 * C] = 0
    a[op.own : op.own + op.inputs] = theta[op.weight : op.weight + op.inputs]
    a[op.own + C : op.own + C + op.inputs] = theta[op.bias : op.bias + op.inputs]


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _normalize(a, op, theta, B):  # type: ignore[no-untyped-def]
    """γ(x - m)/√(v + ε) + β, m and v over a minibatch or over a group's channels of an image."""
    C, (spans, rows, group) = op.x_channels, _spans(op, B)
    _load_scales(a, op, theta)
    blocks, count, own = uint64(C // LANES), uint64(rows), uint64(op.own // LANES)
    for span in range(spans):
        x, y = uint64((op.x + span * rows * C) // LANES), uint64((op.y + span * rows * C) // LANES)
        statistics = op.statistics + 2 * span * C
        at = uint64(statistics // LANES)
        for o in range(blocks):
            total = zero(a)
            for p in range(count):
                total = add(total, load(a, x + p * blocks + o))
            store(a, at + o, total)
        _average_groups(a[statistics : statistics + op.inputs], group, rows)
        for o in range(blocks):
            mean, total = load(a, at + o), zero(a)
            for p in range(count):
                apart = subtract(load(a, x + p * blocks + o), mean)
                total = multiply_add(apart, apart, total)
            store(a, at + blocks + o, total)
        variance = a[statistics + C : statistics + C + op.inputs]
        _average_groups(variance, group, rows)
        for c in range(op.inputs):
            variance[c] = 1 / np.sqrt(variance[c] + a.dtype.type(op.epsilon))
        for o in range(blocks):
            mean, shift = load(a, at + o), load(a, own + blocks + o)
            scale = multiply(load(a, own + o), load(a, at + blocks + o))
            for p in range(count):
                apart = subtract(load(a, x + p * blocks + o), mean)
                store(a, y + p * blocks + o, multiply_add(apart, scale, shift))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _normalize_back(a, op, theta, out, B):  # type: ignore[no-untyped-def]
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
            total, along, mean = zero(a), zero(a), load(a, at + o)
            for p in range(count):
                g = load(a, slope + p * blocks + o)
                total = add(total, g)
                along = multiply_add(g, subtract(load(a, x + p * blocks + o), mean), along)
            store(a, own + uint64(2) * blocks + o, total)
            store(a, own + uint64(3) * blocks + o, along)
        for c in range(op.inputs):
            scale = a[op.statistics + (2 * span + 1) * C + c]
            out[op.weight + c] += a[tilt + c] * scale
            out[op.bias + c] += a[level + c]
            a[level + c] *= a[op.own + c]
            a[tilt + c] *= a[op.own + c] * scale * scale
        _average_groups(a[level : level + op.inputs], group, rows)
        _average_groups(a[tilt : tilt + op.inputs], group, rows)
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


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _activate(x, y, function):  # type: ignore[no-untyped-def]
    one, half = x.dtype.type(1), x.dtype.type(0.5)
    if function == RELU:
        for j in range(len(x)):
            y[j] = x.dtype.type(0) if x[j] < 0 else x[j]
    elif function == TANH:
        for j in range(len(x)):
            y[j] = _tanh(x[j], one)
    else:
        for j in range(len(x)):
            y[j] = half + half * _tanh(half * x[j], one)


@njit(inline="always", **_COMPILED)  # type: ignore[untyped-decorator]
def _tanh(x, one):  # type: ignore[no-untyped-def]
    """tanh x to rounding without a branch: ten levels of Lambert's fraction at x/16, doubled four times."""
    z = min(max(x, -20 * one), 20 * one) * (one / 16)
    square, fraction = z * z, 21 * one
    for level in range(10):
        fraction = (19 - 2 * level) * one + square / fraction
    t = z / fraction
    for _ in range(4):
        t = 2 * t / (one + t * t)
    return t if x == x else x


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _activate_back(y, slope, out, function, again):  # type: ignore[no-untyped-def]
    if again:
        part = np.empty_like(out)
        _times_slope(y, slope, part, function)
        out += part
    else:
        _times_slope(y, slope, out, function)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _times_slope(y, slope, out, function):  # type: ignore[no-untyped-def]
    """σ' is a function of σ."""
    one = y.dtype.type(1)
    if function == RELU:
        for row in range(uint64(len(y) // LANES)):
            store(out, row, where_positive(load(y, row), load(slope, row)))
    elif function == TANH:
        for j in range(len(y)):
            out[j] = slope[j] * (one - y[j] * y[j])
    else:
        for j in range(len(y)):
            out[j] = slope[j] * y[j] * (one - y[j])


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _pass_on(slope, out, again):  # type: ignore[no-untyped-def]
    if again:
        out += slope
    else:
        out[:] = slope


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _average(a, op, B):  # type: ignore[no-untyped-def]
    C = op.x_channels
    for b in range(B):
        y = a[op.y + b * C : op.y + (b + 1) * C]
        y[:] = 0
        for p in range(op.x_pixels):
            first = op.x + (b * op.x_pixels + p) * C
            y += a[first : first + C]
        y /= a.dtype.type(op.x_pixels)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _average_back(a, op, B):  # type: ignore[no-untyped-def]
    C, part = op.x_channels, 1 / a.dtype.type(op.x_pixels)
    for b in range(B):
        slope = a[op.y_gradient + b * C : op.y_gradient + (b + 1) * C]
        for p in range(op.x_pixels):
            first = op.x_gradient + (b * op.x_pixels + p) * C
            for c in range(C):
                g = slope[c] * part
                a[first + c] = a[first + c] + g if op.x_again else g
