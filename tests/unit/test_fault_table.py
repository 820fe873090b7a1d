# SPDX-License-Identifier: Apache-2.0
"""The docs have a row for each fault, with a time below the promised second."""

from __future__ import annotations

from pathlib import Path

from tests.ros.fault_table import BEGIN, END, FAULTS, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
TOLD_S = 1.0  # the promise
START_S = 5.0  # from the start of a process to its first answer


def test_the_docs_have_every_fault_and_its_time() -> None:
    rows = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    assert tuple(row[0] for row in cells) == FAULTS
    for fault, says, seconds, _ in cells:
        assert says
        assert float(seconds) <= (START_S if "restarted" in fault else TOLD_S), fault


def test_a_table_names_packages_without_their_folders() -> None:
    rows = {
        fault: {"says": "/a/b/damaged.qdbev: bad | hash", "told_s": 0.5, "back": "running"}
        for fault in FAULTS
    }
    line = table(rows).splitlines()[2]
    assert line == f"| {FAULTS[0]} | damaged.qdbev: bad \\| hash | 0.50 | running |"
