"""Values of eight numbers in compiled loops, and tiles of eight values: each operation lane by lane is numpy's."""

import numpy as np
import pytest
from numba import njit

from theory.lanes import (
    LANES,
    add,
    add_outer,
    fill_tile,
    is_single,
    load,
    load_tile,
    load_tile_from,
    multiply,
    multiply_add,
    spread,
    spread_from,
    store,
    store_tile,
    store_tile_from,
    subtract,
    turn_tile,
    where_positive,
    zero,
)

PRECISIONS = pytest.mark.parametrize("dtype", [np.float64, np.float32])


@njit
def operations(a, b, number, out):
    """Every operation once, a row of ``out`` each."""
    store(out, 0, multiply(load(a, 1), load(b, 2)))
    store(out, 1, multiply_add(load(a, 0), load(b, 0), load(b, 1)))
    store(out, 2, spread(number))
    store(out, 3, where_positive(load(a, 2), load(b, 2)))
    total = zero(a)
    for row in range(len(a)):
        total = multiply_add(load(a, row), load(b, row), total)
    store(out, 4, total)
    store(out, 5, add(load(a, 0), load(b, 0)))
    store(out, 6, subtract(load(a, 0), load(b, 0)))
    store(out, 7, spread_from(a, 11))


@PRECISIONS
def test_operations_are_those_of_numpy_in_every_lane(dtype):
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 3, LANES)).astype(dtype)
    a[2, :3] = 0.0, np.nan, np.inf
    out, eps = np.full((9, LANES), 7.0, dtype), np.finfo(dtype).eps
    operations(a, b, dtype(0.3), out)
    np.testing.assert_array_equal(out[0], a[1] * b[2])
    np.testing.assert_allclose(out[1], a[0] * b[0] + b[1], rtol=0, atol=5 * eps)
    np.testing.assert_array_equal(out[2], np.full(LANES, 0.3, dtype))
    np.testing.assert_array_equal(out[3], np.where(a[2] > 0, b[2], 0.0))  # NaN is not positive
    np.testing.assert_allclose(out[4], (a * b).sum(0), rtol=0, atol=50 * eps)
    np.testing.assert_array_equal(out[5], a[0] + b[0])
    np.testing.assert_array_equal(out[6], a[0] - b[0])
    np.testing.assert_array_equal(out[7], np.full(LANES, a[1, 3]))
    np.testing.assert_array_equal(out[8], np.full(LANES, 7.0))  # a neighbour stays as it was


@njit
def tiles(a, b, out):
    """Row 1 of b eight times, plus the outer product of every third number of a with row 0, plus rows of out."""
    total = add_outer(fill_tile(load(b, 1)), load(b, 0), a, 2, 3)
    store_tile(out, 1, 2, total)
    store_tile(out, 0, 2, add_outer(load_tile(out, 1, 2), load(b, 0), a, 2, 3))


@PRECISIONS
def test_tiles_are_outer_products(dtype):
    generator = np.random.default_rng(1)
    a, b = generator.standard_normal(40).astype(dtype), generator.standard_normal((2, LANES)).astype(dtype)
    out, eps = np.full((2 * LANES + 1, LANES), 7.0, dtype), np.finfo(dtype).eps
    tiles(a, b, out)
    outer = a[2 : 2 + 3 * LANES : 3, None] * b[0]
    np.testing.assert_allclose(out[1 : 2 * LANES : 2], b[1] + outer, rtol=0, atol=10 * eps)
    np.testing.assert_allclose(out[: 2 * LANES : 2], b[1] + 2 * outer, rtol=0, atol=20 * eps)
    np.testing.assert_array_equal(out[-1], np.full(LANES, 7.0))


@njit
def turned(a, out):
    """Eight numbers each from places 3, 13, … of a, turned, at places 2, 13, … of out."""
    store_tile_from(out, 2, 11, turn_tile(load_tile_from(a, 3, 10)))
    return is_single(a)


@PRECISIONS
def test_tiles_turn_and_lie_anywhere(dtype):
    a, out = np.arange(100, dtype=dtype), np.full(100, -1, dtype)
    single = turned(a, out)
    assert single == (dtype == np.float32)
    expected = np.full(100, -1, dtype)
    for i in range(LANES):
        expected[2 + 11 * i : 2 + 11 * i + LANES] = 3 + i + 10 * np.arange(LANES)
    np.testing.assert_array_equal(out, expected)
