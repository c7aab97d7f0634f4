"""A step is the same step however it is cut: in parts of a batch, over devices, with what is computed again."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.model import SMALL, relative_error, small_model

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.nn import stack


CONFIG = dataclasses.replace(SMALL, vocab=64, windows=(5, 5))
STEPS = 3


def _batch(seed, rows=4):
    """Packed texts, so that rows count unequally and have padding."""
    draw = np.random.default_rng(seed)
    examples = [train.causal(draw.integers(0, CONFIG.vocab, draw.integers(3, 10))) for _ in range(4 * rows)]
    return jax.tree.map(lambda x: x[:rows], train.pack(examples, 12))


def _trained(model, optimizer, batches, *, dtype=jnp.float64, **options):
    step = train.make_step(optimizer, **({"compute_dtype": None} | options))
    return _made(step, train.TrainState.init(model, optimizer, dtype=dtype), batches)


def _made(step, state, batches):
    seen = []
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append(metrics)
    return state, seen


def _arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


@pytest.fixture(scope="module")
def reference():
    """Some steps on one device, in float64, and what the tests need to make them again."""
    with jax.enable_x64(True):
        model, optimizer = small_model(config=CONFIG, dtype=jnp.float64), train.adamw(1e-2)
        batches = [_batch(seed) for seed in range(STEPS)]
        assert len({float(batch.weights.sum()) for batch in batches}) > 1
        step = train.make_step(optimizer, compute_dtype=None)
        state, metrics = _made(step, train.TrainState.init(model, optimizer, dtype=jnp.float64), batches)
        return model, optimizer, batches, step, state, metrics


@pytest.mark.parametrize(
    ("layout", "axes", "options"),
    [
        (mx.HEADS.layout, "tp=2", {"accumulate": 4}),
        (mx.SEQUENCE_PARALLEL.layout + " batch@dp", "tp=2,dp=2", {"accumulate": 2, "remat": "dots"}),
    ],
    ids=["heads", "sequence_parallel x batch"],
)
@pytest.mark.slow
def test_steps_are_those_of_one_device_and_the_whole_batch(reference, layout, axes, options):
    """Weights, optimizer state and metrics after some steps with clipping, decay and packed rows."""
    model, optimizer, batches, _, expected_state, expected = reference
    with jax.enable_x64(True):
        model = mx.shard(model, mx.make_mesh(axes), mx.Strategy(layout))
        state, found = _trained(model, optimizer, batches, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        for one, other in zip(_arrays(state), _arrays(expected_state), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)
        assert float(found[0].gradient_norm) > 1
        assert (int(state.steps), int(state.skipped)) == (STEPS, 0)
        # The state is split as the model is, moments and all.
        weights = jax.tree.leaves(eqx.filter(state.model, train.trained(state.model)))
        moments = jax.tree.leaves(state.optimizer_state[0].mu)
        assert [x.sharding.shard_shape(x.shape) for x in moments] == [x.sharding.shard_shape(x.shape) for x in weights]
        assert any(x.sharding.shard_shape(x.shape) != x.shape for x in moments)


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(reference):
    *_, step, last, _ = reference
    with jax.enable_x64(True):
        state, good = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, last), _batch(0)
        infinite = dataclasses.replace(good, weights=np.where(good.weights > 0, np.inf, 0).astype(np.float32))
        none = dataclasses.replace(good, weights=np.zeros_like(good.weights))
        before = _arrays((state.model, state.optimizer_state))
        for number, batch in enumerate((infinite, none), start=1):
            state, metrics = step(state, batch)
            assert not bool(metrics.finite)
            assert (int(state.steps), int(state.skipped)) == (STEPS + number, number)
        for one, other in zip(_arrays((state.model, state.optimizer_state)), before, strict=True):
            np.testing.assert_array_equal(one, other)
        old, (state, metrics) = state, step(state, good)
        assert bool(metrics.finite)
        assert (int(state.steps), int(state.skipped)) == (STEPS + 3, 2)
        assert any(np.any(one != other) for one, other in zip(_arrays(state.model), before, strict=False))
    # The memory of the state that went in is that of the one that came out.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(eqx.filter(old.model.pattern, eqx.is_array)))


@pytest.mark.slow
def test_gradients_are_clipped_to_the_norm_of_all():
    model = small_model(config=CONFIG)
    # The weights move by the gradient itself.
    state, (metrics,) = _trained(model, optax.sgd(1.0), [_batch(0)], dtype=jnp.float32, clip=0.5)
    before, after = (_arrays(eqx.filter(x, train.trained(x))) for x in (stack(model), state.model))
    moved = sum(np.sum((one - other).astype(np.float64) ** 2) for one, other in zip(after, before, strict=True))
    assert float(metrics.gradient_norm) > 1
    np.testing.assert_allclose(np.sqrt(moved), 0.5, rtol=1e-4)


@eqx.filter_jit
def _log_probs(model, batch):
    hidden, _ = model.hidden(batch.inputs, batch.positions, span=batch.span)
    return jax.nn.log_softmax(model.logits(hidden))


@pytest.mark.slow
def test_products_in_bfloat16_and_weights_in_float32():
    model, optimizer, batch = small_model(config=CONFIG), train.adamw(1e-3), _batch(0)
    state, seen = _trained(model, optimizer, [batch] * 8, dtype=jnp.float32, compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_inexact_array))} == {jnp.dtype("float32")}
    on_device = jax.tree.map(jnp.asarray, batch)
    log_probs = np.take_along_axis(np.asarray(_log_probs(model, on_device)), batch.targets[..., None], axis=-1)[..., 0]
    exact = -(batch.weights * log_probs).sum() / batch.weights.sum()
    # One rounding of bfloat16 is 2⁻⁹; a loss is the mean of many, and not what float32 gives.
    assert 0 < abs(float(seen[0].loss) - exact) < 2**-7 * exact
    losses = [float(metrics.loss) for metrics in seen]
    assert losses == sorted(losses, reverse=True)
    # Steps of 1e-3 are below what weights of bfloat16 could tell.
    assert relative_error(state.unstacked().head.weight.value, model.head.weight.value) < 0.02


def test_rows_that_cannot_be_dealt_out_are_refused():
    model, optimizer = small_model(config=CONFIG), train.adamw(1e-3)
    state = train.TrainState.init(model, optimizer)
    with pytest.raises(ValueError, match="4 rows, not a multiple of 3, which is accumulate"):
        train.make_step(optimizer, accumulate=3)(state, _batch(0))
