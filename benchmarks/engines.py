# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the network on every engine: PyTorch, ONNX Runtime and OpenVINO in float, ours in W4A6.

Backbone (with neck), whole network, and end to end: six JPEG pictures of 1600x900 in, boxes out, through the node's own
pipeline with any engine behind it. Every engine has a process of its own and two threads; all take turns until a
variant's time is over. Large matrix products in float32 and int8 take their turns as well: their best rates are the
machine's peaks, and a row's fraction is that of the peak that its products could reach. Models are kept in out/bench.

example: python benchmarks/engines.py --variants nano tiny --seconds 60 --docs
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import deformable, packages
from benchmarks.engine_jobs import ENGINES, GEMM, OURS, PRODUCTS, missing, run_engine, run_product
from benchmarks.engines_report import numbers, table, write_docs
from benchmarks.packages import ABOUT, FLOAT_PACKAGE, PACKAGE
from benchmarks.turns import Row, Worker, cores, cpu_name, free_gb, serve
from qdbev_ros.core.errors import DataError, QdbevError
from qdbev_ros.core.files import write_json
from qdbev_ros.core.variant import Variant, load_variant
from qdbev_ros.engine.native import KernelError

ROOT = packages.ROOT
KEPT = ROOT / "out" / "bench"
DEMO = ROOT / "demo" / "nano.qdbev"
THREADS = 2
GROWTH = "growth"  # stands for the variants of nano that are made here
FEWEST = 3  # turns of each engine after the warm-up
SAMPLINGS = 20  # runs of each deformable attention
SLOW_S = 120.0  # a round that takes longer is not repeated that often
# Memory that each engine's process needs, GB; variants that are not named here need as much as base.
NEEDED_GB = {"nano": 0.7, "tiny": 1.7, "small": 3.0, "base": 5.0}


def prepare(variant: Variant) -> Path:
    """The folder with the variant's models, made in a process of its own where it isn't there yet."""
    folder = packages.folder_of(variant, KEPT)
    if not (folder / ABOUT).exists():
        folder.mkdir(parents=True, exist_ok=True)
        description = folder / "variant.json"
        description.write_text(json.dumps(variant.to_dict()))
        command = [sys.executable, __file__, "make", str(description)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["killed, perhaps for its memory"])[-1]
            raise DataError(f"the models of {variant.name} could not be made: {last}")
    return folder


def package_of(variant: str, engine: str, folder: Path) -> Path:
    """What an engine loads: nano's W4A6 package is the trained one of the demo."""
    if not ENGINES[engine]:
        return folder / FLOAT_PACKAGE
    return DEMO if variant == "nano" and DEMO.exists() else folder / PACKAGE


def engine_worker(row: Row, package: Path, models: Path) -> Worker:
    arguments = [__file__, "engine", row.engine, str(package), str(models)]
    # The compiler's results are kept, too.
    return Worker(row, arguments, {"TORCHINDUCTOR_CACHE_DIR": str(KEPT / "inductor")})


def product_worker(row: Row) -> Worker:
    return Worker(row, [__file__, "product", row.engine], {})


def take_turns(workers: list[Worker], seconds: float, bar: tqdm[Any]) -> None:
    """Rounds of one turn each until the time is over; the first one warms up."""
    begin, number, slowest = time.monotonic(), 0, 0.0
    while True:
        start = time.monotonic()
        for worker in workers:
            bar.set_description(f"{worker.row.variant}: {worker.row.engine}")
            worker.turn()
            bar.update()
        slowest = max(slowest, time.monotonic() - start)
        if number == 0:
            for worker in workers:
                worker.row.seconds.clear()
                worker.row.cpu_seconds.clear()
                worker.row.parts.clear()
        number += 1
        enough = 2 if slowest > SLOW_S else FEWEST + 1
        if number >= enough and time.monotonic() - begin > seconds:
            return


def measure(name: str, seconds: float, bar: tqdm[Any]) -> tuple[list[Row], dict[str, Any], dict[str, str]]:
    """(rows of the engines and products, what is known of the variant, engine -> why it was left out)."""
    variant = load_variant(name)
    bar.set_description(f"{name}: making the models")
    folder = prepare(variant)
    about = json.loads((folder / ABOUT).read_text())
    left_out = {engine: reason for engine in ENGINES if (reason := missing(engine))}
    rows = [Row(name, engine, "engine") for engine in ENGINES if engine not in left_out]
    products = [Row(name, product, "product") for product in PRODUCTS]
    needed = NEEDED_GB.get(name, NEEDED_GB["base"])
    about["side_by_side"] = together = free_gb() > needed * len(rows) + 1
    if free_gb() < needed + 1:
        return (
            [],
            about,
            dict.fromkeys(ENGINES, f"{free_gb():.1f} GB of memory free, {needed + 1:.1f} wanted"),
        )
    groups = [rows] if together else [[row] for row in rows]
    for group in groups:
        with ExitStack() as stack:
            workers = [stack.enter_context(product_worker(row)) for row in products]
            for row in group:
                bar.set_description(f"{name}: {row.engine} gets ready")
                worker = engine_worker(row, package_of(name, row.engine, folder), folder)
                workers.append(stack.enter_context(worker))
            take_turns(workers, seconds / len(groups), bar)
    return [*products, *rows], about, left_out


def measure_growth(seconds: float, bar: tqdm[Any]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of our engine on nano and on its larger relatives, and what differs between them."""
    nano = load_variant("nano")
    variants = [nano, *packages.grown(nano)]
    rows, kinds = [], []
    with ExitStack() as stack:
        workers = []
        for number, variant in enumerate(variants):
            bar.set_description(f"nano, grown: making {number + 1} of {len(variants)}")
            folder = prepare(variant)
            row = Row(f"{GROWTH} {number}", OURS, "engine")
            workers.append(stack.enter_context(engine_worker(row, folder / PACKAGE, folder)))
            rows.append(row)
            size = {"height": variant.image.height, "width": variant.image.width}
            work = json.loads((folder / ABOUT).read_text())["operations"]["network"]
            kinds.append(
                {**size, "cells": variant.bev.cells, "queries": variant.transformer.queries, "work": work}
            )
        take_turns(workers, seconds, bar)
    return rows, kinds


def run(variants: list[str], seconds: float) -> dict[str, Any]:
    """Measures everything; plain data for the JSON file."""
    cpus = sorted(os.sched_getaffinity(0))[:THREADS]
    os.sched_setaffinity(0, cpus)  # the processes inherit it
    rows: list[Row] = []
    about: dict[str, Any] = {}
    left_out: dict[str, dict[str, str]] = {}
    with tqdm(unit=" turns", disable=None) as bar:
        for name in variants:
            found, about[name], left_out[name] = measure(name, seconds, bar)
            rows += found
        growth = measure_growth(seconds / 2, bar) if "nano" in variants else ([], [])
    machine = {"cpu": cpu_name(), "threads": cores(), "product": GEMM}
    return numbers(rows, about, machine, growth) | {"left_out": left_out, "sampling": sampling(variants)}


def sampling(variants: list[str]) -> list[dict[str, Any]]:
    """Rows of deformable attention alone; none where there is no compiler for the kernel."""
    try:
        return [row for name in variants for row in deformable.measure(name, cores(), SAMPLINGS)]
    except KernelError as error:
        tqdm.write(f"deformable attention alone is not measured: {error}", file=sys.stderr)
        return []


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["make"]:
        description = Path(arguments[1])
        variant = Variant.from_dict(json.loads(description.read_text()), str(description))
        packages.make(variant, description.parent)
        return 0
    if arguments[:1] == ["engine"]:
        engine, package, models = arguments[1:]
        uses_torch = engine.startswith("torch")
        serve(lambda turns: run_engine(engine, Path(package), Path(models), turns), uses_torch, False)
        return 0
    if arguments[:1] == ["product"]:
        serve(lambda turns: run_product(arguments[1], turns), arguments[1].startswith("torch"), False)
        return 0
    return _measure(arguments)


def _measure(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["nano", "tiny"], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each variant's turns (default: 60)")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "bench.json", metavar="FILE")
    parser.add_argument(
        "--docs", action="store_true", help="also put the table and the plots into docs/performance.md"
    )
    parser.add_argument("--prepare", action="store_true", help="make the models, measure nothing")
    args = parser.parse_args(arguments)
    if args.seconds <= 0:
        parser.error("--seconds must be positive")
    try:
        variants = [load_variant(name) for name in args.variants]
        if args.prepare:
            for variant in variants:
                print(prepare(variant))
            return 0
        data = run(args.variants, args.seconds)
        write_json(args.json, data, indent=1)
        if args.docs:
            write_docs(data, ROOT / "docs", f"python benchmarks/engines.py {' '.join(arguments)}")
    except QdbevError as error:
        print(f"engines.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{table(data)}\n\nwrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
