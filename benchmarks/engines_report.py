# SPDX-License-Identifier: Apache-2.0
"""From measured rows to plain data, a Markdown table and plots, so that no number in the documentation is typed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.engine_jobs import ENGINES, GEMM, OURS
from benchmarks.turns import Row
from qdbev_ros.core.errors import DataError

NETWORK = "network"  # the pipeline calls it "engine"
ORDER = ("backbone", NETWORK, "end to end", "decode", "preprocess", "postprocess")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PICTURE = "pictures/performance.png"
Data = dict[str, Any]


def numbers(rows: list[Row], about: Data, machine: Data, growth: tuple[list[Row], list[Data]]) -> Data:
    """Plain data: machine with its peaks, rows, what is known of the variants, growth."""
    peaks = {"float32": 0.0, "int8": 0.0}
    for row in rows:
        if row.stage == "product" and row.parts:
            kind = "int8" if row.engine.endswith("int8") else "float32"
            peaks[kind] = max(peaks[kind], 2.0 * GEMM**3 / min(row.parts["product"]))
    found = [line for row in rows if row.stage == "engine" for line in _lines(row, about[row.variant], peaks)]
    rates = {kind: round(peak / 1e9, 1) for kind, peak in peaks.items()}
    return {
        "machine": machine | {"peak_gops": rates},
        "rows": found,
        "variants": about,
        "growth": [kind | _times(row.parts["engine"]) for row, kind in zip(*growth, strict=True)],
    }


def _times(seconds: list[float]) -> Data:
    return {"ms_median": round(statistics.median(seconds) * 1e3, 2), "ms_min": round(min(seconds) * 1e3, 2)}


def _lines(row: Row, about: Data, peaks: dict[str, float]) -> list[Data]:
    """The lines of an engine, one a stage."""
    lines = []
    limit = "int8" if ENGINES[row.engine] else "float32"
    work = about["operations"] | {"end to end": about["operations"]["network"]}
    for stage in ORDER:
        seconds = row.parts["engine" if stage == NETWORK else stage]
        line: Data = {"variant": row.variant, "engine": row.engine, "stage": stage, **_times(seconds)}
        busy = row.parts.get(f"{stage} cpu")
        if busy:
            line["cpu_ms_median"] = round(statistics.median(busy) * 1e3, 2)
        line |= {"runs": len(seconds), "peak_mb": round(row.peak_mb), "fraction_of_peak": None}
        if stage in work:
            rate = work[stage] / statistics.median(seconds)
            line |= {"gop": round(work[stage] / 1e9, 2), "limit": limit}
            line["fraction_of_peak"] = round(rate / peaks[limit], 3)
        lines.append(line)
    return lines


def table(data: Data) -> str:
    """The numbers as Markdown."""
    machine = data["machine"]
    peaks = machine["peak_gops"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads; products of {GEMM}x{GEMM} matrices reach "
        f"{peaks['float32']:.0f} GOP/s in float32 and {peaks['int8']:.0f} GOP/s in int8.",
    ]
    for variant, about in data["variants"].items():
        lines += ["", *_variant_table(data, variant, about)]
    if data["sampling"]:
        lines += ["", *_sampling_table(data["sampling"])]
    if data["growth"]:
        lines += ["", *_growth_table(data["growth"])]
    return "\n".join(lines)


def _variant_table(data: Data, variant: str, about: Data) -> list[str]:
    rows = {(r["engine"], r["stage"]): r for r in data["rows"] if r["variant"] == variant}
    work = about["operations"]
    lines = [
        f"**{variant}**: {work['network'] / 1e9:.1f} GOP a frame, {work['backbone'] / 1e9:.1f} of them in the "
        "backbone."
    ]
    if not about["side_by_side"]:
        lines[0] += " One engine after the other: memory does not hold them all."
    stages = ("backbone", NETWORK, "end to end")
    lines += [
        "",
        "| engine | backbone ms | of peak | network ms | of peak | end to end ms | x torch eager | frames/s | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    slow = rows.get(("torch eager", "end to end"))
    for engine in dict.fromkeys(engine for engine, _ in rows):
        first, second, whole = (rows[engine, stage] for stage in stages)
        gain = "" if slow is None else f"{slow['ms_median'] / whole['ms_median']:.1f}"
        cells = [engine, _ms(first), f"{first['fraction_of_peak']:.2f}", _ms(second)]
        cells += [f"{second['fraction_of_peak']:.2f}", _ms(whole), gain, f"{1e3 / whole['ms_median']:.1f}"]
        lines.append(f"| {' | '.join([*cells, str(whole['peak_mb'])])} |")
    if (OURS, "decode") in rows:
        parts = ("decode", "preprocess", NETWORK, "postprocess")
        split = ", ".join(f"{part} {_ms(rows[OURS, part])}" for part in parts)
        total = rows[OURS, "end to end"]["ms_median"]
        before = sum(rows[OURS, part]["ms_median"] for part in parts[:2]) / total
        lines += ["", f"Ours, ms: {split}; decoding and preprocessing are {before:.0%} of a frame."]
    lines += [f"{engine}: not run, {why}." for engine, why in data["left_out"][variant].items()]
    return lines


def _ms(row: Data) -> str:
    digits = 0 if row["ms_median"] >= 100 else 1
    return f"{row['ms_median']:.{digits}f} [{row['ms_min']:.{digits}f}]"


def _sampling_table(sampling: list[Data]) -> list[str]:
    lines = [
        "**Deformable attention alone**, between its linear layers: softmax, places, sampling, and the mean over maps",
        "or the sum over cameras; by ONNX Runtime with GridSample and by our kernel (`benchmarks/deformable.py`).",
        "",
        "| variant | attention | samples | GridSample ms | kernel ms | gain |",
        "|---|---|---|---|---|---|",
    ]
    rows = {(row["variant"], row["stage"], row["engine"]): row for row in sampling}
    for variant, stage in dict.fromkeys(key[:2] for key in rows):
        other, own = (rows[variant, stage, engine] for engine in ("grid_sample", "own_kernel"))
        cells = [variant, stage, own["samples"], *(f"{r['ms_median']} [{r['ms_min']}]" for r in (other, own))]
        lines.append(f"| {' | '.join(map(str, [*cells, own['gain']]))} |")
    return lines


def _growth_table(growth: list[Data]) -> list[str]:
    lines = [
        f"**What more costs**: nano and its larger relatives, network alone, {OURS}.",
        "",
        "| pictures | BEV cells | queries | GOP | ms | x nano |",
        "|---|---|---|---|---|---|",
    ]
    for row in growth:
        gain = row["ms_median"] / growth[0]["ms_median"]
        cells = [f"{row['width']}x{row['height']}", row["cells"], row["queries"], f"{row['work'] / 1e9:.1f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, _ms(row), f'{gain:.2f}']))} |")
    return lines


def draw(data: Data, path: Path) -> None:
    """A panel for each variant: a frame on every engine, its parts one behind the other."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    variants = list(dict.fromkeys(row["variant"] for row in data["rows"]))
    figure, panels = plt.subplots(
        1, len(variants), figsize=(6.5 * len(variants), 3.4), layout="constrained", squeeze=False
    )
    for axes, variant in zip(panels[0], variants, strict=True):
        rows = {(r["engine"], r["stage"]): r["ms_median"] for r in data["rows"] if r["variant"] == variant}
        engines = list(dict.fromkeys(engine for engine, _ in rows))
        left = [0.0] * len(engines)
        for part in ("decode", "preprocess", "backbone", "rest of the network", "postprocess"):
            widths = [_part(rows, engine, part) for engine in engines]
            axes.barh(engines, widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(title=variant, xlabel="ms a frame (median)")
        axes.grid(axis="x", alpha=0.3)
    panels[0][-1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _part(rows: dict[tuple[str, str], float], engine: str, part: str) -> float:
    if part == "rest of the network":
        return max(0.0, rows[engine, NETWORK] - rows[engine, "backbone"])
    return rows[engine, part]


def write_docs(data: Data, docs: Path, command: str) -> None:
    """Puts the table and the plot between the marks of docs/performance.md."""
    page = docs / "performance.md"
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise DataError(f"{page}: the marks {BEGIN} and {END} are missing; the table goes between them")
    draw(data, docs / PICTURE)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    body = f"`{command}`: median [least].\n\n{table(data)}\n\n![A frame on every engine]({PICTURE})"
    page.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")
