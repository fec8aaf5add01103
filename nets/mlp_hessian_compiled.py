"""Hessian products of a small fully connected network as one compiled loop (CPU, float32 or float64).

Both passes are differentiated along a vector, block by block of the samples, which stay in cache meanwhile. What does
not depend on the vector lies in the buffers: the inputs of every layer, the gradients in what layers put out, weights.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint64

from nets.compiled_elements import activate_back, bend
from nets.mlp_compiled import add_products, keep_bias, keep_weights, pack, padded, pull, push, turn
from theory.lanes import LANES, fill_tile, load_tile, store_tile, zero

CURVED = np.dtype(
    [(name, np.int64) for name in (
        "weight", "bias", "inputs", "outputs", "function", "x", "x_along", "slope", "slope_along", "pulled", "kernel",
        "turned", "kernel_along", "turned_along", "shift_along", "sums",
    )]
)  # fmt: skip
"""One layer, as :data:`nets.mlp_compiled.LAYER` has it: places of x, of the gradient in Wx + b and, ``pulled``, in x
itself; of W by eight outputs and with padded rows; ``_along``: how all that changes along the vector; of sums."""
BLOCK = 64  # samples
_ONE = uint64(1)
_COMPILED = {"cache": True, "boundscheck": False, "error_model": "numpy"}
_padded = njit(**_COMPILED)(padded)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def prepare(a, theta, layers):  # type: ignore[no-untyped-def]
    """Weights, where products look for them."""
    for i in range(len(layers)):
        layer = layers[i]
        pack(a, theta, layer, layer.kernel, layer.shift_along)
        turn(a, theta, layer, layer.turned)


@njit(nogil=True, **_COMPILED)  # type: ignore[untyped-decorator]
def product(a, v, layers, n, shares, out):  # type: ignore[no-untyped-def]
    """Σ_i ∇²ℓ_i v, shape (p,), in ``out``.

    Args:
        a, layers: buffers, of which the last 64 numbers serve as a tile, and places in them, dtype :data:`CURVED`.
        shares: softmax of the outputs for cross-entropy, (n, outputs); (0, 0) for the squared loss.
    """
    tile, last = len(a) - LANES * LANES, len(layers) - 1
    for i in range(last + 1):
        pack(a, v, layers[i], layers[i].kernel_along, layers[i].shift_along)
        turn(a, v, layers[i], layers[i].turned_along)
    for first in range(0, n, BLOCK):
        end = min(first + BLOCK, n)
        for i in range(last + 1):
            layer, above = layers[i], layers[min(i + 1, last)]
            y = layer.slope_along if i == last else above.x_along
            push(a, layer, layer.kernel_along, layer.shift_along, layer.x, y, first, end, False)
            if i > 0:
                push(a, layer, layer.kernel, layer.shift_along, layer.x_along, y, first, end, True)
            if layer.function >= 0:
                tall = _padded(layer.outputs)
                at, length = y + first * tall, (end - first) * tall
                activate_back(a, above.x + first * tall, at, at, length, layer.function, False)
        if len(shares) > 0:
            _soften(a, layers[last], shares, first, end)
        for i in range(last, -1, -1):
            layer, below = layers[i], layers[max(i - 1, 0)]
            for o in range(0, layer.outputs, LANES):
                for c in range(0, layer.inputs, LANES):
                    place = uint64((layer.sums + o * _padded(layer.inputs)) // LANES + c)
                    total = fill_tile(zero(a)) if first == 0 else load_tile(a, place, _ONE)
                    total = add_products(total, a, layer, layer.slope_along, layer.x, o, c, first, end)
                    if i > 0:
                        total = add_products(total, a, layer, layer.slope, layer.x_along, o, c, first, end)
                    if end == n:
                        keep_weights(a, total, layer, out, tile, o, c)
                    else:
                        store_tile(a, place, _ONE, total)
            if i > 0:
                wide = _padded(layer.inputs)
                at, length, skip = below.slope_along + first * wide, (end - first) * wide, first * wide
                pull(a, layer, layer.turned, layer.slope_along, below.slope_along, first, end, False)
                pull(a, layer, layer.turned_along, layer.slope, below.slope_along, first, end, True)
                if below.function >= 0:
                    activate_back(a, layer.x + skip, at, at, length, below.function, False)
                    bend(a, layer.x + skip, layer.pulled + skip, layer.x_along + skip, at, length, below.function)
    for i in range(last + 1):
        keep_bias(a, layers[i], layers[i].slope_along, out, tile, n)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _soften(a, layer, shares, first, end):  # type: ignore[no-untyped-def]
    """The softmax's derivative along a change h' of the outputs: s (h' - ⟨s, h'⟩)."""
    outputs, tall = shares.shape[1], _padded(layer.outputs)
    for b in range(first, end):
        mean, row = a.dtype.type(0), layer.slope_along + b * tall
        for c in range(outputs):
            mean += shares[b, c] * a[row + c]
        for c in range(outputs):
            a[row + c] = shares[b, c] * (a[row + c] - mean)
