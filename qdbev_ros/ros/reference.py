# SPDX-License-Identifier: Apache-2.0
"""Writes the table of parameters in docs/node.md from their declaration. No ROS.

Example: python -m qdbev_ros.ros.reference docs/node.md
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from qdbev_ros.core.files import write_text
from qdbev_ros.ros.parameters import DetectorParameters

TYPES = {str: "string", int: "integer", float: "number", bool: "true/false"}
BEGIN, END = "<!-- parameters: begin -->", "<!-- parameters: end -->"


def with_table(text: str) -> str:
    """`text` with the table of parameters as it is now between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, table(), END + after])


def table() -> str:
    """The node's parameters in Markdown."""
    head = ["| parameter | type | default | legal | live | |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(_row(item) for item in dataclasses.fields(DetectorParameters))])


def _row(item: dataclasses.Field[Any]) -> str:
    meta, default = item.metadata, item.default
    legal = ""
    if meta["choices"]:
        legal = ", ".join(f"`{choice}`" if choice else "empty" for choice in meta["choices"])
    elif meta["low"] is not None:
        legal = f"{meta['low']} to {meta['high']}"
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    cells = [
        f"`{item.name}`", TYPES[type(default)], f"`{shown}`" if shown else "", legal,
        "yes" if meta["live"] else "", meta["text"],
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> int:
    path = Path(sys.argv[1])
    write_text(path, with_table(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
