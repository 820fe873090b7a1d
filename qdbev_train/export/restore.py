# SPDX-License-Identifier: Apache-2.0
"""Back from a package to the fake-quantised model in PyTorch: every code and every step is in the file.

Another model of the same variant on the same grid, whose numbers tell its tensors apart, is exported too. Node by node
its graph is the package's: where a tensor turns up in the one, its numbers stand in the other. What a package leaves
out because only training needs it (class branches of early decoder layers) keeps made-up numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor

from qdbev_ros.core.errors import PackageError
from qdbev_ros.engine.graph import unpack_int4
from qdbev_ros.engine.master import parse_master
from qdbev_ros.engine.package import Package
from qdbev_train.export.graph import export_master
from qdbev_train.model import BEVFormer, build_model
from qdbev_train.quantization import QuantConfig, quantise_model
from qdbev_train.quantization.config import Override
from qdbev_train.quantization.grid import per_channel
from qdbev_train.quantization.layers import QuantisedLayer
from qdbev_train.quantization.tables import tables

Arrays = dict[str, NDArray[Any]]
_BOUNDS = ("low", "high")  # of codes: the grid's, not the training's


class Restorer:
    """`model` is the package's, in eval mode; `load` gives it the numbers of another master with the same graph.

    Raises PackageError unless exporting `model` gives the package's master again, byte for byte but for names of nodes:
    torch's exporter numbers some of them, and counts what the package leaves out.
    """

    def __init__(self, package: Package) -> None:
        self.config = _grid(package)
        self.model: BEVFormer = quantise_model(build_model(package.variant), self.config).eval()
        # As the package has them: where two grids of one tensor are the same, the graph has one of them.
        for held in (layer for layer in package.quantisation["layers"] if layer["kind"] != "embedding"):
            layer = self.model.get_submodule(held["name"])
            assert isinstance(layer, QuantisedLayer)
            layer.input_quantiser.set_sign(held["activation_codes"][0] < 0)
            layer.input_quantiser.scale.fill_(held["activation_scale"])
        numbers = _tell_apart(self.model)
        marked = parse_master(export_master(self.model, package.variant))
        self._places = _places(numbers, marked, parse_master(package.model))
        lost = sorted(numbers.keys() - {name for name, _, _ in self._places})
        lost = [name for name in lost if not name.startswith(tuple(package.quantisation["left_out"]))]
        if lost:
            raise PackageError(f"{package.path}: the graph does not show where {', '.join(lost[:3])} is")
        self.load(package.model)
        if _nameless(export_master(self.model, package.variant)) != _nameless(package.model):
            raise PackageError(f"{package.path}: what was restored from it exports to another master")

    @torch.no_grad()
    def load(self, master: bytes) -> None:
        arrays, tensors = _arrays(parse_master(master)), _tensors(self.model)
        found = {name: arrays[place].T if turned else arrays[place] for name, place, turned in self._places}
        values = {name: torch.from_numpy(array.copy()) for name, array in found.items()}
        on_grid = values.keys() & _steps(self.model).keys()
        # Steps first: what is on a grid is its codes times them.
        for name in values.keys() - on_grid:
            tensors[name].copy_(values[name])
        steps = _steps(self.model)
        for name in on_grid:
            tensors[name].copy_(values[name] * steps[name])


def _grid(package: Package) -> QuantConfig:
    """What is on which grid, which is all of the configuration that the model needs."""
    held = package.quantisation
    if not held["layers"]:
        raise PackageError(f"{package.path}: a float model; only quantised ones can be restored")
    overrides = [
        Override(e["name"], e["weight_bits"], e["activation_bits"] or e["weight_bits"], e["reason"])
        for e in held["exceptions"]
    ]
    return QuantConfig(tuple(held["parts"]), held["weight_bits"], held["activation_bits"], tuple(overrides))


def _tensors(model: BEVFormer) -> dict[str, Tensor]:
    """What training settles, every tensor once though modules share some."""
    kept = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if name in kept and not name.endswith(_BOUNDS)}


def _steps(model: BEVFormer) -> dict[str, Tensor]:
    """Steps of the tensors that a package holds as codes."""
    steps = {t.parameter: per_channel(t.quantiser.scale, t.values) for t in tables(model) if t.quantiser}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantisedLayer):
            steps[f"{name}.weight"] = per_channel(layer.weight_scale, layer.weight)
            steps[f"{name}.bias"] = layer.input_quantiser.scale * layer.weight_scale
    return steps


@torch.no_grad()
def _tell_apart(model: BEVFormer) -> Arrays:
    """Gives tensors numbers of their own, scales that are known aside; returns all as packages do, codes or float32."""
    generator, tensors, numbers = np.random.default_rng(0), _tensors(model), Arrays()
    on_grid = _steps(model).keys()
    for name in (name for name in tensors if name not in on_grid):
        if not (name.endswith(".scale") and tensors[name].isfinite().all()):
            made = generator.uniform(0.5, 1.5, tensors[name].shape)
            tensors[name].copy_(torch.from_numpy(made))
        numbers[name] = tensors[name].detach().numpy().copy()
    for name, step in _steps(model).items():
        # Weights in codes that any number of bits has.
        size, kind = (2**20, np.int32) if name.endswith(".bias") else (2, np.int8)
        numbers[name] = generator.integers(-size, size, tensors[name].shape).astype(kind)
        tensors[name].copy_(torch.from_numpy(numbers[name]) * step)
    return numbers


def _places(numbers: Arrays, marked: onnx.ModelProto, wanted: onnx.ModelProto) -> list[tuple[str, str, bool]]:
    """(tensor, initialiser of `wanted`, whether it is transposed there); `numbers` are those in `marked`."""
    known = {_content(array): name for name, array in _arrays(marked).items()}
    partners = _partners(marked, wanted)
    places = []
    for name, array in numbers.items():
        forms = [known.get(_content(form)) for form in (array, array.T)]
        place = forms[0] or forms[1]
        if place is not None:
            places.append((name, partners[place], forms[0] is None))
    return places


def _partners(marked: onnx.ModelProto, wanted: onnx.ModelProto) -> dict[str, str]:
    """Initialisers of one graph -> of the other, which has the same nodes in the same order."""
    kinds = [[(n.op_type, len(n.input), *n.output) for n in m.graph.node] for m in (marked, wanted)]
    if kinds[0] != kinds[1]:
        raise PackageError("the package's graph is not the one that this version exports")
    pairs = zip(marked.graph.node, wanted.graph.node, strict=True)
    return {a: b for node, other in pairs for a, b in zip(node.input, other.input, strict=True)}


def _nameless(master: bytes) -> bytes:
    model = parse_master(master)
    for node in model.graph.node:
        node.name = ""
    return model.SerializeToString(deterministic=True)


def _arrays(model: onnx.ModelProto) -> Arrays:
    """Initialisers by name, those of four bits as int8."""
    return {
        t.name: unpack_int4(t) if t.data_type == TensorProto.INT4 else numpy_helper.to_array(t)
        for t in model.graph.initializer
    }


def _content(array: NDArray[Any]) -> tuple[str, tuple[int, ...], bytes]:
    return (array.dtype.name, array.shape, array.tobytes())
