# SPDX-License-Identifier: Apache-2.0
"""Frames into training batches: parallel streams of consecutive frames, decoded ahead of time in threads.

Pictures, projections and can_bus vectors come from qdbev_ros.core, so training sees what the node will see.
Letters: B streams, N cameras, H W padded input, K boxes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qdbev_ros.core.boxes import encode_boxes
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.memory import TemporalMemory
from qdbev_ros.core.preprocess import Picture, decode_picture, normalise_picture, resize_picture
from qdbev_ros.core.projection import scale_to_input, stack_lidar2img
from qdbev_ros.core.variant import Variant
from qdbev_train.data.augment import Augmentation, blank_grid, vary_picture
from qdbev_train.data.frames import CameraFrame, Frame, mirrored, turned

NO_MAP = np.zeros((0, 0), np.float32)  # stands for the map that the training loop keeps itself


@dataclass(frozen=True)
class Batch:
    """One step of all streams.

    images (B, N, 3, H, W) float32 normalised, padded · lidar2img (B, N, 4, 4) float32 at the input's scale ·
    can_bus (B, 18) float32, deltas applied · is_first (B,) bool: no usable history, forget that stream's BEV map ·
    codes B x (K, 10) float32 as encode_boxes, labels B x (K,) int64: valid boxes with centres inside pc_range ·
    tokens B sample tokens
    """

    images: torch.Tensor
    lidar2img: torch.Tensor
    can_bus: torch.Tensor
    is_first: torch.Tensor
    codes: list[torch.Tensor]
    labels: list[torch.Tensor]
    tokens: list[str]


@dataclass(frozen=True)
class Ticket:
    """One frame of one row, to be decoded: everything that depends on the order is settled.

    picture_seed: of the pictures' variation, None for none · mask_seed: of the grid that is blanked out, likewise
    """

    frame: Frame
    can_bus: NDArray[np.float32]
    is_first: bool
    flip: bool
    picture_seed: int | None
    mask_seed: int | None = None


Visit = tuple[Sequence[Frame], np.random.Generator]


class StreamDataset:
    """Endless batches in which row b continues row b of the batch before: streaming training of a recurrent model.

    Each stream visits scenes in random order, every scene of an epoch exactly once over all streams, and plays a
    scene's frames in time order. The order depends on `seed` alone: `start_step` skips batches without decoding
    them, for a resumed run, which has its maps still. Of `processes`, number `rank` takes its `batch` rows of the
    `processes * batch` that there are.
    """

    def __init__(
        self,
        frames_by_scene: Mapping[str, Sequence[Frame]],
        variant: Variant,
        batch: int,
        seed: int,
        start_step: int = 0,
        augmentation: Augmentation | None = None,
        workers: int = 2,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if not frames_by_scene:
            raise DataError("no scene to train on")
        self._scenes = [frames_by_scene[name] for name in sorted(frames_by_scene)]
        self._variant, self._batch, self._seed = variant, batch, seed
        self._start_step, self._workers = start_step, workers
        self._rank, self._processes = rank, processes
        self._augmentation = augmentation or Augmentation()

    def __iter__(self) -> Iterator[Batch]:
        steps = self._tickets()
        pending: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            while True:
                while len(pending) < 2 * self._workers:
                    pending.append(pool.submit(assemble, next(steps), self._variant, self._augmentation))
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _tickets(self) -> Iterator[list[Ticket]]:
        order = self._scene_order()
        rows = self._processes * self._batch
        streams = [_Stream(order, b, self._variant, self._augmentation) for b in range(rows)]
        # Streams that began together would all end together: most of their scenes begin somewhere inside.
        for b, stream in enumerate(streams):
            stream.begin_at(b * stream.remaining // rows)
        for _ in range(self._start_step):
            for stream in streams:
                stream.skip()
        own = slice(self._rank * self._batch, (self._rank + 1) * self._batch)
        while True:
            # Streams draw from one order of scenes, so those of other processes must go on, too.
            for stream in (*streams[: own.start], *streams[own.stop :]):
                stream.skip()
            yield [stream.take() for stream in streams[own]]

    def _scene_order(self) -> Iterator[Visit]:
        """(scene, random generator for its visit) without end, each epoch in a new order."""
        visit = 0
        while True:
            epoch = visit // len(self._scenes)
            for scene in np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._scenes)):
                yield self._scenes[scene], np.random.default_rng([self._seed, 1, visit])
                visit += 1


class _Stream:
    """One row of the batch: plays its scene to the end, then fetches another."""

    def __init__(
        self,
        order: Iterator[Visit],
        number: int,
        variant: Variant,
        augmentation: Augmentation,
    ) -> None:
        self._order, self._augmentation = order, augmentation
        self._memory = TemporalMemory(variant.temporal)
        self._frames: Sequence[Frame] = ()
        self._position = 0  # of the next frame
        self._settled = 0  # frames of this visit that the memory and the random numbers have seen
        self._visits = number << 32  # a name for each visit: the same scene twice in a row is a new drive
        self._fetch()

    @property
    def remaining(self) -> int:
        return len(self._frames) - self._position

    def begin_at(self, position: int) -> None:
        """Leaves out the first frames of this visit, as if there were none."""
        self._position = self._settled = position

    def skip(self) -> None:
        """Goes on by a frame without making it; costs next to nothing for visits that end before the next `take`."""
        if not self.remaining:
            self._fetch()
        self._position += 1

    def take(self) -> Ticket:
        if not self.remaining:
            self._fetch()
        for position in range(self._settled, self._position):
            self._make(position)
        ticket = self._make(self._position)
        self._position += 1
        self._settled = self._position
        return ticket

    def _make(self, position: int) -> Ticket:
        frame = self._frames[position]
        if self._flip:
            frame = mirrored(frame)
        if self._yaw is not None:
            frame = turned(frame, self._yaw)
        step = self._memory.step(frame.stamp_ns, frame.ego2global, str(self._visits), frame.can_dynamics)
        self._memory.store(NO_MAP)
        seed = int(self._rng.integers(2**31)) if self._augmentation.varies_pictures else None
        return Ticket(frame, step.can_bus, step.prev_bev is None, self._flip, seed)

    def _fetch(self) -> None:
        self._frames, self._rng = next(self._order)
        self._position = self._settled = 0
        self._visits += 1
        self._flip = bool(self._rng.random() < self._augmentation.mirror)
        self._yaw = float(self._rng.uniform(-np.pi, np.pi)) if self._augmentation.turn else None


def frame_images(
    frame: Frame, variant: Variant, flip: bool = False, variation: tuple[Augmentation, int] | None = None
) -> NDArray[np.float32]:
    """(N, 3, H, W) float32 input of one frame. `flip` turns every picture left-right, for a frame that was `mirrored`;
    `variation` is how and with which seed the look of the pictures varies."""
    spec = variant.image
    images = np.zeros((len(frame.cameras), 3, spec.padded_height, spec.padded_width), np.float32)
    rng = None if variation is None else np.random.default_rng(variation[1])
    for image, camera in zip(images, frame.cameras):
        picture = _read_picture(camera, variant)
        if flip:
            picture = np.ascontiguousarray(picture[:, ::-1])
        if variation is not None and rng is not None:
            picture = vary_picture(picture, variation[0], rng)
        normalise_picture(picture, spec, out=image)
    return images


def frame_lidar2img(frame: Frame, variant: Variant) -> NDArray[np.float32]:
    """(N, 4, 4) float32 projections of one frame at the scale of the network's input."""
    return stack_lidar2img(
        [scale_to_input(frame.lidar2img(c), c.calibration, variant.image) for c in frame.cameras]
    )


def frame_targets(frame: Frame, variant: Variant) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """((K, 10) codes, (K,) labels) of the boxes with a lidar or radar point whose centre is inside pc_range."""
    boxes = frame.annotations.boxes
    low, high = np.split(np.array(variant.bev.pc_range), 2)
    inside = ((boxes.centers > low) & (boxes.centers < high)).all(-1)
    kept = boxes.select(inside & (frame.annotations.points > 0))
    return encode_boxes(kept.centers, kept.sizes, kept.yaws, kept.velocities), kept.labels


def _read_picture(camera: CameraFrame, variant: Variant) -> Picture:
    calibration = camera.calibration
    try:
        picture = decode_picture(camera.read(), calibration.width, calibration.height, variant.image)
    except DataError as error:
        raise DataError(f"{camera.image}: {error}") from error
    return resize_picture(picture, variant.image)


def assemble(tickets: list[Ticket], variant: Variant, augmentation: Augmentation) -> Batch:
    """Decodes one frame of every row into a batch."""
    images, matrices, codes, labels = [], [], [], []
    for ticket in tickets:
        variation = None if ticket.picture_seed is None else (augmentation, ticket.picture_seed)
        image = frame_images(ticket.frame, variant, ticket.flip, variation)
        if ticket.mask_seed is not None:
            blank_grid(image, variant, np.random.default_rng(ticket.mask_seed))
        images.append(image)
        matrices.append(frame_lidar2img(ticket.frame, variant))
        code, label = frame_targets(ticket.frame, variant)
        codes.append(torch.from_numpy(code))
        labels.append(torch.from_numpy(label))
    return Batch(
        images=torch.from_numpy(np.stack(images)),
        lidar2img=torch.from_numpy(np.stack(matrices)),
        can_bus=torch.from_numpy(np.stack([t.can_bus for t in tickets])),
        is_first=torch.tensor([t.is_first for t in tickets]),
        codes=codes,
        labels=labels,
        tokens=[t.frame.sample_token for t in tickets],
    )
