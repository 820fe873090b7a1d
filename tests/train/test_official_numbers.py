# SPDX-License-Identifier: Apache-2.0
"""Numbers that BEVFormer's official implementation gives for weights and inputs made by a formula, and so do we.

official_numbers.json holds, for two small networks on two consecutive frames, the root mean square of every stage and
a few of its values, and of the second frame the losses for made-up boxes and the best decoded boxes. Whoever changes
the model and fails here has left BEVFormer.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qdbev_ros.core.boxes import decode_boxes, encode_boxes
from qdbev_ros.core.variant import BackboneSpec, BevSpec, TemporalSpec, Variant, load_variant
from qdbev_train.model import BEVFormer, Output, build_model, load_bevformer_checkpoint
from qdbev_train.training.losses import Targets, detection_loss
from tests.model_samples import rig

NUMBERS = json.loads((Path(__file__).parent / "official_numbers.json").read_text())
PROBES = 10
# Deviations are measured against the root mean square of the whole tensor.
TOLERANCE = 1e-4


def one_level() -> Variant:
    """ResNet-50 in pytorch style, one feature level, a map turned about BEVFormer's (100, 100)."""
    tiny = load_variant("tiny")
    return replace(
        tiny,
        name="one_level",
        image=replace(tiny.image, height=64, width=96),
        bev=BevSpec(20, 20, (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0), 4),
        transformer=replace(
            tiny.transformer,
            channels=64,
            ffn_channels=96,
            encoder_layers=2,
            decoder_layers=3,
            queries=30,
        ),
    )


def several_levels() -> Variant:
    """ResNet-50 in caffe style with deformable convolutions, four levels, a map that is not square."""
    one = one_level()
    return replace(
        one,
        name="several_levels",
        backbone=BackboneSpec("resnet", 50, "caffe", (2, 3, 4), (3, 4), 4),
        bev=BevSpec(14, 10, (-30.0, -51.2, -5.0, 40.0, 51.2, 3.0), 4),
        temporal=TemporalSpec((6.0, 5.0), False, "can", 3),
    )


VARIANTS = {"one_level": one_level, "several_levels": several_levels}


def numbers_for(key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The weight or statistic `key`: normal numbers seeded by its name, scaled so that nothing dies or explodes."""
    normal = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, np.float32)
    if key.endswith("code_weights"):
        return np.array([1.0] * 8 + [0.2] * 2, np.float32)
    if key.endswith("running_var"):
        return np.exp(0.3 * normal)
    if "embed" in key:
        return normal
    if key.endswith("sampling_offsets.bias"):
        return 2 * normal
    if len(shape) == 1:
        scale = {"bn3.weight": 0.4}.get(".".join(key.split(".")[-2:]), 1.0)
        is_norm = key.endswith("weight")  # a vector called weight belongs to a norm
        return scale * (float(is_norm) + 0.1 * normal)
    gain = 0.3 if "conv_offset" in key else 1.4 if len(shape) == 4 else 1.0
    if key.endswith("6.weight"):
        gain = 25.0  # class logits that differ from each other
    return normal * np.float32(np.sqrt(gain / np.prod(shape[1:])))


def fill(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the same keys and shapes with `numbers_for` each key."""
    return {
        key: torch.from_numpy(np.asarray(numbers_for(key, tuple(t.shape)), np.float32))
        if t.is_floating_point()
        else t
        for key, t in state.items()
    }


@dataclass(frozen=True)
class Moment:
    """One frame: images (1, 6, 3, H, W), lidar2img (1, 6, 4, 4), position in global axes (m), heading in degrees."""

    images: Tensor
    lidar2img: Tensor
    position: tuple[float, float, float]
    heading: float


def moments(variant: Variant) -> list[Moment]:
    """Two consecutive frames of a vehicle that drove 4.6 m and turned by -3.7 degrees; the rig moves a little."""
    size = (1, 6, 3, variant.image.padded_height, variant.image.padded_width)
    generator = np.random.Generator(np.random.PCG64(9))
    images = [torch.from_numpy(generator.standard_normal(size, np.float32)) for _ in range(2)]
    return [
        Moment(images[0], rig(variant)[None], (600.5, 1640.25, 0.5), 114.2),
        Moment(images[1], rig(variant, turn_degrees=0.4)[None], (598.125, 1644.1875, 0.53125), 110.5),
    ]


def raw_can_bus(moment: Moment) -> NDArray[np.float64]:
    """(18,) before the deltas are taken: absolute position, and the absolute heading in degrees at the end."""
    yaw = np.radians(moment.heading)
    vector = np.zeros(18)
    vector[0:3] = moment.position
    vector[3], vector[6] = np.cos(yaw / 2), np.sin(yaw / 2)
    vector[7:16] = 0.3, -0.2, 9.8, 0.01, -0.02, -0.12, 9.2, 0.05, -0.03
    vector[16], vector[17] = yaw, moment.heading
    return vector


def can_bus_of(frames: list[Moment], index: int) -> Tensor:
    """(1, 18) with deltas applied; the first frame has none."""
    vector = raw_can_bus(frames[index])
    past = raw_can_bus(frames[index - 1]) if index else vector
    vector[[0, 1, 2, 17]] -= past[[0, 1, 2, 17]]
    return torch.from_numpy(vector[None].astype(np.float32))


def stages(out: Output) -> dict[str, Tensor]:
    """Every output of one call by name."""
    features = {f"image_features[{level}]": f for level, f in enumerate(out.image_features)}
    return {**features, "bev": out.bev, "class_logits": out.class_logits, "boxes": out.boxes}


def probe(stage: str, tensor: Tensor) -> tuple[float, NDArray[np.float64]]:
    """Root mean square of a tensor and PROBES of its values, chosen by the stage's name and the tensor's size."""
    flat = tensor.double().numpy().reshape(-1)
    where = np.random.Generator(np.random.PCG64(zlib.crc32(stage.encode()))).integers(0, flat.size, PROBES)
    return float(np.sqrt(np.mean(flat**2))), flat[where]


def made_up_boxes(variant: Variant) -> tuple[NDArray[np.float64], ...]:
    """Eleven boxes inside the map: centres, sizes, yaws, velocities and labels."""
    generator = np.random.Generator(np.random.PCG64(4))
    low, high = np.split(np.array(variant.bev.pc_range), 2)
    centers = low + (high - low) * generator.uniform(0.05, 0.95, (11, 3))
    sizes, yaws = generator.uniform(0.4, 9.0, (11, 3)), generator.uniform(-3.0, 3.0, 11)
    return centers, sizes, yaws, generator.normal(0, 4, (11, 2)), generator.integers(0, 10, 11)


def check_losses_and_decoding(model: BEVFormer, out: Output, expected: dict[str, Any]) -> None:
    """Losses summed over the decoder layers, and the five best boxes: score, label, centre, w l h, velocity."""
    *geometry, labels = made_up_boxes(model.variant)
    targets = [Targets(torch.from_numpy(labels), torch.from_numpy(encode_boxes(*geometry)))]
    losses = detection_loss(
        out.class_logits, out.boxes, targets, torch.tensor(11.0), model.pts_bbox_head.code_weights
    )
    assert {k: float(v) for k, v in losses.items()} == pytest.approx(expected["losses"], rel=TOLERANCE)
    boxes = decode_boxes(out.class_logits[-1, 0].numpy(), out.boxes[-1, 0].numpy())
    columns = boxes.scores, boxes.labels, boxes.centers, boxes.sizes, boxes.velocities
    best = np.column_stack([column[:5] for column in columns])
    np.testing.assert_allclose(best, expected["best"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_two_frames_give_the_official_implementations_numbers(name: str) -> None:
    variant = VARIANTS[name]()
    model = build_model(variant).eval()
    load_bevformer_checkpoint(model, fill(model.state_dict()))
    frames = moments(variant)
    previous = None
    for index, moment in enumerate(frames):
        out = model(moment.images, moment.lidar2img, can_bus_of(frames, index), previous)
        previous = out.bev
        assert stages(out).keys() == NUMBERS[name]["frames"][index].keys()
        for stage, tensor in stages(out).items():
            expected = NUMBERS[name]["frames"][index][stage]
            size, values = probe(stage, tensor)
            assert list(tensor.shape) == expected["shape"]
            assert size == pytest.approx(expected["rms"], rel=TOLERANCE), (index, stage)
            worst = np.abs(values - np.array(expected["values"])).max() / expected["rms"]
            assert worst < TOLERANCE, f"frame {index}, {stage}: {worst:.1e} of the root mean square"
    check_losses_and_decoding(model, out, NUMBERS[name])
