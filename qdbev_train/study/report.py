# SPDX-License-Identifier: Apache-2.0
"""What a study leaves for readers: study.json, tables in Markdown, plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdbev_ros.core.files import write_json, write_text
from qdbev_train.study.config import TABLES, StudyConfig
from qdbev_train.study.plots import draw_curves, draw_sizes
from qdbev_train.study.run import Study

ERRORS = ("mATE", "mASE", "mAOE", "mAVE", "mAAE")
TITLES = {
    "methods": "Methods, W4A6",
    "parts": "Calibration alone, one part at a time",
    "bits": "Calibration alone, by bit width",
    "beyond": "Beyond the paper",
}


def write_report(config: StudyConfig) -> list[Path]:
    """Writes what the finished rows give into `config.docs`; the paths of the files."""
    study, docs = Study(config), Path(config.docs)
    rows = [row for job in config.jobs() if (row := study.finished(job)) is not None]
    data = {
        "title": config.title,
        "command": f"qdbev study {config.source}",
        "teacher": study.teacher[2].get("provenance", {}) | {"sha256": study.teacher_sha256},
        "complete": len(rows) == len(config.jobs()),
        "rows": rows,
    }
    written = [docs / "study.json", docs / "tables.md", docs / "size.png", docs / "curves.png"]
    write_json(written[0], data, indent=1)
    write_text(written[1], tables(config, rows))
    draw_sizes(rows, written[2])
    draw_curves(config, written[3])
    return written


def tables(config: StudyConfig, rows: Sequence[dict[str, Any]]) -> str:
    """All tables in Markdown: one line for each row's name, numbers over its seeds, the paper's beside them."""
    lines = [
        f"# {config.title}",
        "",
        f"Written by `qdbev study {config.source}`. NDS, mAP and the errors by nuscenes-devkit on "
        f"{rows[0]['frames'] if rows else 0} unseen frames; over several seeds the mean, with the lowest and the "
        "highest in brackets. Paper: QD-BEV, ICCV 2023, BEVFormer on nuScenes val, NDS / mAP: other networks on other "
        "data, to compare directions and not numbers.",
    ]
    for table in TABLES:
        found = [row for row in rows if row["table"] == table]
        if found:
            lines += ["", f"## {TITLES[table]}", "", *_table(found, config.paper.get(table, {}))]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, Any]], paper: dict[str, dict[str, str]]) -> list[str]:
    models = list(dict.fromkeys(model for of in paper.values() for model in of))
    head = [
        "row",
        "",
        "seeds",
        "NDS",
        "mAP",
        *ERRORS,
        "MB",
        "GBOPs",
        *(f"paper, {model}" for model in models),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(row["method"] for row in rows):
        same = [row for row in rows if row["method"] == name]
        numbers = [_over_seeds([row["nds"] for row in same], 3), _over_seeds([row["map"] for row in same], 3)]
        errors = [_over_seeds([row[key] for row in same], 2) for key in ERRORS]
        size, bops = same[0]["size_bytes"] / 1e6, same[0]["bops"] / 1e9
        cost = [f"{size:.2f}", f"{bops:.0f}"]
        theirs = [paper.get(name, {}).get(model, "") for model in models]
        cells = [f"`{name}`", same[0]["text"], str(len(same)), *numbers, *errors, *cost, *theirs]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _over_seeds(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.{digits}f} to {max(known):.{digits}f})"
