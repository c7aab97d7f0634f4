"""Quantizes a model block by block, with statistics of the activations that a text gives each layer."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ..errors import InputError
from ..nn import AbstractWeight, Block, Context, DenseWeight, ExpertLinear, Mistral
from ..nn.kernels import group_of_rows
from ..nn.layers import QuantizableLayer, dims_of, map_quantizable, quantizable_layers
from ..parallel import SINGLE
from .blocks import BlockWeight
from .calibration import AbstractCalibratedScheme, Inputs
from .scaling import SHARED, SharedInput
from .schemes import AbstractScheme, Layer, numbers_of
from .wrapped import AbstractWrapped


AnyScheme = AbstractScheme | AbstractCalibratedScheme


def quantize_blocks(
    model: Mistral, chosen: Mapping[str, AnyScheme], ids: np.ndarray, done: Callable[[], None]
) -> Mistral:
    """Quantizes the layers of all blocks, from the first to the last.

    The input of a block is the output of the quantized blocks before it. Within a block, statistics are those of the
    block as it was.

    **Arguments:**

    - `model`: a model on one device.
    - `chosen`: the schemes by the paths of layers of blocks.
    - `ids`: what `checked_calibration` returned.
    - `done`: called after each layer.

    **Raises:** `ValueError` that names the layer, if a scheme does not fit it, if its input is not finite, or if it
    must be scaled and is quantized already.
    """
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    context = Context.init(model.config.rope, positions, dtype=model.dtype)
    activations = [_embed(model, jnp.asarray(row[None])) for row in ids]
    last = max(int(path.split(".")[1]) for path, one in chosen.items() if isinstance(one, AbstractCalibratedScheme))
    blocks = []
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix = f"blocks.{number}."
        own = _OwnSchemes(
            prefix, {path.removeprefix(prefix): one for path, one in chosen.items() if path.startswith(prefix)}
        )
        blocks.append(_quantized(block, own, _observed(block, own, activations, context), done))
        if number < last:
            activations = [_run(blocks[-1], x, context) for x in activations]
    return dataclasses.replace(model, blocks=tuple(blocks))


@dataclasses.dataclass(frozen=True)
class _OwnSchemes:
    """The schemes of a block, by the paths of its layers, and what these begin with in the model."""

    prefix: str
    schemes: Mapping[str, AnyScheme]

    def of(self, shared: SharedInput) -> dict[AbstractCalibratedScheme, list[str]]:
        """The calibrated schemes of layers that share an input, with these layers."""
        found: dict[AbstractCalibratedScheme, list[str]] = {}
        for path in shared.layers:
            scheme = self.schemes.get(path)
            if isinstance(scheme, AbstractCalibratedScheme):
                found.setdefault(scheme, []).append(path)
        return found


@eqx.filter_jit
def _embed(model: Mistral, ids: Array) -> Array:
    return model.embedding(ids)


@eqx.filter_jit
def _run(block: Block, x: Array, context: Context) -> Array:
    return block(x, context)[0]


def _observed(block: Block, own: _OwnSchemes, activations: list[Array], context: Context) -> dict[SharedInput, Inputs]:
    """The statistics of each input of layers with calibrated schemes."""
    wanted = tuple(shared for shared in SHARED if own.of(shared))
    if not wanted:
        return {}
    sums = _sums(block, activations[0], context, wanted)
    for x in activations[1:]:
        sums = jax.tree.map(jnp.add, sums, _sums(block, x, context, wanted))
    found = {}
    for shared, of_shared in zip(wanted, sums, strict=True):
        squares, sizes, tokens = (np.array(each) for each in of_shared)
        inputs, path = squares.shape[-1], own.prefix + shared.layers[0]
        if not np.isfinite(squares).all():
            raise InputError(
                f"The input of {path} is not finite on the calibration; load the model in another dtype, or check its "
                "weights with mistral_eqx.load(..., check=True).",
                key="calibration",
            )
        # Of other layers, `checked_calibration` has seen enough tokens.
        few = (tokens < inputs) & (tokens.ndim > 0)
        if few.any():
            warnings.warn(
                f"{int(few.sum())} of {few.size} experts of {path} saw fewer tokens of the calibration than they have "
                "inputs, and are rounded to the nearest; give a longer text.",
                stacklevel=2,
            )
        each = np.maximum(tokens, 1).astype(np.float32)
        squares, sizes = (
            squares / each[..., None, None],
            sizes / each.reshape(*each.shape, *[1] * (sizes.ndim - few.ndim)),
        )
        # With equal inputs that do not depend on each other, no number makes up for the error of another one.
        squares[few] = np.eye(inputs, dtype=np.float32) / 2
        axes = tuple(axis - len(shared.dims(block)) for axis in shared.together(block))
        magnitude = np.broadcast_to(sizes.mean(axis=axes, keepdims=True), sizes.shape)
        found[shared] = Inputs(2 * squares, magnitude.reshape(*few.shape, -1))
    return found


class _Watched(AbstractWrapped):
    """A weight that tells what it is applied to, and how many rows of it each expert has."""

    base: AbstractWeight
    tell: Callable[[tuple[Array, Array | None]], None] = eqx.field(static=True)

    def contract(self, x: Float[Array, "batch seq ..."], in_dims: str, out_dims: str) -> Float[Array, "batch seq ..."]:
        self.tell((x, None))
        return self.base.contract(x, in_dims, out_dims)

    def contract_grouped(self, x: Float[Array, "rows in"], sizes: Int[Array, "groups"]) -> Float[Array, "rows out"]:
        self.tell((x, sizes))
        return self.base.contract_grouped(x, sizes)


@eqx.filter_jit
def _sums(block: Block, x: Array, context: Context, wanted: tuple[SharedInput, ...]) -> list[tuple[Array, ...]]:
    """The sums of `x xᵀ` and of `|x|` over the tokens of some inputs `x`, and how many tokens these are.

    For inputs of experts, all have a first axis of experts.
    """
    seen: dict[str, tuple[Array, Array | None]] = {}

    def watched(path: str, layer: QuantizableLayer) -> QuantizableLayer:
        return dataclasses.replace(layer, weight=_Watched(layer.weight, functools.partial(seen.__setitem__, path)))

    map_quantizable(watched, block)(x, context)
    sums: list[tuple[Array, ...]] = []
    for own, rows in (seen[shared.layers[0]] for shared in wanted):
        own = own.astype(jnp.float32)
        if rows is not None:
            dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
            squares = lax.ragged_dot_general(own, own, rows, dims, precision=lax.Precision.HIGHEST)
            sizes = jax.ops.segment_sum(jnp.abs(own), group_of_rows(rows, len(own)), len(rows))
            sums.append((squares, sizes, rows))
            continue
        flat = own.reshape(math.prod(own.shape[:2]), -1)
        squares = jnp.matmul(flat.T, flat, precision=lax.Precision.HIGHEST)
        sums.append((squares, jnp.sum(jnp.abs(own), axis=(0, 1)), jnp.asarray(len(flat))))
    return sums


def _quantized(block: Block, own: _OwnSchemes, inputs: dict[SharedInput, Inputs], done: Callable[[], None]) -> Block:
    # Weights of experts are large, and no factors change them.
    layers = {
        path: layer
        for path, layer in quantizable_layers(block).items()
        if path in own.schemes or not isinstance(layer, ExpertLinear)
    }
    norms = {"attention_norm": block.attention_norm, "feed_forward_norm": block.feed_forward_norm}
    numbers = {path: numbers_of(layer.weight) for path, layer in layers.items()}
    numbers |= {path: np.asarray(norm.weight).astype(np.float32) for path, norm in norms.items()}
    scaled: set[str] = set()
    for shared in inputs:
        for scheme, paths in own.of(shared).items():
            if shared.producer is None or not scheme.has_factors:
                continue
            flat = {own.prefix + path: _matrix(layers[path], numbers[path]) for path in paths}
            factors = scheme.factors(flat, inputs[shared])
            if factors is not None:
                shared.scale(block, numbers, factors)
                inputs[shared] = inputs[shared].divided(factors)
                scaled |= {*shared.layers, shared.producer}

    def replaced(path: str, layer: QuantizableLayer) -> QuantizableLayer:
        scheme = own.schemes.get(path)
        described = Layer.of(
            own.prefix + path, layer.out_dims if isinstance(layer, ExpertLinear) else dims_of(layer)[1], None, SINGLE
        )
        if isinstance(scheme, AbstractCalibratedScheme):
            seen = next(each for shared, each in inputs.items() if path in shared.layers)
            if isinstance(layer, ExpertLinear):
                each = (
                    scheme.weight(numbers[path][expert], described, seen.of_expert(expert))
                    for expert in range(layer.weight.row_count)
                )
                weight = _stacked(own.prefix + path, list(each))
            else:
                weight = scheme.weight(numbers[path], described, seen)
        elif scheme is not None:
            weight = scheme.weight(numbers[path], described)
        elif path not in scaled:
            return layer
        elif isinstance(layer.weight, DenseWeight):
            weight = DenseWeight(jnp.asarray(numbers[path], layer.weight.value.dtype))
        else:
            raise InputError(
                f"{own.prefix}{path} has a {type(layer.weight).__name__}, which cannot be scaled for the layers beside "
                "it; give it a scheme too, or expand it first.",
                key="scheme",
            )
        if scheme is not None:
            done()
        return dataclasses.replace(layer, weight=weight)

    changed = {
        path: dataclasses.replace(norm, weight=jnp.asarray(numbers[path], norm.weight.dtype))
        for path, norm in norms.items()
    }
    return dataclasses.replace(map_quantizable(replaced, block), **changed)


def _stacked(path: str, weights: Sequence[AbstractWeight]) -> BlockWeight:
    """The weights of experts as one."""
    blocks = [one for one in weights if isinstance(one, BlockWeight)]
    if len(blocks) < len(weights):
        raise InputError(
            f"{path} is of experts, whose inputs cannot be sorted for each of them; choose a scheme that does not sort "
            "them, such as mx.GPTQ(act_order=False).",
            key="scheme",
        )
    return dataclasses.replace(
        blocks[0], blocks=jnp.stack([one.blocks for one in blocks]), out_axes=blocks[0].out_axes + 1
    )


def _matrix(layer: QuantizableLayer, numbers: np.ndarray) -> np.ndarray:
    """A weight with all outputs on one axis, and all inputs on another."""
    return numbers.reshape(math.prod(numbers.shape[: len(dims_of(layer)[1].split())]), -1)
