# SPDX-License-Identifier: Apache-2.0
"""docs/bevformer.md names a test for each of the reference's peculiarities: the tests must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_the_table_names_exists() -> None:
    rows = [r for r in (ROOT / "docs" / "bevformer.md").read_text().splitlines() if r.startswith("|")]
    named = set(re.findall(r"`(test_\w+)`", "\n".join(rows)))
    sources = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 40
    assert named - set(re.findall(r"def (test_\w+)", sources)) == set()
