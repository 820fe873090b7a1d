# SPDX-License-Identifier: Apache-2.0
"""Quantises a purely convolutional part (backbone, neck): every convolution reads and writes grid tensors.

Integer engines fuse a convolution only when its output is quantised at once, before anything else reads it, so
quantisers stand behind convolutions (and their ReLU) and behind sums, not in front of convolutions. Where that is, the
part's own forward function says: it is traced with torch.fx, and quantisers are put into the traced graph.
"""

from __future__ import annotations

import inspect
import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from qdbev_train.model.dcn import ModulatedDeformConv2d
from qdbev_train.model.layers import fold_batchnorm
from qdbev_train.quantization.config import FLOAT, QuantConfig
from qdbev_train.quantization.layers import (
    ActivationQuantiser,
    QuantisedConv2d,
    QuantisedDeformConv2d,
    QuantisedLayer,
)

Convolution = QuantisedConv2d | QuantisedDeformConv2d
_SUMS = (operator.add, operator.iadd, torch.add)
_RELUS = {F.relu: float("inf"), torch.relu: float("inf"), F.relu6: 6.0}
# The values that come out are among those that go in, so the grid stays the same.
_SELECTIONS = (F.max_pool2d, F.interpolate, torch.max_pool2d)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (QuantisedLayer, ActivationQuantiser)) or super().is_leaf_module(
            m, module_qualified_name
        )


def quantise_convolutions(
    part: nn.Module,
    name: str,
    config: QuantConfig,
    maps: int | None,
    inputs: list[ActivationQuantiser] | None,
) -> fx.GraphModule:
    """The part with its convolutions on the grid.

    `part` maps a tensor (maps None) or a list of `maps` tensors to a list of tensors. inputs: the quantisers on whose
    grid the incoming tensors lie already, or None where they lie on none. `name` is the part's name in the model.
    Parameter names stay as they are, except that BatchNorms are gone and every convolution has a bias.
    """
    _replace_convolutions(part, name, config)
    tracer = _Tracer()
    if maps is None:
        graph = tracer.trace(part)
    else:
        # A list argument is traced element by element.
        argument = next(iter(inspect.signature(part.forward).parameters))
        graph = tracer.trace(part, concrete_args={argument: [fx.PH] * maps})  # type: ignore[attr-defined]
    module = fx.GraphModule(part, graph, type(part).__name__)
    _Placement(module, name, config, inputs).run()
    module.graph.lint()
    module.recompile()
    return module


def output_quantisers(module: fx.GraphModule) -> list[ActivationQuantiser]:
    """The quantisers of the maps that a quantised part puts out."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    found = [module.get_submodule(str(node.target)) for node in output.args[0]]
    return [q for q in found if isinstance(q, ActivationQuantiser)]


def _replace_convolutions(part: nn.Module, name: str, config: QuantConfig) -> None:
    """Swaps every convolution that the configuration quantises, its BatchNorm folded in."""
    for path, parent in list(part.named_modules()):
        if isinstance(parent, ModulatedDeformConv2d):
            continue  # its own convolution was swapped with it
        children = list(parent.named_children())
        for i, (key, child) in enumerate(children):
            full = ".".join(filter(None, (name, path, key)))
            bits, _ = config.bits(full)
            if not isinstance(child, (nn.Conv2d, ModulatedDeformConv2d)) or bits == FLOAT:
                continue
            follower = children[i + 1] if i + 1 < len(children) else ("", None)
            weight, bias = child.weight, child.bias
            if isinstance(follower[1], nn.BatchNorm2d):
                weight, bias = fold_batchnorm(child, follower[1])
                weight = weight.detach().requires_grad_(child.weight.requires_grad)
                setattr(parent, follower[0], nn.Identity())
            if isinstance(child, nn.Conv2d):
                setattr(parent, key, QuantisedConv2d(child, weight, bias, bits))
            else:
                offset_bits, _ = config.bits(f"{full}.conv_offset")
                setattr(parent, key, QuantisedDeformConv2d(child, weight, bias, bits, offset_bits))


class _Placement:
    """Walks the traced graph once, in order, and puts a quantiser behind everything that needs one."""

    def __init__(
        self, module: fx.GraphModule, name: str, config: QuantConfig, inputs: list[ActivationQuantiser] | None
    ) -> None:
        self.module, self.name, self.config = module, name, config
        self.inputs = list(inputs) if inputs is not None else None
        self.grid: dict[fx.Node, ActivationQuantiser] = {}

    def run(self) -> None:
        for node in list(self.module.graph.nodes):
            if node.op == "placeholder" and self.inputs:
                self.grid[node] = self.inputs.pop(0)
            elif self._convolution(node) is not None:
                self._convolution_node(node)
            elif node.target in _SUMS and any(isinstance(a, fx.Node) and a in self.grid for a in node.args):
                self._behind(node, node.name)
            elif node.target in _SELECTIONS or isinstance(self._target(node), nn.MaxPool2d):
                if node.args[0] in self.grid:
                    self.grid[node] = self.grid[node.args[0]]
            elif node.target in (F.relu,) and node.args[0] in self.grid:
                self._behind(node, node.name)

    def _target(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _convolution(self, node: fx.Node) -> Convolution | None:
        target = self._target(node)
        return target if isinstance(target, Convolution) else None

    def _convolution_node(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source not in self.grid:
            source = self._insert(source, source.name, None, float("inf"))
        convolution = self._convolution(node)
        assert convolution is not None
        convolution.reads_from(self.grid[source])
        if isinstance(convolution, QuantisedDeformConv2d):
            self._finer_input(node, source, convolution)
        self._behind(node, str(node.target).replace(".", "_"))

    def _finer_input(self, node: fx.Node, source: fx.Node, convolution: QuantisedDeformConv2d) -> None:
        """Gives the offset branch the input on a grid of its own, from before the first quantiser."""
        coarse = self.grid[source]
        _, bits = self.config.bits(f"{self.name}.{node.target}.conv_offset")
        quantiser = ActivationQuantiser(bits, coarse.non_negative, coarse.limit)
        target = f"{source.target}_offset"
        self.module.add_submodule(target, quantiser)
        before = source.args[0]
        assert isinstance(before, fx.Node)
        with self.module.graph.inserting_after(source):
            finer = self.module.graph.call_module(target, (before,))
        node.args = (source, finer)
        convolution.conv_offset.reads_from(quantiser)

    def _behind(self, node: fx.Node, label: str) -> None:
        """Quantises the value of `node`, behind the ReLU that follows it if nothing else reads it."""
        users = list(node.users)
        if node.target in _RELUS:
            self._insert(node, label, True, _RELUS[node.target])
        elif len(users) == 1 and users[0].target in _RELUS:
            # The walk comes to the ReLU later and leaves it alone: its input is on no grid.
            self._insert(users[0], label, True, _RELUS[users[0].target])
        else:
            self._insert(node, label, False, float("inf"))

    def _insert(self, node: fx.Node, label: str, non_negative: bool | None, limit: float) -> fx.Node:
        bits = self.config.activation_bits
        readers = [f"{self.name}.{u.target}" for u in node.users if self._convolution(u) is not None]
        exceptions = [self.config.bits(reader)[1] for reader in readers]
        bits = max([bits, *exceptions]) if exceptions else bits
        quantiser = ActivationQuantiser(bits, non_negative, limit)
        target = f"quantisers.{label}"
        self.module.add_submodule(target, quantiser)
        with self.module.graph.inserting_after(node):
            inserted = self.module.graph.call_module(target, (node,))
        node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)
        self.grid[inserted] = quantiser
        return inserted
