# SPDX-License-Identifier: Apache-2.0
"""What the engines' benchmark runs: a float model, its graph and its W4A6 package for every variant.

Weights are random, which changes nothing in the time; scales are calibrated on one frame, so that the engines' own
check of what they compute holds. What was made is kept, and made again only when the code that makes it changes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdbev_ros.core.files import write_json
from qdbev_ros.core.variant import Variant

ROOT = Path(__file__).resolve().parents[1]
TOWN = (ROOT / "demo" / "town", "v1.0-mini", "mini_val")  # comes with the project
SOURCES = ("qdbev_train/export", "qdbev_train/model", "qdbev_train/quantization")
FORMAT = ("package.py", "master.py", "graph.py", "sampling.py")
FLOAT_MODEL, FLOAT_PACKAGE, PACKAGE, ABOUT = "float.safetensors", "float.qdbev", "w4a6.qdbev", "about.json"


def folder_of(variant: Variant, kept: Path) -> Path:
    """Where the files of a variant are kept: another folder for other code or another variant."""
    digest = hashlib.sha256(json.dumps(variant.to_dict(), sort_keys=True).encode())
    files = [file for source in SOURCES for file in sorted((ROOT / source).glob("*.py"))]
    files = [file for file in files if not file.stem.endswith(("command", "inspection"))]
    files += [ROOT / "qdbev_ros" / "engine" / name for name in FORMAT]
    for file in (*files, Path(__file__)):
        digest.update(file.read_bytes())
    return kept / f"{variant.name}-{digest.hexdigest()[:12]}"


def make(variant: Variant, folder: Path) -> None:
    """Writes the files of a variant. `about.json` comes last: operations of a frame, number of parameters."""
    import torch

    from qdbev_train.checkpoint import save_model
    from qdbev_train.data.queues import QueueDataset
    from qdbev_train.data.tables import load_scenes
    from qdbev_train.export.package import export_package
    from qdbev_train.model import build_model

    torch.manual_seed(0)
    model = build_model(variant).eval().requires_grad_(False)
    unsettle(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / FLOAT_MODEL, model, variant, {}, None)
    export_package(model, variant, None, folder / FLOAT_PACKAGE, {"weights": "random"}, {})
    *_, batch = next(iter(QueueDataset(load_scenes(*TOWN), variant, batch=1, seed=0)))
    about: dict[str, Any] = {"operations": operations(model, batch)}
    about["parameters"] = sum(p.numel() for p in model.parameters())
    pack(model, variant, batch, folder / PACKAGE)
    write_json(folder / ABOUT, about)


def pack(model: Any, variant: Variant, batch: Any, path: Path) -> None:
    """Writes the W4A6 package of a model, calibrated on one batch the fast way."""
    from qdbev_train.export.package import export_package
    from qdbev_train.quantization import QuantConfig, calibrate, quantise_model

    fast = {"weight_range": "minmax", "activation_range": "minmax", "weight_rounding": "nearest"}
    config = QuantConfig(**fast, bias_correction=False)  # type: ignore[arg-type]
    student = quantise_model(model, config).eval()
    calibrate(student, [batch], config)
    export_package(student, variant, config, path, {"weights": "random"}, {})


def unsettle(model: Any) -> None:
    """Where deformable attention looks depends on what it sees, as in a trained network; untrained it does not."""
    import torch

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight", "conv_offset.weight")):
                tensor.add_(torch.randn_like(tensor) * 0.02)


def operations(model: Any, batch: Any) -> dict[str, int]:
    """Operations of a frame with a past, by stage, as torch counts them: products and convolutions."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    bev, head = model.variant.bev, model.pts_bbox_head
    past = torch.zeros(1, bev.cells, model.variant.transformer.channels)
    tables = model.camera_tables(batch.lidar2img)
    inputs = model.encoder_inputs(batch.images, tables, batch.can_bus, past, None)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.image_features(batch.images)
        backbone = counter.get_total_flops()
        head.decode(head.encode(features, *inputs), None)
    return {"backbone": int(backbone), "network": int(counter.get_total_flops())}


def grown(nano: Variant) -> list[Variant]:
    """nano with more pixels, cells and queries, one at a time."""
    image, bev, spec = nano.image, nano.bev, nano.transformer
    sizes = [(204, 362), (288, 512)]
    variants = [replace(nano, image=replace(image, height=h, width=w)) for h, w in sizes]
    variants += [replace(nano, bev=replace(bev, height=side, width=side)) for side in (57, 80)]
    variants += [replace(nano, transformer=replace(spec, queries=count)) for count in (400, 900)]
    return variants
