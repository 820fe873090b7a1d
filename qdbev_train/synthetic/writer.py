# SPDX-License-Identifier: Apache-2.0
"""Makes one scene: plans it, draws it, and writes its images, map, CAN bus and table rows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.files import whole_file
from qdbev_train.synthetic import tables
from qdbev_train.synthetic.layout import KEYFRAME, scene_rng
from qdbev_train.synthetic.occlusion import Occlusion, surface_points, visibility_token
from qdbev_train.synthetic.plan import ScenePlan, plan_scene
from qdbev_train.synthetic.rig import Camera, cameras

if TYPE_CHECKING:
    from qdbev_train.synthetic.render import TownRenderer

GENERATION = 1  # raised when the same settings would give other pictures
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Settings:
    """What a scene's content depends on, beside its name."""

    seed: int
    frames: int
    width: int
    height: int
    generation: int = GENERATION


@dataclass(frozen=True)
class Job:
    """One scene to be made."""

    out: str
    version: str
    scene: str
    settings: Settings

    @property
    def part(self) -> Path:
        return Path(self.out) / self.version / ".parts" / f"{self.scene}.json"


def finished(job: Job) -> bool:
    """Whether the scene is there already. Raises DataError where it was made with other settings."""
    if not job.part.exists():
        return False
    found = json.loads(job.part.read_text())["settings"]
    wanted = asdict(job.settings)
    if found != wanted:
        other = ", ".join(
            f"{k} {found.get(k)} instead of {v}" for k, v in wanted.items() if found.get(k) != v
        )
        raise DataError(
            f"{job.out}: {job.scene} was made with {other}; use the same settings or another folder"
        )
    return True


@lru_cache(maxsize=1)
def _renderer(size: tuple[int, int]) -> TownRenderer:
    """One renderer per process: making its windows takes longer than a scene's set-up."""
    from qdbev_train.synthetic.render import TownRenderer

    return TownRenderer(size)


def make_scene(job: Job) -> str:
    """Makes a scene; its part file is written last, so that a part file means a finished scene. Returns its name."""
    settings = job.settings
    size = (settings.width, settings.height)
    plan = plan_scene(job.scene, settings.seed, settings.frames)
    rig = cameras(size)
    out = Path(job.out)
    rows = tables.frame_tables(plan, rig, size)
    rows.update(_draw_frames(out, plan, rig, size))
    tables.write_json(out / "can_bus" / f"{job.scene}_pose.json", tables.can_bus_poses(plan.town, job.scene))
    tables.write_json(job.part, {"settings": asdict(settings), "tables": rows})
    return job.scene


def _draw_frames(
    out: Path, plan: ScenePlan, rig: list[Camera], size: tuple[int, int]
) -> dict[str, list[tables.Row]]:
    """Draws every image and the map; returns the annotations and instances that the pictures justify."""
    from qdbev_train.synthetic.ground import map_mask

    renderer = _renderer(size)
    write_image(out / tables.map_file(plan.name), map_mask(renderer.load(plan)), [])
    rng = scene_rng(plan.name, plan.seed, "surface")
    surfaces = np.array([surface_points(o, rng) for o in plan.objects])
    annotations: dict[int, list[tables.Row]] = {}
    for k in range(plan.frames):
        occlusion = observe(renderer, plan, rig, k, surfaces, out)
        shares, points = occlusion.shares(), occlusion.lidar_points()
        for number in range(len(plan.objects)):
            row = tables.annotation(plan, number, k, visibility_token(shares[number]), int(points[number]))
            if row is not None:
                annotations.setdefault(number, []).append(row)
    return tables.chain(plan, annotations)


def observe(
    renderer: TownRenderer, plan: ScenePlan, rig: list[Camera], k: int, surfaces: Any, out: Path | None = None
) -> Occlusion:
    """Draws frame k with every camera (and writes the images under `out`); returns what is seen of each object."""
    from qdbev_train.synthetic.render import camera_to_town

    occlusion = Occlusion(surfaces)
    middles = np.array([o.look.size[2] / 2 for o in plan.objects])
    for index, camera in enumerate(rig):
        t = k * KEYFRAME + camera.offset_us * 1e-6
        picture, identities = renderer.draw(camera, index, t)
        if out is not None:
            write_image(
                out / tables.image_file(plan.name, camera, k),
                picture[..., ::-1],
                [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY],
            )
        poses = np.insert(renderer.poses(t), 2, middles, axis=1)
        occlusion.add(identities, camera, np.linalg.inv(camera_to_town(camera, plan.town.ego.pose(t))), poses)
    return occlusion


def write_image(path: Path, image: Any, options: list[int]) -> None:
    """Writes an image whole or not at all; the suffix decides the format. Raises DataError when it cannot."""
    done, data = cv2.imencode(path.suffix, image, options)
    if not done:
        raise DataError(f"{path}: OpenCV cannot write this image")
    with whole_file(path) as temporary:
        temporary.write_bytes(data.tobytes())
