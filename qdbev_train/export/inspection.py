# SPDX-License-Identifier: Apache-2.0
"""What is in a package, as plain data and as tables for people. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qdbev_ros.core.errors import PackageError
from qdbev_ros.engine.package import MANIFEST, MODEL, Package

PARTS = ("backbone", "neck", "encoder", "decoder")
_ENCODER = ("bev_embedding", "positional_encoding", "transformer.encoder", "can_bus_mlp", "_embeds")
# How ONNX names what it holds, and what that is here.
_CONTENTS = {
    "INT4": "weights and embeddings, 4 bits",
    "INT8": "weights, 5 to 8 bits",
    "INT32": "biases",
    "FLOAT": "steps, LayerNorm, what is left in float32",
}


def inspect_package(package: Package) -> tuple[dict[str, Any], str]:
    """What `summarise` and `as_text` make. Raises PackageError where the manifest lacks something of it.

    A seal covers any manifest, and reading a package to run it asks for none of this.
    """
    try:
        summary = summarise(package)
        return summary, as_text(summary)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise PackageError(
            f"{package.path}: {MANIFEST}: quantisation is not what `qdbev export` writes: {what}"
        ) from error


def summarise(package: Package) -> dict[str, Any]:
    """All that `qdbev inspect` tells. bytes_float32: the tensors of the float model's checkpoint."""
    grid = package.quantisation
    layers = [_with_bytes(layer) for layer in grid["layers"]]
    rows = [(part_of(x["name"]), x["weight_bits"], math.prod(x["shape"]), x["bytes"]) for x in layers]
    for parameter in grid["float_parameters"]:
        count = math.prod(parameter["shape"])
        rows.append((part_of(parameter["name"]), 32, count, 4 * count))
    size = package.path.stat().st_size
    return {
        "file": str(package.path),
        "sha256": package.sha256,
        "bytes": size,
        "bytes_float32": grid["float32_bytes"],
        "ratio": grid["float32_bytes"] / size,
        "variant": package.variant.to_dict(),
        "members": package.members,
        "contents": _contents(package.model),
        "by_bits": _totals((f"{bits} bits", count, held) for _, bits, count, held in rows),
        "by_part": _totals((part, count, held) for part, _, count, held in rows),
        "quantisation": grid | {"layers": layers},
        "training": package.training,
        "scores": package.scores,
    }


def part_of(name: str) -> str:
    """Which of the four parts a layer or parameter belongs to, as quantisation counts them."""
    if name.startswith(("img_backbone.", "img_neck.")):
        return PARTS[0] if name.startswith("img_backbone.") else PARTS[1]
    return PARTS[2] if any(mark in name for mark in _ENCODER) else PARTS[3]


def _with_bytes(layer: Mapping[str, Any]) -> dict[str, Any]:
    # Four bits are packed; everything above is stored as int8.
    bits = 4 if layer["weight_bits"] <= 4 else 8
    return dict(layer) | {"bytes": math.ceil(math.prod(layer["shape"]) * bits / 8)}


def _totals(rows: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, int]]:
    """{key: {"parameters", "bytes"}}; bytes before the zip's compression."""
    counts: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for key, count, size in rows:
        counts[key] += count
        held[key] += size
    return {key: {"parameters": counts[key], "bytes": held[key]} for key in counts}


def _contents(model: bytes) -> dict[str, int]:
    """Bytes of model.onnx by what they are; the rest is the graph itself."""
    import onnx

    held: Counter[str] = Counter()
    for tensor in onnx.load_from_string(model).graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if kind in _CONTENTS:
            held[_CONTENTS[kind]] += len(tensor.raw_data)
    return {label: held[label] for label in _CONTENTS.values()} | {"graph": len(model) - held.total()}


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal."""
    sections = [
        _head(summary),
        _layers(summary["quantisation"]["layers"]),
        _sizes(summary),
        _exceptions(summary["quantisation"]),
        _plain("training", summary["training"]),
        _plain("scores", summary["scores"]),
        _hashes(summary),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _head(summary: Mapping[str, Any]) -> list[str]:
    variant, grid = summary["variant"], summary["quantisation"]
    image, bev, transformer = variant["image"], variant["bev"], variant["transformer"]
    form = f"W{grid['weight_bits']}A{grid['activation_bits']}" if grid["parts"] else "float"
    return [
        f"{summary['file']}: {variant['name']}, {form}, {summary['bytes']:,} bytes; the float32 checkpoint has "
        f"{summary['bytes_float32']:,}: {summary['ratio']:.2f} times as many",
        f"pictures {image['width']}x{image['height']} {image['color']}, BEV {bev['width']}x{bev['height']} over "
        f"{bev['pc_range'][0]:g}..{bev['pc_range'][3]:g} m, {transformer['queries']} queries, "
        f"{transformer['encoder_layers']}+{transformer['decoder_layers']} layers, {len(variant['classes'])} classes",
    ]


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [("layer", "kind", "shape", "W", "A", "codes", "step", "bytes")]
    for layer in layers:
        shape = "x".join(str(n) for n in layer["shape"])
        bits, codes, step = "", "", ""
        if layer["activation_bits"] is not None:  # an embedding has no input
            low, high = layer["activation_codes"]
            bits, codes, step = (
                str(layer["activation_bits"]),
                f"{low}..{high}",
                f"{layer['activation_scale']:.4g}",
            )
        weight = str(layer["weight_bits"])
        rows.append((layer["name"], layer["kind"], shape, weight, bits, codes, step, f"{layer['bytes']:,}"))
    return _table(rows, left=2)


def _sizes(summary: Mapping[str, Any]) -> list[str]:
    rows = [("before compression", "parameters", "bytes")]
    for key in ("by_part", "by_bits"):
        for name, total in sorted(summary[key].items(), key=_order):
            rows.append((name, f"{total['parameters']:,}", f"{total['bytes']:,}"))
        rows.append(("", "", ""))
    rows += [(f"{MODEL}: {label}", "", f"{held:,}") for label, held in summary["contents"].items()]
    rows.append((f"{MODEL} compressed", "", f"{summary['members'][MODEL]['compressed']:,}"))
    rows.append((f"{MANIFEST} compressed", "", f"{summary['members'][MANIFEST]['compressed']:,}"))
    return _table(rows, left=1)


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    name = item[0]
    return (PARTS.index(name), "") if name in PARTS else (int(name.split()[0]), name)


def _exceptions(grid: Mapping[str, Any]) -> list[str]:
    lines = ["exceptions to the rule:"] if grid["exceptions"] else ["exceptions to the rule: none"]
    for reason in dict.fromkeys(e["reason"] for e in grid["exceptions"]):
        same = [e for e in grid["exceptions"] if e["reason"] == reason]
        activation = "" if same[0]["activation_bits"] is None else f"A{same[0]['activation_bits']}"
        bits = "float" if same[0]["weight_bits"] == 32 else f"W{same[0]['weight_bits']}{activation}"
        lines.append(f"  {bits}, {reason}:")
        lines += [f"    {e['name']}" for e in same]
    if grid["left_out"]:
        lines += ["left out, only training needs it:", *(f"    {name}" for name in grid["left_out"])]
    return lines


def _plain(title: str, data: Any) -> list[str]:
    """Nested mappings as indented lines; lists stay on one line."""
    if not data:
        return [f"{title}: none"]
    lines = [f"{title}:"]

    def add(mapping: Mapping[str, Any], indent: str) -> None:
        for key, value in mapping.items():
            if isinstance(value, Mapping) and value:
                lines.append(f"{indent}{key}:")
                add(value, indent + "  ")
            else:
                text = f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
                lines.append(f"{indent}{key}: {text}")

    add(data, "  ")
    return lines


def _hashes(summary: Mapping[str, Any]) -> list[str]:
    rows = [("sha256", "", "bytes"), ("the file", summary["sha256"], f"{summary['bytes']:,}")]
    rows += [(name, m["sha256"], f"{m['bytes']:,}") for name, m in summary["members"].items()]
    return _table(rows, left=2)


def _table(rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Columns as wide as they need to be, the first `left` of them flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
