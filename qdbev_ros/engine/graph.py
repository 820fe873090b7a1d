# SPDX-License-Identifier: Apache-2.0
"""A thin editing layer over an ONNX graph, and INT4 packing. Used by the packing pass and by the lowerings."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qdbev_ros.core.errors import PackageError

# Shape-free arithmetic that the exporter leaves between a parameter and its use.
_FOLDABLE = ("Mul", "Neg", "Reshape", "Unsqueeze", "Identity", "Cast", "Constant")


def pack_int4(codes: NDArray[np.int8]) -> TensorProto:
    """An INT4 tensor: two codes [-8, 7] a byte, the first in the low half, row-major; an odd last half is zero."""
    flat = codes.reshape(-1)
    if flat.size and (flat.min() < -8 or flat.max() > 7):
        raise ValueError(f"codes {flat.min()}..{flat.max()} do not fit four bits")
    nibbles = (flat.astype(np.uint8) & 0x0F).astype(np.uint8)
    padded = np.concatenate([nibbles, np.zeros(flat.size % 2, np.uint8)])
    packed = padded[0::2] | (padded[1::2] << 4)
    return TensorProto(
        data_type=TensorProto.INT4, dims=codes.shape, raw_data=packed.astype(np.uint8).tobytes()
    )


def unpack_int4(tensor: TensorProto) -> NDArray[np.int8]:
    """The codes of a packed INT4 tensor as int8, in its shape. Raises PackageError where the bytes do not fit it."""
    count = int(np.prod(tensor.dims))
    packed = np.frombuffer(tensor.raw_data, np.uint8)
    if packed.size != (count + 1) // 2:
        raise PackageError(f"weight {tensor.name!r}: {packed.size} bytes for {count} codes of four bits")
    nibbles = np.empty(packed.size * 2, np.uint8)
    nibbles[0::2], nibbles[1::2] = packed & 0x0F, packed >> 4
    # Shifting up and arithmetically down again carries the sign of the fourth bit through the byte.
    codes = (nibbles << 4).view(np.int8) >> 4
    return codes[:count].reshape(tuple(tensor.dims))


class Graph:
    """Nodes and initialisers, with an index of who makes and who reads each tensor.

    Nodes keep their order; `finish` moves a node back only as far as its inputs ask for.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._nodes: dict[int, onnx.NodeProto] = {}
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, dict[int, onnx.NodeProto]] = {}
        self._outputs = {o.name for o in model.graph.output}
        self.initializers: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        # Local to the model, by name; `finish` keeps those that are called.
        self.functions: dict[str, onnx.FunctionProto] = {f.name: f for f in model.functions}
        if any(t.data_location == TensorProto.EXTERNAL for t in self.initializers.values()):
            raise PackageError("the ONNX graph refers to data outside its own file")
        for node in model.graph.node:
            self.add(node)

    def add(self, node: onnx.NodeProto) -> None:
        self._nodes[id(node)] = node
        for name in node.input:
            self._readers.setdefault(name, {})[id(node)] = node
        for name in node.output:
            self._makers[name] = node

    def remove(self, node: onnx.NodeProto) -> None:
        del self._nodes[id(node)]
        for name in node.input:
            self._readers[name].pop(id(node), None)
        for name in node.output:
            if self._makers.get(name) is node:
                del self._makers[name]

    def replace(self, node: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
        """Puts nodes in the place of one."""
        self.remove(node)
        for new in nodes:
            self.add(new)

    def set_input(self, node: onnx.NodeProto, index: int, name: str) -> None:
        old = node.input[index]
        node.input[index] = name
        if old not in node.input:
            self._readers[old].pop(id(node), None)
        self._readers.setdefault(name, {})[id(node)] = node

    def redirect(self, old: str, new: str) -> None:
        """Lets everything that read `old` read `new`; graph outputs keep their names and cannot be redirected."""
        for node in self.users(old):
            for i, name in enumerate(node.input):
                if name == old:
                    self.set_input(node, i, new)

    def nodes(self, op_type: str) -> list[onnx.NodeProto]:
        return [n for n in self._nodes.values() if n.op_type == op_type]

    def all_nodes(self) -> list[onnx.NodeProto]:
        return list(self._nodes.values())

    def users(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor."""
        return list(self._readers.get(name, {}).values())

    def only_user(self, node: onnx.NodeProto, op_type: str) -> onnx.NodeProto | None:
        """The one node that reads a node's first output; None where there are others, or it is of another kind."""
        users = self.users(node.output[0])
        return users[0] if len(users) == 1 and users[0].op_type == op_type else None

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that a tensor comes from; None for inputs and initialisers."""
        return self._makers.get(name)

    def is_output(self, name: str) -> bool:
        """The tensor is one of the graph's results."""
        return name in self._outputs

    def is_constant(self, name: str) -> bool:
        """The tensor depends on initialisers alone, through simple arithmetic."""
        if name in self.initializers:
            return True
        node = self.producer(name)
        return node is not None and node.op_type in _FOLDABLE and all(self.is_constant(i) for i in node.input)

    def constant(self, name: str) -> NDArray[Any]:
        """The value of a tensor that depends on initialisers alone."""
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producer(name)
        if node is None or node.op_type not in _FOLDABLE:
            raise PackageError(f"tensor {name!r} is no constant")
        values = {i: self.constant(i) for i in node.input}
        return np.asarray(next(iter(ReferenceEvaluator(node).run(None, values))))

    def add_initializer(self, tensor: TensorProto) -> str:
        """Adds a tensor under a name made from its content, once; returns the name."""
        kind = repr((tensor.data_type, list(tensor.dims))).encode()
        named = TensorProto()
        named.CopyFrom(tensor)
        named.name = f"c_{hashlib.sha256(kind + tensor.raw_data).hexdigest()[:24]}"
        self.initializers[named.name] = named
        return named.name

    def add_constant(self, value: Any) -> str:
        """Adds a numpy array or scalar as an initialiser; returns its name."""
        return self.add_initializer(numpy_helper.from_array(np.asarray(value)))

    def merge_duplicates(self) -> None:
        """Merges nodes that compute the same from the same, e.g. one tensor quantised twice on one grid."""
        seen: dict[tuple[object, ...], onnx.NodeProto] = {}
        for node in self._sorted():
            attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
            key = (node.domain, node.op_type, tuple(node.input), attributes, len(node.output))
            if key not in seen:
                seen[key] = node
            elif not self._outputs.intersection(node.output):
                for old, new in zip(node.output, seen[key].output, strict=True):
                    self.redirect(old, new)
                self.remove(node)

    def _sorted(self) -> list[onnx.NodeProto]:
        """All nodes, makers before readers, otherwise in the order in which they came."""
        done: set[int] = set()
        ordered: list[onnx.NodeProto] = []
        for node in self._nodes.values():
            stack = [node]
            while stack:
                waiting = [
                    m for i in stack[-1].input if (m := self._makers.get(i)) is not None and id(m) not in done
                ]
                if id(stack[-1]) in done:
                    stack.pop()
                elif waiting:
                    stack.append(waiting[0])
                else:
                    done.add(id(stack[-1]))
                    ordered.append(stack.pop())
        return ordered

    def finish(self, producer: str, opset: int, short_names: bool = False) -> onnx.ModelProto:
        """The edited model without what no output depends on; initialisers sorted by name, no intermediate shapes.

        short_names numbers the tensors between nodes, whose names are a tenth of a small file; nodes keep theirs. The
        graph cannot be edited further then.
        """
        needed = set(self._outputs)
        kept: list[onnx.NodeProto] = []
        for node in reversed(self._sorted()):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
                node.name = node.name or f"{node.output[0]}/{node.op_type}"
                node.doc_string = ""
        if short_names:
            self._shorten(kept[::-1])
        graph = self._model.graph
        constants = [t for name, t in sorted(self.initializers.items()) if name in needed]
        edited = helper.make_graph(kept[::-1], "qdbev", list(graph.input), list(graph.output), constants)
        called = {node.op_type for node in kept if node.domain}
        functions = [function for name, function in sorted(self.functions.items()) if name in called]
        domains = sorted({node.domain for node in kept if node.domain})
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model = helper.make_model(edited, producer_name=producer, opset_imports=opsets, functions=functions)
        model.ir_version = 10  # the first with INT4
        return model

    def _shorten(self, nodes: list[onnx.NodeProto]) -> None:
        made = (name for node in nodes for name in node.output if name and name not in self._outputs)
        short = {name: f"t{i}" for i, name in enumerate(made)}
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = [short.get(name, name) for name in names]
