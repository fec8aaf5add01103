"""Convolutions, with many images and channels to an instruction, in buffers of :mod:`nets.convolutional_plan`."""

from __future__ import annotations

from numba import njit, uint64

from theory.lanes import (
    LANES,
    add,
    add_outer,
    fill_tile,
    load,
    load_tile,
    multiply_add,
    spread_from,
    store,
    store_tile,
    zero,
)

_LANES, _ONE = uint64(LANES), uint64(1)
_ZERO, _SHIFTED, _AGAIN = range(3)  # what a sum begins with: nothing, the bias, what is there
_COMPILED = {"cache": True, "boundscheck": False, "error_model": "numpy"}


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _packed(op):  # type: ignore[no-untyped-def]
    return op.taps * max(op.x_channels, LANES) * op.y_channels


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def convolve(a, op, theta, starts, products, B):  # type: ignore[no-untyped-def]
    """y from x; rest of a last eight images are whatever the buffers hold, and touch no other image."""
    _pack(a, op, theta)
    _sum_taps(
        a, uint64(op.x), uint64(op.x_pixels * op.x_channels), uint64(op.x_channels), uint64(op.own), uint64(op.taps),
        uint64(op.own + 3 * _packed(op)), uint64(op.y), uint64(op.y_pixels), uint64(op.y_channels // LANES), starts,
        products, uint64(op.forward), uint64(-(-B // LANES) * LANES), _SHIFTED,
    )  # fmt: skip


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _pack(a, op, theta):  # type: ignore[no-untyped-def]
    """The kernel by eight outputs, (blocks, taps, inputs, 8), its transpose (…, taps, outputs, 8), and the bias."""
    K, C, O = uint64(op.taps), uint64(op.x_channels), uint64(op.y_channels)  # noqa: E741
    here, there, bias = uint64(op.own), uint64(op.own + _packed(op)), uint64(op.own + 3 * _packed(op))
    inputs, outputs, weight, zeros = uint64(op.inputs), uint64(op.outputs), uint64(op.weight), theta.dtype.type(0)
    if inputs < C or outputs < O:
        for j in range(here, bias):
            a[j] = zeros
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
def convolve_back(a, op, out, starts, products, B):  # type: ignore[no-untyped-def]
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
        for c in range(op.outputs):
            out[op.bias + c] = a[sums + c]
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
