# SPDX-License-Identifier: Apache-2.0
"""Frames made from the index's arrays at the moment they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.geometry import CameraCalibration, Pose
from qdbev_train.data.array_file import Arrays, Texts
from qdbev_train.data.frames import Annotations, CameraFrame, Frame
from qdbev_train.data.index_parts import CHANNELS


class Index:
    """All frames of a data set. `arrays` are those of index_parts and index_annotations, mapped from `files` or, where
    there are none, in memory."""

    def __init__(self, root: Path, arrays: Arrays, files: Sequence[Path] = ()) -> None:
        self._root, self.files = root, tuple(files)
        self.arrays: Mapping[str, Any] = arrays
        scenes = Texts(arrays, "scene")
        self.scenes = tuple(scenes[i] for i in range(len(scenes)))
        self._samples, self._images = Texts(arrays, "sample"), Texts(arrays, "image")
        self._instances = Texts(arrays, "instance_token")
        names = Texts(arrays, "attribute_name")
        # The row -1 stands for no attribute.
        self._attributes = (*(names[i] for i in range(len(names))), "")
        self._calibration = lru_cache(maxsize=64)(self._read_calibration)

    def __len__(self) -> int:
        return len(self._samples)

    def frames(self, scene: str) -> SceneFrames:
        """The frames of a scene in time order."""
        number = self.scenes.index(scene)
        ends = self.arrays["scene_ends"]
        return SceneFrames(self, number, range(int(ends[number - 1]) if number else 0, int(ends[number])))

    def frame(self, row: int, scene: int) -> Frame:
        """The frame of a sample's row; `scene` is the number of its scene."""
        ego2global = self._ego2global(row, 0)
        lidar2ego = self._sensor2ego(int(self.arrays["calibration"][row, 0]))
        return Frame(
            sample_token=self._samples[row],
            scene=self.scenes[scene],
            stamp_ns=int(self.arrays["stamp_us"][row, 0]) * 1000,
            lidar2ego=lidar2ego,
            ego2global=ego2global,
            cameras=tuple(self._camera(row, channel) for channel in range(1, len(CHANNELS))),
            annotations=self._annotations(row, (ego2global @ lidar2ego).inverse()),
            can_dynamics=self.arrays["can_dynamics"][row].copy() if self.arrays["has_can"][scene] else None,
        )

    def _ego2global(self, row: int, channel: int) -> Pose:
        rotation, translation = self.arrays["ego_rotation"], self.arrays["ego_translation"]
        return Pose(rotation[row, channel], translation[row, channel].copy())

    def _sensor2ego(self, row: int) -> Pose:
        return Pose(self.arrays["sensor_rotation"][row], self.arrays["sensor_translation"][row].copy())

    def _read_calibration(self, row: int) -> CameraCalibration:
        channel = CHANNELS[self.arrays["sensor_channel"][row]]
        width, height = self.arrays["size"][row].tolist()
        intrinsics = self.arrays["intrinsics"][row].copy()
        return CameraCalibration(channel, intrinsics, width, height, self._sensor2ego(row))

    def _camera(self, row: int, channel: int) -> CameraFrame:
        return CameraFrame(
            self._calibration(int(self.arrays["calibration"][row, channel])),
            self._root / self._images[row * (len(CHANNELS) - 1) + channel - 1],
            int(self.arrays["stamp_us"][row, channel]) * 1000,
            self._ego2global(row, channel),
        )

    def _annotations(self, row: int, global2lidar: Pose) -> Annotations:
        arrays, ends = self.arrays, self.arrays["annotation_ends"]
        here = slice(int(ends[row - 1]) if row else 0, int(ends[row]))
        boxes = Boxes(
            arrays["center"][here],
            arrays["box_size"][here].copy(),
            arrays["yaw"][here],
            arrays["velocity"][here],
            np.ones(here.stop - here.start),
            arrays["label"][here].astype(np.int64),
        )
        return Annotations(
            boxes.transformed(global2lidar),
            tuple(self._instances[i] for i in arrays["instance"][here].tolist()),
            tuple(self._attributes[i] for i in arrays["attribute"][here].tolist()),
            arrays["points"][here].copy(),
            arrays["visibility"][here].astype(np.int64),
        )


class SceneFrames(Sequence[Frame]):
    """The frames of one scene; each is made anew whenever it is asked for, and none is kept."""

    def __init__(self, index: Index, scene: int, rows: range) -> None:
        self._index, self._scene, self._rows = index, scene, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Frame: ...
    @overload
    def __getitem__(self, place: slice) -> SceneFrames: ...
    def __getitem__(self, place: int | slice) -> Frame | SceneFrames:
        if isinstance(place, slice):
            return SceneFrames(self._index, self._scene, self._rows[place])
        return self._index.frame(self._rows[place], self._scene)


class ChainedFrames(Sequence[Frame]):
    """The frames of several scenes, scene after scene."""

    def __init__(self, scenes: Sequence[Sequence[Frame]]) -> None:
        self._scenes = scenes
        self._ends = np.cumsum([len(frames) for frames in scenes])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, place: int) -> Frame: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Frame]: ...
    def __getitem__(self, place: int | slice) -> Frame | Sequence[Frame]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        row = range(len(self))[place]
        number = int(np.searchsorted(self._ends, row, side="right"))
        frames = self._scenes[number]
        return frames[row - int(self._ends[number]) + len(frames)]
