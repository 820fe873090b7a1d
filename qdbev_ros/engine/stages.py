# SPDX-License-Identifier: Apache-2.0
"""Cuts a lowered graph at our own nodes, so that kernels that ONNX Runtime doesn't have can run in between.

A node belongs to the earliest stage in which all its inputs are there; nodes of ours that read each other run one after
the other behind one stage. What depends on constants alone is part of every
stage that reads it, so that weights stay beside the products that the runtime fuses them with; so is what turns codes
into numbers. Codes of pictures and maps lie channels last between the stages, as integer kernels want them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from qdbev_ros.core.errors import PackageError
from qdbev_ros.engine.sampling import DOMAIN

_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass(frozen=True)
class Stage:
    """A graph of its own, or none, and our own nodes that follow it. Tensors keep their names from stage to stage."""

    model: onnx.ModelProto | None
    behind: tuple[onnx.NodeProto, ...]


def cut(model: onnx.ModelProto) -> list[Stage]:
    """The stages of a model in the order in which they run; a single one where there is nothing to cut at."""
    source = _Source(model)
    numbers, ours = {value.name: 0 for value in model.graph.input}, set[str]()
    for node in model.graph.node:
        if node.output[0] in source.varying:
            read = [name for name in node.input if name in numbers]
            number = max(numbers[name] + (_is_ours(node) and name not in ours) for name in read)
            numbers.update(dict.fromkeys(node.output, number))
            if _is_ours(node):
                ours.update(node.output)
    source.dequantise_where_read(numbers)
    made = []
    for number in range(max(numbers.values()) + 1):
        plain = [n for n in source.nodes if numbers.get(n.output[0]) == number and not _is_ours(n)]
        own = {name for node in plain for name in node.output}
        others = (n for n in source.nodes if _is_ours(n) or numbers.get(n.output[0]) != number)
        wanted = {name for n in others for name in n.input} | {o.name for o in model.graph.output}
        behind = [n for n in source.nodes if _is_ours(n) and numbers[n.output[0]] == number + 1]
        # The first decoder layer asks from where its queries always stand: constants that no other node makes.
        fixed = {name for n in behind for name in n.input} - source.varying
        outputs = sorted(own & wanted | fixed)
        part = source.channels_last(source.part(plain, outputs)) if outputs else None
        made.append(Stage(part, tuple(behind)))
    return made


def _is_ours(node: onnx.NodeProto) -> bool:
    return bool(node.domain == DOMAIN)


def split(model: onnx.ModelProto, tensor: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """(what makes a tensor, what is left and takes it as an input)."""
    source = _Source(model)
    needed, front = {tensor}, []
    for node in reversed(source.nodes):
        if needed.intersection(node.output) and node.output[0] in source.varying:
            needed.update(node.input)
            front.append(node)
    made = {name for node in front for name in node.output}
    rest = [n for n in source.nodes if n.output[0] in source.varying and n.output[0] not in made]
    if any(name in made and name != tensor for node in rest for name in node.input):
        raise PackageError(f"the graph cannot be split at {tensor!r}: its other parts read what is before it")
    return source.part(front[::-1], [tensor]), source.part(rest, [o.name for o in model.graph.output])


class _Source:
    """A model with what taking parts of it needs: the types of its tensors, and which depend on its inputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self.types = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.constants = {t.name: t for t in model.graph.initializer}
        self.varying = {value.name for value in model.graph.input}
        for node in self.nodes:
            if self.varying.intersection(node.input):
                self.varying.update(node.output)

    def dequantise_where_read(self, numbers: dict[str, int]) -> None:
        """Repeats a DequantizeLinear in every later stage that reads its numbers, so that codes are handed on."""
        for node in list(self.nodes):
            if node.op_type != "DequantizeLinear" or node.output[0] not in self.varying:
                continue
            (name,) = node.output
            for reader in [n for n in self.nodes if name in n.input]:
                number = numbers[reader.output[0]] - _is_ours(reader)
                if number == numbers[name]:
                    continue
                late = f"{name}_{number}"
                if late not in self.makers:
                    copy = onnx.NodeProto()
                    copy.CopyFrom(node)
                    copy.name, copy.output[0] = f"{node.name}_{number}", late
                    self.nodes.insert(self.nodes.index(node) + 1, copy)
                    self.makers[late], numbers[late] = copy, number
                    self.varying.add(late)
                reader.input[:] = [late if i == name else i for i in reader.input]

    def channels_last(self, part: onnx.ModelProto) -> onnx.ModelProto:
        """The part with uint8 maps (B, C, h, w) handed in and out as (B, h, w, C), but for those of the whole model."""
        ends = {v.name for v in (*self.model.graph.input, *self.model.graph.output)}
        graph = part.graph
        taken = [v for v in graph.input if v.name not in ends and _is_map(v)]
        given = [v for v in graph.output if v.name not in ends and _is_map(v)]
        inside = {v.name: f"{v.name}_planes" for v in (*taken, *given)}
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [inside.get(name, name) for name in names]
        before = [helper.make_node("Transpose", [v.name], [inside[v.name]], perm=_TO_FIRST) for v in taken]
        after = [helper.make_node("Transpose", [inside[v.name]], [v.name], perm=_TO_LAST) for v in given]
        nodes = [*before, *graph.node, *after]
        del graph.node[:]
        graph.node.extend(nodes)
        for value in (*taken, *given):
            sides = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
            turned = [sides[i] for i in _TO_LAST]
            value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.UINT8, turned))
        return part

    def part(self, nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.ModelProto:
        """The model of some nodes, makers first, and of the constant ones that they read."""
        whole: dict[str, onnx.NodeProto] = {}
        for node in nodes:
            for maker in (*self._constant_makers(node.input), node):
                whole[maker.output[0]] = maker
        for maker in self._constant_makers(outputs):
            whole[maker.output[0]] = maker
        made = {name for node in whole.values() for name in node.output}
        read = dict.fromkeys(name for node in whole.values() for name in node.input if name)
        inputs = [self._type(name) for name in read if name not in made and name not in self.constants]
        constants = [self.constants[name] for name in read if name in self.constants]
        # No shape inference knows what comes out of our own nodes.
        known = [self.types[n.output[0]] for n in nodes if _is_ours(n) and n.output[0] in self.types]
        results = [self._type(name) for name in outputs]
        graph = helper.make_graph(list(whole.values()), "part", inputs, results, constants, value_info=known)
        model = helper.make_model(
            graph,
            producer_name=self.model.producer_name,
            opset_imports=self.model.opset_import,
            functions=self.model.functions,
        )
        model.ir_version = self.model.ir_version
        return model

    def _constant_makers(self, names: Iterable[str]) -> list[onnx.NodeProto]:
        """The nodes, makers first, that compute those of the tensors which depend on constants alone."""
        found: list[onnx.NodeProto] = []
        for name in names:
            if name in self.makers and name not in self.varying:
                maker = self.makers[name]
                found += [*self._constant_makers(maker.input), maker]
        return found

    def _type(self, name: str) -> onnx.ValueInfoProto:
        if name not in self.types:
            raise PackageError(f"the type of tensor {name!r} cannot be told")
        return self.types[name]


def _is_map(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return bool(tensor.elem_type == TensorProto.UINT8 and len(tensor.shape.dim) == 4)
