"""README's code runs as printed, and its numbers are those of the recorded run."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_whole_idea_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= 48
    shown = subprocess.run([sys.executable, "-c", blocks[0]], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    change, sde, finite = map(
        float, re.search(r"measured (\S+), SDE law (\S+), finite-step law (\S+)", shown.stdout).groups()
    )
    assert abs(finite - change) < 0.1 * abs(change)
    assert abs(sde - change) < 0.2 * abs(change)
    quiet, noisy = map(float, re.search(r"gradient flow (\S+), SGD (\S+)", shown.stdout).groups())
    assert quiet > 5 * noisy


def test_the_page_of_claims_is_what_the_suites_claim():
    shown = subprocess.run(
        [sys.executable, "-c", "import write_claims; print(write_claims.page(), end='')"],
        capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": f"{ROOT}/docs{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == (ROOT / "docs" / "claims.md").read_text(encoding="utf-8"), "run python docs/write_claims.py"
    assert shown.stdout.count("###") >= 20
