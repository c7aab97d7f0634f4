"""Pipeline parallelism: the blocks are split into stages, and micro-batches pass from stage to stage."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from ..parallel import Strategy, next_stage, shard_index, vary


def pipelined(
    stage: Callable[[Array | None, PyTree[Array]], Array],
    rows: PyTree[Array],
    micro_batches: int,
    strategy: Strategy,
) -> Array:
    """Passes rows through all stages, which split `layers` ([GPipe](https://arxiv.org/abs/1811.06965)).

    In tick `t`, stage `s` computes micro-batch `t - s`. So there are `micro_batches + stages - 1` ticks, and each
    begins with one exchange. In its other ticks, a stage computes something that is not used.

    **Arguments:**

    - `stage`: computes the activations after this device's blocks, from those of the stage before and from the rows
        of a micro-batch. The first stage ignores the former.
    - `rows`: arrays with one entry per row, which all stages have.
    - `micro_batches`: the number of equal parts of the rows.

    **Returns:** the activations of all rows after this device's blocks: on the last stage, those of the last block.
    """
    number, stages = shard_index("layers", strategy)
    parts = micro_batched(rows, micro_batches)

    def tick(sent: Array, at: Int[Array, ""]) -> tuple[Array, Array]:
        x = stage(next_stage(sent, strategy), taken(parts, at - number))
        return x, x

    _, outputs = lax.scan(tick, nothing_sent(stage, parts), jnp.arange(micro_batches + stages - 1, dtype=jnp.int32))
    # The last stage has the first micro-batch in tick `stages - 1`.
    return outputs[stages - 1 :].reshape(-1, *outputs.shape[2:])


def micro_batched(rows: PyTree[Array], micro_batches: int) -> PyTree[Array]:
    """Rows in equal parts, along a new first axis."""
    return jax.tree.map(lambda leaf: leaf.reshape(micro_batches, -1, *leaf.shape[1:]), rows)


def taken(parts: PyTree[Array], at: Array) -> PyTree[Array]:
    """One of the parts; in a tick without one, the nearest."""
    count = jax.tree.leaves(parts)[0].shape[0]
    own = jnp.clip(at, 0, count - 1)
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, own, keepdims=False), parts)


def nothing_sent(stage: Callable[[Array | None, PyTree[Array]], Array], parts: PyTree[Array]) -> Array:
    """Zeros in place of what is sent before the first tick."""
    like = jax.eval_shape(lambda parts: stage(None, jax.tree.map(lambda leaf: leaf[0], parts)), parts)
    return vary(jnp.zeros(like.shape, like.dtype), sorted(like.manual_axis_type.varying))
