# SPDX-License-Identifier: Apache-2.0
"""The table of faults: tests put their figures into out/faults.json, this makes a table in the docs of them.

Example: python -m tests.ros.fault_table docs/reliability.md
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "out" / "faults.json"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
FAULTS = (
    "camera lost: CAM_FRONT",
    "camera lost: CAM_FRONT_RIGHT",
    "camera lost: CAM_FRONT_LEFT",
    "camera lost: CAM_BACK",
    "camera lost: CAM_BACK_LEFT",
    "camera lost: CAM_BACK_RIGHT",
    "three cameras lost at once",
    "pictures late",
    "pictures duplicated",
    "pictures reordered",
    "corrupt JPEG",
    "wrong encoding",
    "wrong size",
    "K of zeros",
    "K of NaN",
    "K without a last row",
    "camera frame without a transform",
    "no ego motion",
    "no transform at all at the start",
    "transforms after the pictures",
    "calibration changed in flight",
    "stamps from the future",
    "one camera's clock in the future",
    "bag looped 100 times",
    "clock going back",
    "vehicle teleported",
    "node killed and restarted",
    "DDS peer killed while it sends",
    "transform of 1.7e308 m",
    "engine answers NaN",
    "error in the node itself",
    "error after the answer",
    "damaged model",
    "model swapped",
)


def record(fault: str, says: str, told_s: float, back: str) -> None:
    """Notes a fault's figures: what diagnostics said, after how many seconds, and how it went on."""
    assert fault in FAULTS
    rows = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    rows[fault] = {"says": says, "told_s": round(told_s, 2), "back": back}
    FIGURES.parent.mkdir(exist_ok=True)
    temporary = FIGURES.with_name(f".{FIGURES.name}")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(temporary, FIGURES)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown. Raises KeyError for a fault without figures."""
    lines = ["| fault | diagnostics say | after, s | then |", "|---|---|---|---|"]
    for fault in FAULTS:
        row = rows[fault]
        says = re.sub(r"/\S*/(\S+\.qdbev)", r"\1", row["says"]).replace("|", "\\|")
        lines.append(f"| {fault} | {says} | {row['told_s']:.2f} | {row['back']} |")
    return "\n".join(lines)


def main(page: Path) -> None:
    text = page.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table(json.loads(FIGURES.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
