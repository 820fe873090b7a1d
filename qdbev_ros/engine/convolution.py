# SPDX-License-Identifier: Apache-2.0
"""Integer convolutions on codes by convolution.c, exact: the same sums as any other integer kernel has.

What follows a convolution in a residual network, rounding, cutting off and the sum with the shortcut, is done while its
sums are at hand. 3x3 convolutions take Winograd's F(2x2, 3x3): 16 products where the plain form has 36. In networks of
8 bits the transformed numbers have 10 and lose their last ones. Ours have room: four codes of 6 bits add up to 8 bits,
nine weights of 4 bits to 7.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import EngineError, PackageError
from qdbev_ros.engine.native import KernelError, Team, load

LANES = 64  # outputs divide by it, and the inputs of Winograd's and of a pool
PICTURE_CHANNELS = 3  # a convolution of so many reads planes of pictures
MOST_TAPS = 49  # of a window: 7 x 7
_PIXEL = 4  # bytes of such a picture's pixel, and what inputs divide by
_EXACT = ((0, 0), (128, 96))  # code of zero and lowest code, of codes that Winograd's way can have
_MOST_SUM = 252  # of four codes, counted from the lowest: 128 must fit on top of their differences
_TWICE_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.int32)
_CHAINED = 640_000  # bytes of two convolutions' weights that stay in the second cache from block to block
_SPOTS, _SUM_SPOT = 16, 5  # of a transformed tile; the one that is the sum of four codes

# Of the functions, with the scratch of those that take any.
_ARGUMENTS = {"convolution": 8, "chain": 13, "winograd": 8, "max_pool": 3, "pack_pixels": 3}

Sides = tuple[int, int, int, int]  # images, height, width, channels


@dataclass(frozen=True)
class Grid:
    """Codes from `low` to `high`, of which `zero` stands for 0."""

    zero: int
    low: int
    high: int


@dataclass(frozen=True)
class Shortcut:
    """What is added to the codes of a convolution: code - zero, times `factor`, its own times `own_factor`."""

    codes: str
    zero: int
    factor: float
    own_factor: float
    grid: Grid  # of the sum


@dataclass(frozen=True)
class Convolution:
    """Codes (images, height, width, inputs) in, codes out. `codes`, `output`: names of their tensors.

    weights (outputs, inputs, size, size) int8 codes · bias (outputs) int32, added to the sums · factors (outputs)
    float32, from sums to codes · source, grid: the codes in, and those of the result
    """

    codes: str
    output: str
    weights: NDArray[np.int8]
    bias: NDArray[np.int32]
    factors: NDArray[np.float32]
    stride: int
    padding: int
    source: Grid
    grid: Grid
    shortcut: Shortcut | None = None

    def __post_init__(self) -> None:
        """Raises PackageError for what the kernel must not be given: it reads and writes where these numbers say."""
        outputs, inputs, *window = self.weights.shape
        lanes = outputs % LANES == 0 and (inputs == PICTURE_CHANNELS or inputs % 4 == 0)
        arrays = self.weights.dtype == np.int8 and self.bias.shape == self.factors.shape == (outputs,)
        if not (lanes and arrays and outputs and inputs and len(window) == 2 and window[0] == window[1]):
            raise PackageError(f"{self.output}: weights {self.weights.shape} are none of our kernel's")
        _check_window(self.output, window[0], self.stride, self.padding)

    @property
    def by_winograd(self) -> bool:
        """Whether Winograd's way is open to it, exactly."""
        source, inputs = self.source, self.weights.shape[1]
        if self.weights.shape[2:] != (3, 3) or (self.stride, self.padding) != (1, 1) or inputs % LANES:
            return False
        # Of other codes the sum of four does not begin where bytes do.
        wide = 4 * (source.high - source.low) > _MOST_SUM or (source.zero, source.low) not in _EXACT
        fits = np.abs(transformed(self.weights)).max() <= np.iinfo(np.int8).max
        return self.shortcut is None and not wide and bool(fits)


@dataclass(frozen=True)
class MaxPool:
    """The largest codes of size x size pixels."""

    codes: str
    output: str
    size: int
    stride: int
    padding: int

    def __post_init__(self) -> None:
        _check_window(self.output, self.size, self.stride, self.padding)


def window_fits(size: int, stride: int, padding: int) -> bool:
    """Whether the kernel can have a square window."""
    return 1 <= size * size <= MOST_TAPS and 0 <= padding < size and stride >= 1


def _check_window(name: str, size: int, stride: int, padding: int) -> None:
    if not window_fits(size, stride, padding):
        raise PackageError(
            f"{name}: a window of {size}, stride {stride}, padding {padding} is none of our kernel's"
        )


def transformed(weights: NDArray[np.int8]) -> NDArray[np.int32]:
    """(16, outputs, inputs) of (outputs, inputs, 3, 3): 2G w 2G', four times what belongs to the plain sums."""
    made: NDArray[np.int32] = np.einsum("ai,ocij,bj->aboc", _TWICE_G, weights.astype(np.int32), _TWICE_G)
    return made.reshape(_SPOTS, *weights.shape[:2])


class _Shape(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("images", "height", "width", "pixel", "inputs", "rows", "columns")
        ),
        *((name, ctypes.c_int64) for name in ("stride", "padding", "out_height", "out_width", "outputs")),
        *((name, ctypes.c_int32) for name in ("zero", "plain_sum", "out_zero", "low", "high")),
        *((name, ctypes.c_int32) for name in ("other_zero", "sum_zero", "sum_low", "sum_high")),
        *((name, ctypes.c_float) for name in ("own_factor", "other_factor")),
    ]


class ConvolutionKernel:
    """The compiled kernel, on `threads` threads. Raises KernelError where it cannot be built or the CPU lacks VNNI.

    artefact: SHA-256 of the compiled file
    """

    def __init__(self, threads: int | None = None) -> None:
        library, self.artefact = load("convolution")
        if not library.qdbev_convolution_runs():
            raise KernelError("this processor has no AVX-512 VNNI")
        self._library = library
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"qdbev_{name}")
            function.argtypes = [ctypes.c_void_p] * arguments + [ctypes.c_int64] * 2
            function.restype = None
        for name in ("convolution", "winograd"):
            getattr(library, f"qdbev_{name}_scratch").restype = ctypes.c_int64
        self._team = Team(threads, "convolution")
        self._scratch = [np.empty(0, np.uint8) for _ in range(self._team.threads)]

    def run(self, name: str, rows: int, *arguments: _Shape | int | None) -> None:
        """One of the functions on all threads, each with scratch of its own where the function takes any."""
        function = getattr(self._library, f"qdbev_{name}")
        shapes = [argument for argument in arguments if isinstance(argument, _Shape)]
        given = [ctypes.byref(a) if isinstance(a, _Shape) else a for a in arguments]
        if len(given) == _ARGUMENTS[name]:
            self._team.share(rows, lambda _, *share: function(*given, *share))
            return
        kind = "winograd" if name == "winograd" else "convolution"
        needed = max(getattr(self._library, f"qdbev_{kind}_scratch")(ctypes.byref(shape)) for shape in shapes)

        def work(thread: int, first: int, last: int) -> None:
            if self._scratch[thread].size < needed:
                self._scratch[thread] = np.empty(needed, np.uint8)
            function(*given, self._scratch[thread].ctypes.data, first, last)

        self._team.share(rows, work)


class PreparedConvolution:
    """A convolution with its weights laid out for the kernel; on pictures with room for their pixels."""

    def __init__(self, convolution: Convolution, kernel: ConvolutionKernel) -> None:
        self.convolution, self._kernel = convolution, kernel
        self._inputs, self._size = convolution.weights.shape[1:3]
        self._winograd = convolution.by_winograd
        self._pictures = self._inputs == PICTURE_CHANNELS
        self._pixels = np.empty(0, np.uint32)
        self._arrays = self._winograds() if self._winograd else self._plain()

    def sides(self, source: Sides) -> Sides:
        """(images, height, width, channels) of the result. Raises EngineError where the channels are others."""
        c, (images, height, width, inputs) = self.convolution, source
        if inputs != self._inputs or min(source) < 1:
            raise EngineError(f"{c.output}: codes of {list(source)}, expected {self._inputs} channels")
        high, wide = (_places(side, self._size, c.stride, c.padding) for side in (height, width))
        return images, high, wide, len(c.bias)

    def __call__(self, source: int, sides: Sides, target: int, shortcut: int | None = None) -> None:
        """From the codes at one address, with these sides, to those at another; the shortcut's lie as these do."""
        shape = self._shape(sides)
        images, high, wide = shape.images, shape.out_height, shape.out_width
        given = [array.ctypes.data for array in self._arrays]
        if self._winograd:
            tiles = images * -(-high // 2) * -(-wide // 2)
            self._kernel.run("winograd", tiles, shape, source, *given, target)
            return
        if self._pictures:
            source = self._pack(source, shape)
        self._kernel.run("convolution", images * high * wide, shape, source, *given, shortcut, target)

    def followed_by(self, other: PreparedConvolution) -> bool:
        """Whether `before` is open to the two."""
        c, size = other.convolution, sum(p.convolution.weights.size for p in (self, other))
        plain = not (self._winograd or self._pictures or c.shortcut)
        window = (other._size, c.stride, c.padding)
        return plain and c.codes == self.convolution.output and window == (1, 1, 0) and size <= _CHAINED

    def before(
        self,
        other: PreparedConvolution,
        source: int,
        sides: Sides,
        target: int,
        shortcut: int | None,
        behind: int,
    ) -> None:
        """As a call, and at once the 1x1 convolution of the result, to the address `behind`."""
        made = self.sides(sides)
        first, second = ([array.ctypes.data for array in prepared._arrays] for prepared in (self, other))
        shapes = self._shape(sides), other._shape(made)
        rows, kernel = made[0] * made[1] * made[2], self._kernel
        kernel.run("chain", rows, shapes[0], source, *first, shortcut, target, shapes[1], *second, behind)

    def _shape(self, sides: Sides) -> _Shape:
        c = self.convolution
        _, high, wide, outputs = self.sides(sides)
        shape = _Shape(
            *sides[:3],
            self._inputs,
            self._inputs,
            self._size,
            self._size,
            c.stride,
            c.padding,
            high,
            wide,
            outputs,
            c.source.zero,
            c.source.zero == 0,
            *_numbers(c.grid),
        )
        if c.shortcut is not None:
            shape.other_zero, shape.own_factor = c.shortcut.zero, c.shortcut.own_factor
            shape.other_factor = c.shortcut.factor
            shape.sum_zero, shape.sum_low, shape.sum_high = _numbers(c.shortcut.grid)
        return shape

    def _pack(self, planes: int, shape: _Shape) -> int:
        """The address of pictures as pixels with their border; a row of the kernel is a single tap of these."""
        high, wide = shape.height + 2 * shape.padding, shape.width + 2 * shape.padding
        if self._pixels.size != shape.images * high * wide:
            self._pixels = np.empty(shape.images * high * wide, np.uint32)
        self._kernel.run("pack_pixels", shape.images * high, shape, planes, self._pixels.ctypes.data)
        shape.height, shape.width, shape.padding = high, wide, 0
        shape.pixel, shape.inputs, shape.columns = _PIXEL, _PIXEL * self._size, 1
        return self._pixels.ctypes.data

    def _plain(self) -> tuple[NDArray[Any], ...]:
        c = self.convolution
        weights = c.weights.transpose(0, 2, 3, 1)  # a tap's channels side by side
        if self._pictures:
            weights = np.pad(weights, ((0, 0), (0, 0), (0, 0), (0, _PIXEL - PICTURE_CHANNELS)))
        outputs = len(c.bias)
        packed = weights.reshape(outputs // LANES, LANES, -1, 4).transpose(0, 2, 1, 3)
        start = c.bias - c.source.zero * c.weights.astype(np.int32).sum((1, 2, 3))
        return (
            np.ascontiguousarray(packed, np.int8),
            np.ascontiguousarray(start, np.int32),
            np.ascontiguousarray(c.factors, np.float32),
        )

    def _winograds(self) -> tuple[NDArray[Any], ...]:
        c = self.convolution
        spots, lanes = transformed(c.weights), len(c.bias) // LANES
        # Bytes count from zero: 128 on top of every difference, and what that adds to the sums is where they start.
        offsets = np.full((_SPOTS, 1), 128, np.int32)
        if c.source.zero == 0:
            offsets[_SUM_SPOT] = 0
        start = -offsets * spots.sum(2)
        packed = spots.reshape(_SPOTS, lanes, LANES, self._inputs // 4, 4).transpose(1, 0, 3, 2, 4)
        return (
            np.ascontiguousarray(packed, np.int8),
            np.ascontiguousarray(start.reshape(_SPOTS, lanes, LANES).transpose(1, 0, 2), np.int32),
            np.ascontiguousarray(c.bias, np.int32),
            np.ascontiguousarray(c.factors, np.float32),
        )


class PreparedPool:
    """A pool for the kernel."""

    def __init__(self, pool: MaxPool, kernel: ConvolutionKernel) -> None:
        self.pool, self._kernel = pool, kernel

    def sides(self, source: Sides) -> Sides:
        """(images, height, width, channels) of the result. Raises EngineError where the kernel cannot have it."""
        images, height, width, channels = source
        if channels % LANES or min(source) < 1:
            raise EngineError(f"{self.pool.output}: codes of {list(source)}, expected channels by {LANES}")
        p = self.pool
        high, wide = (_places(side, p.size, p.stride, p.padding) for side in (height, width))
        return images, high, wide, channels

    def __call__(self, source: int, sides: Sides, target: int) -> None:
        """From the codes at one address, with these sides, to those at another."""
        p, (images, high, wide, channels) = self.pool, self.sides(sides)
        taps = p.size, p.size, p.stride, p.padding
        shape = _Shape(*sides[:3], channels, channels, *taps, high, wide, channels)
        self._kernel.run("max_pool", images * high * wide, shape, source, target)


def _places(side: int, size: int, stride: int, padding: int) -> int:
    """Of a window along a side. Raises EngineError where it does not fit once."""
    places = (side + 2 * padding - size) // stride + 1
    if places < 1:
        raise EngineError(f"a window of {size} pixels does not fit {side} and {padding} around")
    return places


def _numbers(grid: Grid) -> tuple[int, int, int]:
    return grid.zero, grid.low, grid.high
