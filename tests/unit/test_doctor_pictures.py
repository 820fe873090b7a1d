# SPDX-License-Identifier: Apache-2.0
"""The doctor sees pictures as the node does: what turns or refuses one in the node does so here, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from qdbev_ros.core.encodings import raw_picture
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.preprocess import decode_picture
from qdbev_ros.core.variant import load_variant
from qdbev_ros.ros.observe import decode

WIDTH, HEIGHT = 64, 36
FULL = load_variant("tiny").image  # decodes at full size


def picture() -> Any:
    return np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def jpeg(orientation: int) -> bytes:
    """A JPEG whose EXIF says how it is to be turned."""
    data = cv2.imencode(".jpg", picture())[1].tobytes()
    tag = b"\x01\x12\x00\x03\x00\x00\x00\x01" + bytes([0, orientation, 0, 0])
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01" + tag + bytes(4)
    return data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_jpeg_lies_as_it_does_in_the_node_whatever_its_exif_says(orientation: int) -> None:
    data = jpeg(orientation)
    turned = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    expected = decode_picture(data, WIDTH, HEIGHT, FULL)
    assert np.array_equal(turned, expected) == (orientation == 1), "the EXIF of this test is read"
    np.testing.assert_array_equal(decode(SimpleNamespace(data=data, format="jpeg")), expected)


@pytest.mark.parametrize("encoding", ["bgr8", "rgb8", "bgra8", "rgba8"])
def test_a_raw_picture_whose_last_row_is_not_padded_is_taken_as_in_the_node(encoding: str) -> None:
    order = [encoding.index(colour) for colour in "bgr"]
    channels, step = len(encoding) - 1, 300
    rows = np.zeros((HEIGHT, step), np.uint8)
    pixels = rows[:, : channels * WIDTH].reshape(HEIGHT, WIDTH, channels)
    pixels[..., order] = picture()
    data = rows.tobytes()[: step * (HEIGHT - 1) + channels * WIDTH]
    message = SimpleNamespace(data=data, width=WIDTH, height=HEIGHT, step=step, encoding=encoding)
    assert raw_picture(data, WIDTH, HEIGHT, step, encoding).pixels.shape == (HEIGHT, WIDTH, channels)
    np.testing.assert_array_equal(decode(message), picture())
    message.data = data[:-1]
    with pytest.raises(DataError, match=f"are no {encoding} picture of 64x36"):
        decode(message)
