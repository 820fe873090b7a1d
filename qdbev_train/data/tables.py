# SPDX-License-Identifier: Apache-2.0
"""The scenes of a data set in nuScenes format as frames: what training, evaluation and bags begin with. No torch.

Conventions are those of BEVFormer's converter and of the devkit: the reference time is LIDAR_TOP's, velocities are
centred differences as in the devkit's box_velocity, CAN messages keep the reference's one-message skew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qdbev_ros.core.errors import DataError
from qdbev_train.data.frames import Frame
from qdbev_train.data.index import open_index
from qdbev_train.data.index_frames import ChainedFrames

Scenes = Mapping[str, Sequence[Frame]]


def load_scenes(
    root: Path, version: str, split: str | None = None, scenes: Sequence[str] | None = None
) -> Scenes:
    """Frames by scene name, scenes in the order of scene.json, frames in time order; each frame is made when asked for.

    root / version holds the tables. `scenes` names the scenes wanted, `split` those of a split that are in the tables;
    with both a scene must be in both, with neither all are taken. Large tables are indexed first, once. Raises
    DataError naming the table and the token.
    """
    index = open_index(Path(root), version)
    table = Path(root) / version / "scene.json"
    names = _wanted(index.scenes, table, split, scenes)
    return {name: index.frames(name) for name in names}


def all_frames(scenes: Scenes) -> Sequence[Frame]:
    """The frames of all scenes, scene after scene."""
    return ChainedFrames(list(scenes.values()))


def split_scenes(tables: Path, split: str) -> list[str]:
    """Scene names of a split, found as the devkit finds them: the official lists (which come with nuscenes-devkit)
    first, then splits.json beside the tables."""
    try:
        from nuscenes.utils.splits import create_splits_scenes

        official: dict[str, list[str]] = create_splits_scenes()
    except ImportError:
        official = {}
    if split in official:
        return official[split]
    custom = tables / "splits.json"
    names = _custom_splits(custom).get(split)
    if names is not None:
        return names
    if not official:
        raise DataError(
            f"split {split!r}: the official lists come with nuscenes-devkit, which isn't installed here"
        )
    raise DataError(f"no split {split!r}: neither in {custom} nor official ({', '.join(sorted(official))})")


def _custom_splits(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        return {}
    try:
        splits = json.loads(path.read_bytes())
        return {str(split): [str(name) for name in names] for split, names in splits.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON object of split names with lists of scenes: {error}") from error


def _wanted(known: Sequence[str], table: Path, split: str | None, names: Sequence[str] | None) -> list[str]:
    missing = [n for n in names or () if n not in known]
    if missing:
        some = ", ".join(sorted(known)[:5])
        raise DataError(f"{table}: no scene {missing[0]!r}; there are {len(known)}: {some} ...")
    wanted = list(known)
    if split is not None:
        listed = set(split_scenes(table.parent, split))
        wanted = [n for n in wanted if n in listed]
    if names is not None:
        wanted = [n for n in wanted if n in set(names)]
    if not wanted:
        raise DataError(f"{table}: none of its {len(known)} scenes is in split {split!r}")
    return wanted
