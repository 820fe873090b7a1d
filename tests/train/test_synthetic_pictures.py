# SPDX-License-Identifier: Apache-2.0
"""What the town's cameras see: boxes on their pixels, honest occlusion, and what is where in a plan."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

pytest.importorskip("vtkmodules", reason="the synthetic town is drawn with VTK")

from qdbev_ros.core.variant import CLASSES
from qdbev_train.synthetic.catalogue import SHAPES, body, draw_look
from qdbev_train.synthetic.layout import Town, TownObject
from qdbev_train.synthetic.occlusion import surface_points, visibility_token
from qdbev_train.synthetic.paths import stay
from qdbev_train.synthetic.plan import ScenePlan, plan_scene
from qdbev_train.synthetic.render import TownRenderer, camera_to_town
from qdbev_train.synthetic.rig import cameras
from qdbev_train.synthetic.room import rectangles
from qdbev_train.synthetic.writer import observe

SIZE = (400, 225)
CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])


@pytest.fixture(scope="module")
def renderer() -> TownRenderer:
    return TownRenderer(SIZE)


def ahead(town: Town, forward: float, left: float, shape: str, yaw: float = 0.5) -> TownObject:
    """A thing that stands `forward` and `left` metres from the ego car's rear axle at the start."""
    x, y, heading = town.ego.pose(0)
    c, s = np.cos(heading), np.sin(heading)
    place = np.array([x + c * forward - s * left, y + s * forward + c * left])
    return TownObject(draw_look(shape, np.random.default_rng(0)), stay(place, heading + yaw, town.duration))


def scene_with(*things: tuple[float, float, str]) -> ScenePlan:
    """A scene whose ego car stands still, with nothing but these (forward, left, shape) objects."""
    plan = plan_scene("scene-0001", 1, 3)
    town = replace(plan.town, ego=stay(plan.town.ego.xy[0], plan.town.ego.yaw[0], plan.town.duration))
    return replace(plan, town=town, objects=[ahead(town, *thing) for thing in things])


def projected(plan: ScenePlan, index: int, points: np.ndarray) -> np.ndarray:
    """(n, 2) pixels of points (n, 3) given in the unit cube of the plan's first object, by the pinhole formula."""
    camera = cameras(SIZE)[index]
    obj = plan.objects[0]
    x, y, yaw = obj.track.pose(0)
    c, s = np.cos(yaw), np.sin(yaw)
    local = points * obj.look.size
    world = np.c_[c * local[:, 0] - s * local[:, 1] + x, s * local[:, 0] + c * local[:, 1] + y, local[:, 2]]
    world[:, 2] += obj.look.size[2] / 2
    to_camera = np.linalg.inv(camera_to_town(camera, plan.town.ego.pose(0)))
    pixels = (world @ to_camera[:3, :3].T + to_camera[:3, 3]) @ camera.intrinsic.T
    return pixels[:, :2] / pixels[:, 2:]


@pytest.mark.parametrize(
    ("index", "forward", "left", "shape"),
    [
        (0, 15, 1, "car_sedan"),
        (0, 25, -3, "bus"),
        (3, -12, 2, "truck_box"),
        (2, 9, 9, "car_van"),
        (5, -4, -12, "cone"),
    ],
)
def test_the_silhouette_is_where_the_pinhole_formula_puts_it(
    renderer: TownRenderer, index: int, forward: float, left: float, shape: str
) -> None:
    plan = scene_with((forward, left, shape))
    renderer.load(plan)
    _, identities = renderer.draw(cameras(SIZE)[index], index, 0.0)
    rows, columns = np.nonzero(identities == 1)
    expected = projected(plan, index, body(shape)[0].points)
    # a pixel reaches half a pixel to either side of its centre
    first = expected.min(0) - (columns.min() - 0.5, rows.min() - 0.5)
    last = expected.max(0) - (columns.max() + 0.5, rows.max() + 0.5)
    assert np.abs([first, last]).max() < 1.0
    box = projected(plan, index, CORNERS)
    assert (box.min(0) < expected.min(0) + 0.5).all()
    assert (box.max(0) > expected.max(0) - 0.5).all()


def test_every_drawn_object_lies_within_its_projected_box(renderer: TownRenderer) -> None:
    plan = plan_scene("scene-0012", 1, 3)
    renderer.load(plan)
    checked = 0
    for index, camera in enumerate(cameras(SIZE)):
        t = camera.offset_us * 1e-6
        _, identities = renderer.draw(camera, index, t)
        to_camera = np.linalg.inv(camera_to_town(camera, plan.town.ego.pose(t)))
        for number, obj in enumerate(plan.objects):
            x, y, yaw = obj.track.pose(t)
            c, s = np.cos(yaw), np.sin(yaw)
            local = CORNERS * obj.look.size
            world = np.c_[
                c * local[:, 0] - s * local[:, 1] + x, s * local[:, 0] + c * local[:, 1] + y, local[:, 2]
            ]
            world[:, 2] += obj.look.size[2] / 2
            seen = world @ to_camera[:3, :3].T + to_camera[:3, 3]
            pixels = np.argwhere(identities == number + 1)[:, ::-1]
            if seen[:, 2].min() < 1.0 or not len(pixels):
                continue
            flat = seen @ camera.intrinsic.T
            hull = cv2.convexHull((flat[:, :2] / flat[:, 2:]).astype(np.float32))
            outside = [cv2.pointPolygonTest(hull, (float(u), float(v)), True) < -1.5 for u, v in pixels[::5]]
            assert not any(outside), obj.look.shape
            checked += 1
    assert checked > 10


def seen_of(renderer: TownRenderer, plan: ScenePlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    renderer.load(plan)
    surfaces = np.array([surface_points(o, np.random.default_rng(1)) for o in plan.objects])
    occlusion = observe(renderer, plan, cameras(SIZE), 0, surfaces)
    return occlusion.pixels, occlusion.shares(), occlusion.lidar_points()


def test_a_thing_in_the_open_is_fully_visible_and_has_lidar_points(renderer: TownRenderer) -> None:
    pixels, shares, points = seen_of(renderer, scene_with((14, 0, "car_suv"), (35, 6, "walker")))
    assert (pixels > 20).all()
    assert [visibility_token(s) for s in shares] == ["4", "4"]
    assert points[0] > 100
    assert points[0] > 10 * points[1] > 0


def test_a_thing_behind_a_lorry_is_not_there_for_the_lidar(renderer: TownRenderer) -> None:
    pixels, shares, points = seen_of(renderer, scene_with((12, 0, "truck_box"), (26, 0, "cone")))
    assert pixels[1] == 0
    assert points[1] == 0
    assert visibility_token(shares[1]) == "1"


@pytest.mark.parametrize("left", [-5.5, -4.5, -3.5, 3.5, 4.5])
def test_the_visible_share_is_visible_pixels_over_pixels_if_alone(
    renderer: TownRenderer, left: float
) -> None:
    alone, _, _ = seen_of(renderer, scene_with((24, left, "truck_box")))
    behind, shares, _ = seen_of(renderer, scene_with((11, 0, "car_van"), (24, left, "truck_box")))
    assert shares[1] == pytest.approx(behind[1] / alone[0], abs=0.15)


def test_all_ten_classes_appear_and_none_is_rare() -> None:
    counts = dict.fromkeys(CLASSES, 0)
    scenes = dict.fromkeys(CLASSES, 0)
    for number in range(15):
        plan = plan_scene(f"scene-{number:04d}", 3, 20)
        for obj in plan.objects:
            counts[obj.cls] += 1
        for cls in {o.cls for o in plan.objects}:
            scenes[cls] += 1
    total = sum(counts.values())
    assert {cls: count for cls, count in counts.items() if count < 0.02 * total} == {}
    assert min(scenes.values()) > 5


def test_nothing_drives_through_anything() -> None:
    for number in range(4):
        plan = plan_scene(f"scene-{number:04d}", 7, 20)
        for t in np.arange(0, 9.6, 0.5):
            poses = np.array([o.track.pose(t) for o in plan.objects])
            shapes = [
                rectangles(p[None, :2], p[2:], *o.look.size[:2])[0].astype(np.float32)
                for o, p in zip(plan.objects, poses)
            ]
            for i, first in enumerate(shapes):
                for j in np.flatnonzero(np.hypot(*(poses[i + 1 :, :2] - poses[i, :2]).T) < 13):
                    area, _ = cv2.intersectConvexConvex(first, shapes[i + 1 + j])
                    assert area < 0.3, (plan.objects[i].look.shape, plan.objects[i + 1 + j].look.shape)


def test_plans_depend_on_seed_and_name_alone() -> None:
    def places(name: str, seed: int) -> list[tuple[float, float, float]]:
        return [o.track.pose(1.0) for o in plan_scene(name, seed, 6).objects]

    assert places("scene-0003", 1) == places("scene-0003", 1)
    assert places("scene-0003", 1) != places("scene-0003", 2)
    assert places("scene-0003", 1) != places("scene-0004", 1)


def test_every_body_fills_its_box_and_its_front_differs_from_its_rear() -> None:
    for name, shape in SHAPES.items():
        mesh = body(name)[0]
        if name not in ("walker", "stander", "worker"):  # a person's box has room for the stride
            assert np.abs(mesh.points.min(0) + 0.5).max() < 0.06, name
            assert np.abs(mesh.points.max(0) - 0.5).max() < 0.06, name
        if shape.cls not in ("barrier", "traffic_cone"):
            front, rear = mesh.points[:, 0] > 0.44, mesh.points[:, 0] < -0.44
            if shape.cls == "pedestrian":  # face ahead, hair behind
                head = mesh.points[:, 2] > 0.38
                front, rear = head & (mesh.points[:, 0] > 0.1), head & (mesh.points[:, 0] < -0.1)
            difference = mesh.colours[front].mean(0) - mesh.colours[rear].mean(0)
            assert np.abs(difference).max() > 20, name
