"""The likelihood of targets in chunks is that of all logits at once."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import relative_error
from fixtures.sharding import exchanges, sharded, written
from jax.sharding import PartitionSpec as P

from mistral_eqx.nn import DenseWeight, Unembedding, cross_entropy, log_likelihood
from mistral_eqx.parallel import Strategy, make_mesh, specs, with_strategy


EMBED, BATCH, SEQ = 12, 2, 5


@pytest.fixture(autouse=True)
def chunks_of_five_rows(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_LOGITS", 0)
    monkeypatch.setattr(cross_entropy, "_ROWS_OF_CHUNK", 5)


def _inputs(vocab, dtype=jnp.float64, seed=0):
    draw = np.random.default_rng(seed)
    head = Unembedding(DenseWeight(jnp.asarray(draw.standard_normal((vocab, EMBED)), dtype)))
    hidden = jnp.asarray(draw.standard_normal((BATCH, SEQ, EMBED)), dtype)
    targets = draw.integers(0, vocab, (BATCH, SEQ))
    # The first and the last of all, and one that is none.
    targets[0, :3] = 0, vocab - 1, -1
    return head, hidden, jnp.asarray(targets, jnp.int32)


def _all_at_once(head, hidden, targets):
    logits = head(hidden)
    log_probs = jax.nn.log_softmax(logits)
    log_sums = logits[..., 0] - log_probs[..., 0]
    chosen = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    chosen = jnp.where(targets < 0, -log_sums, chosen)
    likeliest = jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
    return chosen, log_sums, likeliest.astype(logits.dtype), jnp.mean(logits, axis=-1)


def _found(head, hidden, targets):
    found = log_likelihood(head, hidden, targets)
    assert found.likeliest.dtype == bool
    return found._replace(likeliest=found.likeliest.astype(found.log_probs.dtype))


def _loss(function, head, hidden, targets):
    log_probs, log_sums, _, means = function(head, hidden, targets)
    return jnp.sum(jnp.sin(log_probs)) + jnp.sum(jnp.cos(log_sums)) + jnp.sum(means**2)


def _gradient(function):
    return lambda head, hidden, targets: eqx.filter_grad(lambda x: _loss(function, *x, targets))((head, hidden))


def _both(function):
    return lambda *inputs: (function(*inputs), _gradient(function)(*inputs))


def _arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


# 13 = 5 + 5 + 3, 3 is less than a chunk; sums of a few numbers in float64, taken in another order.
@pytest.mark.parametrize(("vocab", "kept"), [(3, True), (13, True), (13, False)])
def test_value_and_gradient_are_those_of_log_softmax(vocab, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(cross_entropy, "_KEPT", 0)
    with jax.enable_x64(True):
        inputs = _inputs(vocab)
        found, expected = (_arrays(eqx.filter_jit(_both(f))(*inputs)) for f in (_found, _all_at_once))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == jnp.float64
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layout", "axes"),
    [("vocab@tp", "tp=4"), ("vocab@a embed@b", "a=2,b=2"), ("vocab@a batch@b", "a=2,b=2")],
)
@pytest.mark.slow
def test_each_device_may_have_a_part_of_the_vocabulary(layout, axes):
    strategy, mesh = Strategy(layout), make_mesh(axes)
    with jax.enable_x64(True):
        head, hidden, targets = _inputs(28)
        expected = _both(_all_at_once)(head, hidden, targets)
        head = with_strategy(head, strategy)
        of_hidden, of_rows = strategy.spec("batch _ embed"), strategy.spec("batch _")
        found, _ = sharded(
            lambda *x: tuple(_arrays(_both(_found)(*x))),
            mesh,
            (head, hidden, targets),
            (specs(head, strategy), of_hidden, of_rows),
            ((of_rows,) * 4 + (specs(head, strategy).weight.value, of_hidden)),
        )
        for one, other in zip(found, _arrays(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_devices_exchange_16_bytes_a_token():
    strategy, mesh = Strategy("vocab@tp"), make_mesh("tp=2")
    head, hidden, targets = _inputs(64, jnp.float32)
    head = with_strategy(head, strategy)

    def lowered(function, out_specs):
        arrays, static = eqx.partition((head, hidden, targets), eqx.is_array)
        return jax.jit(
            jax.shard_map(
                lambda arrays: function(*eqx.combine(arrays, static)),
                mesh=mesh,
                in_specs=((specs(head, strategy), P(), P()),),
                out_specs=out_specs,
            )
        ).lower(arrays)

    tokens = BATCH * SEQ
    forward = exchanges(lowered(lambda *x: log_likelihood(*x).log_probs, P()))
    assert forward == {("all_reduce", 4 * tokens, 2): 1, ("all_reduce", 12 * tokens, 2): 1}
    # Backward, the gradient of what every device has: the activations.
    backward = lowered(
        lambda *x: eqx.filter_grad(lambda hidden: jnp.sum(log_likelihood(x[0], hidden, x[2]).log_probs))(x[1]), P()
    )
    assert exchanges(backward) - forward == {("all_reduce", 4 * tokens * EMBED, 2): 1}


def test_no_array_has_a_logit_for_each_token_and_entry_of_the_vocabulary(monkeypatch):
    """The largest array is the head, or its gradient; if logits are kept, those of all chunks but the first."""
    vocab, tokens = 400, BATCH * SEQ
    head, hidden, targets = _inputs(vocab, jnp.float32)

    def sizes(function):
        text = eqx.filter_jit(_gradient(function)).lower(head, hidden, targets).compile().compiled.as_text()
        return [size for operation, size, line in written(text) if operation not in ("parameter", "tuple")]

    table = vocab * EMBED
    assert tokens * vocab in sizes(_all_at_once)
    assert (vocab - 5) * tokens in sizes(log_likelihood)
    monkeypatch.setattr(cross_entropy, "_KEPT", vocab * tokens - 1)
    assert {size for size in sizes(log_likelihood) if size >= 20 * tokens} <= {table}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_sums_of_16_bit_models_are_float32(dtype):
    head, hidden, targets = _inputs(64, dtype)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, (head, hidden, targets))
    found, expected = eqx.filter_jit(_found)(head, hidden, targets), _all_at_once(*exact)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    gradients = _gradient(log_likelihood)(head, hidden, targets), _gradient(_all_at_once)(*exact)
    for one, other in zip(*map(_arrays, gradients), strict=True):
        assert one.dtype == dtype
        # Each chunk's part of a gradient is rounded once, and so is their sum.
        assert relative_error(one, other) < 2 * float(jnp.finfo(dtype).eps)


def _told(head, hidden, targets, layout):
    """Which targets are said to be the likeliest, and the logarithms of the sums."""
    if not layout:
        found = log_likelihood(head, hidden, targets)
        return found.likeliest, found.log_sums
    strategy = Strategy(layout)
    head = with_strategy(head, strategy)

    def told(*inputs):
        found = log_likelihood(*inputs)
        return found.likeliest, found.log_sums

    return sharded(told, make_mesh("tp=4"), (head, hidden, targets), (specs(head, strategy), P(), P()), (P(), P()))[0]


LAYOUTS = pytest.mark.parametrize("layout", ["", "vocab@tp"], ids=["whole", "split"])


@LAYOUTS
# In one chunk, in two, and in those of two devices; and all of them.
@pytest.mark.parametrize("equal", [(0, 3), (2, 6), (3, 4), (11, 12), (5, 13, 21), tuple(range(28))], ids=str)
def test_of_equal_tokens_the_first_is_the_likeliest(equal, layout):
    # Sums of small integers are exact, whatever the size of a chunk.
    rows = np.random.default_rng(0).integers(-3, 4, (28, EMBED))
    rows[list(equal)] = 3 * rows[equal[0]]
    head = Unembedding(DenseWeight(jnp.asarray(rows, jnp.float32)))
    hidden = jnp.asarray(np.tile(rows[equal[0]], (1, 28, 1)), jnp.float32)
    targets = jnp.arange(28, dtype=jnp.int32)[None]
    likeliest, _ = _told(head, hidden, targets, layout)
    assert np.flatnonzero(likeliest[0]).tolist() == [equal[0]]


@LAYOUTS
def test_a_logit_that_is_nearly_as_large_is_not_the_likeliest(layout):
    # The last digit of a float32, which is lost once the logarithm of the sum is taken off.
    rows = np.zeros((28, EMBED), np.float32)
    rows[:, 0] = np.float32(7.5)
    rows[17, 0] = np.nextafter(np.float32(7.5), np.float32(8))
    hidden = jnp.zeros((1, 28, EMBED)).at[:, :, 0].set(1)
    likeliest, _ = _told(
        Unembedding(DenseWeight(jnp.asarray(rows))), hidden, jnp.arange(28, dtype=jnp.int32)[None], layout
    )
    assert np.flatnonzero(likeliest[0]).tolist() == [17]


@LAYOUTS
@pytest.mark.parametrize("row", [1, 14, 27])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_not_lost_in_a_sum(value, row, layout):
    rows = np.zeros((28, EMBED), np.float32)
    rows[row, 0] = value
    hidden = jnp.ones((1, 2, EMBED))
    _, log_sums = _told(Unembedding(DenseWeight(jnp.asarray(rows))), hidden, jnp.zeros((1, 2), jnp.int32), layout)
    assert np.isnan(log_sums).all()


def test_large_logits_do_not_overflow():
    head, hidden, targets = _inputs(13, jnp.float32)
    head = dataclasses.replace(head, weight=DenseWeight(head.weight.value * 1e4))
    targets = targets.at[1].set(jnp.argmax(head(hidden), axis=-1)[1].astype(jnp.int32))
    found = _found(head, hidden, targets)
    for one, other in zip(found, _all_at_once(head, hidden, targets), strict=True):
        assert relative_error(one, other) < 1e-6
