# SPDX-License-Identifier: Apache-2.0
"""The overview picture: six camera images with projected boxes beside the bird's-eye view. Pictures are BGR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.geometry import Array, CameraCalibration
from qdbev_ros.core.preprocess import Picture, RawPicture, decode_picture, shrink_raw
from qdbev_ros.core.variant import CLASSES, ImageSpec

Color = tuple[int, int, int]

# nuScenes' order on a wall: what is left is left, what is behind is below.
LAYOUT = (("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"), ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"))
COLORS: dict[str, Color] = {
    "car": (52, 152, 255),
    "truck": (70, 90, 245),
    "construction_vehicle": (60, 200, 200),
    "bus": (60, 220, 255),
    "trailer": (140, 110, 240),
    "barrier": (170, 150, 130),
    "motorcycle": (230, 90, 200),
    "bicycle": (250, 160, 230),
    "pedestrian": (255, 160, 60),
    "traffic_cone": (110, 225, 90),
}
TRUTH_COLOR: Color = (255, 255, 255)
BACKGROUND: Color = (30, 26, 24)
GRID: Color = (74, 66, 60)
TEXT: Color = (225, 222, 218)
EGO: Color = (200, 196, 190)

PANEL_WIDTH, PANEL_HEIGHT = 480, 270
BEV_SIZE = 2 * PANEL_HEIGHT + 4
FOOTER, HEADER, MARGIN = 66, 40, 4
BEV_RANGE = 51.2  # metres to each side
NEAR = 0.3  # metres: what is nearer to a camera is cut off

# No more pixels than the panels have are decoded.
PANEL = ImageSpec(PANEL_HEIGHT, PANEL_WIDTH, 1, "bgr", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "reduced")

# Edges of the box as pairs of `Boxes.corners` indices; the front face is 0, 1, 5, 4.
EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
FRONT = (0, 1, 5, 4)


@dataclass(frozen=True)
class View:
    """One camera: its picture, and lidar2img (4, 4) at that picture's scale."""

    picture: Picture
    lidar2img: Array


def camera_view(
    picture: bytes | memoryview | RawPicture, calibration: CameraCalibration, lidar2img: Array
) -> View:
    """A camera's view, small. lidar2img (4, 4) at the picture's own scale. Raises DataError where it is no picture."""
    width, height = calibration.width, calibration.height
    if isinstance(picture, RawPicture):
        small: Picture = shrink_raw(picture, PANEL)
    else:
        small = decode_picture(picture, width, height, PANEL)
    scale = np.diag([small.shape[1] / width, small.shape[0] / height, 1.0, 1.0])
    return View(small, scale @ lidar2img)


def draw_overview(
    views: Mapping[str, View], detections: Boxes, truth: Boxes, title: str, footer: str = ""
) -> Picture:
    """The whole picture. detections and truth are in the LIDAR_TOP frame; truth may be empty."""
    grid_width = 3 * PANEL_WIDTH + 2 * MARGIN
    height = HEADER + BEV_SIZE + FOOTER
    canvas = np.full((height, grid_width + MARGIN + BEV_SIZE, 3), BACKGROUND, np.uint8)
    for row, names in enumerate(LAYOUT):
        for column, name in enumerate(names):
            top, left = HEADER + row * (PANEL_HEIGHT + MARGIN), column * (PANEL_WIDTH + MARGIN)
            panel = draw_camera(views.get(name), name, detections, truth)
            canvas[top : top + PANEL_HEIGHT, left : left + PANEL_WIDTH] = panel
    bev = draw_birds_eye(detections, truth, BEV_SIZE)
    canvas[HEADER : HEADER + BEV_SIZE, grid_width + MARGIN :] = bev
    _text(canvas, title, (12, 27), 0.62)
    _legend(canvas, HEADER + BEV_SIZE + 26, detections, truth)
    _text(canvas, footer, (12, height - 12), 0.45, (165, 160, 155))
    return canvas


def draw_camera(view: View | None, name: str, detections: Boxes, truth: Boxes) -> Picture:
    """(PANEL_HEIGHT, PANEL_WIDTH, 3): one camera with its boxes; a note where there is no picture."""
    if view is None:
        panel = np.full((PANEL_HEIGHT, PANEL_WIDTH, 3), 45, np.uint8)
        _text(panel, "no picture", (PANEL_WIDTH // 2 - 50, PANEL_HEIGHT // 2), 0.6)
    else:
        height, width = view.picture.shape[:2]
        # Drawn at twice the size and shrunk: thin slanted lines stay smooth.
        size = (2 * PANEL_WIDTH, 2 * PANEL_HEIGHT)
        panel = cv2.resize(view.picture, size, interpolation=cv2.INTER_AREA)
        matrix = np.diag([size[0] / width, size[1] / height, 1.0, 1.0]) @ view.lidar2img
        corners = truth.corners()
        for index in np.flatnonzero(_may_be_seen(corners, matrix, size)):
            _box_on_camera(panel, corners[index], matrix, TRUTH_COLOR, dashed=True)
        corners = detections.corners()
        seen = _may_be_seen(corners, matrix, size)
        # Far ones first, so that the near ones stay on top.
        for index in (i for i in np.argsort(-np.hypot(*detections.centers[:, :2].T)) if seen[i]):
            color = COLORS[CLASSES[detections.labels[index]]]
            corner = _box_on_camera(panel, corners[index], matrix, color, dashed=False)
            if corner is not None:
                _text(panel, f"{detections.scores[index]:.2f}", corner, 0.62, color)
        panel = cv2.resize(panel, (PANEL_WIDTH, PANEL_HEIGHT), interpolation=cv2.INTER_AREA)
    _label(panel, name.removeprefix("CAM_").replace("_", " ").lower())
    return panel  # type: ignore[return-value]


def draw_birds_eye(detections: Boxes, truth: Boxes, size: int) -> Picture:
    """(size, size, 3): from above, the vehicle in the middle, forward (the LIDAR_TOP frame's +y) is up."""
    canvas = _rings(size).copy()
    scale = size / BEV_RANGE  # pixels per metre of the canvas of twice the size

    def pixel(x: float, y: float) -> tuple[int, int]:
        return round(size + x * scale), round(size - y * scale)

    for corners in truth.corners()[:, :4, :2]:
        outline = [pixel(*corner) for corner in corners]
        for a, b in zip(outline, [*outline[1:], outline[0]], strict=True):
            _dashed(canvas, a, b, TRUTH_COLOR, 2)
    everywhere = detections.corners()
    for index in np.argsort(detections.scores):
        color = COLORS[CLASSES[detections.labels[index]]]
        corners = everywhere[index, :4, :2]
        outline_px = np.array([pixel(*corner) for corner in corners])
        cv2.polylines(canvas, [outline_px], True, color, 3, cv2.LINE_AA)
        center = detections.centers[index, :2]
        cv2.line(canvas, pixel(*center), pixel(*corners[:2].mean(0)), color, 3, cv2.LINE_AA)
        velocity = detections.velocities[index]
        if np.hypot(*velocity) > 0.5:
            cv2.arrowedLine(
                canvas, pixel(*center), pixel(*(center + velocity)), color, 2, cv2.LINE_AA, 0, 0.2
            )
    canvas = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    _label(canvas, "bird's-eye view, arrows: motion in 1 s")
    return canvas  # type: ignore[return-value]


@cache
def _rings(size: int) -> Picture:
    """(2 * size, 2 * size, 3): circles of 10 m around the vehicle; not to be written to."""
    canvas: Picture = np.full((2 * size, 2 * size, 3), BACKGROUND, np.uint8)
    scale = size / BEV_RANGE
    for radius in range(10, 60, 10):
        cv2.circle(canvas, (size, size), round(radius * scale), GRID, 2, cv2.LINE_AA)
        beside = round(radius * 0.7071 * scale)
        if radius <= 50:
            _text(canvas, f"{radius} m", (size + beside + 6, size - beside - 6), 0.72, (140, 132, 124))
    cv2.line(canvas, (size, 0), (size, 2 * size), GRID, 1)
    cv2.line(canvas, (0, size), (2 * size, size), GRID, 1)
    outline = [(-0.95, -2.1), (-0.95, 2.0), (0.0, 2.9), (0.95, 2.0), (0.95, -2.1)]
    ego = np.array([(round(size + x * scale), round(size - y * scale)) for x, y in outline])
    cv2.fillPoly(canvas, [ego], EGO, cv2.LINE_AA)
    return canvas


def _may_be_seen(corners: Array, lidar2img: Array, size: tuple[int, int]) -> NDArray[np.bool_]:
    """(K,) of corners (K, 8, 3): false where a box surely is outside a picture of `size`; most are, of most cameras."""
    points = corners @ lidar2img[:3, :3].T + lidar2img[:3, 3]  # (K, 8, 3): u * depth, v * depth, depth
    depth = points[..., 2]
    pixels = points[..., :2] / np.maximum(depth, NEAR)[..., None]
    beside = (pixels < 0).all(1) | (pixels > size).all(1)  # (K, 2)
    ahead = depth >= NEAR
    return ahead.any(1) & ~(ahead.all(1) & beside.any(1))  # type: ignore[no-any-return]


def _box_on_camera(
    panel: Picture, corners: Array, lidar2img: Array, color: Color, dashed: bool
) -> tuple[int, int] | None:
    """Draws corners (8, 3) of one box; returns where its label goes, None if nothing of the box is in the picture."""
    height, width = panel.shape[:2]
    points = (
        np.concatenate([corners, np.ones((8, 1))], axis=1) @ lidar2img.T
    )  # (8, 4): u * depth, v * depth, depth
    if (points[:, 2] < NEAR).all():
        return None
    segments = [s for a, b in EDGES if (s := _clip_near(points[a, :3], points[b, :3])) is not None]
    ends = np.array(segments).reshape(-1, 2)
    if (ends < 0).all(0).any() or (ends > (width, height)).all(0).any():
        return None
    if not dashed and (points[:, 2] >= NEAR).all():
        face = np.clip(points[list(FRONT), :2] / points[list(FRONT), 2:3], -4 * width, 5 * width).astype(
            np.int32
        )
        (x, y), (right, bottom) = np.clip((face.min(0) - 1, face.max(0) + 2), 0, (width, height))
        part = panel[y:bottom, x:right]
        if part.size:
            tinted = part.copy()
            cv2.fillConvexPoly(tinted, face - (x, y), color, cv2.LINE_AA)
            part[:] = cv2.addWeighted(tinted, 0.3, part, 0.7, 0)
    for a, b in segments:
        visible, start, end = cv2.clipLine((0, 0, width, height), _as_pixel(a), _as_pixel(b))
        if visible and dashed:
            _dashed(panel, start, end, color, 2)
        elif visible:
            cv2.line(panel, start, end, color, 3, cv2.LINE_AA)
    x, y = ends[:, 0].mean(), ends[:, 1].min()
    return int(np.clip(x - 20, 2, width - 60)), int(np.clip(y - 6, 20, height - 4))


def _clip_near(a: Array, b: Array) -> tuple[Array, Array] | None:
    """Pixels of the part of a segment in front of the camera. a, b (3,): u * depth, v * depth, depth."""
    if a[2] < NEAR and b[2] < NEAR:
        return None
    if a[2] < NEAR:
        a = a + (b - a) * ((NEAR - a[2]) / (b[2] - a[2]))
    if b[2] < NEAR:
        b = b + (a - b) * ((NEAR - b[2]) / (a[2] - b[2]))
    return a[:2] / a[2], b[:2] / b[2]


def _as_pixel(point: Array) -> tuple[int, int]:
    x, y = np.clip(point, -1e5, 1e5)
    return round(float(x)), round(float(y))


def _dashed(canvas: Picture, a: tuple[int, int], b: tuple[int, int], color: Color, thickness: int) -> None:
    start, end = np.array(a, float), np.array(b, float)
    dashes = max(1, int(np.linalg.norm(end - start) // 7))
    for i in range(0, dashes, 2):
        p, q = start + (end - start) * i / dashes, start + (end - start) * min(i + 1, dashes) / dashes
        cv2.line(canvas, _as_pixel(p), _as_pixel(q), color, thickness, cv2.LINE_AA)


def _text(canvas: Picture, text: str, at: tuple[int, int], scale: float, color: Color = TEXT) -> None:
    """Text with a dark rim, readable on any picture."""
    thickness = 2 if scale > 0.6 else 1
    cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (20, 18, 16), thickness + 2, cv2.LINE_AA)
    cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, color, thickness, cv2.LINE_AA)


def _label(panel: Picture, text: str) -> None:
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
    panel[0:22, 0 : width + 14] = panel[0:22, 0 : width + 14] // 3
    cv2.putText(panel, text, (7, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.5, TEXT, 1, cv2.LINE_AA)


def _legend(canvas: Picture, y: int, detections: Boxes, truth: Boxes) -> None:
    """One line: the classes that occur with their counts, and what the dashed boxes are."""
    x = 12
    for index, name in enumerate(CLASSES):
        count = int((detections.labels == index).sum())
        if count:
            cv2.rectangle(canvas, (x, y - 11), (x + 14, y + 3), COLORS[name], -1, cv2.LINE_AA)
            entry = f"{name.replace('_', ' ')} {count}"
            _text(canvas, entry, (x + 21, y + 2), 0.5)
            x += 21 + cv2.getTextSize(entry, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0] + 22
    if len(truth):
        _dashed(canvas, (x, y - 4), (x + 32, y - 4), TRUTH_COLOR, 2)
        _text(canvas, f"ground truth {len(truth)}", (x + 40, y + 2), 0.5)
