"""A feed-forward layer with several experts, of which a router chooses some for each token."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ..parallel import (
    SINGLE,
    AbstractNamed,
    Strategy,
    all_slices,
    all_tokens,
    gather_shards,
    own_slices,
    own_tokens,
    shard_index,
    vary_alike,
    vary_over,
)
from .context import Context
from .expert_capacity import capacity_limit, within_capacity
from .expert_exchange import exchanged
from .feed_forward import FeedForward
from .linear import LINEAR
from .router_sums import RouterSums, router_sums
from .weight import AbstractWeight


class Router(AbstractNamed):
    """Chooses the experts of each token: the most probable ones of a softmax over all experts.

    If the experts are divided into groups, they come from the groups whose two best experts have the largest sum of
    probabilities ([DeepSeek-V3](https://arxiv.org/abs/2412.19437)).

    **Attributes:**

    - `weight`: `embed` to `routes`, one score for each expert. Every device has all of them.
    - `per_token`: experts chosen for each token.
    - `groups`, `groups_per_token`, `scale`, `normalized`: as in [`mistral_eqx.Routing`][].
    """

    weight: AbstractWeight
    per_token: int = eqx.field(static=True)
    groups: int = eqx.field(static=True, default=1)
    groups_per_token: int = eqx.field(static=True, default=1)
    scale: float = eqx.field(static=True, default=1.0)
    normalized: bool = eqx.field(static=True, default=True)

    def __call__(
        self, x: Float[Array, "batch seq embed"]
    ) -> tuple[Int[Array, "batch seq per_token"], Float[Array, "batch seq per_token"]]:
        """Computes scores and probabilities in float32 or wider.

        **Returns:** the experts of each token, the most probable one first, and their shares of the result: their
        probabilities, divided by the sum of these if `normalized`, times `scale`.
        """
        probabilities = jax.nn.softmax(self.weight.contract(x, "embed", "routes"))
        shares, experts = lax.top_k(self._in_groups(probabilities), self.per_token)
        if self.normalized:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        return experts, shares if self.scale == 1 else shares * self.scale

    def _in_groups(self, probabilities: Float[Array, "batch seq routes"]) -> Float[Array, "batch seq routes"]:
        """The probabilities, with zeros in the groups that are not chosen."""
        if self.groups_per_token == self.groups:
            return probabilities
        grouped = probabilities.reshape(*probabilities.shape[:-1], self.groups, -1)
        scores = jnp.sum(lax.top_k(grouped, 2)[0], axis=-1)
        # Groups with equal scores are chosen together.
        lowest = lax.top_k(scores, self.groups_per_token)[0][..., -1:]
        return jnp.where((scores >= lowest)[..., None], grouped, 0).reshape(probabilities.shape)

    def array_dims(self) -> dict[str, str]:
        return {f"weight.{field}": dims for field, dims in self.weight.dims("embed", "routes").items()}


class ExpertLinear(AbstractNamed):
    """A linear layer of each expert, without a bias. It exchanges nothing between devices.

    **Attributes:**

    - `weight`: the maps of all experts, shape `(experts, *out, *in)`, in any storage format that has grouped products.
    - `in_dims`, `out_dims`: the names of the contracted and of the resulting dimension.
    """

    weight: AbstractWeight
    in_dims: str = eqx.field(static=True)
    out_dims: str = eqx.field(static=True)

    def __call__(self, x: Float[Array, "rows in"], sizes: Int[Array, "experts"]) -> Float[Array, "rows out"]:
        """Applies each expert's map to its rows.

        **Arguments:**

        - `x`: the rows of the first expert, then those of the second one, and so on.
        - `sizes`: the number of rows of each expert. Results of rows after the last expert's are arbitrary.

        **Returns:** the results, in float32 for 16-bit activations.
        """
        return self.weight.contract_grouped(x, sizes)

    def array_dims(self) -> dict[str, str]:
        dims = self.weight.dims(self.in_dims, f"experts {self.out_dims}")
        return {f"weight.{field}": own for field, own in dims.items()}


class Experts(eqx.Module):
    """A sparse mixture of SwiGLU experts ([Mixtral](https://arxiv.org/abs/2401.04088)).

    The result of a token is the sum over its chosen experts of `share * down(silu(gate(x)) * up(x))`. No token is
    dropped, whatever the number of tokens that choose one expert, except in training with a `capacity`.

    If the strategy splits `experts`, each device computes its own experts for all tokens; if it splits `hidden`, each
    device computes its shard of every expert. In both cases, one psum adds the partial sums, the layer's only
    collective besides that of `shared`. If a mesh axis splits both experts and tokens, tokens travel to their experts
    and back.

    **Attributes:**

    - `router`: chooses the experts of each token.
    - `gate_proj`, `up_proj`: `embed` to `hidden`, for each expert.
    - `down_proj`: `hidden` to `embed`, for each expert.
    - `strategy`: which dimensions are split over which mesh axes.
    - `shared`: the experts that compute every token, as one layer whose result is added; `None` without such.
    - `capacity`: the capacity factor of `routed`, see [`mistral_eqx.train.make_step`][]; `None` drops nothing.
    """

    router: Router
    gate_proj: ExpertLinear
    up_proj: ExpertLinear
    down_proj: ExpertLinear
    strategy: Strategy = SINGLE
    shared: FeedForward | None = None
    capacity: float | None = None

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch tokens embed"]:
        return self.for_own_tokens(x, x.shape[1])

    def for_own_tokens(
        self, x: Float[Array, "batch own embed"], seq: int, chosen: tuple[Array, Array] | None = None
    ) -> Float[Array, "batch tokens embed"]:
        """The result for the tokens of this device, of `seq` in each row over all devices.

        **Arguments:**

        - `chosen`: the experts of these tokens and their shares, of `routed`; those of the router unless given.
        """
        if self.shared is not None:
            x, chosen = jax.tree.map(lambda leaf: all_tokens(leaf, seq, self.strategy), (x, chosen))
        count, limit = self.gate_proj.weight.row_count, None
        if self.capacity is not None and chosen is not None:
            tokens = seq * shard_index("seq", self.strategy)[1]
            limit = capacity_limit(self.capacity, tokens, self.router.per_token, self.router.weight.row_count)
        y = exchanged(self.own_sums, self.router, x, seq, self.strategy, count, chosen, limit)
        y = checkpoint_name(y, LINEAR)
        return y if self.shared is None else y + self.shared(x)

    def routed(
        self, x: Float[Array, "batch tokens embed"], context: Context
    ) -> tuple[tuple[Array, Array] | None, RouterSums]:
        """Applies the capacity, and sums up what the router does with the tokens of this device without padding.

        **Returns:** the experts of these tokens, -1 for those dropped and for padding, and their shares; `None` without
            a capacity. And the sums.
        """
        counted = own_tokens(context.query_index >= 0, x.shape[1], context.strategy)
        scores, (experts, shares) = self.router.weight.contract(x, "embed", "routes"), self.router(x)
        if self.capacity is None:
            return None, router_sums(scores, experts, counted)
        experts, _ = vary_alike(jnp.where(counted[..., None], experts, -1), shares)
        kept = within_capacity(_whole_rows(experts, context), self.capacity, scores.shape[-1])
        kept = own_slices(kept, context.strategy, axis=1) if context.splits_seq else kept
        kept = own_tokens(kept, x.shape[1], context.strategy)
        return (jnp.where(kept, experts, -1), shares), router_sums(scores, experts, counted, kept)

    def own_sums(
        self,
        x: Float[Array, "batch seq embed"],
        experts: Int[Array, "batch seq per_token"],
        shares: Float[Array, "batch seq per_token"],
    ) -> Float[Array, "batch seq embed"]:
        """The terms of this device's experts, and of its shard of `hidden`."""
        # Marked here, their gradients are added up over devices once, and not for each of their uses.
        x, shares = vary_over("experts hidden", self.strategy, x, shares)
        count = self.gate_proj.weight.row_count
        shard, _ = shard_index("experts", self.strategy)
        # Rows of other devices' experts come last, and no expert computes them.
        own = experts.reshape(-1) - shard * count
        is_own = (own >= 0) & (own < count)
        own = jnp.where(is_own, own, count)
        order = _argsort(own)
        sizes = jnp.sum(own[:, None] == jnp.arange(count, dtype=own.dtype)[None], axis=0, dtype=own.dtype)
        rows = x.reshape(-1, x.shape[-1])[order // shares.shape[-1]]
        gate, up = (layer(rows, sizes).astype(x.dtype) for layer in (self.gate_proj, self.up_proj))
        y = self.down_proj(jax.nn.silu(gate) * up, sizes)[_argsort(order)]
        y = jnp.where(is_own[:, None], y, 0).reshape(*shares.shape, -1)
        return jnp.sum(y * shares[..., None], axis=2).astype(x.dtype)


def _whole_rows(x: Array, context: Context) -> Array:
    """The tokens of whole rows, in their order, from those of this device."""
    if x.shape[1] != context.seq:
        x = gather_shards(x, context.strategy.axes("tokens"), axis=1, to="varying")
    return all_slices(x, context.strategy, axis=1) if context.splits_seq else x


def _argsort(keys: Array) -> Array:
    # JAX 0.10 takes the indices of a sort for the same on all devices even if the keys differ. Gradients would then use
    # those of one device.
    indices, _ = vary_alike(jnp.argsort(keys), keys)
    return indices
