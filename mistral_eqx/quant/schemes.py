"""Quantization schemes: how the numbers of a weight become codes."""

import abc
import concurrent.futures
import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from ..errors import InputError
from ..nn import AbstractWeight, DenseWeight
from ..nn.kernels import native
from ..parallel import SINGLE, Strategy, gather_to_host
from .activations import RoundedActivations
from .blocks import BlockWeight, merged_sizes
from .floats import (
    DOUBLE_SIZE,
    LARGEST_FP8,
    double_nf4_rows,
    double_nf4_scales,
    nf4_blocks,
    nf4_codes,
)
from .integers import integer_blocks, least_error, round_to_codes
from .k_types import K_TYPES, k_blocks
from .mixtures import MIXTURES
from .panels import to_panels
from .scaled import By, ScaledWeight
from .table import block_format


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a scheme must know of a layer.

    **Attributes:**

    - `path`: its path in the model, for messages.
    - `out_axes`: how many axes of its weight are of outputs.
    - `rows_divide_by`: among how many devices the last of these is split.
    - `strategy`: the model's strategy.
    - `panels`: whether the weight is for a CPU, whose kernels read panels of rows.
    """

    path: str
    out_axes: int
    rows_divide_by: int = 1
    strategy: Strategy = SINGLE
    panels: bool = False

    @classmethod
    def of(cls, path: str, out_dims: str, mesh: Mesh | None, strategy: Strategy) -> "Layer":
        """A layer of a model that is split over a mesh, or on the default device."""
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        return cls.on(device.platform, path, out_dims, mesh, strategy)

    @classmethod
    def on(
        cls, platform: str, path: str, out_dims: str, mesh: Mesh | AbstractMesh | None, strategy: Strategy
    ) -> "Layer":
        """A layer of a model for a platform, such as `"cpu"`, that need not be present."""
        names = out_dims.split()
        return cls(path, len(names), strategy.parts(names[-1], mesh), strategy, platform == "cpu")


def numbers_of(weight: AbstractWeight) -> np.ndarray:
    """The numbers of a weight, in float32 on the host."""
    dense = weight.value if isinstance(weight, DenseWeight) else jax.jit(lambda weight: weight.dense())(weight)
    return gather_to_host(dense).astype(np.float32)


class AbstractScheme(abc.ABC):
    """A way to quantize a weight. To add one, subclass this and define the methods."""

    @abc.abstractmethod
    def weight(self, numbers: np.ndarray, layer: Layer) -> AbstractWeight:
        """The weight of these numbers.

        **Arguments:**

        - `numbers`: float32, shape `(*out, *in)`.
        - `layer`: the layer.

        **Raises:** `ValueError` that names the layer, if the numbers do not fit the scheme.
        """

    @abc.abstractmethod
    def zeros(self, shape: tuple[int, ...], layer: Layer) -> AbstractWeight:
        """A weight of zeros, made without quantizing: in `jax.eval_shape`, the arrays of `weight` as shapes.

        **Arguments:**

        - `shape`: `(*out, *in)`.
        - `layer`, **Raises:** as for `weight`.
        """


class AbstractBlockScheme(AbstractScheme):
    """A scheme whose scales belong to blocks of consecutive inputs."""

    @property
    @abc.abstractmethod
    def block(self) -> str:
        """The name of the blocks' format."""

    @abc.abstractmethod
    def blocks(self, numbers: np.ndarray) -> np.ndarray:
        """The bytes of blocks, from numbers of shape `(..., size)`."""

    def weight(self, numbers: np.ndarray, layer: Layer) -> AbstractWeight:
        return in_blocks(self.block, numbers, layer, self.blocks)

    def zeros(self, shape: tuple[int, ...], layer: Layer) -> AbstractWeight:
        shape, merged = _block_shape(self.block, shape, layer)
        return _zeros_in_format(self.block, shape, layer, merged)


@dataclasses.dataclass(frozen=True)
class Int8(AbstractBlockScheme):
    """Whole numbers of 8 bits: absmax, zero-point, W8A8 and LLM.int8() quantization.

    **Attributes:**

    - `by`: which numbers share a scale: those of a `"row"` (all inputs of an output), of a `"column"`, or of a block of
        so many inputs, as in `by=64`.
    - `zero_point`: whether codes span the numbers from the least to the largest, with a code for 0 between, and not
        evenly on both sides of 0.
    - `activations`: `"int8"` to round activations too, each token with a scale of its own (W8A8).
    - `threshold`: activations of at least this size stay as they are
        ([LLM.int8()](https://arxiv.org/abs/2208.07339) has 6.0), so `activations` must be `"int8"`.
    - `search`: whether smaller ranges are tried for the least squared error.
    """

    by: Literal["row", "column"] | int = "row"
    zero_point: bool = False
    activations: Literal["int8"] | None = None
    threshold: float | None = None
    search: bool = False

    def __post_init__(self):
        if not (self.by in ("row", "column") or (isinstance(self.by, int) and self.by > 0)):
            raise InputError(f"Int8(by={self.by!r}) is unknown; give 'row', 'column' or the size of a block.", key="by")
        if self.activations not in (None, "int8"):
            raise InputError(
                f"Int8(activations={self.activations!r}) is unknown; give 'int8', or leave it out.", key="activations"
            )
        if self.threshold is not None and self.activations is None:
            raise InputError(
                "Int8 has a threshold, above which activations are not rounded, but does not round activations; give "
                "activations='int8' too.",
                key="threshold",
            )

    def weight(self, numbers: np.ndarray, layer: Layer) -> AbstractWeight:
        found = super().weight(numbers, layer) if isinstance(self.by, int) else self._scaled(numbers, layer)
        return self._rounding(found, layer)

    def zeros(self, shape: tuple[int, ...], layer: Layer) -> AbstractWeight:
        if isinstance(self.by, int):
            return self._rounding(super().zeros(shape, layer), layer)
        by: By = "row" if self.by == "row" else "column"
        shared = shape[: layer.out_axes] if by == "row" else shape[layer.out_axes :]
        base = _zeros_in_format("INT8", shape, layer)
        zero = jnp.zeros(shared) if self.zero_point else None
        return self._rounding(ScaledWeight(base, jnp.zeros(shared), by, zero), layer)

    def _rounding(self, weight: AbstractWeight, layer: Layer) -> AbstractWeight:
        if self.activations is None:
            return weight
        return RoundedActivations(weight, self.activations, threshold=self.threshold, strategy=layer.strategy)

    def blocks(self, numbers: np.ndarray) -> np.ndarray:
        found = round_to_codes(numbers, 8, zero_point=self.zero_point, search=self.search)
        return integer_blocks(*found, bits=8)

    @property
    def block(self) -> str:
        return f"INT8/{self.by}"

    def _scaled(self, numbers: np.ndarray, layer: Layer) -> AbstractWeight:
        out_shape, in_shape = numbers.shape[: layer.out_axes], numbers.shape[layer.out_axes :]
        flat = numbers.reshape(math.prod(out_shape), -1)
        shared = flat if self.by == "row" else flat.T
        codes, scale, zero = round_to_codes(shared, 8, zero_point=self.zero_point, search=self.search)
        codes = codes if self.by == "row" else codes.T
        # Signed codes: 0 is the middle of all.
        signed = (codes.astype(np.int16) - 128).astype(np.int8).reshape(numbers.shape)
        base = in_format("INT8", signed.view(np.uint8)[..., None], layer)
        shape = out_shape if self.by == "row" else in_shape
        by: By = "row" if self.by == "row" else "column"
        zeros = jnp.asarray(zero.astype(np.float32).reshape(shape) - 128) if self.zero_point else None
        return ScaledWeight(base, jnp.asarray(scale.reshape(shape)), by, zeros)


@dataclasses.dataclass(frozen=True)
class RTN(AbstractBlockScheme):
    """Round to nearest: whole numbers of few bits, with a scale and a zero for each group of inputs.

    **Attributes:**

    - `bits`: of a number, 2 to 8.
    - `group_size`: how many inputs share a scale.
    - `zero_point`: whether codes span the numbers from the least to the largest.
    - `search`: whether smaller ranges are tried for the least squared error.
    """

    bits: int = 4
    group_size: int = 64
    zero_point: bool = True
    search: bool = False

    def __post_init__(self):
        expect_groups("RTN", self.bits, self.group_size)

    def blocks(self, numbers: np.ndarray) -> np.ndarray:
        found = round_to_codes(numbers, self.bits, zero_point=self.zero_point, search=self.search)
        return integer_blocks(*found, bits=self.bits)

    @property
    def block(self) -> str:
        return f"INT{self.bits}/{self.group_size}"


@dataclasses.dataclass(frozen=True)
class NF4(AbstractBlockScheme):
    """Four bits with codes at the quantiles of a normal distribution ([QLoRA](https://arxiv.org/abs/2305.14314)).

    **Attributes:**

    - `block_size`: how many numbers share a scale.
    - `double`: whether scales are quantized to 8 bits too, as bitsandbytes does. A block is then a whole row, so that
        no strategy can split the inputs.
    """

    block_size: int = 64
    double: bool = False

    def __post_init__(self):
        if self.double and self.block_size != DOUBLE_SIZE:
            raise InputError(
                f"NF4(block_size={self.block_size!r}, double=True) is unknown; double quantization has blocks of "
                f"{DOUBLE_SIZE}.",
                key="block_size",
            )
        if self.block_size < 2 or self.block_size % 2:
            raise InputError(
                f"NF4(block_size={self.block_size!r}) must be an even number; give one such as 64.", key="block_size"
            )

    def weight(self, numbers: np.ndarray, layer: Layer) -> AbstractWeight:
        if not self.double:
            return super().weight(numbers, layer)
        return in_blocks(self._row(numbers.shape, layer), numbers, layer, _double_nf4, one_axis=True)

    def zeros(self, shape: tuple[int, ...], layer: Layer) -> AbstractWeight:
        if not self.double:
            return super().zeros(shape, layer)
        name = self._row(shape, layer)
        shape, merged = _block_shape(name, shape, layer, one_axis=True)
        return _zeros_in_format(name, shape, layer, merged)

    def blocks(self, numbers: np.ndarray) -> np.ndarray:
        return nf4_blocks(*nf4_codes(numbers))

    @property
    def block(self) -> str:
        return f"NF4/{self.block_size}"

    def _row(self, shape: tuple[int, ...], layer: Layer) -> str:
        inputs = math.prod(shape[layer.out_axes :])
        expect_whole_blocks(layer.path, inputs, self.block)
        return f"NF4D/{inputs}"


def _double_nf4(numbers: np.ndarray) -> np.ndarray:
    """The bytes of rows of a weight."""
    rows = numbers.reshape(-1, numbers.shape[-1])
    codes, largest = nf4_codes(rows.reshape(len(rows), -1, DOUBLE_SIZE))
    offset = np.float32(largest.mean(dtype=np.float64))
    scales, factors = double_nf4_scales(largest.reshape(-1), offset)
    codes = codes.reshape(rows.shape)
    pairs = codes[:, 0::2] << 4 | codes[:, 1::2]
    found = double_nf4_rows(pairs, scales.reshape(len(rows), -1), 0, factors, offset)
    return found.reshape(*numbers.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class FP8(AbstractBlockScheme):
    """Floats of 8 bits (e4m3), with a scale that makes the largest number 448, the largest float of this kind.

    **Attributes:**

    - `by`: which numbers share a scale: `"tensor"` (all), `"row"`, or a block of so many inputs, as in `by=128`.
    - `activations`: `"float8_e4m3"` to round activations too, each token with a scale of its own.
    - `search`: whether smaller scales are tried for the least squared error.
    """

    by: Literal["tensor", "row"] | int = "row"
    activations: Literal["float8_e4m3"] | None = None
    search: bool = False

    def __post_init__(self):
        if not (self.by in ("tensor", "row") or (isinstance(self.by, int) and self.by > 0)):
            raise InputError(f"FP8(by={self.by!r}) is unknown; give 'tensor', 'row' or the size of a block.", key="by")
        if self.activations not in (None, "float8_e4m3"):
            raise InputError(
                f"FP8(activations={self.activations!r}) is unknown; give 'float8_e4m3', or leave it out.",
                key="activations",
            )

    def weight(self, numbers: np.ndarray, layer: Layer) -> AbstractWeight:
        found = super().weight(numbers, layer) if isinstance(self.by, int) else self._scaled(numbers, layer)
        return self._rounding(found, layer)

    def zeros(self, shape: tuple[int, ...], layer: Layer) -> AbstractWeight:
        if isinstance(self.by, int):
            return self._rounding(super().zeros(shape, layer), layer)
        by: By = "row" if self.by == "row" else "tensor"
        base = _zeros_in_format("FP8", shape, layer)
        return self._rounding(ScaledWeight(base, jnp.zeros(shape[: layer.out_axes] if by == "row" else ()), by), layer)

    def _rounding(self, weight: AbstractWeight, layer: Layer) -> AbstractWeight:
        if self.activations is None:
            return weight
        return RoundedActivations(weight, self.activations, strategy=layer.strategy)

    def blocks(self, numbers: np.ndarray) -> np.ndarray:
        codes, scale = _float8(numbers, -1, self.search)
        return np.concatenate([np.ascontiguousarray(scale).view(np.uint8), codes], axis=-1)

    @property
    def block(self) -> str:
        return f"FP8/{self.by}"

    def _scaled(self, numbers: np.ndarray, layer: Layer) -> AbstractWeight:
        out_shape = numbers.shape[: layer.out_axes]
        flat = numbers.reshape(math.prod(out_shape), -1)
        codes, scale = _float8(flat, -1 if self.by == "row" else None, self.search)
        base = in_format("FP8", codes.reshape(numbers.shape)[..., None], layer)
        by: By = "row" if self.by == "row" else "tensor"
        return ScaledWeight(base, jnp.asarray(scale.reshape(out_shape if by == "row" else ())), by)


# The types that the package gguf quantizes. It has no list of them.
_QUANTIZED_BY_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "BF16", "F16", "F32")
_TYPES = tuple(dict.fromkeys((*_QUANTIZED_BY_GGUF, *K_TYPES, *MIXTURES)))

# So many numbers are quantized at once: few enough for the arrays of a search to stay in the cache.
_CHUNK = 2**16


@dataclasses.dataclass(frozen=True)
class GGUF(AbstractBlockScheme):
    """A format of GGUF files, as llama.cpp quantizes it without an importance matrix.

    **Attributes:**

    - `type`: one of `"Q4_0"`, `"Q4_1"`, `"Q5_0"`, `"Q5_1"`, `"Q8_0"`, `"Q2_K"`, `"Q3_K"`, `"Q4_K"`, `"Q5_K"`, `"Q6_K"`,
        `"IQ4_NL"`, `"IQ4_XS"`, `"MXFP4"`, `"BF16"`, `"F16"` and `"F32"`; or a mixture of these, in which the layer
        decides: `"Q3_K_S"`, `"Q3_K_M"`, `"Q3_K_L"`, `"Q4_K_S"`, `"Q4_K_M"`, `"Q5_K_S"` and `"Q5_K_M"`.
    """

    type: str = "Q8_0"

    def __post_init__(self):
        if self.type not in _TYPES:
            raise InputError(
                f"GGUF(type={self.type!r}) cannot be quantized; give one of {', '.join(_TYPES)}.", key="type"
            )

    def blocks(self, numbers: np.ndarray) -> np.ndarray:
        format = block_format(self.type)
        flat = np.ascontiguousarray(numbers, np.float32).reshape(-1, format.size)
        step = _CHUNK // format.size
        chunks = (flat[start : start + step] for start in range(0, len(flat), step))
        # Other threads run while numpy computes.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = np.concatenate(list(pool.map(self._chunk, chunks)))
        return found.reshape(*numbers.shape[:-1], format.nbytes)

    @property
    def block(self) -> str:
        return self.type

    def _chunk(self, numbers: np.ndarray) -> np.ndarray:
        """The blocks of numbers of shape `(blocks, size)`."""
        if self.type in K_TYPES:
            return k_blocks(self.type, numbers)
        # As one row: the package gguf quantizes 16 rows at a time, however short they are.
        raw = gguf.quants.quantize(numbers.reshape(1, -1), gguf.GGMLQuantizationType[self.type])
        return raw.view(np.uint8).reshape(len(numbers), -1)


def _float8(numbers: np.ndarray, axis: int | None, search: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes of float8 e4m3 as bytes, and the scales."""
    largest = np.abs(numbers).max(axis=axis, keepdims=True)
    largest = np.where(largest > 0, largest, LARGEST_FP8).astype(np.float32)

    def tried(shrunk: float) -> tuple[np.ndarray, np.ndarray]:
        scale = largest * np.float32(shrunk) / np.float32(LARGEST_FP8)
        codes = np.clip(numbers / scale, -LARGEST_FP8, LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn)
        return codes.view(np.uint8), scale

    def restored(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale

    return least_error(numbers, tried, restored, axis) if search else tried(1.0)


def expect_groups(scheme: str, bits: int, group_size: int):
    """Refuses groups of whole numbers that no format has.

    **Arguments:**

    - `scheme`: the name of the scheme, for messages.
    - `bits`, `group_size`: as in [`mistral_eqx.RTN`][].
    """
    if bits not in range(2, 9):
        raise InputError(f"{scheme}(bits={bits!r}) must be from 2 to 8; give one of these.", key="bits")
    if group_size < 8 or group_size % 8:
        raise InputError(
            f"{scheme}(group_size={group_size!r}) must be a multiple of 8; give one such as 64 or 128.",
            key="group_size",
        )


def expect_whole_blocks(path: str, inputs: int, name: str):
    """Refuses blocks that do not divide the inputs of a layer.

    **Arguments:**

    - `path`: the layer.
    - `inputs`: how many it has.
    - `name`: the blocks' format.
    """
    size = block_format(name).size
    if inputs % size:
        raise InputError(
            f"{path} has {inputs} inputs, which blocks of {size} ({name}) do not divide; take smaller blocks, such as "
            f"{math.gcd(inputs, size)}, or leave this layer out."
        )


def in_blocks(
    name: str,
    numbers: np.ndarray,
    layer: Layer,
    blocks: Callable[[np.ndarray], np.ndarray],
    *,
    one_axis: bool = False,
) -> BlockWeight:
    """The weight in blocks of consecutive inputs.

    **Arguments:**

    - `name`: the blocks' format.
    - `numbers`: shape `(*out, *in)`.
    - `layer`: the layer.
    - `blocks`: makes bytes of numbers, from shape `(..., size)` to shape `(..., bytes)`.
    - `one_axis`: whether the blocks of all inputs stand on one axis.
    """
    shape, merged = _block_shape(name, numbers.shape, layer, one_axis)
    return in_format(name, blocks(numbers.reshape(*shape, -1)), layer, merged)


def _block_shape(
    name: str, shape: tuple[int, ...], layer: Layer, one_axis: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape `(*out, *in)` with blocks in place of inputs, and the merged sizes."""
    out_shape, in_shape = shape[: layer.out_axes], shape[layer.out_axes :]
    size = block_format(name).size
    expect_whole_blocks(layer.path, math.prod(in_shape), name)
    merged = in_shape if one_axis and len(in_shape) > 1 else merged_sizes(in_shape, size)
    assert merged is not None
    outer = len(in_shape) - max(len(merged), 1)
    return (*out_shape, *in_shape[:outer], math.prod(in_shape[outer:]) // size), merged


def in_format(name: str, blocks: np.ndarray, layer: Layer, merged: tuple[int, ...] = ()) -> BlockWeight:
    """The weight that has these blocks.

    **Arguments:**

    - `name`: their format.
    - `blocks`: shape `(*out, *in, bytes)`.
    - `layer`: the layer.
    - `merged`: as in [`mistral_eqx.quant.BlockWeight`][].
    """
    last = layer.out_axes - 1
    panel = _panel(name, blocks.shape[last], layer)
    if panel > 1:
        blocks = to_panels(blocks, block_format(name), last)
    return BlockWeight(jnp.asarray(blocks), name, layer.out_axes, merged, panel)


def _zeros_in_format(name: str, shape: tuple[int, ...], layer: Layer, merged: tuple[int, ...] = ()) -> BlockWeight:
    """The weight of `in_format` for blocks of zeros; `shape` is without the bytes."""
    *outer, rows = shape[: layer.out_axes]
    panel = _panel(name, rows, layer)
    sizes = (*outer, rows // panel, *shape[layer.out_axes :], panel * block_format(name).nbytes)
    return BlockWeight(jnp.zeros(sizes, jnp.uint8), name, layer.out_axes, merged, panel)


def _panel(name: str, rows: int, layer: Layer) -> int:
    """How many rows stand side by side."""
    has_kernel = layer.panels and native.supports(name) and rows // layer.rows_divide_by % native.PANEL == 0
    return native.PANEL if has_kernel else 1
