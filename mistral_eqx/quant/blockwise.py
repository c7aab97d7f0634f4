"""Quantizes a model block by block, with statistics of the activations that a text gives each layer."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..errors import InputError
from ..nn import AbstractWeight, Block, Context, DenseWeight, Mistral
from ..nn.layers import AdaptableLayer, adaptable_layers, dims_of, map_layers
from ..parallel import SINGLE
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
    tokens, found = np.float32(sum(x.shape[1] for x in activations)), {}
    for shared, of_shared in zip(wanted, sums, strict=True):
        squares, sizes = (np.asarray(each) / tokens for each in of_shared)
        if not np.isfinite(squares).all():
            raise InputError(
                f"The input of {own.prefix}{shared.layers[0]} is not finite on the calibration; load the model in "
                "another dtype, or check its weights with mistral_eqx.load(..., check=True).",
                key="calibration",
            )
        magnitude = np.broadcast_to(sizes.mean(axis=shared.together(block), keepdims=True), sizes.shape)
        found[shared] = Inputs(2 * squares, magnitude.reshape(-1))
    return found


class _Watched(AbstractWrapped):
    """A weight that tells what it is applied to."""

    base: AbstractWeight
    tell: Callable[[Array], None] = eqx.field(static=True)

    def contract(self, x: Float[Array, "batch seq ..."], in_dims: str, out_dims: str) -> Float[Array, "batch seq ..."]:
        self.tell(x)
        return self.base.contract(x, in_dims, out_dims)


@eqx.filter_jit
def _sums(
    block: Block, x: Array, context: Context, wanted: tuple[SharedInput, ...]
) -> list[tuple[Float[Array, "inputs inputs"], Float[Array, "*in"]]]:
    """The sums of `x xᵀ` and of `|x|` over the tokens of some inputs `x`."""
    seen: dict[str, Array] = {}

    def watched(path: str, layer: AdaptableLayer) -> AdaptableLayer:
        return dataclasses.replace(layer, weight=_Watched(layer.weight, functools.partial(seen.__setitem__, path)))

    map_layers(watched, block)(x, context)
    sums = []
    for own in (seen[shared.layers[0]].astype(jnp.float32) for shared in wanted):
        flat = own.reshape(math.prod(own.shape[:2]), -1)
        squares = jnp.matmul(flat.T, flat, precision=lax.Precision.HIGHEST)
        sums.append((squares, jnp.sum(jnp.abs(own), axis=(0, 1))))
    return sums


def _quantized(block: Block, own: _OwnSchemes, inputs: dict[SharedInput, Inputs], done: Callable[[], None]) -> Block:
    layers = adaptable_layers(block)
    norms = {"attention_norm": block.attention_norm, "feed_forward_norm": block.feed_forward_norm}
    numbers = {path: numbers_of(layer.weight) for path, layer in layers.items()}
    numbers |= {path: np.asarray(norm.weight).astype(np.float32) for path, norm in norms.items()}
    scaled: set[str] = set()
    for shared in inputs:
        for scheme, paths in own.of(shared).items():
            flat = {own.prefix + path: _matrix(layers[path], numbers[path]) for path in paths}
            factors = scheme.factors(flat, inputs[shared])
            if factors is not None:
                shared.scale(block, numbers, factors)
                inputs[shared] = inputs[shared].divided(factors)
                scaled |= {*shared.layers, shared.producer}

    def replaced(path: str, layer: AdaptableLayer) -> AdaptableLayer:
        scheme = own.schemes.get(path)
        described = Layer.of(own.prefix + path, dims_of(layer)[1], None, SINGLE)
        if isinstance(scheme, AbstractCalibratedScheme):
            seen = next(each for shared, each in inputs.items() if path in shared.layers)
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
    return dataclasses.replace(map_layers(replaced, block), **changed)


def _matrix(layer: AdaptableLayer, numbers: np.ndarray) -> np.ndarray:
    """A weight with all outputs on one axis, and all inputs on another."""
    return numbers.reshape(math.prod(numbers.shape[: len(dims_of(layer)[1].split())]), -1)
