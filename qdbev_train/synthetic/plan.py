# SPDX-License-Identifier: Apache-2.0
"""The plan of one scene: roads, the ego car's drive, and every object with where it is at any time. No rendering."""

from __future__ import annotations

from dataclasses import dataclass

from qdbev_train.synthetic.layout import Town, TownObject, lay_out, scene_rng
from qdbev_train.synthetic.populate import populate


@dataclass(frozen=True)
class ScenePlan:
    """What the renderer and the tables need."""

    name: str
    seed: int
    frames: int
    town: Town
    objects: list[TownObject]


def plan_scene(name: str, seed: int, frames: int) -> ScenePlan:
    """The whole plan of one scene; the same arguments always give the same plan."""
    town = lay_out(name, seed, frames)
    return ScenePlan(name, seed, frames, town, populate(town, scene_rng(name, seed, "objects")))
