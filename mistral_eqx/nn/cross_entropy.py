"""Log-likelihoods of tokens, without the logits of the whole vocabulary at once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..parallel import Strategy, pmax, psum, psum_together, shard_index, specs, vary_alike
from .embedding import Unembedding


# A chunk has at most this many logits (32 MB of float32), and a multiple of this many rows of the head, so that it has
# whole panels of a weight that is stored in them.
_LOGITS = 8 * 1024 * 1024
_ROWS_OF_CHUNK = 1024
# At most this many logits (256 MB of float32) are kept for the backward pass; more are computed again.
_KEPT = 64 * 1024 * 1024

_ROWS = Strategy("vocab@rows")

Carry = TypeVar("Carry")


class Likelihood(NamedTuple):
    """Statistics of the logits of each token, in float32 or wider.

    If a logit is not finite, `log_probs` and `log_sums` are NaN.

    **Attributes:**

    - `log_probs`: the logarithm of the target's probability.
    - `log_sums`: the logarithm of the sum of all exponentiated logits, which a z-loss keeps small.
    - `likeliest`: whether greedy decoding would choose the target: the first token with the largest logit.
    - `means`: the mean of all logits, which label smoothing needs. Where `vocab` is split and `means` is used, devices
        exchange four more bytes per token.
    """

    log_probs: Float[Array, "batch seq"]
    log_sums: Float[Array, "batch seq"]
    likeliest: Bool[Array, "batch seq"]
    means: Float[Array, "batch seq"]


def log_likelihood(
    head: Unembedding, hidden: Float[Array, "batch seq embed"], targets: Int[Array, "batch seq"]
) -> Likelihood:
    """The logarithms of the probabilities of the given tokens.

    The forward pass goes through the head's rows in chunks, with a running maximum and sum. The backward pass uses the
    saved logarithm of each token's sum. Up to 64 Mi logits are saved too; if there are more, the backward pass computes
    each chunk's logits again. Where the strategy splits `vocab`, devices exchange 16 bytes per token: the maximum, the
    sum of exponentials, the target's logit and whether it comes first.

    **Arguments:**

    - `head`: the output head, with a weight in any storage format.
    - `hidden`: the activations that [`mistral_eqx.nn.Mistral.hidden`][] returned, shape `(batch, seq, embed)`.
    - `targets`: ids in the whole vocabulary; for an id outside of it, `log_probs` is minus `log_sums`.

    **Returns:** a [`mistral_eqx.nn.Likelihood`][]; gradients flow to `hidden` and to the head's arrays of floats.
    """
    strategy, rows = head.strategy, head.weight.row_count
    shard, shards = shard_index("vocab", strategy)
    arrays, static = eqx.partition(head, eqx.is_array)
    leaves, tree = jax.tree.flatten((hidden, arrays))
    hidden, arrays = jax.tree.unflatten(tree, vary_alike(*leaves))
    floats, others = eqx.partition(arrays, eqx.is_inexact_array)
    own = targets - shard * rows
    sums: _Sums = _shard_sums(_Inputs(floats, hidden, others, own), static)
    largest = pmax(lax.stop_gradient(sums.largest), "vocab", strategy)
    total = jnp.exp(sums.log_sum - largest)
    # +1 on the device whose first largest logit is the target's, -1 on each device with an equal logit before it.
    holds = sums.largest == largest
    first = (sums.first == own).astype(total.dtype) - (sums.first < own).astype(total.dtype)
    first = lax.stop_gradient(jnp.where(holds, first, 0))
    total, of_target = psum_together(total[..., None], jnp.stack([sums.chosen, first], axis=-1), "vocab", strategy)
    log_sums = largest + jnp.log(total[..., 0])
    chosen, likeliest = of_target[..., 0], of_target[..., 1] == 1
    means = psum(sums.sum, "vocab", strategy) / (rows * shards)
    return Likelihood(chosen - log_sums, log_sums, likeliest, means)


class _Inputs(NamedTuple):
    floats: PyTree
    hidden: Array
    # No gradient: the head's other arrays, and the targets' rows, which may lie on another device.
    others: Any
    rows: Any


class _Sums(NamedTuple):
    """Statistics of the logits of some rows: the largest and the first row that has it, the logarithm of the sum of
    exponentials, the target's logit, the sum."""

    largest: Array
    first: Array
    log_sum: Array
    chosen: Array
    sum: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shard_sums(inputs: _Inputs, static: PyTree) -> _Sums:
    return _chunked(inputs, static, keeps=False)[0]


def _chunked(inputs: _Inputs, static: PyTree, *, keeps: bool) -> tuple[_Sums, tuple[Array | None, Array | None]]:
    """The statistics, and the logits of the first chunk and of all others if they are kept."""
    count = _row_count(inputs, static)

    def chunk_sums(start: Array | int, size: int) -> tuple[_Sums, Array | None]:
        floats, others = (_take(part, count, start, size) for part in (inputs.floats, inputs.others))
        logits = eqx.combine(floats, others, static)(inputs.hidden)
        return _sums(logits, inputs.rows - start, start), logits if keeps else None

    def add(sums: _Sums, start: Array, _: None) -> tuple[_Sums, Array | None]:
        of_chunk, logits = chunk_sums(start, size)
        return _merged(sums, of_chunk), logits

    first, size, starts = _chunks(count, inputs.rows.size)
    sums, of_first = chunk_sums(0, first)
    sums, of_others = _over(starts, add, sums, None)
    return sums, (of_first, of_others)


def _forward(inputs: _Inputs, static: PyTree):
    keeps = keeps_logits(_row_count(inputs, static), inputs.rows.size)
    sums, kept = _chunked(inputs, static, keeps=keeps)
    return sums, (inputs, sums.log_sum, kept)


def _backward(static: PyTree, saved: tuple[_Inputs, Array, tuple[Any, Any]], gradient: _Sums):
    inputs, log_sum, (of_first, of_others) = saved
    count = _row_count(inputs, static)

    def add(
        carry: tuple[PyTree, Array], start: Array | int, kept: Array | None, size: int
    ) -> tuple[tuple[PyTree, Array], None]:
        others = _take(inputs.others, count, start, size)
        computed, pull = jax.vjp(
            lambda floats, hidden: eqx.combine(floats, others, static)(hidden),
            _take(inputs.floats, count, start, size),
            inputs.hidden,
        )
        logits = computed if kept is None else kept
        target = (inputs.rows - start)[..., None]
        rows = jnp.arange(size, dtype=inputs.rows.dtype)[None, None, :]
        d_logits = jnp.exp(logits - log_sum[..., None]) * gradient.log_sum[..., None] + gradient.sum[..., None]
        d_floats, d_hidden = pull(d_logits + jnp.where(rows == target, gradient.chosen[..., None], 0))
        return (_added(carry[0], d_floats, count, start), carry[1] + d_hidden.astype(log_sum.dtype)), None

    first, size, starts = _chunks(count, inputs.rows.size)
    none = jax.tree.map(jnp.zeros_like, inputs.floats), jnp.zeros_like(inputs.hidden, dtype=log_sum.dtype)
    carry, _ = add(none, 0, of_first, first)
    (d_floats, d_hidden), _ = _over(starts, functools.partial(add, size=size), carry, of_others)
    return (_Inputs(d_floats, d_hidden.astype(inputs.hidden.dtype), None, None),)


_shard_sums.defvjp(_forward, _backward)


def _row_count(inputs: _Inputs, static: PyTree) -> int:
    return eqx.combine(inputs.floats, inputs.others, static).weight.row_count


def keeps_logits(rows: int, tokens: int) -> bool:
    """Whether the forward pass keeps the logits of so many rows of a head, for so many tokens."""
    return rows * tokens <= _KEPT


def chunk_rows(rows: int, tokens: int) -> int:
    """The number of rows of a head whose logits are computed at once for so many tokens."""
    return min(rows, max(1, _LOGITS // max(1, tokens) // _ROWS_OF_CHUNK) * _ROWS_OF_CHUNK)


def _chunks(rows: int, tokens: int) -> tuple[int, int, range]:
    """The number of rows of the first chunk and of every other chunk, and where the others start."""
    size = chunk_rows(rows, tokens)
    first = rows % size or size
    return first, size, range(first, rows, size)


def _over(
    starts: range, add: Callable[[Carry, Array, Any], tuple[Carry, Any]], carry: Carry, given: Any
) -> tuple[Carry, Any]:
    """Scans the chunks after the first one, of which `given` has one entry each."""
    if not starts:
        return carry, None
    numbers = jnp.arange(starts.start, starts.stop, starts.step, dtype=jnp.int32)
    return lax.scan(lambda carry, one: add(carry, *one), carry, (numbers, given))


def _take(head: PyTree, rows: int, start: Array | int, size: int) -> PyTree:
    """The head with only `size` of its `rows` from `start` on, as if `vocab` were split."""

    def take(x: Array, spec: PartitionSpec) -> Array:
        if "rows" not in spec:
            return x
        axis = spec.index("rows")
        panel = rows // x.shape[axis]
        return lax.dynamic_slice_in_dim(x, start // panel, size // panel, axis)

    return jax.tree.map(take, head, specs(head, _ROWS))


def _added(whole: PyTree, chunk: PyTree, rows: int, start: Array | int) -> PyTree:
    """The gradient of the head, with the gradient of a chunk of rows added."""

    def add(whole: Array, chunk: Array, spec: PartitionSpec) -> Array:
        if "rows" not in spec:
            return whole + chunk
        axis = spec.index("rows")
        return lax.dynamic_update_slice_in_dim(whole, chunk, start // (rows // whole.shape[axis]), axis)

    return jax.tree.map(add, whole, chunk, specs(whole, _ROWS))


def _sums(logits: Float[Array, "batch seq rows"], rows: Int[Array, "batch seq"], start: Array | int) -> _Sums:
    size, of_all = logits.shape[-1], jnp.sum(logits, axis=-1)
    largest, first = jnp.max(logits, axis=-1), jnp.argmax(logits, axis=-1).astype(rows.dtype) + start
    total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    # Minus infinity adds nothing to the sum of exponentials, so it would go unnoticed.
    total = jnp.where(jnp.isfinite(of_all), total, jnp.nan)
    chosen = jnp.take_along_axis(logits, jnp.clip(rows, 0, size - 1)[..., None], axis=-1)[..., 0]
    chosen = jnp.where((rows >= 0) & (rows < size), chosen, 0)
    return _Sums(largest, first, largest + jnp.log(total), chosen, of_all)


def _merged(one: _Sums, other: _Sums) -> _Sums:
    """The statistics of the rows of `one` and of the later rows of `other`."""
    return _Sums(
        jnp.maximum(one.largest, other.largest),
        jnp.where(other.largest > one.largest, other.first, one.first),
        jnp.logaddexp(one.log_sum, other.log_sum),
        one.chosen + other.chosen,
        one.sum + other.sum,
    )
