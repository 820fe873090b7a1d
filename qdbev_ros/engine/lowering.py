# SPDX-License-Identifier: Apache-2.0
"""From the packed master to the form that a runtime has fast kernels for.

U8 with integer Clip (`lower_u8`), for ONNX Runtime on CPUs: weights unpacked to int8; activations uint8 with
zero-point 128 (signed codes, Clip [96, 159]) or 0 (codes from zero up, Clip [0, 63]); the Clip stands between
QuantizeLinear and DequantizeLinear, on the integers, where it does not keep the runtime from fusing the convolution.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qdbev_ros.core.errors import PackageError
from qdbev_ros.core.preprocess import PictureGrid
from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.master import OPSET, open_master

ZERO_POINT = 128


def lower_u8(master: bytes) -> onnx.ModelProto:
    """The U8 form of a packed master. Deterministic; raises PackageError where the master is not one."""
    graph = open_master(master)
    for node in graph.nodes("Conv"):
        _one_grid_each(graph, node)
    for node in graph.nodes("QuantizeLinear"):
        _fold_rectifier(graph, node)
        _to_unsigned(graph, node)
    for node in graph.nodes("Resize"):
        _resize_codes(graph, node)
    for node in graph.nodes("DequantizeLinear"):
        _dequantise_plain_bias(graph, node)
    return graph.finish("qdbev-u8", OPSET)


def _one_grid_each(graph: Graph, conv: onnx.NodeProto) -> None:
    """Repeats a quantised convolution, and a rectifier behind it, for every grid that its result is rounded to.

    A convolution in front of a deformable one has two. Integer kernels round to one grid; computed in float, a single
    convolution takes longer than two of these.
    """
    if _integer_inputs(graph, conv) is None:
        return
    users, rectifier = graph.users(conv.output[0]), None
    if len(users) == 1 and users[0].op_type in ("Relu", "Clip"):
        rectifier = users[0]
        users = graph.users(rectifier.output[0])
    if len(users) < 2 or any(user.op_type != "QuantizeLinear" for user in users):
        return
    for number, user in enumerate(users[1:], 1):
        source = ""
        for node in (conv, rectifier):
            if node is not None:
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.name, copy.output[0] = f"{node.name}_grid{number}", f"{node.output[0]}_grid{number}"
                copy.input[0] = source or copy.input[0]
                graph.add(copy)
                source = copy.output[0]
        graph.set_input(user, 0, source)


def _integer_inputs(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """The DequantizeLinear nodes that input and weight come from; None where one does not."""
    sources = [graph.producer(name) for name in node.input[:2]]
    found = [source for source in sources if source is not None and source.op_type == "DequantizeLinear"]
    return found if len(found) == 2 else None


def _fold_rectifier(graph: Graph, quantise: onnx.NodeProto) -> None:
    """Drops a ReLU or ReLU6 in front of codes that cut off at zero, and at or below six, all the same."""
    rectifier = graph.producer(quantise.input[0])
    if rectifier is None or len(graph.users(rectifier.output[0])) != 1:
        return
    low, high = _code_bounds(graph, quantise)
    if rectifier.op_type == "Clip" and all(graph.is_constant(name) for name in rectifier.input[1:]):
        floor, ceiling = (float(graph.constant(name)) for name in rectifier.input[1:])
        # Values above the ceiling have to land on the highest code without it as well.
        redundant = floor == 0.0 and ceiling >= float(graph.constant(quantise.input[1])) * high * (1 - 1e-6)
    else:
        redundant = rectifier.op_type == "Relu"
    if redundant and low == 0:
        graph.set_input(quantise, 0, rectifier.input[0])
        graph.remove(rectifier)


def _code_bounds(graph: Graph, quantise: onnx.NodeProto) -> tuple[int, int]:
    """Lowest and highest code behind a QuantizeLinear, its Clip included."""
    clip = clip_behind(graph, quantise)
    if clip is not None:
        return int(graph.constant(clip.input[1])), int(graph.constant(clip.input[2]))
    info = np.iinfo(graph.constant(quantise.input[2]).dtype)
    return int(info.min), int(info.max)


def clip_behind(graph: Graph, quantise: onnx.NodeProto) -> onnx.NodeProto | None:
    """The Clip that limits the codes of a QuantizeLinear."""
    users = graph.users(quantise.output[0])
    return users[0] if len(users) == 1 and users[0].op_type == "Clip" else None


def _to_unsigned(graph: Graph, quantise: onnx.NodeProto) -> None:
    """Moves one quantiser's codes to uint8: by 128 where they are signed, by nothing where they start at zero."""
    low, high = _code_bounds(graph, quantise)
    shift = ZERO_POINT if low < 0 else 0
    zero = graph.add_constant(np.uint8(shift))
    codes, clip = quantise.output[0], clip_behind(graph, quantise)
    graph.set_input(quantise, 2, zero)
    if clip is not None:
        for i, bound in ((1, low), (2, high)):
            graph.set_input(clip, i, graph.add_constant(np.uint8(bound + shift)))
        codes = clip.output[0]
    for user in graph.users(codes):
        if user.op_type != "DequantizeLinear":
            raise PackageError(f"the codes {codes!r} are read by {user.op_type}, expected DequantizeLinear")
        graph.set_input(user, 2, zero)


def _resize_codes(graph: Graph, resize: onnx.NodeProto) -> None:
    """Lets a nearest-neighbour Resize work on codes: DequantizeLinear moves behind it, so that sums stay integer."""
    mode = next((a.s for a in resize.attribute if a.name == "mode"), b"nearest")
    source = graph.producer(resize.input[0])
    if mode != b"nearest" or source is None or source.op_type != "DequantizeLinear":
        return
    value, codes = resize.output[0], resize.output[0] + "_codes"
    moved = onnx.NodeProto()
    moved.CopyFrom(resize)
    moved.input[0], moved.output[0] = source.input[0], codes
    behind = helper.make_node("DequantizeLinear", [codes, *source.input[1:]], [value])
    graph.replace(resize, [moved, behind])


def _dequantise_plain_bias(graph: Graph, node: onnx.NodeProto) -> None:
    """Turns the int32 bias of anything but a convolution into the float numbers that it stands for."""
    tensor = graph.initializers.get(node.input[0])
    if tensor is None or tensor.data_type != TensorProto.INT32:
        return
    if any(user.op_type == "Conv" for user in graph.users(node.output[0])):
        return
    codes, scale = graph.constant(node.input[0]), graph.constant(node.input[1])
    values: NDArray[np.float32] = (codes.astype(np.float32) * scale).astype(np.float32)
    graph.redirect(node.output[0], graph.add_constant(values))
    graph.remove(node)


def fuse_linears(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's own integer matrix product in place of DequantizeLinear -> MatMul (-> Add).

    Left to itself, ONNX Runtime makes float products of these. Values are the same: integers are summed exactly.
    """
    graph = Graph(model)
    for matmul in graph.nodes("MatMul"):
        sources = [graph.producer(name) for name in matmul.input]
        if any(s is None or s.op_type != "DequantizeLinear" for s in sources):
            continue
        (codes, step, zero), (weight, scale) = (list(s.input) for s in sources if s is not None)
        users = graph.users(matmul.output[0])
        target, bias = matmul, []
        if len(users) == 1 and users[0].op_type == "Add":
            constants = [i for i in users[0].input if i in graph.initializers]
            if constants and graph.initializers[constants[0]].dims == graph.initializers[scale].dims:
                target, bias = users[0], constants
                graph.remove(matmul)
        inputs = [codes, weight, step, scale, zero, "", *bias]
        fused = helper.make_node(
            "MatMulIntegerToFloat", inputs, target.output, name=matmul.name, domain="com.microsoft"
        )
        graph.replace(target, [fused])
        _fold_division(graph, fused)
    for conv in graph.nodes("Conv"):
        _integer_sums(graph, conv)
    return graph.finish("qdbev-u8-onnxruntime", OPSET)


def _integer_sums(graph: Graph, conv: onnx.NodeProto) -> None:
    """A quantised convolution whose result no grid waits for, as integer sums and one product in float.

    ONNX Runtime would compute it in float. The offsets of deformable convolutions are such results.
    """
    sources = _integer_inputs(graph, conv)
    readers = {user.op_type for user in graph.users(conv.output[0])}
    if sources is None or readers == {"QuantizeLinear"} or (readers and readers <= {"Relu", "Clip"}):
        return
    (codes, step, zero), (weight, scale) = (list(source.input)[:3] for source in sources)
    factors = (graph.constant(step) * graph.constant(scale)).astype(np.float32).reshape(-1, 1, 1)
    name = conv.output[0]
    sums = helper.make_node("ConvInteger", [codes, weight, zero], [f"{name}_sums"], name=conv.name)
    sums.attribute.extend(conv.attribute)
    numbers = helper.make_node("Cast", [f"{name}_sums"], [f"{name}_numbers"], to=TensorProto.FLOAT)
    bias = graph.producer(conv.input[2]) if len(conv.input) > 2 else None
    if bias is None:
        graph.replace(conv, [sums, numbers, _product(graph, numbers, factors, name)])
        return
    added = graph.constant(bias.input[0]) * graph.constant(bias.input[1])
    constant = graph.add_constant(added.astype(np.float32).reshape(-1, 1, 1))
    scaled = _product(graph, numbers, factors, f"{name}_scaled")
    add = helper.make_node("Add", [f"{name}_scaled", constant], [name])
    graph.replace(conv, [sums, numbers, scaled, add])


def _product(graph: Graph, node: onnx.NodeProto, factors: NDArray[np.float32], name: str) -> onnx.NodeProto:
    return helper.make_node("Mul", [node.output[0], graph.add_constant(factors)], [name])


def _fold_division(graph: Graph, linear: onnx.NodeProto) -> None:
    """Lets a linear layer put out fractions of a map where its pixels were divided by width and height behind it.

    ONNX Runtime divides pairs of numbers far slower than long rows. Equal to float rounding.
    """
    name, paired = linear.output[0], False
    while True:
        users = graph.users(name)
        if len(users) != 1 or users[0].input[0] != name:
            return
        (user,) = users
        if user.op_type == "Div" and paired and graph.is_constant(user.input[1]):
            break
        if not _keeps_pairs(graph, user):
            return
        name, paired = user.output[0], paired or user.op_type == "Reshape"
    pair, columns = graph.constant(user.input[1]), graph.constant(linear.input[3])
    if pair.shape[-1:] != (2,) or pair.size != 2 or columns.ndim != 1 or columns.size % 2:
        return
    divisors = np.tile(pair.reshape(2), columns.size // 2)
    for index in (3, 6):  # step of the weights, bias
        if index < len(linear.input):
            scaled = (graph.constant(linear.input[index]) / divisors).astype(np.float32)
            graph.set_input(linear, index, graph.add_constant(scaled))
    graph.replace(user, [helper.make_node("Identity", [name], user.output, name=user.name)])


def _keeps_pairs(graph: Graph, node: onnx.NodeProto) -> bool:
    """The node makes pairs of a layer's columns, or leaves pairs as they are."""
    if node.op_type == "Reshape":
        return side_of(graph, node.input[1], -1) == 2
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "Transpose":
        perm = list(attributes["perm"].ints)
        return perm[-1] == len(perm) - 1
    return node.op_type == "Cast" and attributes["to"].i == TensorProto.FLOAT


def side_of(graph: Graph, shape: str, index: int) -> int | None:
    """One number of a shape, which may be put together from single ones; None where it isn't known."""
    node = graph.producer(shape)
    if node is not None and node.op_type == "Concat":
        return side_of(graph, node.input[index], 0)
    return int(graph.constant(shape).reshape(-1)[index]) if graph.is_constant(shape) else None


def quantised_convolutions(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions whose weights are integers: an engine has to run every one of them in int8."""
    integers = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return [n.name for n in model.graph.node if n.op_type == "Conv" and n.input[1] in integers]


def picture_codes(lowered: onnx.ModelProto) -> tuple[str, PictureGrid] | None:
    """The tensor that holds the pictures' codes, (6, 3, H, W), and their grid; None where pictures stay in float."""
    graph = Graph(lowered)
    name = "images"
    while True:
        users = [user for user in graph.users(name) if user.op_type != "Shape"]
        if len(users) != 1 or users[0].op_type not in ("Reshape", "QuantizeLinear"):
            return None
        (user,) = users
        name = user.output[0]
        if user.op_type == "QuantizeLinear":
            break
    low, high = _code_bounds(graph, user)
    clip = clip_behind(graph, user)
    step, zero = float(graph.constant(user.input[1])), int(graph.constant(user.input[2]))
    return name if clip is None else clip.output[0], PictureGrid(step, zero, low, high)
