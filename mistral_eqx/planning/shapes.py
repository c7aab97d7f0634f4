"""Models and caches as shapes, and the bytes that one device has of them."""

import collections
import functools
import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import PyTree

from ..checks import CacheDType
from ..config import MistralConfig
from ..nn import Cache, Mistral
from ..parallel import SINGLE, Strategy, check_shapes, specs
from ..quant import QUANTIZED, Recipe, formats, quantized_shapes


def model_shapes(
    config: MistralConfig,
    dtype: str,
    strategy: Strategy,
    mesh: Mesh | AbstractMesh,
    platform: str,
    quantize: Recipe | None = None,
) -> Mistral:
    """A model of shapes, which carry their shardings.

    **Arguments:** as for [`mistral_eqx.plan`][], and

    - `platform`: the platform of the devices, such as `"tpu"`.

    **Raises:** `ValueError` if a weight cannot be quantized, or the devices would cut its blocks.
    """
    model = eqx.filter_eval_shape(
        lambda: Mistral.init(config, dtype=jnp.dtype(dtype), strategy=strategy, key=jr.key(0))
    )
    if quantize is not None:
        model = quantized_shapes(model, quantize, mesh, platform)
    return split_shapes(model, strategy, mesh)


def whole_shapes(config: MistralConfig, dtype: str, quantize: Recipe | None) -> Mistral:
    """The shapes of a model on one device, from which those of any split follow; the last ones are kept.

    They are those of a TPU: with a CPU kernel's panels of rows, they would depend on the split.

    **Arguments:** as for [`mistral_eqx.plan`][].
    """
    return _whole(config, dtype, tuple(quantize.items()) if isinstance(quantize, Mapping) else quantize)


@functools.lru_cache(maxsize=2)
def _whole(config: MistralConfig, dtype: str, recipe: Any) -> Mistral:
    quantize = dict(recipe) if isinstance(recipe, tuple) else recipe
    return model_shapes(config, dtype, SINGLE, AbstractMesh((1,), ("tp",)), "tpu", quantize)


def split_shapes(model: Mistral, strategy: Strategy, mesh: Mesh | AbstractMesh) -> Mistral:
    """A model of shapes, split by a strategy.

    **Raises:** `ValueError` if the devices would cut blocks of a quantized weight.
    """
    check_shapes(eqx.filter(model, is_shape), mesh, strategy)
    return with_shardings(model, specs(model, strategy), mesh)


def cache_shapes(
    config: MistralConfig,
    batch: int,
    kv_seq: int,
    dtype: str,
    cache_dtype: CacheDType | None,
    chunk: int,
    strategy: Strategy,
    mesh: Mesh | AbstractMesh,
    platform: str,
) -> Cache:
    """A cache of shapes, which carry their shardings.

    **Arguments:** as for [`mistral_eqx.nn.Cache`][] and `model_shapes`.
    """
    init = functools.partial(
        Cache.init,
        config,
        batch,
        kv_seq,
        jnp.dtype(dtype),
        cache_dtype,
        platform=platform,
        chunk=chunk,
        num_shards=strategy.parts("kv_seq", mesh),
    )
    cache = eqx.filter_eval_shape(init)
    return with_shardings(cache, specs(cache, strategy), mesh)


def with_shardings(tree: PyTree, specs: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """The shapes of a tree, with shardings."""

    def with_sharding(leaf: Any, spec: Any) -> Any:
        if not is_shape(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(with_sharding, tree, specs)


def is_shape(leaf: Any) -> bool:
    """Whether a leaf stands for an array."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def device_bytes(tree: PyTree) -> int:
    """The bytes of all arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if is_shape(leaf)
    )


def bytes_by_format(model: Mistral) -> dict[str, int]:
    """The bytes of the weights on one device by their format, the largest first.

    A format is a precision such as `"bfloat16"` or that of blocks such as `"NF4/64"`, to which its scales belong.
    """
    totals = collections.Counter[str]()
    for leaf in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, QUANTIZED)):
        if isinstance(leaf, QUANTIZED):
            totals[formats(leaf)[0]] += device_bytes(leaf)
        elif is_shape(leaf):
            totals[leaf.dtype.name] += device_bytes(leaf)
    return dict(totals.most_common())
