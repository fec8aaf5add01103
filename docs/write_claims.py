"""Write docs/claims.md: what each suite claims, as an equation, and what would falsify it.

Usage: python docs/write_claims.py
"""

from __future__ import annotations

import importlib
from pathlib import Path

from validation.suite import SUITES

HEAD = "# What is claimed\n\nWritten by `python docs/write_claims.py` from the suites themselves.\n"


def page() -> str:
    """The page as text."""
    parts = [HEAD]
    for suite, summary in SUITES.items():
        parts.append(f"\n## Suite `{suite}`: {summary}\n")
        for claim in importlib.import_module(f"validation.{suite}").CLAIMS:
            parts.append(f"\n### {claim.name}\n\n> {claim.equation}\n\n{claim.meaning}\n")
    return "".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "claims.md").write_text(page(), encoding="utf-8")
