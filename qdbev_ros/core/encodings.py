# SPDX-License-Identifier: Apache-2.0
"""Raw pictures (sensor_msgs/Image) as arrays; which encodings the node takes, and why it refuses the others."""

from __future__ import annotations

from typing import Any

import numpy as np

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.preprocess import Picture, RawPicture

COLOUR = ("bgr8", "rgb8", "bgra8", "rgba8")


def encoding_problem(encoding: str) -> str | None:
    """Why pictures of this encoding are refused and what to do; None for those that are taken.

    Bayer is refused although OpenCV could turn it into colours: it is what leaves the sensor, so it was not rectified.
    """
    if encoding in COLOUR:
        return None
    taken = ", ".join(COLOUR)
    if encoding.startswith("bayer"):
        return f"encoding {encoding!r} is raw sensor data: debayer and rectify it first (image_proc); taken: {taken}"
    if encoding.startswith(("mono", "8UC1", "16UC1", "32FC1")):
        return f"encoding {encoding!r} has no colours, which the model needs; taken: {taken}"
    if encoding in ("8UC3", "8UC4"):
        return f"encoding {encoding!r} does not say the order of its colours: publish one of {taken}"
    return f"encoding {encoding!r} is not taken: convert to one of {taken}"


def raw_picture(data: Any, width: int, height: int, step: int, encoding: str) -> RawPicture:
    """The pixels as they lie in `data`, a buffer; nothing is copied. Raises DataError where they cannot be used."""
    if problem := encoding_problem(encoding):
        raise DataError(problem)
    channels = 4 if "a" in encoding else 3
    buffer = np.frombuffer(data, np.uint8)
    if step < channels * width or len(buffer) < step * (height - 1) + channels * width or not width * height:
        raise DataError(
            f"{len(buffer)} bytes are no {encoding} picture of {width}x{height} with rows of {step} bytes"
        )
    pixels: Picture = np.ndarray((height, width, channels), np.uint8, buffer, strides=(step, channels, 1))
    return RawPicture(pixels, red_first=encoding.startswith("rgb"))
