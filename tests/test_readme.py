"""README's code runs as printed, and its numbers are those of the recorded run."""

import json
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


def test_the_pages_of_claims_are_what_the_suites_claim():
    code = "import json, write_claims; print(json.dumps(write_claims.pages()))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}/docs{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    pages = json.loads(shown.stdout)
    written = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "claims").glob("*.md")}
    assert written == pages, "run python docs/write_claims.py"
    assert len(pages) >= 20
