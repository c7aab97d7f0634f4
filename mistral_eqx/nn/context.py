"""What all layers share in one forward pass."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..config import Rope
from ..parallel import SINGLE, Strategy
from .rotary import Rotation
from .slots import own_slot, own_slots
from .visible import Span, bounds


class Context(eqx.Module):
    """What the layers of one forward pass know of its tokens, besides their activations.

    A mask compares an index of each query with one of each key. These are positions in the row's text, or under a
    `span` columns of the row; -1 is padding.

    **Attributes:**

    - `rotation`: of queries and keys, by their positions.
    - `query_index`: of each token of this pass.
    - `key_index`: of the key in each slot of this device, the tokens of this pass included; without a cache, of each of
        these tokens.
    - `slot`: the slot of the first token of this pass, counted over all devices.
    - `mask`: which keys each query may see at most.
    - `span`: which columns each query sees; all up to its own unless given.
    - `strategy`: which dimensions are split over which axes of the mesh.
    """

    rotation: Rotation
    query_index: Int[Array, "batch seq"]
    key_index: Int[Array, "batch kv_seq"]
    slot: Int[Array, ""]
    mask: Bool[Array, "batch seq kv_seq"] | None
    span: Span | None
    strategy: Strategy

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
    ) -> "Context":
        """The context of a pass.

        **Arguments:**

        - `rope`: the angles of the rotary embedding.
        - `positions`: where each token stands in its row's text, -1 for padding.
        - `dtype`: the precision of the activations.
        - `strategy`, `mask`, `span`: as above.
        - `cached`: what a cache knows of the tokens before: the position in each slot, and the first free slot.
        """
        seq = positions.shape[1]
        query_index = positions
        if span is not None:
            query_index = jnp.where(positions < 0, -1, jnp.arange(seq, dtype=positions.dtype)[None, :])
        before, slot = (None, jnp.zeros((), jnp.int32)) if cached is None else cached
        key_index = own_slots(query_index, slot, strategy, axis=1, fill=-1)
        if before is not None:
            key_index = lax.dynamic_update_slice_in_dim(before, key_index, own_slot(slot, strategy), axis=1)
        rotation = Rotation.init(rope, positions, dtype, strategy)
        return cls(rotation, query_index, key_index, slot, mask, span, strategy)

    @property
    def seq(self) -> int:
        """How many tokens of each row this pass has."""
        return self.query_index.shape[1]

    @property
    def own_slot(self) -> Int[Array, ""]:
        """The slot of the first of this device's tokens, in its part of the cache."""
        return own_slot(self.slot, self.strategy)

    @property
    def own_used(self) -> Int[Array, ""]:
        """The first free slot of this device's part of the cache, after this pass."""
        return own_slot(self.slot + self.seq, self.strategy)

    def own(self, x: Float[Array, "batch kv_heads seq head_dim"]) -> Float[Array, "batch kv_heads own head_dim"]:
        """The keys or values of the tokens that this device keeps."""
        return own_slots(x, self.slot, self.strategy, axis=2)

    def bounds(self, window: int | None) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
        """The first and the last index of a key that each query sees in a layer with this window."""
        return bounds(self.query_index, window, self.span)
