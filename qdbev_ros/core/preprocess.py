# SPDX-License-Identifier: Apache-2.0
"""From a camera's picture to the network's input. Pictures are (height, width, 3) uint8 BGR, as OpenCV has them."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.variant import ImageSpec

Picture = NDArray[np.uint8]

_REDUCED_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def decode_reduction(width: int, height: int, image: ImageSpec) -> int:
    """1, 2, 4 or 8: how much smaller a (width, height) JPEG may be decoded and still cover the network's input."""
    if image.decode == "full":
        return 1
    return max(
        r for r in (1, 2, 4, 8) if r == 1 or (width // r >= image.width and height // r >= image.height)
    )


def decode_picture(data: bytes | memoryview, width: int, height: int, image: ImageSpec) -> Picture:
    """Decodes JPEG or PNG bytes of a (width, height) picture, reduced where the variant allows.

    Raises DataError where the bytes are no picture or the size isn't the calibration's.
    """
    reduction = decode_reduction(width, height, image)
    buffer = np.frombuffer(data, np.uint8)
    # EXIF orientation would silently turn the picture away from its calibration.
    flags = _REDUCED_FLAGS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    picture = cv2.imdecode(buffer, flags) if buffer.size else None
    if picture is None:
        raise DataError(f"{buffer.size} bytes that are no JPEG or PNG picture")
    expected = (-(-height // reduction), -(-width // reduction))
    if picture.shape[:2] != expected:
        h, w = picture.shape[0] * reduction, picture.shape[1] * reduction
        raise DataError(f"the picture is about {w}x{h} pixels, its CameraInfo says {width}x{height}")
    return picture  # type: ignore[return-value]


def resize_picture(picture: Picture, image: ImageSpec) -> NDArray[Any]:
    """(image.height, image.width, 3) BGR: bilinear in float32, or uint8 area averages where decoding is reduced.

    BEVFormer resizes what it has normalised already. A bilinear mean of normalised values is the normalised mean, as
    long as the mean isn't rounded to whole grey levels; hence float32.
    """
    size = (image.width, image.height)
    if picture.shape[1::-1] == size:
        return picture
    if image.decode == "reduced":
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return cv2.resize(picture.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)


def normalise_picture(
    picture: NDArray[Any], image: ImageSpec, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """(3, padded height, padded width) float32 from a picture of the input's size: (value - mean) / std, zero padding.

    `out` may hold the result; its padding must be zero already.
    """
    if picture.shape != (image.height, image.width, 3):
        raise DataError(
            f"a picture of shape {picture.shape} where {(image.height, image.width, 3)} was expected"
        )
    if out is None:
        out = np.zeros((3, image.padded_height, image.padded_width), np.float32)
    for channel in range(3):
        source = 2 - channel if image.color == "rgb" else channel
        plane = out[channel, : image.height, : image.width]
        np.subtract(picture[:, :, source], np.float32(image.mean[channel]), out=plane)
        plane *= np.float32(1.0 / image.std[channel])
    return out
