"""Gradients of many fully connected networks as one compiled loop (CPU, float32 or float64).

A network's minibatch goes forward and back before the next one's turn, in buffers that stay in cache: a row of numbers
a sample, padded to eight. Its numbers are the same to the bit however many run beside it and on any number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint64

from nets.compiled_elements import activate, activate_back, loss_slopes
from theory.lanes import (
    LANES,
    add,
    add_outer,
    fill_tile,
    load,
    load_tile,
    load_tile_from,
    store,
    store_tile,
    store_tile_from,
    turn_tile,
    zero,
)

LAYER = np.dtype(
    [(name, np.int64) for name in (
        "weight", "bias", "inputs", "outputs", "function", "x", "y", "slope", "kernel", "turned", "shift",
    )]
)  # fmt: skip
"""One layer y = σ(Wx + b): places in θ (-1: no bias), sizes, σ (-1: none); places in the buffers of x, y, of the
gradient in y, of W by eight outputs, of W with its rows padded, and of b."""
BLOCK = 128  # samples
_LANES, _ONE = uint64(LANES), uint64(1)
_COMPILED = {"cache": True, "boundscheck": False, "error_model": "numpy"}


def padded(count: int) -> int:
    """The next multiple of eight."""
    return -(-count // LANES) * LANES


_padded = njit(**_COMPILED)(padded)


@njit(nogil=True, **_COMPILED)  # type: ignore[untyped-decorator]
def gradients(  # type: ignore[no-untyped-def]
    theta, X, targets, rows, weights, slopes, layers, size, loss, out, losses, first, step
):
    """∂/∂θ of Σ_i w_i ℓ_i + ⟨s_i, h_i⟩, and ℓ, of networks ``first``, ``first`` + ``step``, …

    Args:
        theta: shape (R, p).
        X, targets: of all samples, shapes (n, inputs) and (n, outputs).
        rows: the samples meant, shape (R or 1, B).
        weights, slopes: w, shape (R or 1, B), and s, shape (R, B, outputs), or (1, 0, 0) for zeros.
        layers, size: dtype :data:`LAYER`, and numbers that the buffers hold, of which the last 64 serve as a tile.
        out, losses: shapes (R, p) and (R, B).
    """
    B, outputs = losses.shape[1], targets.shape[1]
    end = layers[len(layers) - 1]
    a, target = np.zeros(size, theta.dtype), np.empty((B, outputs), theta.dtype)
    for r in range(first, len(theta), step):
        chosen, w, s = rows[min(r, len(rows) - 1)], weights[min(r, len(weights) - 1)], slopes[min(r, len(slopes) - 1)]
        _forward(a, theta[r], X, targets, chosen, layers, target)
        loss_slopes(a, (end.y, end.slope, _padded(outputs)), target, w, s, loss, losses[r])
        for i in range(len(layers) - 1, -1, -1):
            layer, below = layers[i], layers[max(i - 1, 0)]
            for o in range(0, layer.outputs, LANES):
                for c in range(0, layer.inputs, LANES):
                    total = add_products(fill_tile(zero(a)), a, layer, layer.slope, layer.x, o, c, 0, B)
                    keep_weights(a, total, layer, out[r], size - LANES * LANES, o, c)
            keep_bias(a, layer, layer.slope, out[r], size - LANES * LANES, B)
            if i > 0:
                turn(a, theta[r], layer, layer.turned)
                pull(a, layer, layer.turned, layer.slope, below.slope, 0, B, False)
                if below.function >= 0:
                    length = B * _padded(layer.inputs)
                    activate_back(a, below.y, below.slope, below.slope, length, below.function, False)


@njit(nogil=True, **_COMPILED)  # type: ignore[untyped-decorator]
def values(theta, X, targets, layers, size, loss, total, first, step):  # type: ignore[no-untyped-def]
    """Σ_i ℓ_i over all samples, shape (R,), a minibatch of at most :data:`BLOCK` after the other."""
    n, outputs, end = len(X), targets.shape[1], layers[len(layers) - 1]
    places, none = (end.y, end.slope, _padded(outputs)), np.empty((0, 0), theta.dtype)
    a, target, everything = np.zeros(size, theta.dtype), np.empty((BLOCK, outputs), theta.dtype), np.arange(n)
    losses, weights = np.empty(BLOCK, theta.dtype), np.ones(BLOCK, theta.dtype)
    for r in range(first, len(theta), step):
        total[r] = 0
        for begin in range(0, n, BLOCK):
            chosen = everything[begin : begin + BLOCK]
            B = len(chosen)
            _forward(a, theta[r], X, targets, chosen, layers, target)
            loss_slopes(a, places, target[:B], weights, none, loss, losses)
            total[r] += losses[:B].sum()


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _forward(a, theta, X, targets, chosen, layers, target):  # type: ignore[no-untyped-def]
    """What every layer puts out, and targets, of the samples chosen."""
    B, inputs = len(chosen), uint64(X.shape[1])
    wide, outputs = uint64(_padded(X.shape[1])), uint64(targets.shape[1])
    for b in range(uint64(B)):
        i = uint64(chosen[b])
        for c in range(inputs):
            a[b * wide + c] = X[i, c]
        for c in range(outputs):
            target[b, c] = targets[i, c]
    for i in range(len(layers)):
        layer = layers[i]
        pack(a, theta, layer, layer.kernel, layer.shift)
        push(a, layer, layer.kernel, layer.shift, layer.x, layer.y, 0, B, False)
        if layer.function >= 0:
            activate(a, layer.y, layer.y, B * _padded(layer.outputs), layer.function)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def pack(a, theta, layer, kernel, shift):  # type: ignore[no-untyped-def]
    """W by eight outputs, (blocks, inputs, 8), and b; what lies beyond the outputs stays as it is."""
    inputs, outputs, weight, kernel = (
        uint64(layer.inputs), uint64(layer.outputs), uint64(layer.weight), uint64(kernel),
    )  # fmt: skip
    for o in range(uint64(0), outputs, _LANES):
        whole = inputs // _LANES * _LANES if o + _LANES <= outputs else uint64(0)
        row, place = (kernel + o * inputs) // _LANES, weight + o * inputs
        for c in range(uint64(0), whole, _LANES):
            store_tile(a, row + c, _ONE, turn_tile(load_tile_from(theta, place + c, inputs)))
        for c in range(whole, inputs):
            for i in range(min(_LANES, outputs - o)):
                a[(row + c) * _LANES + i] = theta[place + c + i * inputs]
    if layer.bias >= 0:
        for o in range(outputs):
            a[uint64(shift) + o] = theta[uint64(layer.bias) + o]


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def turn(a, theta, layer, turned):  # type: ignore[no-untyped-def]
    """W with its rows padded to eight."""
    inputs, weight, turned, wide = uint64(layer.inputs), uint64(layer.weight), uint64(turned), _padded(layer.inputs)
    for o in range(uint64(layer.outputs)):
        for c in range(inputs):
            a[turned + o * uint64(wide) + c] = theta[weight + o * inputs + c]


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def push(a, layer, kernel, shift, x, y, first, end, again):  # type: ignore[no-untyped-def]
    """y = Wx + b, or y += Wx, of samples ``first`` … ``end``, eight samples and eight outputs at a time.

    What lies beyond either touches nothing else.
    """
    inputs, wide, blocks = uint64(layer.inputs), uint64(_padded(layer.inputs)), uint64(_padded(layer.outputs) // LANES)
    x, y, kernel, shift = uint64(x), uint64(y // LANES), uint64(kernel // LANES), uint64(shift // LANES)
    for b in range(uint64(first), uint64(end), _LANES):
        for o in range(blocks):
            row, to = kernel + o * inputs, y + b * blocks + o
            total = load_tile(a, to, blocks) if again else fill_tile(load(a, shift + o))
            for c in range(inputs):
                total = add_outer(total, load(a, row + c), a, x + b * wide + c, wide)
            store_tile(a, to, blocks, total)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def pull(a, layer, turned, slope, to, first, end, again):  # type: ignore[no-untyped-def]
    """Wᵀδ, or that added to what is there, of samples ``first`` … ``end``."""
    outputs, tall, blocks = (
        uint64(layer.outputs),
        uint64(_padded(layer.outputs)),
        uint64(_padded(layer.inputs) // LANES),
    )
    slope, to, turned = uint64(slope), uint64(to // LANES), uint64(turned // LANES)
    for b in range(uint64(first), uint64(end), _LANES):
        for c in range(blocks):
            place = to + b * blocks + c
            total = load_tile(a, place, blocks) if again else fill_tile(zero(a))
            for o in range(outputs):
                total = add_outer(total, load(a, turned + o * blocks + c), a, slope + b * tall + o, tall)
            store_tile(a, place, blocks, total)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def add_products(total, a, layer, slope, x, o, c, first, end):  # type: ignore[no-untyped-def]
    """The tile with Σ_b δ_b x_bᵀ added, of eight outputs from o and eight inputs from c."""
    tall, blocks = uint64(_padded(layer.outputs)), uint64(_padded(layer.inputs) // LANES)
    row, place = uint64((x + c) // LANES), uint64(slope + o)
    for b in range(uint64(first), uint64(end)):
        total = add_outer(total, load(a, row + b * blocks), a, place + b * tall, _ONE)
    return total


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def keep_weights(a, total, layer, out, tile, o, c):  # type: ignore[no-untyped-def]
    """Such a tile where W lies in ``out``."""
    inputs, o, c, tile = uint64(layer.inputs), uint64(o), uint64(c), uint64(tile)
    to, tall, wide = uint64(layer.weight) + o * inputs + c, uint64(layer.outputs) - o, inputs - c
    if tall >= _LANES and wide >= _LANES:
        store_tile_from(out, to, inputs, total)
    else:
        store_tile(a, tile // _LANES, _ONE, total)
        for i in range(min(_LANES, tall)):
            for j in range(min(_LANES, wide)):
                out[to + i * inputs + j] = a[tile + i * _LANES + j]


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def keep_bias(a, layer, slope, out, tile, B):  # type: ignore[no-untyped-def]
    """Σ_b δ_b where b lies in ``out``."""
    if layer.bias < 0:
        return
    outputs, tall, slope, tile = uint64(layer.outputs), uint64(_padded(layer.outputs)), uint64(slope), uint64(tile)
    for o in range(uint64(0), outputs, _LANES):
        total = zero(a)
        for b in range(uint64(B)):
            total = add(total, load(a, (slope + b * tall + o) // _LANES))
        store(a, tile // _LANES, total)
        for j in range(min(_LANES, outputs - o)):
            out[uint64(layer.bias) + o + j] = a[tile + j]
