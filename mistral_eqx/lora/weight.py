"""Weights that are partly trained: any weight with a low-rank adapter, and a table that is trained as a whole."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from ..nn import AbstractWeight, DenseWeight
from ..nn.precision import at_least_float32
from ..parallel import SINGLE, Strategy, own_slices, shard_index


class LoRAWeight(AbstractWeight):
    """A weight and a low-rank change of it: `y = base x + scale B (A x)` ([LoRA](https://arxiv.org/abs/2106.09685)).

    `A` contracts the input dimensions to `rank`, and `B` contracts `rank` to the output dimensions. A device with a
    shard of the outputs has all of `A` and its shard of `B`. A device with a shard of the inputs has its shard of `A`
    and all of `B`: `A x` is then a partial sum, and so is `B (A x)`, since `B` is linear. The layer adds up the partial
    sums of base and adapter in one psum, which it needs without an adapter too.

    **Attributes:**

    - `base`: any weight, which is not trained.
    - `a`: dimensions `rank *in`, or `experts rank in`.
    - `b`: dimensions `*out rank`; for experts `experts out rank`.
    - `alpha`: the strength of the change.
    - `use_rslora`: whether `alpha` is divided by the square root of the rank and not by the rank, so that a larger rank
        does not learn more slowly ([rank-stabilised LoRA](https://arxiv.org/abs/2312.03732)).
    - `dropout`: the probability with which training drops each entry of the input of `A`; the others are scaled by
        `1 / (1 - dropout)`. Rows that are looked up are not dropped.
    - `strategy`: the strategy of the layer, which determines the entries that this device has.
    - `key`: a key for each row, from the training step. Without a key, nothing is dropped.
    - `stacked`: whether these are the weights of experts, each of which has an `A` and a `B`.
    """

    base: AbstractWeight
    a: DenseWeight
    b: DenseWeight
    alpha: float = eqx.field(static=True)
    use_rslora: bool = eqx.field(static=True, default=False)
    dropout: float = eqx.field(static=True, default=0.0)
    strategy: Strategy = SINGLE
    key: Key[Array, "*layers batch"] | None = None
    stacked: bool = eqx.field(static=True, default=False)

    @property
    def rank(self) -> int:
        """The rank of the change."""
        return self.b.value.shape[-1]

    @property
    def scale(self) -> float:
        """The factor of the change."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def depends_on_index(self) -> bool:
        return self.key is not None or self.base.depends_on_index

    def contract(self, x: Float[Array, "batch seq *in"], in_dims: str, out_dims: str) -> Float[Array, "batch seq *out"]:
        y = self.base.contract(x, in_dims, out_dims)
        dtype = self.a.value.dtype
        x = x.astype(dtype)
        if self.key is not None:
            kept = _kept(self.key, self.dropout, x.shape, in_dims, self.strategy)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        low = self.a.contract(x, in_dims, "rank").astype(dtype)
        return y + self.scale * self.b.contract(low, "rank", out_dims).astype(y.dtype)

    def contract_grouped(self, x: Float[Array, "rows in"], sizes: Int[Array, "groups"]) -> Float[Array, "rows out"]:
        y = self.base.contract_grouped(x, sizes)
        dtype = self.a.value.dtype
        low = self.a.contract_grouped(x.astype(dtype), sizes).astype(dtype)
        return y + self.scale * self.b.contract_grouped(low, sizes).astype(y.dtype)

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        rows, low = self.base.rows(ids), self.b.rows(ids)
        change = jnp.tensordot(low, self.a.value, 1, preferred_element_type=at_least_float32(low.dtype))
        return (rows.astype(change.dtype) + self.scale * change).astype(rows.dtype)

    @property
    def row_count(self) -> int:
        return self.base.row_count

    def dense(self) -> Float[Array, "..."]:
        """The sum, in the precision of the base."""
        base = self.base.dense()
        a, b = self.a.value, self.b.value
        multiply = jax.vmap(_product) if self.stacked else _product
        change = multiply(b, a)
        wide = at_least_float32(base.dtype)
        return (base.astype(wide) + self.scale * change.astype(wide)).astype(base.dtype)

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        base = {f"base.{field}": dims for field, dims in self.base.dims(in_dims, out_dims).items()}
        a = f"experts rank {in_dims}" if self.stacked else f"rank {in_dims}"
        return {**base, "a.value": a, "b.value": f"{out_dims} rank", "key": "batch"}


def _product(b: Float[Array, "..."], a: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.tensordot(b, a, 1, preferred_element_type=at_least_float32(b.dtype))


def _kept(
    keys: Key[Array, " batch"], dropout: float, shape: tuple[int, ...], in_dims: str, strategy: Strategy
) -> Bool[Array, "batch seq *in"]:
    """Which entries of an adapter's input are kept.

    The random bits of an entry are a hash of the indices of its token and itself, with the key of its row. So they do
    not depend on how rows and inputs are split over devices, and each device draws only for its own entries.
    """
    seq, sizes = shape[1], shape[2:]
    index = jnp.zeros(1, jnp.uint32)
    for dim, size in zip(in_dims.split(), sizes, strict=True):
        shard, shards = shard_index(dim, strategy)
        own = jnp.uint32(shard * size) + jnp.arange(size, dtype=jnp.uint32)
        index = (index[:, None] * (size * shards) + own[None, :]).reshape(-1)
    _, shards = shard_index("seq", strategy)
    columns = own_slices(jnp.arange(seq * shards, dtype=jnp.uint32), strategy, axis=0)
    token = jnp.repeat(columns, index.size)
    indices = jnp.concatenate([token, jnp.tile(index, seq)])

    def bits(key: Key[Array, ""]) -> UInt32[Array, " indices"]:
        return threefry_2x32(jr.key_data(key), indices)[: token.size]

    return (jax.vmap(bits)(keys) >= jnp.uint32(int(dropout * 2**32))).reshape(shape)


class TrainedWeight(AbstractWeight):
    """An array of floats that is trained as a whole, in a model in which otherwise only adapters are trained.

    **Attributes:**

    - `value`: the weight, shape `(*out, *in)`, in the precision in which it is trained.
    - `dtype`: the precision of the rest of the model, in which rows are looked up.
    """

    value: Float[Array, "..."]
    dtype: jnp.dtype = eqx.field(static=True)

    def contract(self, x: Float[Array, "batch seq *in"], in_dims: str, out_dims: str) -> Float[Array, "batch seq *out"]:
        return DenseWeight(self.value.astype(x.dtype)).contract(x, in_dims, out_dims)

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        return DenseWeight(self.value).rows(ids).astype(self.dtype)

    @property
    def row_count(self) -> int:
        return self.value.shape[0]

    def dense(self) -> Float[Array, "..."]:
        return self.value.astype(self.dtype)

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        return {"value": f"{out_dims} {in_dims}"}
