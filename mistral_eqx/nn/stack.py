"""A model whose equal blocks are stacked and scanned."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from ..checks import Count, checked
from ..config import MistralConfig
from ..errors import InputError
from ..parallel import (
    LEADING,
    Strategy,
    all_tokens,
    from_last_stage,
    in_order,
    psum,
    shard_index,
    specs,
    spmd,
    vary_over,
    with_strategy,
)
from .block import Block, StagedBlock, check_whole
from .context import Context
from .embedding import Unembedding
from .mask import Span
from .model import Mistral
from .pipeline import pipelined
from .router_sums import RouterSums, packed, unpacked


class Gathering(NamedTuple):
    """How sharded arrays are gathered just before they are used.

    **Attributes:**

    - `outer`: gathers the arrays of the model without its blocks.
    - `blocks`: gathers the arrays of one repeat of the layer pattern.
    """

    outer: Callable[[PyTree], PyTree]
    blocks: Callable[[PyTree], PyTree]


AS_IT_IS = Gathering(lambda outer: outer, lambda blocks: blocks)


class Passed(NamedTuple):
    """What passes from stage to stage.

    **Attributes:**

    - `x`: the residual stream after the blocks so far.
    - `routed`: what the routers of the layers so far did with the tokens of this device's rows, as
        [`mistral_eqx.nn.RouterSums`][] in one array; `None` without experts.
    """

    x: Array
    routed: Array | None


class Stacked(eqx.Module):
    """A model whose blocks are stacked: their arrays have a first axis `layers`.

    The length of a program that scans them does not depend on the number of layers. Where blocks differ by a layer
    pattern, as windows do in some models, there is one stacked block for each layer of the pattern.

    **Attributes:**

    - `outer`: the model without its blocks.
    - `pattern`: the blocks of the layer pattern, each stacked over all repeats; with several `chunks`, those of the
        first chunk, then those of the second, and so on.
    - `chunks`: the number of equal chunks of consecutive layers, of which each is split over all stages.
    """

    outer: Mistral
    pattern: tuple[Block, ...] = eqx.field(metadata={LEADING: "layers "})
    chunks: int = eqx.field(static=True, default=1)

    @property
    def config(self) -> MistralConfig:
        """The config of the model."""
        return self.outer.config

    @property
    def mesh(self) -> Mesh | None:
        """The devices over which the arrays are split, or `None`."""
        return self.outer.mesh

    @property
    def strategy(self) -> Strategy:
        """Which dimensions are split over which axes of the mesh."""
        return self.outer.strategy

    @property
    def repeats(self) -> int:
        """The number of repeats of the layer pattern in a chunk; inside `shard_map`, of those on this device."""
        return jax.tree.leaves(eqx.filter(self.pattern, eqx.is_array))[0].shape[0]

    def chunk(self, number: int) -> tuple[Block, ...]:
        """The blocks of the layer pattern, stacked over the repeats in a chunk."""
        size = len(self.pattern) // self.chunks
        return self.pattern[number * size : (number + 1) * size]

    def layers(self, number: int) -> range:
        """The layers of the model whose blocks are stacked in an entry of `pattern`, in order."""
        size, count = len(self.pattern) // self.chunks, self.config.layers // self.chunks
        start = number // size * count
        return range(start + number % size, start + count, size)

    def on_mesh(self, mesh: Mesh) -> "Stacked":
        """This model, whose arrays were put on a mesh, with that mesh."""
        return dataclasses.replace(self, outer=self.outer.on_mesh(mesh))

    def __call__(self, ids: Int[Array, "batch seq"], *, micro_batches: int = 1) -> Float[Array, "batch seq vocab"]:
        """The logits of the token after each of `ids`, as [`mistral_eqx.nn.Mistral`][] computes them.

        **Arguments:**

        - `ids`: tokens, shape `(batch, seq)`.
        - `micro_batches`: the number of equal parts of the rows that pass through the stages one after another, where
            the strategy splits `layers`.
        """

        def forward(model: Stacked, ids: Array) -> Array:
            columns = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
            hidden = model.hidden(ids, columns, Span(), micro_batches=micro_batches)
            return model.head()(in_order(from_last_stage(hidden, strategy), strategy))

        strategy, mesh = self.strategy, self.mesh
        strategy.check_length(ids.shape[1], mesh)
        strategy.check_micro_batches(ids.shape[0], micro_batches, mesh)
        in_specs, out_specs = (specs(self, strategy), strategy.spec("batch")), strategy.spec("batch seq vocab")
        return spmd(forward, mesh, in_specs, out_specs)(self, ids)

    def hidden(
        self,
        ids: Int[Array | np.ndarray, "batch seq"],
        positions: Int[Array | np.ndarray, "batch seq"],
        span: Span | None = None,
        *,
        wrapped: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda repeat: repeat,
        gathering: Gathering = AS_IT_IS,
        micro_batches: int = 1,
    ) -> Float[Array, "batch own embed"]:
        """The activations that [`mistral_eqx.nn.Mistral.hidden`][] returns for the model that is not stacked.

        **Arguments:**

        - `ids`, `positions`, `span`: as for `Mistral.hidden`, whose result is in the order of the tokens. Where the
            strategy splits `seq`, this one has the tokens of this device, in the order of
            [`mistral_eqx.parallel.own_slices`][].
        - `wrapped`: transforms the function of one repeat of the layer pattern, as `jax.checkpoint` does.
        - `gathering`: gathers arrays of which each device has a shard.
        - `micro_batches`: the number of equal parts of the rows that pass through the stages one after another, where
            the strategy splits `layers`. The result is then right on the last stage alone; the others have finite
            numbers.
        """
        x, _ = self.hidden_and_router_sums(
            ids, positions, span, wrapped=wrapped, gathering=gathering, micro_batches=micro_batches
        )
        return x

    def hidden_and_router_sums(
        self,
        ids: Int[Array | np.ndarray, "batch seq"],
        positions: Int[Array | np.ndarray, "batch seq"],
        span: Span | None = None,
        *,
        wrapped: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda repeat: repeat,
        gathering: Gathering = AS_IT_IS,
        micro_batches: int = 1,
    ) -> tuple[Float[Array, "batch own embed"], RouterSums | None]:
        """The result of `hidden`, and what the routers of all layers did with the tokens of this device's rows.

        **Returns:** activations; and the sums of each micro-batch, right where the activations are, or `None` for a
            model without experts. Without stages, all rows are one micro-batch.
        """
        strategy, rows = self.strategy, (jnp.asarray(ids), jnp.asarray(positions), span)
        stage = partial(self.stage, wrapped=wrapped, gathering=gathering)
        if strategy.axes("layers"):
            passed = pipelined(stage, rows, micro_batches, strategy, self.chunks)
            passed = passed._replace(x=passed.x.reshape(-1, *passed.x.shape[2:]))
        else:
            passed = stage(None, rows)
            for chunk in range(1, self.chunks):
                passed = stage(passed, rows, chunk)
        return self.finished(passed, rows[0].shape[1] // shard_index("seq", strategy)[1], gathering)

    def stage(
        self,
        received: Passed | None,
        rows: tuple[Array, Array, Span | None],
        chunk: Int[Array, ""] | int = 0,
        *,
        wrapped: Callable[[Callable[..., Any]], Callable[..., Any]],
        gathering: Gathering,
    ) -> Passed:
        """What the blocks of this device pass on.

        **Arguments:**

        - `received`: what the stage before passed on. Without it, or in the first chunk of the first stage, the blocks
            begin with the embedded tokens.
        - `rows`: ids, positions and span.
        - `chunk`: which of its chunks the device computes.
        - `wrapped`, `gathering`: as for `hidden`.
        """
        ids, positions, span = rows
        strategy, dtype, rope = self.strategy, self.outer.dtype, self.config.rope
        context = Context.init(rope, positions, dtype=dtype, strategy=strategy, span=span)
        split = [eqx.partition(self.chunk(number), eqx.is_array) for number in range(self.chunks)]
        arrays, static = tuple(arrays for arrays, _ in split), split[0][1]

        def repeat(x: Array, arrays: tuple[PyTree, ...]) -> tuple[Array, list[RouterSums]]:
            # Here, and not before the scan: the backward pass must not keep the weights of each tick.
            own = _selected(jnp.asarray(chunk, jnp.int32), arrays) if self.chunks > 1 else arrays[0]
            found = []
            for block in eqx.combine(gathering.blocks(own), static):
                x, sums = block.with_router_sums(x, context)
                found += [] if sums is None else [sums]
            return x, found

        x = _embedded(self.outer, context.own_ids(ids), gathering)
        (x,), before = vary_over("layers", strategy, x), None
        if received is not None:
            is_first = (jnp.asarray(shard_index("layers", strategy)[0]) == 0) & (jnp.asarray(chunk) == 0)
            x = jnp.where(is_first, x, received.x)
            before = None if received.routed is None else jnp.where(is_first, 0, received.routed)
        x, found = lax.scan(wrapped(repeat), x, arrays)
        if not found:
            return Passed(x, None)
        sums = jax.tree.map(lambda *layers: jnp.sum(sum(layers[1:], start=layers[0]), axis=0), *found)
        return Passed(x, packed(sums) if before is None else before + packed(sums))

    def finished(
        self, passed: Passed, seq: int, gathering: Gathering = AS_IT_IS
    ) -> tuple[Float[Array, "batch own embed"], RouterSums | None]:
        """The normalised residual stream with all `seq` tokens, the input of the head; and the sums of routers.

        **Arguments:**

        - `passed`: what the last stage passed on, whose sums may be those of several micro-batches.
        - `seq`: the number of tokens of each row; where the strategy splits `seq`, of this device's.
        - `gathering`: as for `hidden`.
        """
        x, routed = passed
        hidden = all_tokens(self.whole(gathering).norm(x), seq, self.strategy, to="invarying")
        if routed is None:
            return hidden, None
        routed = routed.reshape(-1, routed.shape[-1])
        return hidden, unpacked(routed if x.shape[1] == seq else psum(routed, "tokens", self.strategy))

    def head(self, gathering: Gathering = AS_IT_IS) -> Unembedding:
        """The output head; with tied embeddings, its weight is the embedding table."""
        return self.whole(gathering).unembedding

    def whole(self, gathering: Gathering) -> Mistral:
        """The model without its blocks, with gathered arrays."""
        arrays, static = eqx.partition(self.outer, eqx.is_array)
        return eqx.combine(gathering.outer(arrays), static)


def stack(model: Mistral, chunks: Count = 1) -> Stacked:
    """Stacks the blocks of a model; `unstack` reverses this.

    **Arguments:**

    - `model`: a model.
    - `chunks`: where the strategy is going to split `layers` into `S` stages, each stage has so many chunks of
        consecutive layers: stage `s` has the chunks `s`, `s + S`, and so on, of the `chunks * S` chunks of all.

    **Raises:** `InputError` if the layers cannot be split into so many equal chunks.
    """
    check_whole(model)
    chunks = checked(chunks, Count, "chunks")
    blocks = cast(tuple[Block, ...], model.blocks)
    kinds = [_kind(block) for block in blocks]
    count = len(kinds) // chunks
    sizes = (size for size in range(1, count + 1) if count % size == 0 and kinds == kinds[:size] * (len(kinds) // size))
    if len(kinds) % chunks or (size := next(sizes, None)) is None:
        raise InputError(
            f"The {len(kinds)} layers of the model cannot be split into {chunks} chunks with the same windows; take "
            "fewer chunks.",
            key="chunks",
        )
    pattern = tuple(
        _joined(blocks[start + layer : start + count : size])
        for start in range(0, len(kinds), count)
        for layer in range(size)
    )
    return Stacked(dataclasses.replace(model, blocks=()), pattern, chunks)


def unstack(stacked: Stacked) -> Mistral:
    """The model with a tuple of blocks, for generating and for writing to a file.

    If the strategy splits `layers`, each of its devices then has all layers.
    """
    blocks = tuple(
        jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat] if eqx.is_array(leaf) else leaf, block)
        for chunk in range(stacked.chunks)
        for repeat in range(stacked.repeats)
        for block in stacked.chunk(chunk)
    )
    model = dataclasses.replace(stacked.outer, blocks=blocks)
    return with_strategy(model, model.strategy.without("layers"))


def in_stages(stacked: Stacked) -> Mistral:
    """The model to generate with, where the strategy splits `layers`: each device keeps the layers of its stage.

    It has a block for each layer of a stage, with the arrays of that layer in all stages, so that a loop that decodes
    takes nothing out of a stack. The blocks are copied on the devices, which exchange nothing.

    **Raises:** `InputError` if the strategy does not split `layers`, or the stages have several chunks.
    """
    strategy, mesh = stacked.strategy, stacked.mesh
    if stacked.chunks > 1:
        raise InputError(
            f"The stages have {stacked.chunks} chunks of layers each, between which a token would pass all stages; "
            "stack the model with chunks=1 to generate in stages."
        )
    if mesh is None or not strategy.axes("layers"):
        raise InputError(
            f"The strategy {strategy.layout!r} does not split 'layers', so there are no stages; take "
            "mistral_eqx.nn.unstack."
        )
    arrays, static = eqx.partition(stacked.pattern, eqx.is_array)
    split, repeats = specs(stacked, strategy).pattern, stacked.repeats // strategy.parts("layers", mesh)

    def one_by_one(arrays: PyTree) -> list[PyTree]:
        return [jax.tree.map(lambda leaf, at=at: leaf[at : at + 1], arrays) for at in range(repeats)]

    layers = jax.jit(spmd(one_by_one, mesh, (split,), [split] * repeats))(arrays)
    blocks = tuple(StagedBlock(block) for repeat in layers for block in eqx.combine(repeat, static))
    return dataclasses.replace(stacked.outer, blocks=blocks)


def _kind(block: Block) -> tuple[PyTree, list[tuple[Any, ...]]]:
    """The structure, shapes and dtypes that two blocks must share to be stacked."""
    arrays, static = eqx.partition(block, eqx.is_array)
    return static, [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)]


def _joined(blocks: tuple[Block, ...]) -> Block:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *blocks)


def _selected(number: Array, chunks: tuple[PyTree, ...]) -> PyTree:
    """The arrays of one of the chunks, by a number that differs from device to device."""
    return jax.tree.map(lambda *arrays: lax.select_n(number, *arrays), *chunks)


def _embedded(outer: Mistral, ids: Array, gathering: Gathering) -> Array:
    if gathering is AS_IT_IS:
        return outer.embedding(ids)
    # The checkpoint keeps the gathered table from being saved for the backward pass, which needs the ids alone.
    return eqx.filter_checkpoint(lambda outer: Stacked(outer, ()).whole(gathering).embedding(ids))(outer)
