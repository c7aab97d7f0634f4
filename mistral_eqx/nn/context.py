"""What all layers share in one forward pass."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..parallel import SINGLE, Strategy, own_slices, shard_index
from ..rope import Rope
from .mask import Span, bounds
from .rotary import Rotation, query_scale
from .slots import own_slot, own_slots


class Context(eqx.Module):
    """What all layers share in one forward pass, besides activations.

    The mask compares an index of each query with an index of each key. The index is the position in the row's
    sequence or, with a `span`, the column of the row; -1 is padding.

    **Attributes:**

    - `query_rotation`, `key_rotation`: the rotary embedding of queries, which includes `query_scale`, and of keys.
    - `query_scale`: the factor of each query by its position, `None` for 1.
    - `query_index`: the index of each token of this pass; where `seq` is split, of this device's tokens.
    - `key_index`: the index of the key in each of this device's slots, this pass included; without a cache, of each
        token of this pass that this device keeps. Where a pass without a cache splits `seq`, of each token of all
        devices.
    - `slot`: the slot of the first token of this pass, counted over all devices.
    - `mask`: a further mask: a query attends to a key only if this mask and the index allow it.
    - `span`: the attention span of each query in columns; causal unless given.
    - `strategy`: which dimensions are split over which axes of the mesh.
    - `splits_seq`: whether each device computes its own tokens of this pass only, and keeps their keys. A pass with a
        `mask` computes all tokens on all devices that split `seq`, and so does one with a cache unless it `prefills`.
    - `row`: the first row of this pass in caches that have more rows; `None` if they have the rows of this pass.
    """

    query_rotation: Rotation
    key_rotation: Rotation
    query_scale: Float[Array, "batch seq"] | None
    query_index: Int[Array, "batch seq"]
    key_index: Int[Array, "batch kv_seq"]
    slot: Int[Array, ""]
    mask: Bool[Array, "batch seq kv_seq"] | None
    span: Span | None
    strategy: Strategy
    splits_seq: bool = eqx.field(static=True)
    row: Int[Array, ""] | None = None

    @classmethod
    def init(
        cls,
        rope: Rope,
        positions: Int[Array, "batch seq"],
        *,
        dtype: DTypeLike = jnp.float32,
        strategy: Strategy = SINGLE,
        cached: tuple[Int[Array, "batch kv_seq"], Int[Array, ""]] | None = None,
        mask: Bool[Array, "batch seq kv_seq"] | None = None,
        span: Span | None = None,
        prefills: bool = False,
        row: Int[Array, ""] | None = None,
    ) -> "Context":
        """The context of a pass.

        **Arguments:**

        - `rope`: the angles of the rotary embedding.
        - `positions`: the position of each token in the row's sequence, -1 for padding. Like `span`, it has the tokens
            of all devices that split `seq`.
        - `dtype`: the precision of the activations.
        - `strategy`, `mask`, `span`, `row`: see the attributes.
        - `cached`: the cache's `positions` and `used`, before this pass, for the rows of this pass.
        - `prefills`: whether a pass with a cache splits `seq` too.
        """
        seq = positions.shape[1]
        query_index = positions
        if span is not None:
            query_index = jnp.where(positions < 0, -1, jnp.arange(seq, dtype=positions.dtype)[None, :])
        before, slot = (None, jnp.zeros((), jnp.int32)) if cached is None else cached
        splits_seq = (cached is None or prefills) and mask is None and shard_index("seq", strategy)[1] > 1
        key_index = query_index
        if splits_seq:
            query_index, positions, span = jax.tree.map(
                lambda x: own_slices(x, strategy, axis=1), (query_index, positions, span)
            )
            key_index = key_index if cached is None else query_index
        else:
            key_index = own_slots(query_index, slot, strategy, axis=1, fill=-1)
        if before is not None:
            key_index = lax.dynamic_update_slice_in_dim(before, key_index, own_slot(slot, strategy), axis=1)
        rotation = Rotation.init(rope, positions, dtype, strategy)
        query_rotation = rotation.of_queries(rope.query_scaling, positions)
        scale = query_scale(rope.query_scaling, positions, dtype)
        masks = query_index, key_index, slot, mask, span
        return cls(query_rotation, rotation, scale, *masks, strategy, splits_seq, row)

    @property
    def seq(self) -> int:
        """The number of tokens of each row in this pass; where `seq` is split, of this device's."""
        return self.query_index.shape[1]

    @property
    def own_slot(self) -> Int[Array, ""]:
        """The slot of the first token that this device keeps, in its shard of the cache."""
        return own_slot(self.slot, self.strategy)

    @property
    def own_used(self) -> Int[Array, ""]:
        """The first free slot of this device's shard of the cache, after this pass."""
        return own_slot(self.slot + self.seq, self.strategy)

    def own_ids(self, ids: Int[Array, "batch all"]) -> Int[Array, "batch seq"]:
        """The ids of the tokens that this device computes."""
        return own_slices(ids, self.strategy, axis=1) if self.splits_seq else ids

    def own(self, x: Float[Array, "batch kv_heads seq head_dim"]) -> Float[Array, "batch kv_heads own head_dim"]:
        """The keys or values of the tokens that this device keeps."""
        return x if self.splits_seq else own_slots(x, self.slot, self.strategy, axis=2)

    def put(self, x: Array, new: Array, slot: Int[Array, ""]) -> Array:
        """An array `(batch, kv_heads, kv_seq, ...)` of a cache with what this pass adds, from a slot on."""
        if self.row is None:
            return lax.dynamic_update_slice_in_dim(x, new, slot, axis=2)
        zero = jnp.zeros_like(slot)
        return lax.dynamic_update_slice(x, new, (self.row, zero, slot, zero)[: x.ndim])

    def own_rows(self, x: Array) -> Array:
        """The rows of this pass of an array of a cache."""
        if self.row is None:
            return x
        return lax.dynamic_slice_in_dim(x, self.row, self.query_index.shape[0], axis=0)

    def bounds(self, window: int | None) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
        """The first and the last key index that each query attends to in a layer with this window."""
        return bounds(self.query_index, window, self.span)
