# SPDX-License-Identifier: Apache-2.0
"""From picture bytes to the network's input."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from qdbev_ros.core.encodings import raw_picture
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.preprocess import (
    PictureGrid,
    RawPicture,
    decode_picture,
    decode_reduction,
    encode_picture,
    normalise_picture,
    resize_picture,
    shrink_raw,
)
from qdbev_ros.core.variant import load_variant

NANO, TINY, SMALL = (load_variant(name).image for name in ("nano", "tiny", "small"))


def jpeg(width: int, height: int, bgr: tuple[int, int, int] = (30, 60, 90)) -> bytes:
    picture = np.full((height, width, 3), bgr, np.uint8)
    return cv2.imencode(".jpg", picture)[1].tobytes()


@pytest.mark.parametrize(
    ("width", "height", "reduction"),
    [(1600, 900, 4), (1280, 720, 4), (800, 450, 2), (400, 225, 1), (160, 90, 1)],
)
def test_nano_decodes_jpegs_at_the_smallest_scale_that_covers_its_input(
    width: int, height: int, reduction: int
) -> None:
    assert decode_reduction(width, height, NANO) == reduction
    decoded = decode_picture(jpeg(width, height), width, height, NANO)
    assert decoded.shape == (-(-height // reduction), -(-width // reduction), 3)
    assert resize_picture(decoded, NANO).shape == (144, 256, 3)


def test_reduced_decoding_shows_the_same_picture_at_the_same_place(real_frames: Any) -> None:
    """A reduced decode is area averaging: within a few grey levels of averaging the full picture, not shifted."""
    camera = real_frames[0].cameras[0]
    data = camera.read()
    fast = resize_picture(decode_picture(data, 1600, 900, NANO), NANO).astype(np.float32)
    full = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    exact = cv2.resize(full, (256, 144), interpolation=cv2.INTER_AREA).astype(np.float32)
    assert np.abs(fast - exact).mean() < 2.0
    for shift in (-1, 1):
        assert np.abs(fast - exact).mean() < 0.5 * np.abs(fast - np.roll(exact, shift, axis=1)).mean()


def test_an_exif_orientation_does_not_turn_the_picture_away_from_its_calibration() -> None:
    plain = jpeg(160, 90)
    header = b"Exif\x00\x00II*\x00\x08\x00\x00\x00"
    orientation_6 = b"\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"  # "turn me by 90 degrees"
    exif = header + orientation_6 + bytes(4)
    turned = plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:]
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (
        160,
        90,
        3,
    )  # it would turn
    assert decode_picture(turned, 160, 90, NANO).shape == (90, 160, 3)


def test_tiny_gets_rgb_with_imagenet_statistics_and_zero_padding() -> None:
    """BEVFormer-tiny: 450 x 800 padded to 480 x 800, red first."""
    picture = np.zeros((450, 800, 3), np.uint8)
    picture[:, :, 2] = 200  # OpenCV's red
    out = normalise_picture(picture, TINY)
    assert out.shape == (3, 480, 800)
    np.testing.assert_allclose(out[0, :450], (200 - 123.675) / 58.395, rtol=1e-5)
    np.testing.assert_allclose(out[2, :450], -103.53 / 57.375, rtol=1e-5)
    assert not out[:, 450:].any()


@pytest.mark.parametrize(("width", "height", "channels"), [(1600, 900, 3), (34, 218, 3), (12, 6, 4)])
def test_a_picture_that_is_halved_in_strips_is_the_whole_one_halved(
    width: int, height: int, channels: int
) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels)).astype(np.uint8)
    spec = replace(TINY, width=width // 2, height=height // 2)
    whole = cv2.resize(pixels.astype(np.float32), (spec.width, spec.height), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resize_picture(pixels, spec), whole)


def test_resizing_before_normalising_gives_what_bevformer_gets_the_other_way_round(real_frames: Any) -> None:
    picture = decode_picture(real_frames[0].cameras[0].read(), 1600, 900, SMALL)
    normalised = picture.astype(np.float32) - np.array(SMALL.mean, np.float32)
    theirs = cv2.resize(normalised, (1280, 720), interpolation=cv2.INTER_LINEAR)
    ours = normalise_picture(resize_picture(picture, SMALL), SMALL)[:, :720]
    np.testing.assert_allclose(ours, theirs.transpose(2, 0, 1), atol=1e-4)


def test_small_gets_bgr_with_the_mean_taken_off_only() -> None:
    picture = np.zeros((720, 1280, 3), np.uint8)
    picture[:, :, 0] = 200  # blue
    out = normalise_picture(picture, SMALL)
    assert out.shape == (3, 736, 1280)
    np.testing.assert_allclose(out[0, 0, 0], 200 - 103.53, rtol=1e-5)
    np.testing.assert_allclose(out[2, 0, 0], -123.675, rtol=1e-5)


def huge_png() -> bytes:
    """A PNG whose header says more pixels than OpenCV reads."""
    data = bytearray(cv2.imencode(".png", np.zeros((9, 16, 3), np.uint8))[1].tobytes())
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    "data", [b"", b"not a picture", jpeg(160, 90)[:40], huge_png()], ids=["empty", "text", "cut", "huge"]
)
def test_bytes_that_are_no_picture_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="no JPEG or PNG"):
        decode_picture(data, 160, 90, NANO)


def test_a_picture_of_another_size_than_its_calibration_is_refused() -> None:
    with pytest.raises(DataError, match="800x450 pixels, its CameraInfo says 1600x900"):
        decode_picture(jpeg(800, 450), 1600, 900, replace(NANO, decode="full"))


def test_a_png_is_decoded_too() -> None:
    data = cv2.imencode(".png", np.zeros((225, 400, 3), np.uint8))[1].tobytes()
    assert decode_picture(data, 400, 225, NANO).shape == (225, 400, 3)


@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("grid", [PictureGrid(0.0277, 128, 0, 255), PictureGrid(0.08, 128, 96, 159)])
def test_codes_are_the_normalised_picture_rounded_to_the_grid(color: str, grid: PictureGrid) -> None:
    """Every grey level in every channel, ties and cut-off values among them; padding stands for the mean colour."""
    image = replace(NANO, height=16, width=48, pad_divisor=32, color=color)
    picture = (
        np.random.default_rng(3).permuted(np.repeat(np.arange(256, dtype=np.uint8), 9)).reshape(16, 48, 3)
    )
    codes = np.full((3, 32, 64), grid.zero, np.uint8)
    encode_picture(picture, image, grid.table(image), codes)
    exact = normalise_picture(picture, image) / np.float32(grid.step)
    wanted = np.clip(np.rint(exact) + grid.zero, grid.low, grid.high)
    np.testing.assert_array_equal(codes, wanted)


def test_a_picture_that_is_not_bytes_of_the_inputs_size_has_no_codes() -> None:
    table = PictureGrid(0.03, 128, 0, 255).table(NANO)
    out = np.zeros((3, 144, 256), np.uint8)
    for picture in (np.zeros((144, 256, 3), np.float32), np.zeros((256, 144, 3), np.uint8)):
        with pytest.raises(DataError, match=r"\(144, 256, 3\) was expected"):
            encode_picture(picture, NANO, table, out)


@pytest.mark.parametrize("spare", [0, 32])
@pytest.mark.parametrize("encoding", ["bgr8", "rgb8", "bgra8", "rgba8"])
@pytest.mark.parametrize("image", [NANO, TINY], ids=["nano", "tiny"])
def test_raw_pictures_of_any_order_and_row_length_become_the_same_input(
    image: Any, encoding: str, spare: int
) -> None:
    bgr = np.random.default_rng(6).integers(0, 256, (180, 320, 3), np.uint8)
    order = ["bgra".index(channel) for channel in encoding.removesuffix("8")]
    channels = np.dstack([bgr, np.full((180, 320), 7, np.uint8)])[:, :, order]
    rows = np.zeros((180, 320 * len(order) + spare), np.uint8)
    rows[:, : 320 * len(order)] = channels.reshape(180, -1)
    raw = raw_picture(rows.tobytes(), 320, 180, rows.shape[1], encoding)
    # OpenCV adds the last bit of a float in another order for other places of a channel.
    np.testing.assert_allclose(shrink_raw(raw, image), shrink_raw(RawPicture(bgr), image), atol=1e-3)
    if image.decode == "full":
        np.testing.assert_allclose(shrink_raw(raw, image), resize_picture(bgr, image), atol=1e-3)


def test_the_pixels_of_a_raw_picture_stay_where_they_are() -> None:
    data = bytearray(160 * 90 * 3)
    raw = raw_picture(data, 160, 90, 480, "bgr8")
    assert np.shares_memory(raw.pixels, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(("size", "step"), [(480 * 90 - 1, 480), (480 * 90, 479), (0, 480)])
def test_a_raw_picture_with_too_few_bytes_is_refused(size: int, step: int) -> None:
    with pytest.raises(DataError, match="are no bgr8 picture of 160x90 with rows of"):
        raw_picture(bytes(size), 160, 90, step, "bgr8")


def test_raw_pictures_shrink_to_what_jpegs_decode_to(real_frames: Any) -> None:
    """Training sees JPEGs decoded at a quarter: halving twice is nearer to that than one step of any width."""
    data = real_frames[0].cameras[0].read()
    small = resize_picture(decode_picture(data, 1600, 900, NANO), NANO).astype(int)
    full = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    halved = np.abs(shrink_raw(RawPicture(full), NANO).astype(int) - small)  # type: ignore[arg-type]
    at_once = np.abs(cv2.resize(full, (256, 144), interpolation=cv2.INTER_AREA).astype(int) - small)
    assert halved.mean() < 0.5 < at_once.mean()
    assert halved.max() <= 4
