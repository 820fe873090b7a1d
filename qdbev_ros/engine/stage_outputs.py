# SPDX-License-Identifier: Apache-2.0
"""The feature maps as further outputs of a master, so that the parity gate sees more than the end of the network.

What every backend runs is the master with these outputs: the engine that was checked is the engine in use.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from qdbev_ros.engine.master import FEATURES, parse_master

_PRODUCTS = ("Conv", "Einsum")  # a deformable convolution is an Einsum
# What the encoder begins with. A neck's coarsest level is made from another one, which is read by this all the same.
_TOKENS = ("Reshape", "Flatten")
_BEHIND = ("Relu", "Clip", "QuantizeLinear", "DequantizeLinear")


def with_stage_outputs(master: bytes) -> bytes:
    """The master with outputs `image_features_0` ... (6, C, h, w): the last maps, and those that become tokens."""
    model = parse_master(master)
    nodes = list(model.graph.node)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    before: set[str] = set()  # tensors that some convolution depends on
    ends = []
    for node in reversed(nodes):
        if node.op_type == "Conv":
            end = _end_of_chain(node.output[0], readers)
            if node.output[0] not in before or any(n.op_type in _TOKENS for n in readers.get(end, [])):
                ends.append(end)
        if node.op_type in _PRODUCTS or before.intersection(node.output):
            before.update(node.input)
    for index, name in enumerate(ends[::-1]):
        output = f"{FEATURES}{index}"
        model.graph.node.append(helper.make_node("Identity", [name], [output], name=output))
        model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    return bytes(model.SerializeToString(deterministic=True))


def _end_of_chain(name: str, readers: dict[str, list[onnx.NodeProto]]) -> str:
    """Follows rectifiers and quantisers for as long as nothing else reads what is between them."""
    while True:
        following = [n for n in readers.get(name, []) if n.op_type != "Shape"]
        if len(following) != 1 or following[0].op_type not in _BEHIND:
            return name
        name = following[0].output[0]
