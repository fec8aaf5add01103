"""Sums and means over pixels, eight numbers to an instruction, in buffers of :mod:`nets.convolutional_plan`."""

from __future__ import annotations

from numba import njit, uint64

from theory.lanes import LANES, add, divide, load, spread, store, zero

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
