"""Pipeline parallelism: the blocks are split into stages, and micro-batches pass from stage to stage."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from ..parallel import Strategy, next_stage, send_on, shard_index, vary


Passed = TypeVar("Passed")
Sums = TypeVar("Sums")
State = TypeVar("State")


def pipelined(
    stage: Callable[[Passed | None, PyTree[Array], Array | int], Passed],
    rows: PyTree[Array],
    micro_batches: int,
    strategy: Strategy,
    chunks: int = 1,
) -> Passed:
    """Passes rows through all stages, which split `layers` ([GPipe](https://arxiv.org/abs/1811.06965)).

    In tick `t`, stage `s` computes micro-batch `t - s`. So there are `micro_batches + stages - 1` ticks, and each
    begins with one exchange. In its other ticks, a stage computes something that is not used.

    With several chunks of layers, a micro-batch passes all stages once for each chunk, on a ring
    ([Narayanan et al., 2021](https://arxiv.org/abs/2104.04473)). As many micro-batches as there are stages follow one
    another on the ring, chunk after chunk, and then as many others. So there are `chunks * micro_batches + stages - 1`
    ticks, each with `1 / chunks` of the work; for `micro_batches`, take the next multiple of the stages.

    **Arguments:**

    - `stage`: computes what this device's blocks of a chunk pass on, such as activations, from what the stage before
        passed on, the rows of a micro-batch, and the number of the chunk. The first stage ignores what it receives for
        the first chunk.
    - `rows`: arrays with one entry per row, which all stages have.
    - `micro_batches`: the number of equal parts of the rows.
    - `chunks`: the number of chunks of each stage.

    **Returns:** what this device's blocks pass on, on the last stage after the last block: arrays with one entry for
        each micro-batch.
    """
    number, stages = shard_index("layers", strategy)
    parts = micro_batched(rows, micro_batches)
    together = stages if chunks > 1 else 1
    turns = -(-micro_batches // together) * together * chunks

    def send(x: Array) -> Array:
        return send_on(x, 1, strategy, dims="layers") if chunks > 1 else next_stage(x, strategy)

    def tick(sent: Passed, at: Int[Array, ""]) -> tuple[Passed, Passed]:
        turn = at - number
        first, within = turn // (together * chunks) * together, turn % (together * chunks)
        own = taken(parts, first + within % together)
        passed = stage(jax.tree.map(send, sent), own, within // together if chunks > 1 else 0)
        return passed, passed

    def of_last_chunk(outputs: Array) -> Array:
        # The last stage has the first micro-batch in tick `stages - 1`.
        outputs = outputs[stages - 1 :].reshape(-1, chunks, together, *outputs.shape[1:])[:, -1]
        return outputs.reshape(-1, *outputs.shape[2:])[:micro_batches]

    nothing = nothing_sent(lambda received, rows: stage(received, rows, 0), parts)
    _, outputs = lax.scan(tick, nothing, jnp.arange(turns + stages - 1, dtype=jnp.int32))
    return jax.tree.map(of_last_chunk, outputs)


def one_forward_one_backward(
    forward: Callable[[Passed | None, PyTree[Array]], Passed],
    backward: Callable[[Sums, Passed, PyTree[Array], Passed, Array], tuple[Sums, Passed]],
    start: Sums,
    parts: PyTree[Array],
    strategy: Strategy,
) -> Sums:
    """Passes micro-batches through all stages and back, each as soon as its loss is there.

    In tick `t`, stage `s` computes micro-batch `t - s` forward, and micro-batch `t - 2 (stages - 1) + s` backward. So
    there are `micro_batches + 2 (stages - 1)` ticks. Between the two, a stage keeps what it has received alone, of at
    most `2 stages - 1` micro-batches.

    **Arguments:**

    - `forward`: as `stage` of [`mistral_eqx.nn.pipelined`][], for one chunk.
    - `backward`: takes sums, what the stage received, the rows of a micro-batch, the gradient of what the stage passed
        on, and whether there is such a micro-batch: if not, it adds zeros, and that gradient is zero. It returns the
        sums, and the gradient of what the stage received.
    - `start`: the sums before the first micro-batch.
    - `parts`: arrays with one entry per micro-batch, which all stages have.
    """
    number, stages = shard_index("layers", strategy)
    count, slots = jax.tree.leaves(parts)[0].shape[0], 2 * stages - 1
    nothing = nothing_sent(forward, parts)

    def tick(
        carry: tuple[Passed, Passed, PyTree[Array], Sums], at: Int[Array, ""]
    ) -> tuple[tuple[Passed, Passed, PyTree[Array], Sums], None]:
        sent, sent_back, kept, sums = carry
        received = jax.tree.map(lambda x: next_stage(x, strategy), sent)
        kept = jax.tree.map(lambda x, new: lax.dynamic_update_index_in_dim(x, new, at % slots, 0), kept, received)
        passed = forward(received, taken(parts, at - number))
        late = 2 * (stages - 1 - number)
        own = at - number - late
        exists = (own >= 0) & (own < count)
        received = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, (at - late) % slots, keepdims=False), kept)
        gradient = jax.tree.map(lambda x: jnp.where(exists, next_stage(x, strategy, back=True), 0), sent_back)
        sums, sent_back = backward(sums, received, taken(parts, own), gradient, exists)
        return (passed, sent_back, kept, sums), None

    kept = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (slots, *x.shape)), nothing)
    ticks = jnp.arange(count + 2 * (stages - 1), dtype=jnp.int32)
    (*_, sums), _ = lax.scan(tick, (nothing, nothing, kept, start), ticks)
    return sums


def in_turn(
    stage: Callable[[Array | None, Int[Array, ""], State], tuple[Array, State]],
    state: State,
    parts: int,
    strategy: Strategy,
) -> tuple[Array, State]:
    """Passes the parts of a sequence through all stages, of which each has a state, such as the caches of its layers.

    In tick `t`, stage `s` computes part `t - s`. So there are `parts + stages - 1` ticks, and each begins with one
    exchange. A stage without a part computes the first part before that has come, and the last part again after it.
    It needs no mask: what it writes before is overwritten, and what it writes again is the same.

    **Arguments:**

    - `stage`: computes the activations after this device's blocks, from those of the stage before, the number of the
        part, and the state. To compute a part twice must leave the state as computing it once does.
    - `state`: that before the first part.
    - `parts`: the number of parts.

    **Returns:** the activations of the last part, which are right on the last stage alone, and the state.
    """
    number, stages = shard_index("layers", strategy)
    zero = jnp.zeros((), jnp.int32)
    nothing = zeros_like(jax.eval_shape(lambda state: stage(None, zero, state)[0], state))

    def tick(carry: tuple[Array, Array, State], at: Int[Array, ""]) -> tuple[tuple[Array, Array, State], None]:
        sent, received, state = carry
        own = at - number
        received = jnp.where((own >= 0) & (own < parts), next_stage(sent, strategy), received)
        x, state = stage(received, jnp.clip(own, 0, parts - 1), state)
        return (x, received, state), None

    ticks = jnp.arange(parts + stages - 1, dtype=jnp.int32)
    (x, _, state), _ = lax.scan(tick, (nothing, nothing, state), ticks)
    return x, state


def micro_batched(rows: PyTree[Array], micro_batches: int) -> PyTree[Array]:
    """Rows in equal parts, along a new first axis."""
    return jax.tree.map(lambda leaf: leaf.reshape(micro_batches, -1, *leaf.shape[1:]), rows)


def taken(parts: PyTree[Array], at: Array) -> PyTree[Array]:
    """One of the parts; in a tick without one, the nearest."""
    count = jax.tree.leaves(parts)[0].shape[0]
    own = jnp.clip(at, 0, count - 1)
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, own, keepdims=False), parts)


def nothing_sent(stage: Callable[[Passed | None, PyTree[Array]], Passed], parts: PyTree[Array]) -> Passed:
    """Zeros in place of what is sent before the first tick."""
    shapes = jax.eval_shape(lambda parts: stage(None, jax.tree.map(lambda leaf: leaf[0], parts)), parts)
    return jax.tree.map(zeros_like, shapes)


def zeros_like(like: jax.ShapeDtypeStruct) -> Array:
    """Zeros of a shape, which vary along the same mesh axes."""
    return vary(jnp.zeros(like.shape, like.dtype), sorted(like.manual_axis_type.varying))
