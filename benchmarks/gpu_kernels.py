"""Kernels that measure a GPU's ceilings. Import it only where there is Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = tl.constexpr(1024)


@triton.jit(do_not_specialize=["times"])
def _multiply_adds(values, times):
    """``times`` dependent multiply-adds of each value; a thread holds eight that are independent."""
    at = values + tl.program_id(0) * _BLOCK + tl.arange(0, _BLOCK)
    x = tl.load(at)
    y = x * 1e-9
    for _ in range(0, times):
        x = x * x + y
    tl.store(at, x)


def multiply_adds(values: Tensor, times: int) -> None:
    """``times`` multiply-adds of each of the float64 values, whose number is a multiple of 1024, in registers."""
    _multiply_adds[(values.numel() // _BLOCK.value,)](values, times, num_warps=4, enable_fp_fusion=True)
