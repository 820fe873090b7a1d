# SPDX-License-Identifier: Apache-2.0
"""Makes the pictures of the views in docs/pictures: one moment of the demo bag, as each viewer shows it.

overlay: ~/overlay/compressed as the node publishes it. rviz: what `rviz:=true` shows (ROS 2's rviz2; Debian: xvfb,
imagemagick). rerun: what `qdbev rerun` writes, in Rerun's viewer (Debian: xvfb, xauth, mesa-vulkan-drivers). foxglove:
config/foxglove_layout.json in a Lichtblick that is served at --app (Debian: chromium, chromium-driver).

Example: python scripts/view_pictures.py overlay rviz rerun
Example: python scripts/view_pictures.py foxglove --app http://localhost:8080
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from qdbev_msgs.msg import DetectedObjectArray
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage

from qdbev_ros.bringup import DETECTOR
from qdbev_ros.core.errors import ConfigError, QdbevError
from qdbev_ros.core.files import whole_file
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.calibration_file import RigCalibration
from qdbev_ros.ros.domain import free_domain
from qdbev_ros.ros.messages import stamp_to_ns
from qdbev_ros.ros.presets import config_folder, load_preset
from qdbev_ros.ros.recording import read_sets
from qdbev_ros.ros.rerun_export import export

VIEWS = ("overlay", "rviz", "rerun", "foxglove")
WIDTH = 1600
RVIZ_SIZE = "1800x1000"  # as config/qdbev.rviz has it
PATIENCE_S = 900.0
VIEWER_S = 180.0
DRAWN_S = 0.3  # RViz draws what it got, before the next set comes
SETTLE_S = 8.0  # a page draws what it was given, without a GPU
SET_NS = 300_000_000  # longer than the pictures of a set are apart, shorter than sets are
# Patient, and one set at a time: the picture is the same however slow the machine is.
NODE = {"image_reliability": "reliable", "sync_deadline": 10.0, "tf_timeout": 10.0, "overlay_rate": 60.0}
PLAYER = {"answers": f"/{DETECTOR}/detections", "max_ahead": 1, "linger": 60.0, "wait": 300.0}


@dataclass(frozen=True)
class Scene:
    """What is shown: the answer of `model` to the set of `stamp`, in ns, of `bag`."""

    model: Path
    bag: Path
    stamp: int


class Moment(BagReader):
    """A bag of which only transforms and the messages of one set are read."""

    def __init__(self, path: Path, stamp: int) -> None:
        super().__init__(path)
        self._stamp = stamp

    def messages(self, topics: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
        for topic, logged, message in super().messages(topics):
            stamp = stamp_to_ns(message.header.stamp) if hasattr(message, "header") else logged
            if topic.startswith("/tf") or 0 <= self._stamp - stamp < SET_NS:
                yield topic, logged, message


def start(module: str, **parameters: Any) -> subprocess.Popen[bytes]:
    words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    return subprocess.Popen([sys.executable, "-m", f"qdbev_ros.{module}", "--ros-args", *words])


def wait_for(kind: Any, topic: str, stamp: int, running: list[subprocess.Popen[bytes]]) -> Any:
    """The first message of the stamp or later while all of `running` run. Raises ConfigError where none comes."""
    rclpy.init()
    node = rclpy.create_node("view_pictures")
    found: list[Any] = []

    def take(message: Any) -> None:
        if stamp_to_ns(message.header.stamp) >= stamp:
            found.append(message)

    node.create_subscription(kind, topic, take, QoSProfile(depth=5))
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not found and time.monotonic() < deadline and all(p.poll() is None for p in running):
            rclpy.spin_once(node, timeout_sec=0.1)
    finally:
        rclpy.shutdown()
    if not found:
        raise ConfigError(f"nothing of the moment came on {topic}, see above")
    return found[0]


def end(running: list[subprocess.Popen[bytes]]) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait()


def overlay(scene: Scene) -> bytes:
    """The first overlay of the stamp or later while the node runs over the bag."""
    os.environ["ROS_DOMAIN_ID"] = str(free_domain())
    running = [
        start("detector_node", model=scene.model, **NODE), start("bag_player_node", bag=scene.bag, **PLAYER)
    ]  # fmt: skip
    try:
        message = wait_for(CompressedImage, f"/{DETECTOR}/overlay/compressed", scene.stamp, running)
    finally:
        end(running)
    return message.data.tobytes()


def rviz(scene: Scene) -> bytes:
    """RViz, as everything together starts it, on a virtual screen of its size, shortly after the answer."""
    program("rviz2", "it comes with ROS 2")
    grab, screen = program("import", "Debian: imagemagick"), program("Xvfb", "Debian: xvfb")
    os.environ["ROS_DOMAIN_ID"] = str(free_domain())
    display = subprocess.Popen(
        [screen, "-displayfd", "1", "-screen", "0", f"{RVIZ_SIZE}x24"], stdout=subprocess.PIPE
    )
    running = [display]
    try:
        assert display.stdout
        environment = {**os.environ, "DISPLAY": f":{display.stdout.readline().decode().strip()}"}
        words = [f"model:={scene.model}", f"bag:={scene.bag}", "rviz:=true"]
        running.insert(
            0, subprocess.Popen([sys.executable, "-m", "qdbev_ros.bringup", *words], env=environment)
        )
        wait_for(DetectedObjectArray, f"/{DETECTOR}/objects", scene.stamp, running)
        time.sleep(DRAWN_S)
        return subprocess.run(
            [grab, "-window", "root", "png:-"], env=environment, stdout=subprocess.PIPE, check=True
        ).stdout
    finally:
        end(running)


def record(scene: Scene, folder: Path) -> Path:
    """A recording, with the pictures, of the node over the whole bag."""
    out = folder / "demo.mcap"
    words = [f"model:={scene.model}", f"bag:={scene.bag}", f"record:={out}", "record_images:=true"]
    if subprocess.run([sys.executable, "-m", "qdbev_ros.bringup", *words]).returncode or not out.exists():
        raise ConfigError("the node could not be recorded, see above")
    return out


def rerun(scene: Scene, folder: Path) -> bytes:
    """Rerun's viewer, which takes the picture itself, on a virtual screen and a Vulkan driver for the processor."""
    drivers = sorted(Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
    if not drivers:
        raise ConfigError("no Vulkan driver for the processor (Debian: mesa-vulkan-drivers)")
    screen = program("xvfb-run", "Debian: xvfb, xauth")
    shown, picture = folder / "demo.rrd", folder / "rerun.png"
    with Moment(scene.bag, scene.stamp) as bag, Moment(record(scene, folder), scene.stamp) as answers:
        export(bag, answers, load_preset("nuscenes"), RigCalibration(), DETECTOR, 0.3, shown)
    viewer = [sys.executable, "-m", "rerun", str(shown), "--port", "0", "--renderer", "vulkan"]
    viewer += ["--window-size", f"{WIDTH}x1100", "--screenshot-to", str(picture)]
    # A home of its own: no settings of former sessions.
    environment = {**os.environ, "VK_ICD_FILENAMES": str(drivers[0]), "HOME": str(folder)}
    done = subprocess.run(
        [screen, "-a", "-s", "-screen 0 1920x1200x24", *viewer],
        env=environment, capture_output=True, text=True, timeout=VIEWER_S,
    )  # fmt: skip
    if not picture.exists():  # the exit code says nothing: the viewer panics when it has taken the picture
        raise ConfigError(f"Rerun's viewer took no picture: {' '.join(done.stderr.split())[-300:]}")
    return picture.read_bytes()


def foxglove(scene: Scene, folder: Path, app: str) -> bytes:
    """A served Lichtblick in a browser without a window, driven by WebDriver."""
    driver = program("chromedriver", "Debian: chromium, chromium-driver")
    recording = record(scene, folder)
    with BagReader(recording) as bag:
        answers = bag.messages([f"/{DETECTOR}/detections"])
        logged = next(logged for _, logged, m in answers if stamp_to_ns(m.header.stamp) == scene.stamp)
    then = datetime.fromtimestamp(logged / 1e9 + 0.1, timezone.utc)
    running = subprocess.Popen(
        [driver, "--port=0"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout
    port = next(line.split()[-1].rstrip(".") for line in running.stdout if "started successfully" in line)
    address = f"http://127.0.0.1:{port}/session"

    def ask(path: str, **words: Any) -> Any:
        request = urllib.request.Request(address + path, json.dumps(words).encode() if words else None)
        with urllib.request.urlopen(request, timeout=VIEWER_S) as reply:
            return json.load(reply)["value"]

    try:
        switches = ["--headless=new", "--no-sandbox", f"--window-size={WIDTH},1140", "--hide-scrollbars"]
        switches += ["--enable-unsafe-swiftshader", "--disable-background-networking"]
        options = {"goog:chromeOptions": {"args": [*switches, f"--user-data-dir={folder / 'browser'}"]}}
        address += "/" + ask("", capabilities={"alwaysMatch": options})["sessionId"]
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        ask("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params=dark)
        ask("/url", url=f"{app}/?time={then:%Y-%m-%dT%H:%M:%S.%fZ}")
        time.sleep(SETTLE_S)
        found = ask("/element", using="css selector", value="[data-puppeteer-file-upload]")
        files = "\n".join([str(config_folder() / "foxglove_layout.json"), str(recording)])
        ask(f"/element/{next(iter(found.values()))}/value", text=files)
        time.sleep(SETTLE_S)
        body = ask("/element", using="css selector", value="body")
        ask(f"/element/{next(iter(body.values()))}/value", text="[")  # closes the side bar
        time.sleep(SETTLE_S)
        return base64.b64decode(ask("/screenshot"))
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        running.wait()


def program(name: str, source: str) -> str:
    """Where a program is. Raises ConfigError with what brings it."""
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"there is no {name} ({source})")
    return path


def as_jpeg(picture: bytes) -> bytes:
    """A PNG as a JPEG that is WIDTH wide."""
    pixels = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    height = round(pixels.shape[0] * WIDTH / pixels.shape[1])
    small = cv2.resize(pixels, (WIDTH, height), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("views", nargs="+", choices=VIEWS, metavar="VIEW", help=", ".join(VIEWS))
    parser.add_argument("--model", type=Path, default=Path("demo/nano.qdbev"), help="default: %(default)s")
    parser.add_argument("--bag", type=Path, default=Path("demo/town.mcap"), help="default: %(default)s")
    parser.add_argument("--at", type=float, default=13.5, help="seconds into the bag (default: %(default)s)")
    parser.add_argument("--app", metavar="ADDRESS", help="of a served Lichtblick")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="default: %(default)s")
    args = parser.parse_args(words)
    try:
        if "foxglove" in args.views and not args.app:
            raise ConfigError("foxglove needs --app, the address of a served Lichtblick")
        with BagReader(args.bag) as bag:
            begin = read_sets(bag, load_preset("nuscenes"))[0].stamp_ns
        scene = Scene(args.model, args.bag, begin + round(args.at * 1e9))
        for view in args.views:
            with tempfile.TemporaryDirectory() as folder:
                if view == "overlay":
                    picture = overlay(scene)
                elif view == "rviz":
                    picture = as_jpeg(rviz(scene))
                elif view == "rerun":
                    picture = as_jpeg(rerun(scene, Path(folder)))
                else:
                    picture = as_jpeg(foxglove(scene, Path(folder), args.app))
            with whole_file(args.out / f"{view}.jpg") as temporary:
                temporary.write_bytes(picture)
            print(args.out / f"{view}.jpg")
    except QdbevError as error:
        print(f"view_pictures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
