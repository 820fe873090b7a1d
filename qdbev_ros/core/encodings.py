# SPDX-License-Identifier: Apache-2.0
"""Which raw picture encodings (sensor_msgs/Image.encoding) the node takes, and why it refuses the others."""

from __future__ import annotations

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
