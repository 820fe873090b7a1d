# SPDX-License-Identifier: Apache-2.0
"""`qdbev eval`: the official nuScenes score of a checkpoint or a package."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.variant import CAMERAS

if TYPE_CHECKING:
    from qdbev_ros.core.pipeline import Engine
    from qdbev_train.data.frames import Frame
    from qdbev_train.evaluation.results import Entry

EXAMPLE = """example:
  qdbev eval nano.qdbev data/town --version v1.0-trainval --split val --json score.json
  qdbev eval base.safetensors /data/nuscenes --version v1.0-trainval --split val --results out/base.json
  qdbev eval nano.qdbev data/town --version v1.0-trainval --split val --without CAM_BACK --json without_back.json
With --results an evaluation that was stopped goes on after its last whole scene."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "eval",
        help="official NDS and mAP of a checkpoint or a package",
        description="Runs a model over a split, as the node would, and scores it with nuscenes-devkit.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", type=Path, help=".qdbev package, or .safetensors checkpoint (float or quantised)"
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--backend", default="auto", help="engine of a package: auto, onnxruntime, openvino or tensorrt"
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=CAMERAS,
        metavar="CAMERA",
        help="evaluate as if this camera were lost in every frame; repeatable",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="keep the detections, as the nuScenes server takes them; makes the evaluation resumable",
    )
    parser.set_defaults(run=run)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What `eval` and `score` share: where the ground truth is and where the numbers go."""
    parser.add_argument("dataroot", type=Path, help="folder that holds the tables' folder and samples/")
    parser.add_argument("--version", required=True, help="folder of the tables, for example v1.0-mini")
    parser.add_argument("--split", required=True, help="split to score, for example mini_val")
    parser.add_argument(
        "--scene", action="append", metavar="NAME", help="only this scene of the split; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")


def run(args: argparse.Namespace) -> int:
    from qdbev_ros.core.files import write_json
    from qdbev_train.data.tables import all_frames, load_scenes
    from qdbev_train.evaluation.inference import open_engine
    from qdbev_train.evaluation.metrics import devkit_tables, official_score, require_devkit, require_tables

    require_devkit(args.version, args.split)
    scenes = load_scenes(args.dataroot, args.version, args.split, args.scene)
    frames = all_frames(scenes)
    annotated = any(len(frame.annotations.boxes) for frame in frames)
    if not annotated and args.results is None:
        raise DataError(
            f"{args.dataroot} {args.version} {args.split} has no annotations; give --results FILE"
        )
    where = (args.dataroot, args.version, args.split)
    if annotated:
        require_tables(args.dataroot / args.version)
    engine = open_engine(args.model, args.backend)
    tables = devkit_tables(*where, [frame.sample_token for frame in frames]) if annotated else None
    results, per_frame = _detect(args, engine, scenes)
    timing = "" if per_frame is None else f", {per_frame * 1e3:.0f} ms a frame"
    lost = f" without {', '.join(args.without)}" if args.without else ""
    print(f"{args.model}, {args.dataroot} {args.version} {args.split}{lost}{timing}")
    if args.results:
        print(f"wrote {args.results}")
    if not annotated:
        print("no annotations here, so no score: this is a file for the nuScenes server")
        return 0
    score = official_score(*where, results, tables)
    print(score.text())
    if args.json:
        data = {"model": args.model.name, "version": args.version, "split": args.split}
        if args.without:
            data["without"] = args.without
        write_json(args.json, data | score.to_dict() | {"seconds_per_frame": per_frame})
    return 0


def _detect(
    args: argparse.Namespace, engine: Engine, scenes: Mapping[str, Sequence[Frame]]
) -> tuple[dict[str, list[Entry]], float | None]:
    """Results by sample token, and seconds a frame of what was left to do; with --results kept scene by scene."""
    from qdbev_train.evaluation.finished import FinishedScenes
    from qdbev_train.evaluation.inference import detect
    from qdbev_train.evaluation.results import write_results

    finished = None
    if args.results:
        digest = hashlib.sha256(args.model.read_bytes()).hexdigest()
        where = {"data root": str(args.dataroot.resolve()), "version": args.version}
        if args.without:
            where["list of lost cameras"] = " ".join(args.without)
        finished = FinishedScenes(args.results, {"model": digest, "engine": args.backend} | where)
    left = sum(len(f) for name, f in scenes.items() if finished is None or name not in finished.scenes)
    start = time.monotonic()
    results = detect(engine, scenes, finished, args.without)
    seconds = time.monotonic() - start
    if finished is not None:
        write_results(args.results, results)
        finished.remove()
    return results, seconds / left if left else None
