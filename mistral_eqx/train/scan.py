"""A model as it is trained: equal blocks are stacked, and scanned one after the other."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..errors import InputError
from ..lora import has_adapters, is_adapter, with_keys
from ..nn import Block, Mistral, Unembedding
from ..nn.linear import LINEAR
from ..parallel import Strategy, all_tokens, own_slots, specs
from .batch import Batch


_REMAT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "none": lambda layer: layer,
    "block": lambda layer: jax.checkpoint(layer, prevent_cse=False),
    "dots": lambda layer: jax.checkpoint(
        layer, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(LINEAR)
    ),
}


# What the backward pass may compute again; see `Stacked.hidden`.
REMATS = tuple(_REMAT)


class Gathering(NamedTuple):
    """How arrays are put together of which each device has a part, where they are used and no earlier.

    **Attributes:**

    - `outer`: of the model without its blocks.
    - `blocks`: of one turn of blocks.
    """

    outer: Callable[[PyTree], PyTree]
    blocks: Callable[[PyTree], PyTree]


AS_IT_IS = Gathering(lambda outer: outer, lambda blocks: blocks)


class Stacked(eqx.Module):
    """A model whose blocks are one, with arrays that have a first axis `layers`.

    A program that scans it is as long for many layers as for few. Where blocks differ in turn, as windows do in some
    models, there is one for each place of the turn.

    **Attributes:**

    - `outer`: the model without its blocks.
    - `period`: the blocks of one turn, each stacked over all turns.
    """

    outer: Mistral
    period: tuple[Block, ...]

    def head(self, gathering: Gathering = AS_IT_IS) -> Unembedding:
        """The output head, which may have the embedding's table."""
        outer = self.whole(gathering)
        return Unembedding(outer.embedding.weight, outer.strategy) if outer.head is None else outer.head

    def specs(self, strategy: Strategy) -> "Stacked":
        """How each array is split over the mesh; see [`mistral_eqx.parallel.specs`][]. Layers are not split."""
        period = jax.tree.map(lambda spec: PartitionSpec(None, *spec), specs(self.period, strategy))
        return Stacked(specs(self.outer, strategy), period)

    def with_keys(self, key: PRNGKeyArray, rows: Int[Array, " batch"]) -> "Stacked":
        """The model with keys for dropout in its adapters, others in each layer; see [`mistral_eqx.lora.with_keys`][].

        **Arguments:**

        - `key`: that of a step.
        - `rows`: which rows of the whole batch those are that come in.
        """
        outer, blocks = jr.split(key)
        turns = jax.tree.leaves(eqx.filter(self.period, eqx.is_array))[0].shape[0]
        return Stacked(with_keys(self.outer, outer, rows), with_keys(self.period, blocks, rows, layers=turns))

    def hidden(
        self, batch: Batch, *, remat: str = "block", gathering: Gathering = AS_IT_IS
    ) -> Float[Array, "batch seq embed"]:
        """What [`mistral_eqx.nn.Mistral.hidden`][] gives.

        **Arguments:**

        - `batch`: tokens, their positions, and what they see.
        - `remat`: what the backward pass computes again. `"none"`: nothing, all activations are kept. `"block"`: all,
            from the residual stream between blocks. `"dots"`: all but the results of linear layers.
        - `gathering`: makes whole what each device has a part of.

        **Raises:** `ValueError` if `remat` is none of these.
        """
        if remat not in _REMAT:
            raise InputError(f"There is no rematerialisation {remat!r}; take one of {', '.join(map(repr, _REMAT))}.")
        strategy = self.outer.strategy
        inputs, positions = jnp.asarray(batch.inputs), jnp.asarray(batch.positions)
        seq = inputs.shape[1]
        rotation = self.outer.rotary(positions)
        columns = jnp.where(positions < 0, -1, jnp.arange(seq, dtype=positions.dtype)[None, :])
        slot = jnp.zeros((), jnp.int32)
        known = own_slots(columns, slot, strategy, axis=1, fill=-1)
        arrays, static = eqx.partition(self.period, eqx.is_array)

        def layer(x: Array, arrays: PyTree) -> tuple[Array, None]:
            for block in eqx.combine(gathering.blocks(arrays), static):
                x, _ = block(x, rotation, columns, known, None, slot, None, batch.span)
            return x, None

        x, _ = lax.scan(_REMAT[remat](layer), _embedded(self.outer, inputs, gathering), arrays)
        return all_tokens(self.whole(gathering).norm(x), seq, strategy, to="invarying")

    def whole(self, gathering: Gathering) -> Mistral:
        """The model without its blocks, put together."""
        arrays, static = eqx.partition(self.outer, eqx.is_array)
        return eqx.combine(gathering.outer(arrays), static)


def stack(model: Mistral) -> Stacked:
    """Puts the blocks of a model together; `unstack` takes them apart again."""
    kinds = [_kind(block) for block in model.blocks]
    count = len(kinds)
    turn = next(size for size in range(1, count + 1) if count % size == 0 and kinds == kinds[:size] * (count // size))
    period = tuple(_joined(model.blocks[place::turn]) for place in range(turn))
    return Stacked(dataclasses.replace(model, blocks=()), period)


def unstack(stacked: Stacked) -> Mistral:
    """The model with a tuple of blocks, as it is for generating and for writing to a file."""
    turns = jax.tree.leaves(eqx.filter(stacked.period, eqx.is_array))[0].shape[0]
    blocks = tuple(
        jax.tree.map(lambda leaf, turn=turn: leaf[turn] if eqx.is_array(leaf) else leaf, block)
        for turn in range(turns)
        for block in stacked.period
    )
    return dataclasses.replace(stacked.outer, blocks=blocks)


def trained(model: Stacked) -> PyTree[bool]:
    """Which leaves are trained: in a model with adapters these alone, otherwise all weights that are floats."""
    if has_adapters(model):
        return is_adapter(model)
    return jax.tree.map(
        lambda leaf, is_weight: is_weight and jnp.issubdtype(leaf.dtype, jnp.inexact), model, weights(model)
    )


def weights(model: Stacked) -> PyTree[bool]:
    """Which leaves are weights: all arrays but the rotary angles, which are constants."""
    return eqx.tree_at(lambda tree: tree.outer.rotary.inv_freq, jax.tree.map(_is_array, model), False)


def cast_floats(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """The floats of a tree in another precision."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)


def _is_array(leaf: Any) -> bool:
    # A state is also planned without arrays.
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _kind(block: Block) -> tuple[PyTree, list[tuple[Any, ...]]]:
    """What two blocks must have in common to be stacked."""
    arrays, static = eqx.partition(block, eqx.is_array)
    return static, [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)]


def _joined(blocks: tuple[Block, ...]) -> Block:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *blocks)


def _embedded(outer: Mistral, inputs: Array, gathering: Gathering) -> Array:
    if gathering is AS_IT_IS:
        return outer.embedding(inputs)
    # The table is let go of, and not kept for the backward pass, which needs the ids alone.
    return eqx.filter_checkpoint(lambda outer: Stacked(outer, ()).whole(gathering).embedding(inputs))(outer)
