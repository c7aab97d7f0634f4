"""The language model."""

import dataclasses
import functools
import math
from typing import Any, overload

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..arguments import check_key, float_dtype
from ..checks import checked
from ..config import Latent, MistralConfig, Routing
from ..errors import InputError
from ..parallel import (
    SINGLE,
    Strategy,
    all_tokens,
    entered,
    from_last_stage,
    in_order,
    last_token,
    pmax,
    shard_index,
    specs,
    spmd,
)
from .attention import Attention
from .block import Block, StagedBlock
from .cache import AbstractLayerCache, Cache
from .context import Context
from .embedding import Embedding, Unembedding
from .experts import ExpertLinear, Experts, Router
from .feed_forward import FeedForward
from .latent_attention import LatentAttention
from .linear import Linear
from .mask import Span
from .norm import RMSNorm
from .pipeline import in_turn
from .weight import DenseWeight


Layers = tuple[AbstractLayerCache | None, ...]


class Mistral(eqx.Module):
    """A decoder of the Mistral family, dense ([Mistral 7B](https://arxiv.org/abs/2310.06825)) or with experts
    ([Mixtral](https://arxiv.org/abs/2401.04088)).

    ```python
    logits = eqx.filter_jit(model)(ids)
    ```

    **Attributes:**

    - `embedding`, `blocks`, `norm`: the layers, in the order in which they are applied. Where the strategy splits
        `layers`, the blocks are those of a stage ([`mistral_eqx.nn.in_stages`][]).
    - `head`: the output head, or `None` if it is the embedding table.
    - `config`: the sizes of the whole model, for checks and for writing it to a file. The layers use only `config.rope`
        of it: inside `shard_map`, every size comes from this device's arrays.
    - `mesh`: the devices over which [`mistral_eqx.shard`][] has split the arrays; `None` for one device. A model that
        is called outside of `shard_map` enters its mesh itself.
    """

    embedding: Embedding
    blocks: tuple[Block | StagedBlock, ...]
    norm: RMSNorm
    head: Unembedding | None
    config: MistralConfig = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True, default=None)

    @classmethod
    def init(
        cls,
        config: MistralConfig,
        *,
        key: PRNGKeyArray,
        dtype: DTypeLike = jnp.float32,
        strategy: Strategy = SINGLE,
    ) -> "Mistral":
        """A model with random weights.

        Weights are normal with standard deviation 0.02. For projections that write to the residual stream it is
        divided by the square root of the number of such projections, so that the stream keeps its scale
        ([GPT-2](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)).

        **Arguments:**

        - `config`: the sizes.
        - `key`: the key of the random numbers.
        - `dtype`: the precision of all weights.
        - `strategy`: which dimensions are split over which mesh axes.
        """
        checked(config, MistralConfig, "config", remedy="mistral_eqx.PRESETS has some")
        checked(strategy, Strategy, "strategy")
        check_key(key)
        dtype = float_dtype(dtype)
        embed_key, head_key, *block_keys = jr.split(key, 2 + config.layers)
        table = (config.vocab, config.embed)
        return cls(
            embedding=Embedding(DenseWeight.init(table, 0.02, key=embed_key, dtype=dtype), strategy),
            blocks=tuple(_block(config, layer, key, dtype, strategy) for layer, key in enumerate(block_keys)),
            norm=RMSNorm(jnp.ones(config.embed, dtype), config.norm_eps, strategy),
            head=None
            if config.tied
            else Unembedding(DenseWeight.init(table, 0.02, key=head_key, dtype=dtype), strategy),
            config=config,
        )

    @property
    def dtype(self) -> jnp.dtype:
        """The precision of the activations."""
        return self.norm.weight.dtype

    @property
    def strategy(self) -> Strategy:
        """Which dimensions are split over which axes of the mesh."""
        return self.embedding.strategy

    @property
    def unembedding(self) -> Unembedding:
        """The output head; with tied embeddings, its weight is the embedding table."""
        return Unembedding(self.embedding.weight, self.strategy) if self.head is None else self.head

    def __call__(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
        """The logits of the token after each of `ids`; float32 for a 16-bit model.

        On a mesh, the logits are split as the strategy splits `batch`, `seq` and `vocab`.
        """

        def forward(model: Mistral, ids: Array) -> Array:
            hidden, _ = _hidden(model, ids, None, None, None, None)
            return model.logits(hidden)

        self._check_rows(ids)
        self._check_length(ids)
        rows = self.strategy.spec("batch")
        return spmd(forward, self.mesh, (specs(self, self.strategy), rows), self.strategy.spec("batch seq vocab"))(
            self, ids
        )

    def on_mesh(self, mesh: Mesh) -> "Mistral":
        """This model, whose arrays were put on a mesh, with that mesh."""
        return dataclasses.replace(self, mesh=mesh)

    def _check_rows(self, ids: Array):
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise InputError(
                f"Token ids have shape {ids.shape} and dtype {ids.dtype}; give integers of shape (batch, seq)."
            )
        if entered():
            return
        devices = self.strategy.parts("batch", self.mesh)
        if ids.shape[0] % devices:
            raise InputError(
                f"{ids.shape[0]} rows cannot be split over {devices} devices, over which the strategy "
                f"{self.strategy.layout!r} splits 'batch'; give a multiple of {devices}."
            )

    def _check_length(self, ids: Array):
        if not entered():
            self.strategy.check_length(ids.shape[1], self.mesh)

    @overload
    def hidden(
        self,
        ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        cache: None = None,
        mask: Bool[Array, "batch seq kv_seq"] | None = None,
        span: Span | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], None]: ...

    @overload
    def hidden(
        self,
        ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None,
        cache: Cache,
        mask: Bool[Array, "batch seq kv_seq"] | None = None,
        span: None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache]: ...

    def hidden(
        self,
        ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"] | None = None,
        cache: Cache | None = None,
        mask: Bool[Array, "batch seq kv_seq"] | None = None,
        span: Span | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache | None]:
        """The normalised output of the last block, from which `logits` computes logits.

        **Arguments:**

        - `ids`: tokens, shape `(batch, seq)`.
        - `positions`: the position of each token in its row's sequence, -1 for padding. Unless given, positions
            continue those in the cache, or start at 0.
        - `cache`: the keys and values of earlier tokens. It must have `seq` free slots: a write past the end would
            overwrite the last slots. Where `kv_seq` is split, each device needs one more slot, for padding.
        - `mask`: a further mask over slots, for continuations of one prompt that share a row: a token attends to a
            slot only if `mask`, its position and the window allow it.
        - `span`: the attention span of each token, without a cache: for packed documents and attention that is not
            causal. `positions` then determine only rotary angles and padding.

        **Returns:** activations, shape `(batch, seq, embed)`, and the cache with these tokens added. Where the strategy
            splits `seq`, a pass without a cache and without a `mask` returns them split.
        """
        self._check_rows(ids)
        if span is not None and cache is not None:
            raise InputError(
                "A span counts columns of the row, which a cache does not have; pass the whole sequence at once, "
                "without a cache."
            )
        rows, layers = self.strategy.spec("batch"), specs(cache, self.strategy)
        in_specs = specs(self, self.strategy), rows, rows, layers, self.strategy.spec("batch _ kv_seq"), rows
        seq = "_"
        if cache is None and mask is None:
            self._check_length(ids)
            seq = "seq"
        out_specs = self.strategy.spec(f"batch {seq} embed"), layers
        return spmd(_hidden, self.mesh, in_specs, out_specs)(self, ids, positions, cache, mask, span)

    def prefill(
        self, ids: Int[Array, "batch seq"], positions: Int[Array, "batch seq"], cache: Cache, parts: int = 1
    ) -> tuple[Float[Array, "batch 1 embed"], Cache]:
        """What `hidden` returns with a cache, of the last token alone.

        If `seq` is a multiple of twice `prefill_devices`, each of these devices computes its share of the tokens, and
        keeps their keys and values. Otherwise, all devices compute all tokens.

        **Arguments:**

        - `ids`, `positions`, `cache`: as for `hidden`.
        - `parts`: the number of equal parts of the columns that pass through the stages one after another, where the
            strategy splits `layers`.
        """
        self._check_rows(ids)
        if ids.shape[1] % parts:
            raise InputError(f"{ids.shape[1]} columns cannot be split into {parts} equal parts; give another number.")
        rows, layers = self.strategy.spec("batch"), specs(cache, self.strategy)
        in_specs = specs(self, self.strategy), rows, rows, layers
        out_specs = self.strategy.spec("batch _ embed"), layers
        run = functools.partial(_prefill, parts=parts)
        return spmd(run, self.mesh, in_specs, out_specs)(self, ids, positions, cache)

    def prefill_devices(self, cache: Cache) -> int:
        """The number of devices that can share the tokens of `prefill`: those that split both `seq` and `kv_seq`, or 1.

        It is 1 with a [`mistral_eqx.nn.WindowCache`][]: one device would have all of the last tokens.
        """
        is_ring = self.strategy.axes("seq") == self.strategy.axes("kv_seq")
        forgets = any(layer.forgets for layer in cache.layers)
        return self.strategy.parts("seq", self.mesh) if is_ring and not forgets else 1

    def logits(self, hidden: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq vocab"]:
        """Applies the output head to activations that `hidden` returned, or to some of them."""

        def forward(model: Mistral, hidden: Array) -> Array:
            return model.unembedding(hidden)

        # Some of the activations, such as those of the last token, may be too few to be split.
        seq = "_" if hidden.shape[1] % self.strategy.parts("seq", self.mesh) else "seq"
        in_specs = specs(self, self.strategy), self.strategy.spec(f"batch {seq} embed")
        return spmd(forward, self.mesh, in_specs, self.strategy.spec(f"batch {seq} vocab"))(self, hidden)

    def stage(
        self,
        received: Float[Array, "batch tokens embed"] | None,
        ids: Int[Array, "batch seq"],
        context: Context,
        layers: Layers,
    ) -> tuple[Float[Array, "batch tokens embed"], Any]:
        """The residual stream after the blocks of this device, and their caches, inside `shard_map`.

        **Arguments:**

        - `received`: the stream after the blocks of the stage before; without it, zeros. The first stage begins with
            the embedded tokens.
        - `ids`, `context`: of this pass.
        - `layers`: the caches of these blocks, or `None` for each.
        """
        x = self.embedding(ids)
        is_first = shard_index("layers", self.strategy)[0] == 0
        x = jnp.where(is_first, x, jnp.zeros_like(x) if received is None else received)
        return self.through(x, context, layers)

    def through(
        self, x: Float[Array, "batch tokens embed"], context: Context, layers: Layers
    ) -> tuple[Float[Array, "batch tokens embed"], Any]:
        """What `stage` returns, from the stream before the first of the blocks."""
        extended = []
        for block, layer in zip(self.blocks, layers, strict=True):
            x, layer = block(x, context, layer)
            extended.append(layer)
        return x, tuple(extended)


def _prefill(model: Mistral, ids: Array, positions: Array, cache: Cache, *, parts: int) -> tuple[Array, Cache | None]:
    devices = model.prefill_devices(cache)
    splits = devices > 1 and ids.shape[1] % (2 * devices) == 0
    hidden, extended = _hidden(model, ids, positions, cache, None, None, prefills=splits, parts=parts)
    return last_token(hidden, model.strategy) if splits else hidden[:, -1:], extended


def _hidden(
    model: Mistral,
    ids: Array,
    positions: Array | None,
    cache: Cache | None,
    mask: Array | None,
    span: Span | None,
    *,
    prefills: bool = False,
    parts: int = 1,
) -> tuple[Array, Cache | None]:
    """The result of `Mistral.hidden`; where several parts pass through stages, that of the last part alone."""
    strategy, seq = model.strategy, ids.shape[1]
    if positions is None:
        start = jnp.zeros(ids.shape[0], jnp.int32)
        if cache is not None:
            start = pmax(cache.next_positions, "kv_seq", strategy)
        positions = start[:, None] + jnp.arange(seq, dtype=jnp.int32)[None, :]
        span = Span() if cache is None and span is None else span
    cached = None if cache is None else (cache.positions, cache.used)
    context = Context.init(
        model.config.rope,
        positions,
        dtype=model.dtype,
        strategy=strategy,
        cached=cached,
        mask=mask,
        span=span,
        prefills=prefills,
    )
    layers, own = (None,) * len(model.blocks) if cache is None else cache.layers, context.seq
    if strategy.axes("layers"):
        x, layers = _in_stages(model, ids, positions, context, layers, parts)
        own //= parts
    else:
        x, layers = model.through(model.embedding(context.own_ids(ids)), context, layers)
    if cache is not None:
        cache = Cache(layers, context.key_index, context.slot + seq)
    hidden = all_tokens(model.norm(x), own, strategy, to="invarying")
    return in_order(hidden, strategy) if context.splits_seq and not prefills else hidden, cache


def _in_stages(
    model: Mistral, ids: Array, positions: Array, whole: Context, layers: Layers, parts: int
) -> tuple[Array, Any]:
    """What `Mistral.stage` returns on the last stage, for the last of so many parts, on all stages.

    **Arguments:**

    - `whole`: the context of all parts together. A part that has not come yet has its positions there, which no earlier
        token attends to.
    """
    strategy, columns = model.strategy, ids.shape[1] // parts

    def stage(received: Array | None, number: Array, layers: Layers) -> tuple[Array, Any]:
        own, context = ids, whole
        if parts > 1:
            own, at = (lax.dynamic_slice_in_dim(x, number * columns, columns, axis=1) for x in (ids, positions))
            cached = whole.key_index, whole.slot + number * columns
            context = Context.init(model.config.rope, at, dtype=model.dtype, strategy=strategy, cached=cached)
        return model.stage(received, own, context, layers)

    x, layers = in_turn(stage, layers, parts, strategy)
    return from_last_stage(x, strategy), layers


def _block(config: MistralConfig, layer: int, key: PRNGKeyArray, dtype: DTypeLike, strategy: Strategy) -> Block:
    routed = layer >= config.dense_layers
    # A key does not depend on the number of keys: models of the same kind have the same weights in each version.
    keys = iter(jr.split(key, 12))
    residual, scale = 0.02 / math.sqrt(2 * config.layers), 1 / math.sqrt(config.head_dim)

    def weight(dims: str, std: float = 0.02, hidden: str = "hidden") -> DenseWeight:
        shape = tuple(config.sizes[hidden if dim == "hidden" else dim] for dim in dims.split())
        return DenseWeight.init(shape, std, key=next(keys), dtype=dtype)

    def linear(in_dims: str, out_dims: str, std: float = 0.02, hidden: str = "hidden") -> Linear:
        return Linear(weight(f"{out_dims} {in_dims}", std, hidden), in_dims, out_dims, strategy)

    def norm(size: int = config.embed, eps: float = config.norm_eps) -> RMSNorm:
        return RMSNorm(jnp.ones(size, dtype), eps, strategy)

    def grouped_attention() -> Attention:
        return Attention(
            q_proj=linear("embed", "kv_heads q_per_kv head_dim"),
            k_proj=linear("embed", "kv_heads head_dim"),
            v_proj=linear("embed", "kv_heads head_dim"),
            o_proj=linear("kv_heads q_per_kv head_dim", "embed", residual),
            scale=scale,
            window=config.windows[layer],
            strategy=strategy,
        )

    def latent_attention(latent: Latent) -> LatentAttention:
        return LatentAttention(
            q_a_proj=linear("embed", "q_rank"),
            q_a_norm=norm(latent.q_rank, latent.eps),
            q_b_proj=linear("q_rank", "kv_heads head_dim"),
            kv_a_proj=linear("embed", "cached"),
            kv_a_norm=norm(latent.kv_rank, latent.eps),
            kv_b_proj=linear("kv_rank", "kv_heads expanded"),
            o_proj=linear("kv_heads value_dim", "embed", residual),
            latent=latent,
            scale=scale * latent.scale,
            window=config.windows[layer],
            strategy=strategy,
        )

    def feed_forward(hidden: str) -> FeedForward:
        return FeedForward(
            gate_proj=linear("embed", "hidden", hidden=hidden),
            up_proj=linear("embed", "hidden", hidden=hidden),
            down_proj=linear("hidden", "embed", residual, hidden),
        )

    def experts(routing: Routing) -> Experts:
        return Experts(
            router=Router(
                weight("routes embed"),
                routing.per_token,
                routing.groups,
                routing.groups_per_token,
                routing.scale,
                routing.normalized,
            ),
            gate_proj=ExpertLinear(weight("experts hidden embed", hidden="expert_hidden"), "embed", "hidden"),
            up_proj=ExpertLinear(weight("experts hidden embed", hidden="expert_hidden"), "embed", "hidden"),
            down_proj=ExpertLinear(weight("experts embed hidden", residual, hidden="expert_hidden"), "hidden", "embed"),
            strategy=strategy,
            shared=feed_forward("shared_hidden") if routing.shared else None,
        )

    return Block(
        attention_norm=norm(),
        attention=grouped_attention() if config.latent is None else latent_attention(config.latent),
        feed_forward_norm=norm(),
        feed_forward=experts(config.routing) if routed and config.routing is not None else feed_forward("hidden"),
    )
