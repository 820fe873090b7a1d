# SPDX-License-Identifier: Apache-2.0
"""Do engines score alike? Means over many roundings, because on a short drive one rounding moves a score by a point.

Every run moves every activation's step by a millionth, up or down at random, and scores each engine on that same model.
References are plain ONNX Runtime on the master, as in the parity gate, and the fake-quantised model in PyTorch, which
is restored from the package. Differences are means over pairs of runs of one model.

Example: python benchmarks/score_noise.py demo/nano.qdbev demo/town --version v1.0-mini --split mini_val --runs 40
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from qdbev_ros.core.errors import DataError, QdbevError
from qdbev_ros.core.files import write_json
from qdbev_ros.core.pipeline import Engine as PipelineEngine
from qdbev_ros.engine.engine import Engine
from qdbev_ros.engine.onnxruntime_runner import OnnxRuntimeRunner
from qdbev_ros.engine.package import Package, read_package
from qdbev_ros.engine.parity import steps_moved
from qdbev_ros.engine.reference_runner import ReferenceRunner
from qdbev_train.checkpoint import save_model
from qdbev_train.data.tables import all_frames, load_scenes
from qdbev_train.evaluation.command import add_data_arguments
from qdbev_train.evaluation.inference import detect
from qdbev_train.evaluation.metrics import devkit_tables, official_score, require_devkit, require_tables
from qdbev_train.evaluation.torch_engine import TorchEngine
from qdbev_train.export.restore import Restorer

PLAIN, PYTORCH = "plain ONNX Runtime on the master", "fake-quantised PyTorch"
REFERENCES = (PLAIN, PYTORCH)
SCORES = {"nds": "NDS", "mAP": "mAP"}
Opener = Callable[[Package], PipelineEngine]
Found = dict[str, dict[str, list[float]]]  # engine -> score -> one number a run


def openers(package: Package) -> dict[str, Opener]:
    """What this machine can run. Each takes the package with another master of the same graph."""
    found: dict[str, Opener] = {
        PLAIN: lambda moved: Engine(moved, ReferenceRunner(moved.model, 1)),
        "ONNX Runtime engine": lambda moved: Engine(moved, OnnxRuntimeRunner(moved.model, 1)),
    }
    if importlib.util.find_spec("openvino") is not None:
        from qdbev_ros.engine.openvino_runner import OpenVinoRunner

        found["OpenVINO engine"] = lambda moved: Engine(moved, OpenVinoRunner(moved.model, 1))
    restorer = Restorer(package)

    def in_pytorch(moved: Package) -> PipelineEngine:
        restorer.load(moved.model)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            save_model(file, restorer.model, moved.variant, {}, restorer.config.to_dict())
            return TorchEngine(file)

    found[PYTORCH] = in_pytorch
    return found


def signs(seed: int) -> Iterator[int]:
    """1 or -1 without end, those of a seed."""
    generator = np.random.default_rng(seed)
    return (int(generator.choice((-1, 1))) for _ in repeat(None))


def measure(args: argparse.Namespace) -> Found:
    """Scores in points, run by run; all engines take turns."""
    require_devkit(args.version, args.split)
    require_tables(args.dataroot / args.version)
    package = read_package(args.package)
    where = (args.dataroot, args.version, args.split)
    scenes = load_scenes(*where, args.scene)
    tables = devkit_tables(*where, [frame.sample_token for frame in all_frames(scenes)])
    engines = openers(package)
    found: Found = {name: {score: [] for score in SCORES} for name in engines}
    with tqdm(total=args.runs * len(engines), unit=" runs") as bar:
        for seed in range(args.runs):
            moved = replace(package, model=steps_moved(package.model, signs(seed)))
            for name, opened in engines.items():
                score = official_score(*where, detect(opened(moved), scenes), tables)
                for key, numbers in found[name].items():
                    numbers.append(100.0 * float(getattr(score, key)))
                bar.update()
            write_json(args.json, found)
    return found


def table(found: Found, key: str) -> str:
    """Markdown, of one score. The error of a difference is that of the mean over pairs of runs."""
    title = SCORES[key]
    head = ["engine", "runs", f"mean {title}", "standard deviation", "standard error"]
    lines = [[*head, *(f"from {name}" for name in REFERENCES)], ["---"] * (len(head) + len(REFERENCES))]
    for engine, scores in found.items():
        numbers = scores[key]
        cells = [engine, str(len(numbers))]
        cells += [f"{x:.2f}" for x in (statistics.mean(numbers), statistics.stdev(numbers), error(numbers))]
        for name in REFERENCES:
            pairs = [a - b for a, b in zip(numbers, found[name][key], strict=True)]
            cells.append("" if name == engine else f"{statistics.mean(pairs):+.2f} ± {error(pairs):.2f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def error(numbers: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(numbers) / len(numbers) ** 0.5


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="the .qdbev file")
    add_data_arguments(parser)
    parser.add_argument(
        "--runs", type=int, default=40, help="of each engine, two or more (default: %(default)s)"
    )
    parser.set_defaults(json=Path("out/score_noise.json"))
    args = parser.parse_args(words)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        if args.runs < 2:
            raise DataError(f"--runs {args.runs}: a spread needs two or more")
        found = measure(args)
        print("\n\n".join(table(found, key) for key in SCORES))
    except QdbevError as problem:
        print(f"score_noise: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
