# SPDX-License-Identifier: Apache-2.0
"""The node's life: loops, resets, signals, other kinds of input."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rosbags.typesys import Stores, get_typestore
from std_srvs.srv import Trigger

from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.diagnostics import PIPELINE
from qdbev_ros.ros.recording import read_detections, read_status, stamp_ns
from tests.ros.drive import PERIOD_NS, START_NS, edit_bag
from tests.ros.graph import Graph, Running

NODE = "/qdbev_detector"
STAMPS = [START_NS + i * PERIOD_NS for i in range(4)]
TYPES = get_typestore(Stores.ROS2_JAZZY).types


def replay(graph: Graph, package: Path, bag: Path, out: Path, *more: str) -> Running:
    arguments = (f"model:={package}", f"bag:={bag}", f"record:={out}", "queue_size:=4")
    return graph.start("qdbev_ros.bringup", *arguments, *more)


def test_a_looped_bag_resets_the_memory_and_repeats_its_answers(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    """Were anything of the old pass remembered, the first answers of the new one would differ."""
    out = tmp_path / "loop.mcap"
    run = replay(graph, package, short_bag, out, "loop:=true")
    run.wait_for("pass 3")
    assert run.stop() == 0, run.output
    answers: dict[int, list[list[float]]] = {}
    with BagReader(out) as bag:
        for _, _, message in bag.messages([f"{NODE}/detections"]):
            scores = [d.results[0].hypothesis.score for d in message.detections]
            answers.setdefault(stamp_ns(message.header), []).append(scores)
        status = read_status(bag, PIPELINE)
    assert set(answers) == set(STAMPS)
    for passes in answers.values():
        assert len(passes) >= 2
        assert all(scores == passes[0] for scores in passes)
    assert int(status["memory_resets.time_back"]) >= 1
    assert int(status["sync_resets.time_back"]) >= 1


def test_the_reset_service_empties_the_memory(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    out = tmp_path / "reset.mcap"
    node = graph.node("detector_node", model=package)
    node.wait_for("ready")
    context = Context()
    rclpy.init(context=context, domain_id=graph.domain)
    try:
        caller = rclpy.create_node("caller", context=context)
        client = caller.create_client(Trigger, f"{NODE}/reset_memory")
        assert client.wait_for_service(10)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(caller)
        future = client.call_async(Trigger.Request())
        executor.spin_until_future_complete(future, 10)
        assert future.result().success
        executor.shutdown()
        caller.destroy_node()
    finally:
        context.try_shutdown()
    recorder = graph.node("recorder_node", output=out, topics="/diagnostics")
    graph.node("bag_player_node", bag=short_bag, rate=4.0, linger=2.0).wait()
    assert recorder.stop() == 0
    with BagReader(out) as bag:
        assert read_status(bag, PIPELINE)["memory_resets.service"] == "1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_node_cleanly(graph: Graph, package: Path, number: int) -> None:
    node = graph.node("detector_node", model=package)
    node.wait_for("ready")
    assert node.stop(number) == 0
    assert "Traceback" not in node.output


def test_a_signal_in_the_middle_of_a_bag_ends_everything_cleanly(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    run = replay(graph, package, short_bag, tmp_path / "cut.mcap", "loop:=true")
    run.wait_for("playing")
    assert run.stop() == 0
    assert "Traceback" not in run.output
    assert (tmp_path / "cut.mcap").exists()


def test_raw_images(graph: Graph, package: Path, short_bag: Path, tmp_path: Path) -> None:
    def decode(topic: str, message: Any) -> Any:
        if not topic.endswith("compressed"):
            return message
        picture = cv2.cvtColor(cv2.imdecode(message.data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        height, width = picture.shape[:2]
        kind = TYPES["sensor_msgs/msg/Image"]
        return kind(message.header, height, width, "rgb8", 0, 3 * width, picture.reshape(-1))

    compressed = edit_bag(short_bag, tmp_path / "decoded.mcap", decode)
    raw = rename_topics(compressed, tmp_path / "raw.mcap")
    out = tmp_path / "answers.mcap"
    run = replay(graph, package, raw, out, "preset:=raw")
    assert run.wait() == 0, run.output
    with BagReader(out) as bag:
        assert sorted(read_detections(bag, "qdbev_detector")) == STAMPS


def rename_topics(source: Path, out: Path) -> Path:
    """The bag with image topics as preset raw names them."""
    from qdbev_ros.ros.bags import BagWriter

    with BagReader(source) as bag:
        writer = BagWriter(out)
        names = {topic: topic.replace("_compressed", "") for topic in bag.types}
        for topic, msgtype in bag.types.items():
            writer.add_topic(names[topic], msgtype, latched=topic == "/tf_static")
        for topic, stamp, data in bag.raw():
            writer.write(names[topic], stamp, data)
        writer.close()
    return out


def test_odometry_stands_in_for_the_motion_on_tf_where_the_mountings_may_be_too(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    """Some converters repeat the sensors' transforms on /tf and have no /tf_static."""
    with BagReader(short_bag) as source:
        ((_, _, mountings),) = source.messages(["/tf_static"])

    def repeat(topic: str, message: Any) -> Any:
        if topic == "/tf":
            stamp = message.transforms[0].header.stamp
            message.transforms = copy.deepcopy(mountings.transforms)
            for transform in message.transforms:
                transform.header.stamp = stamp
        return None if topic == "/tf_static" else message

    bag = edit_bag(short_bag, tmp_path / "odom.mcap", repeat)
    params = tmp_path / "params.yaml"
    params.write_text("qdbev_detector: {ros__parameters: {ego_motion: odometry}}")
    out = tmp_path / "answers.mcap"
    run = replay(graph, package, bag, out, f"params:={params}")
    assert run.wait() == 0, run.output
    with BagReader(out) as answers:
        assert sorted(read_detections(answers, "qdbev_detector")) == STAMPS
        assert "memory_resets.no_ego_motion" not in read_status(answers, PIPELINE)


def test_the_players_clock_is_the_bags_time(graph: Graph, short_bag: Path, tmp_path: Path) -> None:
    out = tmp_path / "clock.mcap"
    recorder = graph.node("recorder_node", output=out, topics="/clock /odom")
    player = graph.node("bag_player_node", bag=short_bag, clock="true", wait_for="/odom", linger=0.5)
    assert player.wait() == 0
    assert recorder.stop() == 0
    with BagReader(out) as bag:
        times = np.array(
            [m.clock.sec * 10**9 + m.clock.nanosec for _, _, m in bag.messages(["/clock"])], np.int64
        )
    assert len(times) > 20
    assert (np.diff(times) > 0).all()
    assert times[0] >= START_NS - 10**8
    assert times[-1] <= STAMPS[-1] + 10**8
