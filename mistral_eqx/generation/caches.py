"""The size of a model's KV cache, and how it is sharded over the model's devices."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int

from ..checks import CacheDType
from ..config import MistralConfig
from ..nn import Cache, Mistral
from ..nn.slots import slots_for, tokens_in
from ..parallel import Strategy, pmax, shard_index, specs, spmd
from .prompt import bucket


def empty_cache(
    model: Mistral, batch: int, kv_seq: int, chunk: int | None = None, cache_dtype: CacheDType | None = None
) -> Cache:
    """An empty cache, sharded as the model is.

    **Arguments:** as for [`mistral_eqx.nn.Cache`][].
    """
    init = _init_cache(model.config, batch, kv_seq, model.dtype, cache_dtype, chunk, model.mesh, model.strategy)
    return init()


@functools.lru_cache
def _init_cache(
    config: MistralConfig,
    batch: int,
    kv_seq: int,
    dtype: jnp.dtype,
    cache_dtype: CacheDType | None,
    chunk: int | None,
    mesh: Mesh | None,
    strategy: Strategy,
) -> Callable[[], Cache]:
    platform = None if mesh is None else mesh.devices.flat[0].platform
    init = functools.partial(
        Cache.init,
        config,
        batch,
        kv_seq,
        dtype,
        cache_dtype,
        platform=platform,
        chunk=chunk,
        num_shards=strategy.parts("kv_seq", mesh),
        stages=strategy.parts("layers", mesh),
    )
    if mesh is None:
        return init
    split = specs(eqx.filter_eval_shape(init), strategy)
    return jax.jit(init, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), split))


@eqx.filter_jit
def grow(model: Mistral, cache: Cache, kv_seq: int, times: int = 1) -> Cache:
    """A copy of a model's cache with `kv_seq` slots; each device adds its share to its own shard.

    **Arguments:**

    - `times`: how many copies of each row it gets, next to each other.
    """
    split = specs(cache, model.strategy)
    share = kv_seq // parts(model, "kv_seq")

    def copy(cache: Cache) -> Cache:
        # The result shares no buffer with the argument, since one of the two will be donated.
        cache = jax.tree.map(jnp.copy, cache.grow(share))
        layers, positions = jax.tree.map(lambda x: repeated(x, times), (cache.layers, cache.positions))
        return Cache(layers, positions, cache.used)

    return spmd(copy, model.mesh, (split,), split)(cache)


def moved_to_front(live: Bool[Array, "batch kv_seq"], kv_seq: int) -> Callable[[Array], Array]:
    """Copies the entries of some slots to the front, in their order; zeros follow.

    **Arguments:**

    - `live`: which slots of this device's shard.
    - `kv_seq`: the number of slots of the copy on this device, at least as many as are live in any row.

    **Returns:** a function of arrays of shape `(batch, _, kv_seq, ...)`.
    """
    order = jnp.argsort(~live, axis=1, stable=True)[:, :kv_seq]
    more = kv_seq - order.shape[1]

    def moved(x: Array) -> Array:
        x = jax.vmap(lambda x, order: jnp.take(x, order, axis=1, mode="clip"))(x, order)
        return jnp.pad(x, [(0, more if axis == 2 else 0) for axis in range(x.ndim)])

    return moved


def packed(
    cache: Cache, live: Bool[Array, "batch kv_seq"], moved: Callable[[Array], Array], used: Int[Array, ""]
) -> Cache:
    """A cache whose live slots are at the front.

    **Arguments:**

    - `moved`: the result of `moved_to_front`.
    - `used`: the first slot after them.
    """
    # Padding by zeros becomes the position -1.
    positions = moved(jnp.where(live, cache.positions + 1, 0)[:, None])[:, 0] - 1
    return Cache(jax.tree.map(moved, cache.layers), positions, used)


@eqx.filter_jit
def pack(model: Mistral, cache: Cache) -> Cache:
    """A copy of a model's cache without padding between its tokens; each device moves those of its own shard."""
    strategy, split = model.strategy, specs(cache, model.strategy)

    def move(cache: Cache) -> Cache:
        live = cache.positions >= 0
        most = pmax(jnp.max(jnp.sum(live, axis=1, dtype=jnp.int32)), "batch kv_seq", strategy)
        # One slot more is free in all rows, since a draft writes the last token again.
        used = most * shard_index("kv_seq", strategy)[1] + 1
        return packed(cache, live, moved_to_front(live, cache.kv_seq), used)

    return spmd(move, model.mesh, (split,), split)(cache)


def repeated(x: Array, times: int) -> Array:
    """Repeats each row `times` times, copies next to each other."""
    return x if times == 1 else jnp.repeat(x, times, axis=0)


def slots(model: Mistral, count: int) -> int:
    """The size of a cache for `count` tokens of this model."""
    return slots_for(count, parts(model, "kv_seq"))


def holds(model: Mistral, kv_seq: int) -> int:
    """How many tokens a cache of this size has room for: the inverse of `slots`."""
    return tokens_in(kv_seq, parts(model, "kv_seq"))


def parts(model: Mistral, dim: str) -> int:
    """The number of shards of a dimension."""
    return model.strategy.parts(dim, model.mesh)


def first_room(max_new_tokens: int) -> int:
    """The new tokens that a cache first has room for; few, because attention reads the whole cache in each step."""
    return min(max_new_tokens, 128)


def capacity(slots: int) -> int:
    """The size of a cache with at least `slots`: two sizes per octave, so that few loops are compiled."""
    return bucket(slots, step=128, per_octave=2)
