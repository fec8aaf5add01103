"""Values of eight numbers in compiled loops: each operation lane by lane is that of numpy."""

import numpy as np
from numba import njit

from theory.lanes import LANES, load, multiply, multiply_add, spread, store, where_positive


@njit
def operations(a, b, number, out):
    """Every operation once, a row of ``out`` each."""
    store(out, 0, multiply(load(a, 1), load(b, 2)))
    store(out, 1, multiply_add(load(a, 0), load(b, 0), load(b, 1)))
    store(out, 2, spread(number))
    store(out, 3, where_positive(load(a, 2), load(b, 2)))
    total = spread(0.0)
    for row in range(len(a)):
        total = multiply_add(load(a, row), load(b, row), total)
    store(out, 4, total)


def test_operations_are_those_of_numpy_in_every_lane():
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 3, LANES))
    a[2, :3] = 0.0, np.nan, np.inf
    out = np.full((6, LANES), 7.0)
    operations(a, b, 0.3, out)
    np.testing.assert_array_equal(out[0], a[1] * b[2])
    np.testing.assert_allclose(out[1], a[0] * b[0] + b[1], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(out[2], np.full(LANES, 0.3))
    np.testing.assert_array_equal(out[3], np.where(a[2] > 0, b[2], 0.0))  # NaN is not positive
    np.testing.assert_allclose(out[4], (a * b).sum(0), rtol=0, atol=1e-14)
    np.testing.assert_array_equal(out[5], np.full(LANES, 7.0))  # a neighbour stays as it was
