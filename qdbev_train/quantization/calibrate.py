# SPDX-License-Identifier: Apache-2.0
"""Post-training quantisation: scales from temporally ordered frames, codes and biases from what layers put out.

`quantise_model` puts the grid into a model, `calibrate` finds its scales, `tune_layers` rounds weights with an eye on
the output and repairs means; `post_training_quantise` does all of them in a row. The result trains on as any model
(straight-through gradients).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdbev_train.model.bevformer import BEVFormer
from qdbev_train.quantization.config import QuantConfig
from qdbev_train.quantization.layers import ActivationQuantiser, QuantisedConv2d, QuantisedLayer
from qdbev_train.quantization.model import bev_quantisers, quantise_model
from qdbev_train.quantization.ranges import Histogram, activation_scale, weight_scales
from qdbev_train.quantization.rounding import input_covariance, round_weights

if TYPE_CHECKING:
    from qdbev_train.data.dataset import Batch

# Frames whose mean outputs are compared, all in one batch: a mean over 16 x 6 pictures is steady enough.
CORRECTION_FRAMES = 16
# A channel with (nearly) no weights would need a step so fine that its bias left the integers; 2^20 steps are plenty.
BIAS_STEPS = 2.0**20


def post_training_quantise(model: BEVFormer, frames: Iterable[Batch], config: QuantConfig) -> BEVFormer:
    """The W4A6 (or as `config` says) student of a trained float model.

    frames: batches in temporal order, such as a training stream gives them; all are read once and kept. The model
    itself is changed and returned in eval mode.
    """
    batches = list(frames)
    model = quantise_model(model, config).eval()
    histories = calibrate(model, batches, config)
    tune_layers(model, batches, histories, config)
    return model


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Batch], config: QuantConfig) -> list[Tensor | None]:
    """Sets every scale of a quantised model from what the float network computes on `batches`.

    Returns for each batch the BEV map (B, cells, C) that was its history, None at the start.
    """
    histories: list[Tensor | None] = []
    quantisers = [m for m in model.modules() if isinstance(m, ActivationQuantiser)]
    for quantiser in quantisers:
        quantiser.histogram = Histogram()
    # One scale for every place where the BEV map is read, so that it is quantised once and not again and again.
    shared = Histogram()
    for quantiser in bev_quantisers(model):
        quantiser.histogram = shared
    with in_float(model):
        previous: Tensor | None = None
        for batch in batches:
            histories.append(previous)
            previous = run_batch(model, batch, previous).bev
    for quantiser in quantisers:
        set_activation_range(quantiser, config)
    for module in model.modules():
        if isinstance(module, QuantisedLayer):
            set_weight_scale(module, config.weight_range)
    return histories


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
    step = activation_scale(
        histogram, int(quantiser.high), config.activation_range, config.percentile, quantiser.limit
    )
    quantiser.scale.fill_(step)
    quantiser.histogram = None


def set_weight_scale(layer: QuantisedLayer, method: str) -> None:
    """Steps of every output channel; the input's scale has to be there already."""
    scale = weight_scales(layer.weight, layer.bits, method)
    finest = layer.bias.detach().abs() / (layer.input_quantiser.scale * BIAS_STEPS)
    layer.weight_scale.copy_(torch.maximum(scale, finest))


@torch.no_grad()
def tune_layers(
    model: nn.Module, batches: Sequence[Batch], histories: Sequence[Tensor | None], config: QuantConfig
) -> None:
    """Chooses weight codes by the output's error, and shifts biases so that every channel keeps its mean.

    One pass over one batch tunes all layers in the order in which they run. Each sees inputs from the tuned layers
    before it, rounding noise included: codes chosen on clean inputs were worse than the nearest ones. (Bias correction:
    Nagel et al. 2019, "Data-free quantization".)
    """
    batch, history = _joined(batches, histories)
    layers = [m for m in model.modules() if isinstance(m, QuantisedLayer)]
    wanted: dict[nn.Module, Tensor] = {}

    def remember(layer: nn.Module, _: Any, output: Tensor) -> None:
        wanted[layer] = _channel_mean(layer, output)

    def tune(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, QuantisedLayer)
        if config.weight_rounding == "output":
            round_weights(layer, input_covariance(layer, inputs[0]))
            output = layer.forward(inputs[0])
        if config.bias_correction:
            layer.bias.add_(wanted[layer] - _channel_mean(layer, output))
            output = layer.forward(inputs[0])
        return output

    with in_float(model), _hooks(layers, remember):
        run_batch(model, batch, history)
    with _hooks(layers, tune):
        run_batch(model, batch, history)


def _channel_mean(layer: nn.Module, output: Tensor) -> Tensor:
    return output.mean((0, 2, 3)) if isinstance(layer, QuantisedConv2d) else output.flatten(0, -2).mean(0)


def _joined(batches: Sequence[Batch], histories: Sequence[Tensor | None]) -> tuple[Batch, Tensor | None]:
    """Evenly spread batches as one, at most CORRECTION_FRAMES frames, the histories with them."""
    count = max(1, min(len(batches), CORRECTION_FRAMES // len(batches[0].images)))
    picked = [round(i) for i in torch.linspace(0, len(batches) - 1, count).tolist()]
    some = next((h for i in picked if (h := histories[i]) is not None), None)
    parts = [batches[i] for i in picked]
    joined = replace(
        parts[0],
        images=torch.cat([p.images for p in parts]),
        lidar2img=torch.cat([p.lidar2img for p in parts]),
        can_bus=torch.cat([p.can_bus for p in parts]),
        is_first=torch.cat([p.is_first | (histories[i] is None) for i, p in zip(picked, parts, strict=True)]),
    )
    if some is None:
        return joined, None
    filled = [torch.zeros_like(some) if (h := histories[i]) is None else h for i in picked]
    return joined, torch.cat(filled)


@contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """Within, the quantised model computes in float, as if nothing were quantised."""
    modules = [m for m in model.modules() if isinstance(m, (ActivationQuantiser, QuantisedLayer))]
    before = [m.active for m in modules]
    for module in modules:
        module.active = False
    try:
        yield
    finally:
        for module, active in zip(modules, before, strict=True):
            module.active = active


@contextmanager
def _hooks(layers: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
