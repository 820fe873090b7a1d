# SPDX-License-Identifier: Apache-2.0
"""Draws a town with VTK: the picture of each camera, and which object each pixel shows."""

from __future__ import annotations

import cv2
import numpy as np
import vtkmodules.vtkRenderingOpenGL2  # noqa: F401  (registers the OpenGL implementations)
from numpy.typing import NDArray
from vtkmodules.vtkCommonCore import vtkLogger
from vtkmodules.vtkCommonMath import vtkMatrix4x4
from vtkmodules.vtkRenderingCore import vtkPolyDataMapper, vtkRenderer, vtkRenderWindow

from qdbev_train.synthetic.bodies import Bodies, Light
from qdbev_train.synthetic.ground import PIXELS_PER_METRE, Picture, ground_kinds, paint_ground, paint_sky
from qdbev_train.synthetic.layout import scene_rng
from qdbev_train.synthetic.mesh import Array
from qdbev_train.synthetic.plan import ScenePlan
from qdbev_train.synthetic.rig import Camera
from qdbev_train.synthetic.scenery import Scenery, build_scenery
from qdbev_train.synthetic.vtk_bits import (
    actor_of,
    mapper_of,
    poly_data,
    read_colours,
    read_depth,
    set_matrix,
    texture_of,
)

NEAR, FAR = 0.3, 700.0
# without a display VTK draws off screen; that it looked for one first is no news
vtkLogger.SetStderrVerbosity(vtkLogger.VERBOSITY_ERROR)


def camera_to_town(camera: Camera, ego: tuple[float, float, float]) -> Array:
    """(4, 4) from the camera's frame to the town's, ego = x, y, yaw."""
    c, s = np.cos(ego[2]), np.sin(ego[2])
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    pose = np.eye(4)
    pose[:3, :3] = turn @ camera.rotation
    pose[:3, 3] = turn @ camera.translation + (ego[0], ego[1], 0)
    return pose


def projection(camera: Camera, width: int, height: int) -> Array:
    """(4, 4) OpenGL projection of a pinhole camera whose pixel centres are whole numbers."""
    k = camera.intrinsic
    return np.array(
        [
            [2 * k[0, 0] / width, 0, 1 - 2 * (k[0, 2] + 0.5) / width, 0],
            [0, 2 * k[1, 1] / height, 2 * (k[1, 2] + 0.5) / height - 1, 0],
            [0, 0, -(FAR + NEAR) / (FAR - NEAR), -2 * FAR * NEAR / (FAR - NEAR)],
            [0, 0, -1, 0],
        ]
    )


class _Window:
    """One off-screen window with one renderer."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.renderer = vtkRenderer()
        self.renderer.SetBackground(0, 0, 0)
        self.window = vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetMultiSamples(0)
        self.window.SetSize(width, height)
        self.window.AddRenderer(self.renderer)
        self._projection = vtkMatrix4x4()

    def aim(self, camera: Camera, pose: Array, full: tuple[int, int]) -> None:
        """Puts the renderer's camera where the rig's camera is; full = the size its intrinsics belong to."""
        eye = self.renderer.GetActiveCamera()
        eye.SetPosition(*pose[:3, 3])
        eye.SetFocalPoint(*(pose[:3, 3] + pose[:3, 2]))
        eye.SetViewUp(*-pose[:3, 1])
        eye.SetClippingRange(NEAR, FAR)
        set_matrix(self._projection, projection(camera, *full))
        eye.SetExplicitProjectionTransformMatrix(self._projection)
        eye.SetUseExplicitProjectionTransformMatrix(True)


class TownRenderer:
    """Keeps its two windows (pictures and identities) over many scenes; `load` a plan, then `draw`.

    All light is worked out here, per facet, and VTK draws plain colours: its own lighting is what costs most without
    a graphics card. What moves is one mesh, put together anew for each picture: many actors cost more than that.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        # pictures are drawn larger and averaged down, against jagged edges
        self._picture = _Window(size[0] * 3 // 2, size[1] * 3 // 2)
        self._identity = _Window(size[0], size[1])

    def load(self, plan: ScenePlan) -> Picture:
        """Builds a scene; returns the (N, N) kinds of ground for the map mask."""
        for window in (self._picture, self._identity):
            window.renderer.RemoveAllViewProps()
        self._plan = plan
        self._light = Light.of(plan.town.weather)
        kinds = ground_kinds(plan.town)
        scenery = build_scenery(
            plan, kinds, scene_rng(plan.name, plan.seed, "scenery"), self._light.shadow_shift
        )
        rng = scene_rng(plan.name, plan.seed, "paint")
        ground = paint_ground(plan.town, kinds, scenery.shadows, rng)
        self._sky = paint_sky(plan.town, rng)
        self._haze = self._sky[-1].mean(0)
        weather = plan.town.weather
        self._gains = (
            np.array(weather.tint, np.float32)
            * weather.brightness
            * rng.uniform(0.93, 1.07, (6, 1)).astype(np.float32)
        )
        noise = rng.normal(0, 2.0, (self.size[1] + 64, self.size[0] + 64)).astype(np.float32)
        self._noise = np.repeat(noise, 3, axis=1)  # one grain per pixel, not per channel
        self._shot = 0
        self._add_ground(ground)
        self._add_scenery(scenery)
        self._bodies = Bodies(plan, self._light)
        self._moving = (vtkPolyDataMapper(), vtkPolyDataMapper())
        for mapper, window in zip(self._moving, (self._picture, self._identity)):
            mapper.SetColorModeToDirectScalars()
            window.renderer.AddActor(actor_of(mapper))
        return kinds

    def _add_ground(self, image: Picture) -> None:
        size = len(image) / PIXELS_PER_METRE
        corners = np.array([[0, 0, 0], [size, 0, 0], [size, size, 0], [0, size, 0.0]])
        poly = poly_data(corners, 4, texture=np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]]))
        self._picture.renderer.AddActor(actor_of(mapper_of(poly), texture=texture_of(image, repeat=False)))
        colour = np.tile(image[::50, ::50].reshape(-1, 3).mean(0).astype(np.uint8), (4, 1))
        far = poly_data((corners - size / 2) * 6 + (size / 2, size / 2, size * 3 - 0.1), 4, colour)
        self._picture.renderer.AddActor(actor_of(mapper_of(far)))

    def _add_scenery(self, scenery: Scenery) -> None:
        props = scenery.props
        lit = self._light.shaded(props.colours[::3], props.normals[::3])
        self._add_static(props.points, 3, np.repeat(lit, 3, 0))
        for walls, facade in zip(scenery.walls, scenery.facades):
            if walls.points:
                points = np.concatenate(walls.points)
                quads = points.reshape(-1, 4, 3)
                normals = np.cross(quads[:, 1] - quads[:, 0], quads[:, 3] - quads[:, 0])
                normals /= np.linalg.norm(normals, axis=1, keepdims=True)
                lit = self._light.shaded(np.full((len(quads), 3), 255.0), normals)
                self._add_static(points, 4, np.repeat(lit, 4, 0), np.concatenate(walls.texture), facade)

    def _add_static(
        self,
        points: Array,
        corners: int,
        colours: Picture,
        uv: Array | None = None,
        image: Picture | None = None,
    ) -> None:
        poly = poly_data(points, corners, colours, uv)
        texture = None if image is None else texture_of(image, repeat=True)
        self._picture.renderer.AddActor(actor_of(mapper_of(poly), texture=texture))
        hiding = poly_data(points, corners, np.zeros_like(colours))
        self._identity.renderer.AddActor(actor_of(mapper_of(hiding)))

    def poses(self, t: float) -> Array:
        """(n, 3) x, y, yaw of every object at t seconds."""
        return self._bodies.poses(t)

    def draw(self, camera: Camera, index: int, t: float) -> tuple[Picture, NDArray[np.uint16]]:
        """The picture (H, W, 3) RGB of the rig's camera number `index` at t seconds, and the identities (H, W):
        0 where no object is, else the object's position in the plan plus one."""
        pose = camera_to_town(camera, self._plan.town.ego.pose(t))
        seen = self._bodies.in_view(t, np.linalg.inv(pose), self.size[0] / camera.intrinsic[0, 0])
        points, colours, identities = self._bodies.assemble(seen, t)
        shadows = self._light.fallen(points)
        shade = np.full_like(colours, self._light.shadow_grey)
        self._moving[0].SetInputData(
            poly_data(np.concatenate([points, shadows]), 3, np.concatenate([colours, shade]))
        )
        self._moving[1].SetInputData(poly_data(points, 3, identities))
        for window in (self._picture, self._identity):
            window.aim(camera, pose, self.size)
            window.window.Render()
        picture = self._develop(camera, index, pose)
        rgb = read_colours(self._identity.window, *self.size).astype(np.uint16)
        return picture, rgb[..., 0] + 256 * rgb[..., 1]

    def _develop(self, camera: Camera, index: int, pose: Array) -> Picture:
        """Turns what the renderer drew into a photograph: sky, haze, exposure, grain."""
        window = self._picture
        colours = read_colours(window.window, window.width, window.height)
        image = cv2.resize(colours, self.size, interpolation=cv2.INTER_AREA).astype(np.float32)
        buffer = cv2.resize(
            read_depth(window.window, window.width, window.height), self.size, interpolation=cv2.INTER_NEAREST
        )
        depth = NEAR * FAR / np.maximum(FAR - buffer * (FAR - NEAR), 1e-6)
        clear = np.exp(depth * np.float32(-1.0 / self._plan.town.weather.haze_metres))
        height, width = clear.shape
        line = image.reshape(height, width * 3)  # numpy is slow where the last axis has three entries
        haze = np.tile(self._haze, width)
        line -= haze
        line *= cv2.merge([clear] * 3).reshape(height, width * 3)
        line += haze
        sky = buffer >= 1.0
        rows = int(np.max(np.flatnonzero(sky.any(1)), initial=-1)) + 1
        if rows:
            where = cv2.merge([sky[:rows].view(np.uint8)] * 3).view(bool)
            np.copyto(image[:rows], self._sky_behind(camera, pose, rows), where=where)
        line *= np.tile(self._gains[index], width)
        down, right = self._shot * 37 % 64, self._shot * 23 % 64
        self._shot += 1
        line += self._noise[down : down + height, right * 3 : (right + width) * 3]
        return np.clip(line, 0, 255, out=line).astype(np.uint8).reshape(height, width, 3)

    def _sky_behind(self, camera: Camera, pose: Array, height: int) -> NDArray[np.float32]:
        """(height, W, 3) the panorama as the camera sees it in its first rows (roll is too small to matter)."""
        k = camera.intrinsic
        u, v = np.arange(self.size[0]), np.arange(height)
        heading = np.arctan2(pose[1, 2], pose[0, 2])
        azimuth = heading - np.arctan((u - k[0, 2]) / k[0, 0])
        elevation = np.degrees(np.arctan((k[1, 2] - v) / k[1, 1]))
        columns = (np.degrees(azimuth) * 2 % 720).astype(np.int64) % 720
        rows = np.clip(63 - elevation * 2, 0, 63).astype(np.int64)
        return self._sky[rows[:, None], columns[None]]
