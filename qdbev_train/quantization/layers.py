# SPDX-License-Identifier: Apache-2.0
"""Layers that compute on the integer grid in float: activation quantisers, convolutions and linears.

State of a layer (all saved with the checkpoint): `weight`, `bias` as trained in float; `weight_scale` (out,),
`weight_low`, `weight_high`. State of an activation quantiser: `scale`, `low`, `high`. Scales are NaN until calibrated,
so that a forgotten calibration shows at once. In training they stay as calibrated, follow what passes ("running"), or
are parameters ("learned"); their names are the same, so that a checkpoint does not depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from qdbev_train.model.dcn import ModulatedDeformConv2d, deformed_taps
from qdbev_train.model.decoder import PackedAttention
from qdbev_train.quantization.grid import BIAS_LIMIT, code_range, fake_quantise, per_channel
from qdbev_train.quantization.ranges import Histogram, symmetric_step, weight_scales

# A channel with (nearly) no weights would need a step so fine that its bias left the integers; 2^20 steps are plenty.
BIAS_STEPS = 2.0**20


class ActivationQuantiser(nn.Module):
    """One tensor's 6-bit (or `bits`-bit) grid. Passes values through unchanged while `histogram` collects them.

    non_negative: True where an operation guarantees it (after ReLU), None where calibration finds out. limit: largest
    possible value (6 after ReLU6). momentum: of the running range in training, 0 for a range that stays. frozen: the
    running range stands still. listens: False where what it is called with is not what its range is for.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, bits: int, non_negative: bool | None = None, limit: float = float("inf")) -> None:
        super().__init__()
        self.bits = bits
        self.non_negative = non_negative
        self.limit = limit
        self.active = True
        self.momentum = 0.0
        self.frozen = False
        self.listens = True
        self.histogram: Histogram | None = None
        low, high = code_range(bits, signed=not non_negative)
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.register_buffer("low", torch.tensor(float(low)))
        self.register_buffer("high", torch.tensor(float(high)))

    def set_sign(self, signed: bool) -> None:
        """Chooses between codes around zero and codes from zero up."""
        low, high = code_range(self.bits, signed)
        self.low.fill_(low)
        self.high.fill_(high)

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape; the same shape."""
        if self.listens:
            self.listen(x)
        return fake_quantise(x, self.scale, self.low, self.high) if self.active else x

    def listen(self, x: Tensor) -> None:
        """Lets the range take notice of x: in calibration, and in training where it runs."""
        if self.histogram is not None:
            self.histogram.add(x)
        if self.active and self.momentum:
            self.follow(x, self.momentum)

    @torch.no_grad()
    def follow(self, x: Tensor, momentum: float) -> None:
        """Moves the scale towards the range of x, on all processes together, in training, unless it is frozen."""
        if self.training and not self.frozen:
            peak = x.abs().amax().float()
            # Each process sees its share of a batch; all of them run the same quantisers in the same order.
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(peak, distributed.ReduceOp.MAX)
            step = symmetric_step(peak.clamp(1e-6, self.limit), self.low, self.high)
            self.scale.lerp_(step, 1.0 - momentum)

    def learn_scale(self) -> None:
        """Makes the scale a parameter, under its name."""
        to_parameter(self, "scale")

    def extra_repr(self) -> str:
        return f"codes {int(self.low)}..{int(self.high)}, scale {float(self.scale.detach()):.4g}"


class QuantisedLayer(nn.Module):
    """What a quantised convolution and linear share: a float weight and bias seen through the grid."""

    weight_scale: Tensor
    weight_low: Tensor
    weight_high: Tensor
    bias_limit: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.active = True
        self.follows_weight = False
        trained = weight.requires_grad
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
        # A bias is always there: bias correction needs it, and integer convolutions get it for nothing.
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
        low, high = code_range(bits, signed=True)
        self.register_buffer("weight_scale", torch.full((len(weight),), float("nan")))
        self.register_buffer("weight_low", torch.tensor(float(low)))
        self.register_buffer("weight_high", torch.tensor(float(high)))
        self.register_buffer("bias_limit", torch.tensor(float(BIAS_LIMIT)), persistent=False)
        self._input: list[ActivationQuantiser] = []

    def reads_from(self, quantiser: ActivationQuantiser) -> None:
        """Names the quantiser of this layer's input; its scale is part of the bias's."""
        # In a list, so that the module tree (and the checkpoint) holds every quantiser once.
        self._input = [quantiser]

    @property
    def input_quantiser(self) -> ActivationQuantiser:
        return self._input[0]

    @torch.no_grad()
    def fit_scale(self, method: str) -> None:
        """Sets the steps of every output channel by the range of its weights; the input's scale must be known."""
        scale = weight_scales(self.weight, self.bits, method)
        finest = self.bias.abs() / (self.input_quantiser.scale * BIAS_STEPS)
        self.weight_scale.copy_(torch.maximum(scale, finest))

    def learn_scale(self) -> None:
        """Makes the steps parameters, under their name."""
        to_parameter(self, "weight_scale")

    def parameters_on_grid(self) -> tuple[Tensor, Tensor]:
        """(weight, bias) as the integer engine has them, or as they are while the layer is inactive."""
        if not self.active:
            return self.weight, self.bias
        if self.follows_weight and self.training:
            self.fit_scale("minmax")
        scale = per_channel(self.weight_scale, self.weight)
        weight = fake_quantise(self.weight, scale, self.weight_low, self.weight_high)
        # Bias codes are so fine that their rounding says nothing about the steps: no gradient from here.
        bias_scale = (self.input_quantiser.scale * self.weight_scale).detach()
        return weight, fake_quantise(self.bias, bias_scale, -self.bias_limit, self.bias_limit)


class QuantisedConv2d(QuantisedLayer):
    """A convolution whose input lies on `input_quantiser`'s grid already; its output is left as it is."""

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        super().__init__(weight, bias, bits)
        assert isinstance(conv.padding, tuple)  # not given by name
        self.stride, self.padding, self.dilation, self.groups = (
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        weight, bias = self.parameters_on_grid()
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QuantisedDeformConv2d(QuantisedLayer):
    """A deformable convolution (DCNv2): weight and input on the grid, its taps read in between the input's pixels.

    `conv_offset`, which says where, is a quantised convolution with bits and an input quantiser of its own.
    """

    def __init__(
        self, conv: ModulatedDeformConv2d, weight: Tensor, bias: Tensor | None, bits: int, offset_bits: int
    ) -> None:
        super().__init__(weight, bias, bits)
        self.stride = conv.stride
        offset = conv.conv_offset
        self.conv_offset = QuantisedConv2d(offset, offset.weight, offset.bias, offset_bits)

    def columns(self, x: Tensor, finer: Tensor) -> Tensor:
        """(B, in, 9, H', W') taps of x (B, in, H, W); `finer` is the same map on the grid of conv_offset."""
        return deformed_taps(x, self.conv_offset(finer), self.stride)

    def forward(self, x: Tensor, finer: Tensor) -> Tensor:
        """(B, in, H, W) twice, see `columns` -> (B, out, H', W')."""
        weight, bias = self.parameters_on_grid()
        out = torch.einsum("oct,bcthw->bohw", weight.flatten(2), self.columns(x, finer))
        return out + bias[:, None, None]


class QuantisedLinear(QuantisedLayer):
    """A linear layer with a quantiser of its own in front."""

    def __init__(self, weight: Tensor, bias: Tensor | None, weight_bits: int, activation_bits: int) -> None:
        super().__init__(weight, bias, weight_bits)
        self.activation = ActivationQuantiser(activation_bits)
        self.reads_from(self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        weight, bias = self.parameters_on_grid()
        return F.linear(self.activation(x), weight, bias)


class QuantisedPackedAttention(nn.Module):
    """`PackedAttention` with its three projections on the grid: queries and keys in one, values, output."""

    def __init__(self, attention: PackedAttention, weight_bits: int, activation_bits: int) -> None:
        super().__init__()
        self.heads, self.dropout = attention.heads, attention.dropout
        split = 2 * attention.out_proj.in_features
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.query_key = QuantisedLinear(weight[:split], bias[:split], weight_bits, activation_bits)
        self.value = QuantisedLinear(weight[split:], bias[split:], weight_bits, activation_bits)
        self.out_proj: nn.Module = attention.out_proj

    def forward(self, query: Tensor, value: Tensor, may_attend: Tensor | None) -> Tensor:
        """query, value (B, Q, C) -> (B, Q, C), as PackedAttention."""
        q, k = self.query_key(query).chunk(2, dim=-1)
        return self.out_proj(
            attend(q, k, self.value(value), self.heads, may_attend, self.dropout * self.training)
        )


def to_parameter(module: nn.Module, name: str) -> None:
    """Turns a buffer into a parameter under the same key; one that is a parameter already stays."""
    value = getattr(module, name)
    if not isinstance(value, nn.Parameter):
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(value))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, may_attend: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention of projected queries, keys and values (B, Q, C) -> (B, Q, C)."""
    batch, _, channels = q.shape
    q, k, v = (x.reshape(batch, -1, heads, channels // heads).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, dropout_p=dropout)
    return out.transpose(1, 2).reshape(batch, -1, channels)
