# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the main job over a bag, headless: real processes, real DDS; then a picture and a summary of it.

Example: python -m qdbev_ros.demo --bag demo/town.mcap --model demo/nano.qdbev --out out/demo
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from qdbev_ros.bringup import DETECTOR
from qdbev_ros.core.boxes import Boxes, empty_boxes
from qdbev_ros.core.drawing import draw_overview
from qdbev_ros.core.errors import DataError, QdbevError
from qdbev_ros.core.files import whole_file, write_json
from qdbev_ros.core.matching import MATCH_DISTANCE, match_boxes
from qdbev_ros.core.pose_buffer import TransformTree
from qdbev_ros.core.synchroniser import FrameSet
from qdbev_ros.core.variant import CLASSES
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.diagnostics import PIPELINE
from qdbev_ros.ros.domain import free_domain
from qdbev_ros.ros.presets import TopicPreset, load_preset
from qdbev_ros.ros.recording import (
    open_recording,
    read_detections,
    read_sets,
    read_status,
    read_transforms,
    read_truth,
    read_views,
)

THRESHOLD = 0.3  # what is shown and counted
RANGE = 50.0  # metres; objects further away are neither shown nor counted
FRAMES = ("map", "base_link", "LIDAR_TOP")
QUEUE = 4  # sets may wait, and the bag waits for them: a slow machine takes longer, but answers all
PATIENCE_S = 240.0  # beyond the bag's length


class DemoFailure(Exception):
    """The demo ran, but not as it should have."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qdbev_ros.demo", description=__doc__)
    parser.add_argument("--bag", type=Path, default=Path("demo/town.mcap"), help="default: %(default)s")
    parser.add_argument("--model", type=Path, default=Path("demo/nano.qdbev"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=1.0, help="speed of the bag (default: %(default)s)")
    args = parser.parse_args(words)
    try:
        return _demo(args.bag, args.model, args.out, args.rate)
    except QdbevError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except DemoFailure as error:
        print(f"demo: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it; what was started has ended


def _demo(bag_path: Path, model: Path, out: Path, rate: float) -> int:
    preset = load_preset("nuscenes")
    out.mkdir(parents=True, exist_ok=True)
    recording_path = out / "detections.mcap"
    recording_path.unlink(missing_ok=True)
    with BagReader(bag_path) as bag:
        bag.require_cameras(preset)
        started = time.monotonic()
        with_what = _play(bag_path, model, recording_path, rate, bag.duration_s / rate + PATIENCE_S)
        wall = time.monotonic() - started
        if not recording_path.exists():
            raise DemoFailure(f"no recording {recording_path}: see the messages above")
        with open_recording(recording_path, f"/{DETECTOR}/detections") as recording:
            answers = read_detections(recording, DETECTOR)
            status = read_status(recording, PIPELINE)
        sets, tree = read_sets(bag, preset), read_transforms(bag)
        truth = _truth_in_model_frame(read_truth(bag, preset.annotations), tree)
        summary = _summary(sets, answers, truth, status)
        summary |= {"bag": str(bag_path), "started_with": with_what, "wall_time_s": round(wall, 1)}
        write_json(out / "summary.json", summary)
        _draw(out / "overview.png", bag, preset, sets, tree, answers, truth, status)
    _tell(summary, out)
    if summary["sets_unanswered"]:
        missing = len(summary["sets_unanswered"])
        raise DemoFailure(
            f"{missing} of {summary['sets_in_bag']} sets were not answered, see {out / 'summary.json'}"
        )
    return 0


def _play(bag: Path, model: Path, recording: Path, rate: float, limit_s: float) -> str:
    """Runs detector, player and recorder until the bag ends. Returns what started them; raises DemoFailure."""
    arguments = [
        f"model:={model}",
        f"bag:={bag}",
        f"record:={recording}",
        f"rate:={rate}",
        f"queue_size:={QUEUE}",
    ]
    environment = dict(os.environ)
    # A graph of its own: neither does a running vehicle get these images, nor this detector the vehicle's.
    environment.setdefault("ROS_DOMAIN_ID", str(free_domain()))
    launcher = _ros2_launch(environment)
    command = launcher or [sys.executable, "-m", "qdbev_ros.bringup"]
    process = subprocess.Popen([*command, *arguments], env=environment)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise DemoFailure(f"not at the end after {limit_s:.0f} s") from None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # a SIGTERM to launch would leave its processes running
            process.wait()
    if code:
        raise DemoFailure(f"{' '.join(command)} ended with exit code {code}")
    return "ros2 launch" if launcher else "qdbev_ros.bringup"


def _ros2_launch(environment: dict[str, str]) -> list[str] | None:
    """The command of `ros2 launch` where that is installed and knows this package."""
    ros2 = shutil.which("ros2")
    if ros2 is None:
        return None
    asked = [ros2, "launch", "--show-args", "qdbev_ros", "detect.launch.py"]
    if subprocess.run(asked, env=environment, capture_output=True, check=False).returncode:
        return None
    return [ros2, "launch", "qdbev_ros", "detect.launch.py"]


def _truth_in_model_frame(truth: dict[int, Boxes], tree: TransformTree) -> dict[int, Boxes]:
    fixed, _, model = FRAMES
    return {
        stamp: _near(boxes.transformed(tree.lookup(model, fixed, stamp))) if len(boxes) else boxes
        for stamp, boxes in truth.items()
    }


def _near(boxes: Boxes) -> Boxes:
    return boxes.select(np.hypot(*boxes.centers[:, :2].T) <= RANGE)


def _shown(boxes: Boxes) -> Boxes:
    return _near(boxes.select(boxes.scores >= THRESHOLD))


def _truth_at(truth: dict[int, Boxes], stamp_ns: int) -> Boxes:
    """Annotations of a set. In nuScenes they bear the lidar's stamp, up to a few milliseconds from the images'."""
    nearest = min(truth, key=lambda stamp: abs(stamp - stamp_ns), default=None)
    return truth[nearest] if nearest is not None and abs(nearest - stamp_ns) < 20_000_000 else empty_boxes()


def _summary(
    sets: list[FrameSet[None]], answers: dict[int, Boxes], truth: dict[int, Boxes], status: dict[str, str]
) -> dict[str, Any]:
    """Numbers of the run, ready for JSON."""
    counts: Counter[str] = Counter()
    matched = detected = objects = 0
    for frame in sets:
        if frame.stamp_ns in answers:
            boxes, real = _shown(answers[frame.stamp_ns]), _truth_at(truth, frame.stamp_ns)
            counts.update(CLASSES[label] for label in boxes.labels)
            matched += int((match_boxes(boxes, real) >= 0).sum())
            detected, objects = detected + len(boxes), objects + len(real)
    latency: dict[str, dict[str, float]] = {}
    for key, value in status.items():
        if key.startswith("latency_ms."):
            _, stage, percentile = key.split(".", 2)
            latency.setdefault(stage, {})[percentile] = float(value)
    resets = {k.partition(".")[2]: int(v) for k, v in status.items() if k.startswith("memory_resets.")}
    return {
        "sets_in_bag": len(sets),
        "sets_answered": sum(frame.stamp_ns in answers for frame in sets),
        "sets_unanswered": [frame.stamp_ns for frame in sets if frame.stamp_ns not in answers],
        "detections": {name: counts[name] for name in CLASSES},
        "score_threshold": THRESHOLD,
        "matching": {
            "distance_m": MATCH_DISTANCE,
            "range_m": RANGE,
            "objects": objects,
            "detections": detected,
            "matched": matched,
            "recall": round(matched / objects, 3) if objects else None,
            "precision": round(matched / detected, 3) if detected else None,
        },
        "latency_ms": latency,
        "memory_resets": resets,
        "engine": status.get("engine"),
        "package": status.get("package"),
        "package_sha256": status.get("package_sha256"),
    }


def _draw(
    path: Path, bag: BagReader, preset: TopicPreset, sets: list[FrameSet[None]], tree: TransformTree,
    answers: dict[int, Boxes], truth: dict[int, Boxes], status: dict[str, str],
) -> None:  # fmt: skip
    """The overview picture of the moment at which the most objects are found; of the fullest one where none is."""
    answered = [frame for frame in sets if frame.stamp_ns in answers]
    if not answered:
        raise DemoFailure("not one set was answered: see the messages above")

    def found(frame: FrameSet[None]) -> tuple[int, int]:
        real = _truth_at(truth, frame.stamp_ns)
        return int((match_boxes(_shown(answers[frame.stamp_ns]), real) >= 0).sum()), len(real)

    frame = max(answered, key=found)
    views = read_views(bag, preset, frame, tree, FRAMES)
    engine = status.get("engine", "unknown engine").split(",")[0]  # the rest is in summary.json
    title = f"{status.get('package', 'QD-BEV')} on {engine}"
    footer = (
        f"{bag.path.name}, stamp {frame.stamp_ns * 1e-9:.3f} s: the set in which most objects are found. "
        f"Boxes with a score of {THRESHOLD} or more; the tinted side is the front"
    )
    boxes, real = _shown(answers[frame.stamp_ns]), _truth_at(truth, frame.stamp_ns)
    picture = draw_overview(views, boxes, real, title, footer)
    done, data = cv2.imencode(".png", picture)
    if not done:
        raise DataError(f"cannot encode {path}")
    with whole_file(path) as temporary:
        temporary.write_bytes(data.tobytes())


def _tell(summary: dict[str, Any], out: Path) -> None:
    matching, latency = summary["matching"], summary["latency_ms"].get("total", {})
    print(
        f"\n{summary['sets_answered']} of {summary['sets_in_bag']} sets answered in {summary['wall_time_s']} s"
    )
    print(
        f"recall {matching['recall']}, precision {matching['precision']} at {MATCH_DISTANCE} m and score {THRESHOLD}"
    )
    print(f"last image to boxes: p50 {latency.get('p50')} ms, p99 {latency.get('p99')} ms")
    for name in ("detections.mcap", "overview.png", "summary.json"):
        print(out / name)


if __name__ == "__main__":
    sys.exit(main())
