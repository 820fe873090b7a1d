# SPDX-License-Identifier: Apache-2.0
"""Boxes: frames, the network's code and its decoding, against real annotations and the devkit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.boxes import Boxes, attribute_name, decode_boxes, encode_boxes
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.variant import CLASSES


def logits_of(scores: Any, labels: Any) -> Any:
    """(K, 10) logits that give each row its score for its label and next to nothing for the rest."""
    logits = np.full((len(scores), 10), -20.0)
    logits[np.arange(len(scores)), labels] = np.log(scores / (1 - scores))
    return logits


def test_a_box_in_global_coordinates_is_the_annotation_in_the_table(devkit: Any, real_frames: Any) -> None:
    """LIDAR_TOP -> global undoes what the reader did: centre, size, heading and the devkit's own velocity."""
    from nuscenes.eval.common.utils import quaternion_yaw
    from pyquaternion import Quaternion

    for frame in real_frames[::10]:
        boxes = frame.annotations.boxes.transformed(frame.lidar2global)
        records = {
            (a["instance_token"]): a
            for t in devkit.get("sample", frame.sample_token)["anns"]
            if (a := devkit.get("sample_annotation", t))
        }
        for i, instance in enumerate(frame.annotations.instances):
            record = records[instance]
            np.testing.assert_allclose(boxes.centers[i], record["translation"], atol=1e-6)
            np.testing.assert_allclose(boxes.sizes[i], record["size"])
            turn = boxes.yaws[i] - quaternion_yaw(Quaternion(record["rotation"]))
            assert abs(np.sin(turn)) < 2e-3  # the frame tilts a little, and yaw is an angle in its plane
            assert np.cos(turn) > 0
            expected = devkit.box_velocity(record["token"])[:2]
            np.testing.assert_allclose(boxes.velocities[i], expected, atol=2e-2)


def test_corners_are_the_devkits(devkit: Any, real_frames: Any) -> None:
    frame = real_frames[3]
    annotations = frame.annotations
    corners = annotations.boxes.transformed(frame.lidar2global).corners()
    for i, instance in enumerate(annotations.instances):
        tokens = devkit.get("sample", frame.sample_token)["anns"]
        token = next(t for t in tokens if devkit.get("sample_annotation", t)["instance_token"] == instance)
        expected = devkit.get_box(token).corners().T
        front = expected[:4]  # the devkit lists the four front corners first
        gap = np.linalg.norm(corners[i][:, None] - expected[None], axis=-1)
        assert gap.min(1).max() < 0.02
        ours_front = corners[i][[0, 1, 4, 5]]
        assert np.linalg.norm(ours_front[:, None] - front[None], axis=-1).min(1).max() < 0.02


def test_codes_of_real_boxes_decode_to_the_same_boxes(real_frames: Any) -> None:
    for frame in real_frames[::10]:
        boxes = frame.annotations.boxes
        boxes = boxes.select((np.abs(boxes.centers[:, :2]) < 60).all(-1))
        codes = encode_boxes(boxes.centers, boxes.sizes, boxes.yaws, boxes.velocities)
        scores = np.linspace(0.9, 0.1, len(boxes))
        decoded = decode_boxes(logits_of(scores, boxes.labels), codes).select(slice(len(boxes)))
        np.testing.assert_allclose(decoded.centers, boxes.centers, atol=1e-4)
        np.testing.assert_allclose(decoded.sizes, boxes.sizes, rtol=1e-5)
        np.testing.assert_allclose(np.cos(decoded.yaws - boxes.yaws), 1.0, atol=1e-6)
        np.testing.assert_allclose(decoded.velocities, np.nan_to_num(boxes.velocities), atol=1e-5)
        np.testing.assert_allclose(decoded.scores, scores, atol=1e-9)
        np.testing.assert_array_equal(decoded.labels, boxes.labels)


def test_the_code_holds_the_old_second_angle() -> None:
    """r = -yaw - pi/2: a car driving forward (yaw 90 degrees, along +y) has r = -pi."""
    code = encode_boxes(
        np.zeros((1, 3)), np.array([[2.0, 4.0, 1.5]]), np.array([np.pi / 2]), np.array([[0.0, 3.0]])
    )
    np.testing.assert_allclose(code[0], [0, 0, np.log(2), np.log(4), 0, np.log(1.5), 0, -1, 0, 3], atol=1e-6)


def test_unknown_velocities_are_trained_as_zero() -> None:
    code = encode_boxes(np.zeros((1, 3)), np.ones((1, 3)), np.zeros(1), np.full((1, 2), np.nan))
    np.testing.assert_array_equal(code[0, 8:], 0.0)


def test_decoding_keeps_the_best_300_pairs_and_drops_what_lies_outside() -> None:
    """A query may appear with several classes; the centre range is wider than the map."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 10))
    codes = np.zeros((200, 10))
    codes[:, 7] = 1.0
    boxes = decode_boxes(logits, codes)
    assert len(boxes) == 300
    assert (np.diff(boxes.scores) <= 0).all()
    assert boxes.scores[0] == pytest.approx(1 / (1 + np.exp(-logits.max())))
    codes[:, 0] = 61.3
    assert len(decode_boxes(logits, codes)) == 0
    codes[:, 0] = np.nan
    assert len(decode_boxes(logits, codes)) == 0


@pytest.mark.parametrize(
    ("name", "speed", "attribute"),
    [
        ("car", 5.0, "vehicle.moving"),
        ("car", 0.1, "vehicle.parked"),
        ("bus", 0.1, "vehicle.stopped"),
        ("bicycle", 3.0, "cycle.with_rider"),
        ("motorcycle", 0.0, "cycle.without_rider"),
        ("pedestrian", 1.0, "pedestrian.moving"),
        ("pedestrian", 0.0, "pedestrian.standing"),
        ("barrier", 0.0, ""),
        ("traffic_cone", 5.0, ""),
    ],
)
def test_attributes_follow_class_and_speed(name: str, speed: float, attribute: str) -> None:
    assert attribute_name(CLASSES.index(name), np.array([0.0, speed])) == attribute


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    good = Boxes(
        np.zeros((2, 3)), np.ones((2, 3)), np.zeros(2), np.zeros((2, 2)), np.ones(2), np.zeros(2, np.int64)
    )
    with pytest.raises(DataError, match=r"sizes has shape \(1, 3\)"):
        replace(good, sizes=np.ones((1, 3)))


def test_the_same_numbers_give_the_same_boxes_to_the_last_bit_wherever_they_lie_in_memory() -> None:
    rng = np.random.default_rng(2)
    logits, codes = rng.normal(size=(900, 10)), rng.normal(size=(900, 10))
    first, moved = decode_boxes(logits, codes).yaws, []
    for size in rng.integers(1, 5000, 300):
        moved.append(np.empty(size))  # so that the next arrays lie elsewhere
        np.testing.assert_array_equal(decode_boxes(logits, codes).yaws, first)
