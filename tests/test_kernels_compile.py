"""Every Triton kernel compiles for a GPU without one: what an interpreter accepts, a compiler may not."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = """
import importlib, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, "benchmarks")
REAL, LONG, INT, KEY = "*fp64", "*i64", "*i32", "i64"
KERNELS = {
    "simulators.normals_triton:_fill": ("out", "", "", "key", {}),
    "nets.sampling_triton:_draw": ("", "keys taken", "out", "", {}),
    "nets.diagonal_triton:_advance": (
        "a_at b_at seen_a seen_b average X y shift eta options", "at bad_at",
        "a_exp_at b_exp_at seen_a_exp seen_b_exp index", "",
        dict(DECAY=True, AVERAGING=True, SHIFTED=True, SIZE=2, D=20, BLOCK=32),
    ),
    "simulators.diagonal_triton:_advance": (
        "logs X y mean_square scales levels dt_at", "bad_at", "", "key",
        dict(KIND=int(sys.argv[1]), REFINE=2, N=20, D=20, ROWS=16, SAMPLES=32, COLUMNS=32),
    ),
    "simulators.scalar_triton:_well": (
        "start zeta numbers out", "records", "", "key", dict(SPLIT=sys.argv[1] == "1", FLOOR=1e-145),
    ),
    "gpu_kernels:_multiply_adds": ("values", "", "", "", {}),
}
for name, (reals, longs, ints, keys, constants) in KERNELS.items():
    module, function = name.split(":")
    kernel = getattr(importlib.import_module(module), function)
    types = dict.fromkeys(reals.split(), REAL) | dict.fromkeys(longs.split(), LONG) | dict.fromkeys(ints.split(), INT)
    types |= dict.fromkeys(keys.split(), KEY) | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
    assert built.asm["cubin"], name
    print(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["0", "1", "2"])
def test_kernels_compile_for_a_gpu(kind):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton")
    shown = subprocess.run(
        [sys.executable, "-c", CODE, kind], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout.splitlines()) == 6
