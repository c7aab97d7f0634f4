"""A model whose equal blocks are stacked and scanned."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from ..parallel import Strategy, all_tokens, psum, specs
from .block import Block
from .context import Context
from .embedding import Unembedding
from .mask import Span
from .model import Mistral
from .router_sums import RouterSums


class Gathering(NamedTuple):
    """How sharded arrays are gathered just before they are used.

    **Attributes:**

    - `outer`: gathers the arrays of the model without its blocks.
    - `blocks`: gathers the arrays of one repeat of the layer pattern.
    """

    outer: Callable[[PyTree], PyTree]
    blocks: Callable[[PyTree], PyTree]


AS_IT_IS = Gathering(lambda outer: outer, lambda blocks: blocks)


class Stacked(eqx.Module):
    """A model whose blocks are stacked: their arrays have a first axis `layers`.

    The length of a program that scans them does not depend on the number of layers. Where blocks differ by a layer
    pattern, as windows do in some models, there is one stacked block for each layer of the pattern.

    **Attributes:**

    - `outer`: the model without its blocks.
    - `pattern`: the blocks of the layer pattern, each stacked over all repeats.
    """

    outer: Mistral
    pattern: tuple[Block, ...]

    @property
    def repeats(self) -> int:
        """The number of repeats of the layer pattern."""
        return jax.tree.leaves(eqx.filter(self.pattern, eqx.is_array))[0].shape[0]

    def specs(self, strategy: Strategy) -> "Stacked":
        """The `PartitionSpec` of each array; see [`mistral_eqx.parallel.specs`][]. Layers are not split."""
        pattern = jax.tree.map(lambda spec: PartitionSpec(None, *spec), specs(self.pattern, strategy))
        return Stacked(specs(self.outer, strategy), pattern)

    def hidden(
        self,
        ids: Int[Array | np.ndarray, "batch seq"],
        positions: Int[Array | np.ndarray, "batch seq"],
        span: Span | None = None,
        *,
        wrapped: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda repeat: repeat,
        gathering: Gathering = AS_IT_IS,
    ) -> Float[Array, "batch own embed"]:
        """The activations that [`mistral_eqx.nn.Mistral.hidden`][] returns for the model that is not stacked.

        **Arguments:**

        - `ids`, `positions`, `span`: as for `Mistral.hidden`, whose result is in the order of the tokens. Where the
            strategy splits `seq`, this one has the tokens of this device, in the order of
            [`mistral_eqx.parallel.own_slices`][].
        - `wrapped`: transforms the function of one repeat of the layer pattern, as `jax.checkpoint` does.
        - `gathering`: gathers arrays of which each device has a shard.
        """
        x, _ = self.hidden_and_router_sums(ids, positions, span, wrapped=wrapped, gathering=gathering)
        return x

    def hidden_and_router_sums(
        self,
        ids: Int[Array | np.ndarray, "batch seq"],
        positions: Int[Array | np.ndarray, "batch seq"],
        span: Span | None = None,
        *,
        wrapped: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda repeat: repeat,
        gathering: Gathering = AS_IT_IS,
    ) -> tuple[Float[Array, "batch own embed"], RouterSums | None]:
        """The result of `hidden`, and what the routers of all layers did with the tokens of this device's rows.

        **Returns:** activations, and the sums; `None` for a model without experts.
        """
        strategy, dtype, rope = self.outer.strategy, self.outer.dtype, self.outer.config.rope
        context = Context.init(rope, jnp.asarray(positions), dtype=dtype, strategy=strategy, span=span)
        arrays, static = eqx.partition(self.pattern, eqx.is_array)

        def repeat(x: Array, arrays: PyTree) -> tuple[Array, list[RouterSums]]:
            found = []
            for block in eqx.combine(gathering.blocks(arrays), static):
                x, sums = block.with_router_sums(x, context)
                found += [] if sums is None else [sums]
            return x, found

        x, found = lax.scan(
            wrapped(repeat), _embedded(self.outer, context.own_ids(jnp.asarray(ids)), gathering), arrays
        )
        sums = None
        if found:
            sums = jax.tree.map(lambda *layers: jnp.sum(sum(layers[1:], start=layers[0]), axis=0), *found)
            if x.shape[1] != context.seq:
                sums = jax.tree.map(lambda leaf: psum(leaf, "tokens", strategy), sums)
        return all_tokens(self.whole(gathering).norm(x), context.seq, strategy, to="invarying"), sums

    def head(self, gathering: Gathering = AS_IT_IS) -> Unembedding:
        """The output head; with tied embeddings, its weight is the embedding table."""
        return self.whole(gathering).unembedding

    def whole(self, gathering: Gathering) -> Mistral:
        """The model without its blocks, with gathered arrays."""
        arrays, static = eqx.partition(self.outer, eqx.is_array)
        return eqx.combine(gathering.outer(arrays), static)


def stack(model: Mistral) -> Stacked:
    """Stacks the blocks of a model; `unstack` reverses this."""
    kinds = [_kind(block) for block in model.blocks]
    count = len(kinds)
    size = next(size for size in range(1, count + 1) if count % size == 0 and kinds == kinds[:size] * (count // size))
    pattern = tuple(_joined(model.blocks[layer::size]) for layer in range(size))
    return Stacked(dataclasses.replace(model, blocks=()), pattern)


def unstack(stacked: Stacked) -> Mistral:
    """The model with a tuple of blocks, for generating and for writing to a file."""
    blocks = tuple(
        jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat] if eqx.is_array(leaf) else leaf, block)
        for repeat in range(stacked.repeats)
        for block in stacked.pattern
    )
    return dataclasses.replace(stacked.outer, blocks=blocks)


def _kind(block: Block) -> tuple[PyTree, list[tuple[Any, ...]]]:
    """The structure, shapes and dtypes that two blocks must share to be stacked."""
    arrays, static = eqx.partition(block, eqx.is_array)
    return static, [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)]


def _joined(blocks: tuple[Block, ...]) -> Block:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *blocks)


def _embedded(outer: Mistral, ids: Array, gathering: Gathering) -> Array:
    if gathering is AS_IT_IS:
        return outer.embedding(ids)
    # The checkpoint keeps the gathered table from being saved for the backward pass, which needs the ids alone.
    return eqx.filter_checkpoint(lambda outer: Stacked(outer, ()).whole(gathering).embedding(ids))(outer)
