"""The counter-based normals: published vectors, the textbook formula, the law, and independence of how they are cut."""

import math

import numpy as np
import pytest
from scipy import stats

from theory.normals import BLOCK, LANES, fill_row, fill_rows, normals_key, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)  # fmt: skip
def test_bits_are_those_of_the_published_test_vectors(counter, key, expected):
    def join(low, high):
        return np.uint64(low | high << 32)

    one, two = np.empty(LANES, np.uint64), np.empty(LANES, np.uint64)
    philox(join(*key), join(*counter[2:]), join(*counter[:2]), one, two)
    words = [int(one[0]) & 0xFFFFFFFF, int(one[0]) >> 32, int(two[0]) & 0xFFFFFFFF, int(two[0]) >> 32]
    assert " ".join(f"{word:08x}" for word in words) == expected


def literal(key, step, numbers):
    """The textbook Box-Muller transform of the same bits, number by number."""
    found = []
    for block in range(-(-numbers // BLOCK)):
        bits = np.empty((2, LANES), np.uint64)
        philox(key, np.uint64(step), np.uint64(block * LANES), bits[0], bits[1])
        for half in bits:
            radius, angle = [], []
            for word in map(int, half):
                radius.append(math.sqrt(-2 * math.log(((word >> 24) + 0.5) / 2**40)))
                small = ((word & 0x3FFFFF) - 2**21 + 0.5) * math.pi / 2 / 2**22
                cosine, sine = math.cos(small), math.sin(small)
                quadrant = word >> 22 & 3
                cosine = -cosine if quadrant >= 2 else cosine
                angle.append((sine, cosine) if quadrant % 2 else (cosine, sine))
            found += [r * a[0] for r, a in zip(radius, angle, strict=True)]
            found += [r * a[1] for r, a in zip(radius, angle, strict=True)]
    return np.array(found[:numbers])


def test_normals_are_the_box_muller_transform_of_the_bits():
    key, drawn = normals_key(3, "literal"), np.empty(5000)
    fill_row(key, 17, 0, drawn)
    assert np.abs(drawn - literal(key, 17, 5000)).max() < 4e-15


def test_any_part_of_any_row_is_the_same_numbers():
    key, rows = normals_key(1, "parts"), np.empty((5, 9000))
    fill_rows(key, 2**33, rows)
    for step, first, count in [(0, 0, 1), (1, 255, 2), (4, 133, 1000), (3, 8999, 1), (2, 4096, 4904)]:
        part = np.empty(count)
        fill_row(key, 2**33 + step, first, part)
        assert np.array_equal(part, rows[step, first : first + count])


def test_law_and_independence():
    rows = np.empty((64, 1 << 15))
    fill_rows(normals_key(5, "law"), 0, rows)
    flat, count = rows.ravel(), rows.size
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((flat**power).mean() - moment) < 4 * math.sqrt(variance / count)
    beyond = (np.abs(flat) > 4).sum()
    assert abs(beyond - count * 2 * stats.norm.sf(4)) < 4 * math.sqrt(count * 2 * stats.norm.sf(4))
    # Numbers LANES apart share a radius, those 2·LANES apart a counter; products and squares are uncorrelated.
    for lag in (1, LANES, 2 * LANES, 3 * LANES, BLOCK, 1 << 15):
        first, second = flat[:-lag], flat[lag:]
        assert abs((first * second).mean()) < 4 / math.sqrt(len(first))
        assert abs(((first**2 - 1) * (second**2 - 1)).mean()) < 4 * 2 / math.sqrt(len(first))
    other = np.empty_like(rows)
    fill_rows(normals_key(5, "other"), 0, other)
    assert abs((rows * other).mean()) < 4 / math.sqrt(count)
