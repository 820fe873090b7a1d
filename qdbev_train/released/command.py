# SPDX-License-Identifier: Apache-2.0
"""`qdbev import-bevformer` and `qdbev export-bevformer`: released BEVFormer checkpoints in and out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

IMPORT_EXAMPLE = """example:
  qdbev import-bevformer bevformer_tiny_epoch_24.pth tiny.safetensors
  qdbev eval tiny.safetensors data/nuscenes --version v1.0-trainval --split val
The file is read without mmcv, and nothing in it is run. Its optimizer state is left out."""
EXPORT_EXAMPLE = """example:
  qdbev export-bevformer tiny.safetensors bevformer_tiny.pth
mmcv's load_checkpoint reads the .pth; the keys are the released ones."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `import-bevformer` and `export-bevformer`."""
    raw = argparse.RawDescriptionHelpFormatter
    taken = commands.add_parser(
        "import-bevformer",
        help="turn a released BEVFormer checkpoint into one of ours",
        description="Checks a released BEVFormer checkpoint key by key and writes it as a model file.",
        epilog=IMPORT_EXAMPLE,
        formatter_class=raw,
    )
    taken.add_argument("checkpoint", type=Path, help="the released file, e.g. bevformer_tiny_epoch_24.pth")
    taken.add_argument("out", type=Path, help="the model file to write, e.g. tiny.safetensors")
    taken.add_argument(
        "--variant", metavar="NAME|YAML", help="tiny, small, base or a variant file (default: the shapes say)"
    )
    taken.add_argument("--verbose", action="store_true", help="list every key that is wrong, one a line")
    taken.add_argument("--json", type=Path, metavar="FILE", help="write what was found here")
    taken.set_defaults(run=run_import)
    given = commands.add_parser(
        "export-bevformer",
        help="write a float checkpoint as BEVFormer's released ones are",
        description="Writes a float model file in mmcv's layout, for tools that read released BEVFormer checkpoints.",
        epilog=EXPORT_EXAMPLE,
        formatter_class=raw,
    )
    given.add_argument("checkpoint", type=Path, help="a float model.safetensors")
    given.add_argument("out", type=Path, help="the .pth to write (or .safetensors with the same keys)")
    given.add_argument("--json", type=Path, metavar="FILE", help="write size and hash here")
    given.set_defaults(run=run_export)


def run_import(args: argparse.Namespace) -> int:
    from qdbev_ros.core.files import write_json
    from qdbev_train.released.conversion import import_released

    report = import_released(args.checkpoint, args.out, args.variant, args.verbose)
    if args.json:
        write_json(args.json, report)
    print(_table(report))
    return 0


def run_export(args: argparse.Namespace) -> int:
    from qdbev_ros.core.files import write_json
    from qdbev_train.released.conversion import export_released

    report = export_released(args.checkpoint, args.out)
    if args.json:
        write_json(args.json, report)
    print(f"wrote {args.out}: {report['variant']}, {report['tensors']} tensors, {_file(report['result'])}")
    return 0


def _table(report: dict[str, Any]) -> str:
    from qdbev_train.model.checkpoint import shown

    meta = " · ".join(f"{key} {shown(str(value))}" for key, value in report["meta"].items())
    converted = ", ".join(f"{count} tensors from {kinds}" for kinds, count in report["converted"].items())
    rows = {
        "variant": report["variant"] + ("" if report["given"] else ", as its shapes say"),
        "parameters": f"{report['parameters']:,}",
        "tensors": str(report["tensors"]),
        "converted": converted,
        "left out": ", ".join(shown(key) for key in report["left_out"]),
        "its meta": meta,
        "source": f"{report['source']['file']}, {_file(report['source'])}",
        "wrote": f"{report['result']['file']}, {_file(report['result'])}",
    }
    return "\n".join(f"{title:<11}{text}" for title, text in rows.items() if text)


def _file(identity: dict[str, Any]) -> str:
    return f"{identity['bytes'] / 1e6:.1f} MB, sha256 {identity['sha256']}"
