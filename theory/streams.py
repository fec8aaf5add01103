"""Named independent random streams under one root seed, from numpy's counter-based Philox generator."""

from __future__ import annotations

import hashlib

import numpy as np


def named_generator(seed: int, *names: str | int, block: int = 0) -> np.random.Generator:
    """A generator that depends on (seed, names, block) alone; no global generator is read or written.

    Different names give independent streams; different blocks give disjoint parts of one stream.
    """
    return np.random.Generator(np.random.Philox(key=stream_key(seed, *names), counter=[0, 0, block, 0]))


def stream_key(seed: int, *names: str | int) -> np.ndarray:
    """The Philox key of a named stream, two uint64."""
    digest = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return np.frombuffer(digest[:16], dtype=np.uint64)


def seed_of(*names: str | int) -> int:
    """A 128-bit seed fixed by names, e.g. of a check: the hash of what it is called, never chosen."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:16], "big")
