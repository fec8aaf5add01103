"""The quartic well on the GPU: one program takes a block of 256 paths through all steps in registers.

The loop is that of :mod:`simulators.scalar` with the same counters for the noise, so that ensembles of one seed are
equal to rounding. A block's normals come as four quarters of 64, and so do its paths. Import it only where there is
Triton.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from simulators.normals_triton import normal_quarters, signed
from theory.normals import BLOCK

_LANES = tl.constexpr(64)


def well(
    mu: float, zeta: np.ndarray, theta: np.ndarray, step: float, records: np.ndarray, key: np.uint64, split: bool,
    floor: float, device: torch.device,
) -> np.ndarray:  # fmt: skip
    """θ after the numbers of steps ``records``, shape (records, levels, paths), from ``theta`` (levels, paths).

    |θ| stays where it would fall below the floor.
    """
    levels, paths = theta.shape
    start, noise, numbers = (
        torch.from_numpy(np.array(part, order="C")).to(device) for part in (theta, zeta, [step, mu])
    )
    at = torch.from_numpy(records).to(device)
    out = torch.empty(len(records), levels, paths, dtype=torch.float64, device=device)
    blocks = -(-paths // BLOCK)
    with torch.cuda.device_of(out):
        _well[(levels * blocks,)](
            start, noise, numbers, at, out, signed(key), len(records), levels, paths, blocks,
            SPLIT=split, FLOOR=floor, num_warps=2, enable_fp_fusion=True,
        )  # fmt: skip
    return out.cpu().numpy()


@triton.jit  # type: ignore[untyped-decorator]
def _well_step(x, xi, h, drift, kick, SPLIT: tl.constexpr, FLOOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """One step of θ (Euler) or of θ² (split); what would fall below the floor stays."""
    if SPLIT:
        e = tl.exp(drift + kick * xi)
        new = x * e / (1.0 + h * x * (1.0 + e))
        return tl.where(new > FLOOR * FLOOR, new, x)
    new = x * (drift - h * x * x + kick * xi)
    return tl.where(tl.abs(new) > FLOOR, new, x)


@triton.jit  # type: ignore[untyped-decorator]
def _well_start(start, path, paths, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    theta = tl.load(start + path, mask=path < paths, other=1.0)
    return theta * theta if SPLIT else theta


@triton.jit  # type: ignore[untyped-decorator]
def _well_store(out, start, path, paths, x, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    if SPLIT:
        theta = tl.load(start + path, mask=path < paths, other=1.0)
        x = tl.where(theta < 0.0, -tl.sqrt(x), tl.sqrt(x))
    tl.store(out + path, x, mask=path < paths)


@triton.jit(do_not_specialize=["key", "count", "levels", "paths", "blocks"])  # type: ignore[untyped-decorator]
def _well(  # type: ignore[no-untyped-def]
    start, zeta, numbers, records, out, key, count, levels, paths, blocks, SPLIT: tl.constexpr, FLOOR: tl.constexpr
):
    """All steps of one block of paths at one level; ``records`` are the numbers of steps after which to store."""
    item = tl.program_id(0).to(tl.int64)
    level, lane = item // blocks, tl.arange(0, _LANES).to(tl.int64)
    path = item % blocks * (4 * _LANES) + lane
    h, mu, noise = tl.load(numbers), tl.load(numbers + 1), tl.load(zeta + level)
    if SPLIT:
        drift, kick = 2.0 * h * (mu - noise * noise / 2.0), 2.0 * noise * tl.sqrt(h)
    else:
        drift, kick = 1.0 + h * mu, noise * tl.sqrt(h)
    here = start + level * paths
    a, b = _well_start(here, path, paths, SPLIT), _well_start(here, path + _LANES, paths, SPLIT)
    c, d = _well_start(here, path + 2 * _LANES, paths, SPLIT), _well_start(here, path + 3 * _LANES, paths, SPLIT)
    done = tl.full((), 0, tl.int64)
    for r in range(0, count):
        until = tl.load(records + r)
        for step in range(done, until):
            one, two, three, four = normal_quarters(key, step, item, lane)
            a, b = _well_step(a, one, h, drift, kick, SPLIT, FLOOR), _well_step(b, two, h, drift, kick, SPLIT, FLOOR)
            c, d = _well_step(c, three, h, drift, kick, SPLIT, FLOOR), _well_step(d, four, h, drift, kick, SPLIT, FLOOR)
        done = until
        to = out + (r * levels + level) * paths
        _well_store(to, here, path, paths, a, SPLIT)
        _well_store(to, here, path + _LANES, paths, b, SPLIT)
        _well_store(to, here, path + 2 * _LANES, paths, c, SPLIT)
        _well_store(to, here, path + 3 * _LANES, paths, d, SPLIT)
