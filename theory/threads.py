"""Compiled loops on several threads of Python, in place of numba's own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba


def share(loop: Callable[..., None], arguments: tuple[Any, ...], most: int) -> None:
    """``loop(*arguments, t, T)`` for t < T, each in a thread: it does items t, t + T, … and holds no lock (``nogil``).

    T is the number of threads that numba may use, and at most ``most``.
    """
    threads = max(1, min(numba.get_num_threads(), most))
    if threads == 1:
        loop(*arguments, 0, 1)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(loop, *arguments, t, threads) for t in range(threads)]:
            done.result()
