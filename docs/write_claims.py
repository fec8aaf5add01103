"""Write docs/claims/: a page per claim with its equation, what it means, what falsifies it and how to check it.

Usage: python docs/write_claims.py
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from validation.suite import SUITES

FOLDER = Path(__file__).parent / "claims"


def pages() -> dict[str, str]:
    """File name to text, the index among them."""
    found, index = {}, ["# What is claimed\n\nWritten by `python docs/write_claims.py` from the suites themselves.\n"]
    for suite, summary in SUITES.items():
        index.append(f"\n## `{suite}`: {summary}\n\n")
        for claim in importlib.import_module(f"validation.{suite}").CLAIMS:
            name = (
                f"{suite}-{re.sub('[^a-z0-9]+', '-', claim.name.lower().replace('α', 'alpha').replace('δ', 'delta'))}"
            )
            name = name.strip("-") + ".md"
            index.append(f"- [{claim.name}]({name})\n")
            found[name] = (
                f"# {claim.name}\n\nSuite `{suite}`: {summary}.\n\n> {claim.equation}\n\n{claim.meaning}\n\n"
                f"Checked by `valleydrift validate {suite}`: theory, measurement, standard error, runs that diverged, "
                "rivals and verdict for every setting are in the section of this name in `report.html`, with a figure "
                "of predicted against measured, and in `checks.json`.\n"
            )
    return found | {"README.md": "".join(index)}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
