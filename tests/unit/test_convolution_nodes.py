# SPDX-License-Identifier: Apache-2.0
"""Which parts of a U8 graph our convolution kernel takes, and that the graph computes what it computed."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdbev_ros.engine import convolution_nodes
from qdbev_ros.engine.convolution import Convolution, Grid, MaxPool
from qdbev_ros.engine.convolution_nodes import take_convolutions
from qdbev_ros.engine.cut_graph import CutGraph
from qdbev_ros.engine.sessions import session_options
from qdbev_ros.engine.stages import cut, split

SIGNED, UNSIGNED = Grid(128, 96, 159), Grid(0, 0, 63)


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution_nodes, "LEAST_PRODUCTS", 1)


class Network:
    """A small residual network as `lower_u8` leaves it: stem, pool, and blocks 1x1, 3x3, 1x1.

    Reads images (2, 3, 15, 21). The first block's shortcut is a convolution.
    """

    def __init__(self, blocks: int, channels: int = 64, **odd: int) -> None:
        self._random, self._channels = np.random.default_rng(0), channels
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, object] = {}
        pictures = self._codes("images", Grid(128, 0, 255))
        stem = self._numbers(self._layer("stem", pictures, 7, UNSIGNED, inputs=3, strides=2))
        pool = self._add("MaxPool", [stem], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        last = shortcut = pool
        for i in range(blocks):
            first = self._layer(f"{i}.first", last, 1, Grid(0, 0, odd.get("high", 63)))
            second = self._layer(f"{i}.second", first, 3, UNSIGNED, **odd)
            third = self._layer(f"{i}.third", second, 1, SIGNED)
            if i == 0:
                shortcut = self._numbers(self._layer("shortcut", last, 1, SIGNED))
            total = self._add("Add", [self._numbers(third), shortcut], f"{i}.sum")
            last = self._codes(total, UNSIGNED)
            shortcut = self._numbers(last)
        graph = helper.make_graph(
            self._nodes,
            "blocks",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [2, 3, 15, 21])],
            [helper.make_tensor_value_info(shortcut, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(v), n) for n, v in self._constants.items()],
        )
        self.output = shortcut
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        self.model.ir_version = 10

    def _add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self._nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def _codes(self, value: str, grid: Grid) -> str:
        codes = f"{value}.codes"
        self._constants |= {f"{codes}.step": np.float32(1.0), f"{codes}.zero": np.uint8(grid.zero)}
        self._constants |= {f"{codes}.low": np.uint8(grid.low), f"{codes}.high": np.uint8(grid.high)}
        wide = self._add("QuantizeLinear", [value, f"{codes}.step", f"{codes}.zero"], f"{codes}.wide")
        return self._add("Clip", [wide, f"{codes}.low", f"{codes}.high"], codes)

    def _numbers(self, codes: str) -> str:
        name = f"{codes}.number{len(self._nodes)}"
        return self._add("DequantizeLinear", [codes, f"{codes}.step", f"{codes}.zero"], name)

    def _layer(
        self,
        name: str,
        source: str,
        size: int,
        grid: Grid,
        inputs: int | None = None,
        strides: int = 1,
        most: int = 8,
        dilation: int = 1,
        high: int = 63,
    ) -> str:
        """The codes of a convolution of codes, or of numbers that a pool makes."""
        random, n = self._random, self._channels
        step = random.uniform(0.5, 1.5, n).astype(np.float32) * np.float32(0.02 / size)
        self._constants |= {
            f"{name}.w": random.integers(-most, most, (n, inputs or n, size, size)).astype(np.int8),
            f"{name}.b": random.integers(-99, 99, n).astype(np.int32),
            f"{name}.step": step,
        }
        weights, bias = (
            self._add("DequantizeLinear", [f"{name}.{part}", f"{name}.step"], f"{name}.{part}n", axis=0)
            for part in ("w", "b")
        )
        value = self._add(
            "Conv",
            [source if source == "pool" else self._numbers(source), weights, bias],
            name,
            kernel_shape=[size] * 2,
            pads=[size // 2 * dilation] * 4,
            strides=[strides] * 2,
            dilations=[dilation] * 2,
            group=1,
        )
        return self._codes(value, grid)

    def taken(self) -> dict[str, Convolution | MaxPool]:
        return take_convolutions(copy(self.model), "images.codes")[1]


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(model.SerializeToString())


def images() -> np.ndarray:
    return np.random.default_rng(1).uniform(-128, 127, (2, 3, 15, 21)).astype(np.float32)


def by_runtime(network: Network) -> np.ndarray:
    session = ort.InferenceSession(
        network.model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    made: np.ndarray = session.run([network.output], {"images": images()})[0]
    assert len(np.unique(made)) > 32, "a picture of something"
    return made


def by_parts(network: Network) -> np.ndarray:
    graph = CutGraph(copy(network.model), 2)
    made: list[np.ndarray] = []
    for _ in range(2):  # the second time in room that was used before
        values = {"images": ort.OrtValue.ortvalue_from_numpy(images())}
        graph.run(values)
        made.append(values[network.output].numpy().copy())
    np.testing.assert_array_equal(*made)
    return made[0]


ODD = [{}, {"dilation": 2}, {"most": 127}, {"high": 127}]


@pytest.mark.parametrize("odd", ODD, ids=str)
@pytest.mark.parametrize("channels", [64, 48])
def test_a_graph_cut_at_its_convolutions_computes_the_same_numbers(
    odd: dict[str, int], channels: int
) -> None:
    network = Network(3, channels, **odd)
    np.testing.assert_array_equal(by_parts(network), by_runtime(network))


def test_pictures_given_as_codes_are_the_same_pictures() -> None:
    network = Network(1)
    graph = CutGraph(copy(network.model), 1)
    assert graph.picture_grid is not None
    codes = np.clip(np.rint(images()) + graph.picture_grid.zero, 0, 255).astype(np.uint8)
    values = {graph.codes: ort.OrtValue.ortvalue_from_numpy(codes)}
    graph.run(values)
    np.testing.assert_array_equal(values[network.output].numpy(), by_runtime(network))


def test_a_residual_network_is_taken_whole_its_sums_included() -> None:
    network = Network(blocks=2)
    rest, taken = take_convolutions(copy(network.model), "images.codes")
    assert sum(isinstance(own, MaxPool) for own in taken.values()) == 1
    convolutions = [own for own in taken.values() if isinstance(own, Convolution)]
    assert len(convolutions) == 1 + 1 + 2 * 3
    assert sum(own.by_winograd for own in convolutions) == 2
    assert sum(own.shortcut is not None for own in convolutions) == 2, "one for each block"
    left = {node.op_type for node in rest.graph.node if not node.domain}
    assert left <= {"QuantizeLinear", "Clip", "DequantizeLinear"}, "pictures to codes, and codes to numbers"
    _, behind = split(rest, "images.codes")
    assert [len(stage.behind) for stage in cut(behind)] == [9, 0], "one after the other, nothing in between"
    assert cut(behind)[0].model is None


def test_what_the_kernel_cannot_do_is_left_to_the_runtime() -> None:
    whole = len(Network(1).taken())
    assert len(Network(1, dilation=2).taken()) == whole - 1
    assert Network(1, channels=48).taken() == {}, "channels that do not divide by 64"


def test_small_convolutions_are_not_worth_leaving_the_runtime_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stem, largest = 2 * 8 * 11 * 64 * 3 * 49, 2 * 4 * 6 * 64 * 64 * 9
    for least, wanted in (
        (stem, {"stem.codes", "pool_codes", "0.second.codes"}),  # a pool comes with what it reads
        (largest, {"0.second.codes"}),
        (largest + 1, set()),
    ):
        monkeypatch.setattr(convolution_nodes, "LEAST_PRODUCTS", least)
        assert set(Network(1).taken()) == wanted


@pytest.mark.parametrize("odd", [{"most": 127}, {"high": 127}], ids=str)
def test_wider_numbers_take_the_plain_way(odd: dict[str, int]) -> None:
    ways = [own.by_winograd for own in Network(1, **odd).taken().values() if isinstance(own, Convolution)]
    assert len(ways) == 5
    assert not any(ways)


def test_codes_that_somebody_else_reads_are_kept() -> None:
    """A sum is no part of a convolution whose own codes are wanted, too."""
    network = Network(1)
    third = "0.third.codes"
    number = next(n for n in network.model.graph.node if n.input[0] == third)
    network.model.graph.node.append(helper.make_node("Relu", [number.output[0]], ["seen"]))
    network.model.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.FLOAT, None))
    taken = network.taken()
    assert third in taken
    assert "shortcut.codes" not in taken, "the other side adds"


def altered(op_type: str, name: str, **attributes: object) -> dict[str, Convolution | MaxPool]:
    """What is taken of a network with other attributes on one node."""
    network = Network(1)
    node = next(n for n in network.model.graph.node if n.op_type == op_type and n.name == name)
    kept = [a for a in node.attribute if a.name not in attributes]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in attributes.items())])
    return network.taken()


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [5, 5]},
        {"kernel_shape": [3, 1], "pads": [1, 0, 1, 0]},
        {"pads": [-1, -1, -1, -1]},
        {"strides": [0, 0]},
        {"auto_pad": "SAME_UPPER", "pads": [0, 0, 0, 0]},
    ],
    ids=str,
)
def test_windows_that_are_forged_or_odd_are_not_taken(attributes: dict[str, object]) -> None:
    assert "0.second.codes" not in altered("Conv", "0.second", **attributes)


def test_codes_that_are_no_bytes_are_not_taken() -> None:
    """Half a byte each, say: the kernel would read twice as far as there is."""
    network = Network(1)
    graph = network.model.graph
    (reader,) = (n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "0.first.codes")
    at = list(graph.node).index(reader)
    graph.node.insert(at, helper.make_node("Cast", ["0.first.codes"], ["nibbles"], to=TensorProto.UINT4))
    graph.initializer.append(helper.make_tensor("nibble", TensorProto.UINT4, [], [0]))
    reader.input[0], reader.input[2] = "nibbles", "nibble"
    assert "0.second.codes" not in network.taken()


def test_numbers_without_a_code_for_zero_are_left_to_the_runtime() -> None:
    network = Network(1)
    (reader,) = (n for n in network.model.graph.node if list(n.input[:1]) == ["0.first.codes"])
    del reader.input[2]
    assert "0.second.codes" not in network.taken()


def test_planes_that_are_no_pictures_are_left_to_the_runtime() -> None:
    """Inputs of the graph lie channels first."""
    network = Network(1)
    _, behind = split(copy(network.model), "stem.codes")
    taken = take_convolutions(behind, None)[1]
    assert not any(own.codes == "stem.codes" for own in taken.values())
