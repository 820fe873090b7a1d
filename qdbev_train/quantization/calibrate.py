# SPDX-License-Identifier: Apache-2.0
"""Post-training quantisation: scales from temporally ordered frames, codes and biases from what layers put out.

`quantise_model` puts the grid into a model, `calibrate` finds its scales, `tune_layers` rounds weights with an eye on
the output and repairs means; `post_training_quantise` does all of them in a row. The result trains on as any model
(straight-through gradients).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from qdbev_train.model.bevformer import BEVFormer
from qdbev_train.quantization.config import QuantConfig
from qdbev_train.quantization.layers import (
    ActivationQuantiser,
    QuantisedConv2d,
    QuantisedDeformConv2d,
    QuantisedLayer,
)
from qdbev_train.quantization.model import quantise_model
from qdbev_train.quantization.ranges import Histogram, activation_scale
from qdbev_train.quantization.rounding import input_covariance, round_weights
from qdbev_train.quantization.tables import TableQuantiser, tables

if TYPE_CHECKING:
    from qdbev_train.data.dataset import Batch

# Frames whose mean outputs are compared, all in one batch: a mean over 16 x 6 pictures is steady enough.
CORRECTION_FRAMES = 16


OnGrid = ActivationQuantiser | QuantisedLayer | TableQuantiser


class Frames(Sized, Iterable["Batch"], Protocol):
    """Batches in temporal order whose number is known; a list will do."""


def post_training_quantise(model: BEVFormer, frames: Frames, config: QuantConfig) -> BEVFormer:
    """The W4A6 (or as `config` says) student of a trained model.

    frames: such as a training stream gives them; all are read once. Parts that are on the
    grid already stay as they are and take part as they are: that is how progressive training switches on the next one.
    The model itself is changed and returned in eval mode.
    """
    model = quantise_model(model, config).eval()
    fresh = uncalibrated(model)
    kept = calibrate(model, frames, config)
    tune_layers(model, fresh, kept, config)
    return model


def uncalibrated(model: nn.Module) -> list[OnGrid]:
    """Everything on the grid that has no scale yet."""
    return [
        m
        for m in model.modules()
        if (isinstance(m, (ActivationQuantiser, TableQuantiser)) and bool(m.scale.isnan().any()))
        or (isinstance(m, QuantisedLayer) and bool(m.weight_scale.isnan().any()))
    ]


Kept = list[tuple["Batch", Tensor | None]]


@torch.no_grad()
def calibrate(model: nn.Module, frames: Frames, config: QuantConfig) -> Kept:
    """Sets every scale that there is none of yet, from what the network computes on `frames` without those.

    Returns evenly spread batches, together at most CORRECTION_FRAMES frames, each with the BEV map (B, cells, C) that
    was its history, None at the start.
    """
    fresh = uncalibrated(model)
    quantisers = [m for m in fresh if isinstance(m, ActivationQuantiser)]
    for quantiser in quantisers:
        quantiser.histogram = Histogram()
    kept: Kept = []
    with in_float(fresh):
        previous: Tensor | None = None
        picked: set[int] = set()
        for i, batch in enumerate(frames):
            if i == 0:
                count = max(1, min(len(frames), CORRECTION_FRAMES // len(batch.images)))
                picked = {round(p) for p in torch.linspace(0, len(frames) - 1, count).tolist()}
            if i in picked:
                kept.append((batch, previous))
            previous = run_batch(model, batch, previous).bev
    for quantiser in quantisers:
        set_activation_range(quantiser, config)
    for module in fresh:
        if isinstance(module, QuantisedLayer):
            module.fit_scale(config.weight_range)
    for table in tables(model):
        if table.quantiser in fresh:
            table.quantiser.fit_scale(table.values, config.weight_range)
    return kept


def run_batch(model: nn.Module, batch: Batch, previous: Tensor | None) -> Any:
    """The model's output for a batch of frames whose history is `previous`, where the batch says there is one."""
    device = next(model.parameters()).device
    has_history = None if previous is None else ~batch.is_first.to(device)
    return model(
        batch.images.to(device),
        batch.lidar2img.to(device),
        batch.can_bus.to(device),
        previous,
        has_prev=has_history,
    )


def set_activation_range(quantiser: ActivationQuantiser, config: QuantConfig) -> None:
    """Scale, and sign where calibration has to find out, from the collected histogram, which is then dropped."""
    histogram = quantiser.histogram
    assert histogram is not None
    if quantiser.non_negative is None:
        quantiser.set_sign(signed=histogram.negative)
    codes = (int(quantiser.low), int(quantiser.high))
    step = activation_scale(histogram, codes, config.activation_range, config.percentile, quantiser.limit)
    quantiser.scale.fill_(step)
    quantiser.histogram = None


@torch.no_grad()
def tune_layers(model: nn.Module, fresh: Sequence[OnGrid], kept: Kept, config: QuantConfig) -> None:
    """Chooses weight codes by the output's error, and shifts biases so that every channel keeps its mean.

    `fresh` is what was just switched on: its layers are tuned, towards what the network computed without it. One pass
    over one batch tunes all layers in the order in which they run. Each sees inputs from the tuned layers before it,
    rounding noise included: codes chosen on clean inputs were worse than the nearest ones. (Bias correction: Nagel et
    al. 2019, "Data-free quantization".)
    """
    if config.weight_rounding == "nearest" and not config.bias_correction:
        return
    batch, history = _joined(kept)
    layers = [m for m in fresh if isinstance(m, QuantisedLayer)]
    wanted: dict[nn.Module, Tensor] = {}

    def remember(layer: nn.Module, _: Any, output: Tensor) -> None:
        wanted[layer] = _channel_mean(layer, output)

    def tune(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, QuantisedLayer)
        if config.weight_rounding == "output":
            round_weights(layer, input_covariance(layer, inputs))
            output = layer.forward(*inputs)
        if config.bias_correction:
            layer.bias.add_(wanted[layer] - _channel_mean(layer, output))
            output = layer.forward(*inputs)
        return output

    with in_float(fresh), _hooks(layers, remember):
        run_batch(model, batch, history)
    with _hooks(layers, tune):
        run_batch(model, batch, history)


def _channel_mean(layer: nn.Module, output: Tensor) -> Tensor:
    pictures = isinstance(layer, (QuantisedConv2d, QuantisedDeformConv2d))
    return output.mean((0, 2, 3)) if pictures else output.flatten(0, -2).mean(0)


def _joined(kept: Kept) -> tuple[Batch, Tensor | None]:
    """The batches as one, the histories with them."""
    parts = [batch for batch, _ in kept]
    histories = [history for _, history in kept]
    some = next((h for h in histories if h is not None), None)
    joined = replace(
        parts[0],
        images=torch.cat([p.images for p in parts]),
        lidar2img=torch.cat([p.lidar2img for p in parts]),
        can_bus=torch.cat([p.can_bus for p in parts]),
        is_first=torch.cat([p.is_first | (h is None) for p, h in zip(parts, histories, strict=True)]),
    )
    if some is None:
        return joined, None
    return joined, torch.cat([torch.zeros_like(some) if h is None else h for h in histories])


@contextmanager
def in_float(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, the quantisers and quantised layers among `modules` compute in float, as if nothing were quantised."""
    switched = [m for m in modules if isinstance(m, OnGrid)]
    before = [m.active for m in switched]
    for module in switched:
        module.active = False
    try:
        yield
    finally:
        for module, active in zip(switched, before, strict=True):
            module.active = active


@contextmanager
def _hooks(layers: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
