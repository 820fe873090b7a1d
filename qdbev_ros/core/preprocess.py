# SPDX-License-Identifier: Apache-2.0
"""From a camera's picture to the network's input. Pictures are (height, width, 3) uint8 BGR, as OpenCV has them.

The input is normalised float32, or, for an engine that takes it and pictures that stay whole numbers, its codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.variant import ImageSpec

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class RawPicture:
    """A picture as a driver sends it: pixels (height, width, 3 or 4) uint8; blue first, or red."""

    pixels: Picture
    red_first: bool = False


_STRIP = 50  # rows of a result that are made at a time
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


def decode_bytes(data: bytes | memoryview, reduction: int = 1) -> Picture:
    """The picture of JPEG or PNG bytes, 1, 2, 4 or 8 times smaller. Raises DataError where they are none."""
    buffer = np.frombuffer(data, np.uint8)
    # EXIF orientation would silently turn the picture away from its calibration.
    flags = _REDUCED_FLAGS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        picture = cv2.imdecode(buffer, flags) if buffer.size else None
    except cv2.error:  # a header that says more pixels than OpenCV reads
        picture = None
    if picture is None:
        raise DataError(f"{buffer.size} bytes that are no JPEG or PNG picture")
    return picture  # type: ignore[return-value]


def decode_picture(data: bytes | memoryview, width: int, height: int, image: ImageSpec) -> Picture:
    """Decodes JPEG or PNG bytes of a (width, height) picture, reduced where the variant allows.

    Raises DataError where the bytes are no picture or the size isn't the calibration's.
    """
    reduction = decode_reduction(width, height, image)
    picture = decode_bytes(data, reduction)
    expected = (-(-height // reduction), -(-width // reduction))
    if picture.shape[:2] != expected:
        h, w = picture.shape[0] * reduction, picture.shape[1] * reduction
        raise DataError(f"the picture is about {w}x{h} pixels, its CameraInfo says {width}x{height}")
    return picture


def shrink_raw(picture: RawPicture, image: ImageSpec) -> NDArray[Any]:
    """A raw picture at the size of the network's input, as resize_picture has it. Colours are put in order last, when
    there are few pixels left.

    Where decoding is reduced it is halved as often as a JPEG would be decoded smaller: OpenCV does that ten times as
    fast as an odd scale, and it is what training sees.
    """
    pixels = picture.pixels
    height, width = pixels.shape[:2]
    reduction = decode_reduction(width, height, image)
    while reduction > 1 and not (height % 2 or width % 2):
        height, width, reduction = height // 2, width // 2, reduction // 2
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    small = resize_picture(pixels, image)
    if picture.red_first:
        return cv2.cvtColor(small, cv2.COLOR_RGB2BGR if small.shape[2] == 3 else cv2.COLOR_RGBA2BGR)
    return small if small.shape[2] == 3 else cv2.cvtColor(small, cv2.COLOR_BGRA2BGR)


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
    if picture.shape[:2] == (2 * image.height, 2 * image.width):
        return _halved(picture)
    return cv2.resize(picture.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)


def _halved(picture: Picture) -> NDArray[np.float32]:
    """The same at half the size, where no row is read for two others: strips of it stay in the cache."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    out = np.empty((height, width, *picture.shape[2:]), np.float32)
    for top in range(0, height, _STRIP):
        strip = out[top : top + _STRIP]
        pixels = picture[2 * top : 2 * (top + len(strip))].astype(np.float32)
        cv2.resize(pixels, (width, len(strip)), dst=strip, interpolation=cv2.INTER_LINEAR)
    return out


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


@dataclass(frozen=True)
class PictureGrid:
    """The integers that a network takes for its pictures: a code stands for (code - zero) * step, `low` to `high`."""

    step: float
    zero: int
    low: int
    high: int

    def table(self, image: ImageSpec) -> NDArray[np.uint8]:
        """(256, 3): the code of every grey level, for the channels of a BGR picture.

        What normalise_picture computes, divided and rounded as QuantizeLinear does it: the same codes to the bit.
        Padding is `zero`, since BEVFormer pads behind the normalisation: it stands for the mean colour.
        """
        columns = []
        for channel in range(3):
            grey = np.arange(256, dtype=np.uint8)
            value = np.subtract(grey, np.float32(image.mean[channel])) * np.float32(1.0 / image.std[channel])
            codes = np.rint(value.astype(np.float32) / np.float32(self.step)) + self.zero
            columns.append(np.clip(codes, self.low, self.high).astype(np.uint8))
        return np.stack(columns[::-1] if image.color == "rgb" else columns, axis=1)


def encode_picture(
    picture: Picture, image: ImageSpec, table: NDArray[np.uint8], out: NDArray[np.uint8]
) -> None:
    """Fills out (3, padded height, padded width) with the codes of a picture of the input's size.

    The padding of `out` must hold the grid's zero already. Raises DataError where the picture's size is another.
    """
    if picture.shape != (image.height, image.width, 3) or picture.dtype != np.uint8:
        raise DataError(
            f"a {picture.dtype} picture of shape {picture.shape} where {(image.height, image.width, 3)} was expected"
        )
    codes = cv2.LUT(picture, table[None])
    for channel in range(3):
        source = 2 - channel if image.color == "rgb" else channel
        # Straight into its place; numpy's strided copy takes twice as long.
        cv2.extractChannel(codes, source, out[channel, : image.height, : image.width])
