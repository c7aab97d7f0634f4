"""Training a model with experts: the losses of routers, and the same steps on several devices."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.model import SMALL, relative_error, small_model

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.nn import Context, Stacked, stack
from mistral_eqx.train.loss import router_losses


CONFIG = dataclasses.replace(
    SMALL, vocab=64, kv_heads=2, q_per_kv=1, max_positions=256, routing=mx.Routing(experts=8, per_token=2)
)
OPTIMIZER = train.adamw(1e-2)
# In float64: thousands of operations, each of them off by 1e-16.
TOLERANCE = 1e-10


def batch(seed, rows=4, seq=12, shortest=3):
    draw = np.random.default_rng(seed)
    texts = [draw.integers(0, CONFIG.vocab, length) for length in draw.integers(shortest, seq + 1, rows)]
    return train.one_a_row([train.causal(text) for text in texts], seq)


def trained(model, batches, *, zero=0, **options):
    state = train.TrainState.init(model, OPTIMIZER, dtype=jnp.float64, zero=zero)
    step, seen = train.make_step(OPTIMIZER, compute_dtype=None, **options), []
    for one in batches:
        state, metrics = step(state, one)
        seen.append(metrics)
    return seen, jax.tree.leaves(eqx.filter(state.unstacked(), eqx.is_array))


def assert_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=TOLERANCE)
    assert max(relative_error(one, other) for one, other in zip(found[1], expected[1], strict=True)) < TOLERANCE


@eqx.filter_jit
def routed(model, batch):
    """The scores of each layer's router, and the experts that it chose."""
    context = Context.init(model.config.rope, jnp.asarray(batch.positions), dtype=model.dtype, span=batch.span)
    x, found = model.embedding(jnp.asarray(batch.inputs)), []
    for block in model.blocks:
        mixed, _ = block.attention(block.attention_norm(x), context, None)
        normed, router = block.feed_forward_norm(x + mixed), block.feed_forward.router
        found.append((router.weight.contract(normed, "embed", "routes"), router(normed)[0]))
        x, _ = block(x, context)
    return found


def by_numpy(model, batch):
    """Both losses."""
    scores, chosen = (np.concatenate(one) for one in zip(*routed(model, batch), strict=True))
    counted = np.concatenate([batch.positions >= 0] * CONFIG.layers)
    exps, chosen = np.exp(scores[counted].astype(np.float64)), chosen[counted]
    fractions = np.stack([(chosen == expert).any(-1).mean() for expert in range(8)])
    balance = 8 * np.sum(fractions * (exps / exps.sum(-1, keepdims=True)).mean(0))
    return balance, np.mean(np.log(exps.sum(-1)) ** 2)


def test_losses_of_routers_are_those_of_the_formula_and_spread_tokens_over_experts():
    model, one = small_model(config=CONFIG), batch(0, rows=8)
    assert (one.positions < 0).any()
    step = train.make_step(train.adamw(1e-2), compute_dtype=None, balance_loss=0.5, router_z_loss=0.25)
    state, seen = train.TrainState.init(model, train.adamw(1e-2)), []
    for _ in range(16):
        state, metrics = step(state, one)
        seen.append(metrics)
    balance, z = by_numpy(model, one)
    # Float32: sums over tens of tokens.
    np.testing.assert_allclose([seen[0].router_balance, seen[0].router_z], [balance, z], rtol=1e-5)
    np.testing.assert_allclose(seen[0].loss, seen[0].cross_entropy + 0.5 * balance + 0.25 * z, rtol=1e-5)
    # 2 of 8 experts: even choices would give 2.
    assert float(seen[-1].router_balance) - 2 < (balance - 2) / 2
    assert float(seen[-1].router_z) < z


LAYOUTS = {
    "tokens travel": ("batch@dp experts@dp kv_heads@tp hidden@tp vocab@tp", {"dp": 4, "tp": 2}),
    "tokens are split": ("batch@dp kv_heads@tp experts@tp vocab@tp tokens@tp", {"dp": 2, "tp": 2}),
    "a layer of all tokens": ("batch@dp experts@dp kv_heads@tp hidden@tp vocab@tp tokens@tp", {"dp": 2, "tp": 2}),
    "a ring": ("batch@dp seq@cp kv_seq@cp experts@tp", {"dp": 2, "cp": 2, "tp": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "zero", "accumulate", "capacity"),
    [
        ("tokens travel", 2, 2, None),
        ("tokens travel", 3, 2, 0.75),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("tokens travel", 3, 1, None),
                # Here buffers may overflow: then all tokens are gathered.
                ("tokens travel", 3, 1, 1.75),
                ("tokens are split", 1, 1, 1.0),
                ("tokens are split", 1, 2, None),
                ("a ring", 1, 2, 1.0),
                ("a layer of all tokens", 1, 1, 1.0),
            )
        ),
    ],
)
def test_steps_are_those_of_one_device(layout, zero, accumulate, capacity):
    options = {"balance_loss": 0.5, "router_z_loss": 0.25, "accumulate": accumulate, "capacity": capacity}
    # 128 tokens on each of four devices are the fewest that travel by all_to_all.
    batches = [batch(seed, rows=8, seq=128, shortest=60) for seed in range(2)]
    text, axes = LAYOUTS[layout]
    with jax.enable_x64(True):
        # With shared experts, each device gathers all tokens of its rows.
        routing = dataclasses.replace(CONFIG.routing, shared=int(layout == "a layer of all tokens"))
        config = dataclasses.replace(CONFIG, layers=1, windows=(None,), routing=routing)
        model = small_model(config=config, dtype=jnp.float64)
        # Each device splits its own rows into micro-batches: the same rows on one device.
        rows = np.arange(8).reshape(axes["dp"], accumulate, -1).swapaxes(0, 1).reshape(-1)
        expected = trained(model, [jax.tree.map(lambda x: x[rows], one) for one in batches], **options)
        split = mx.shard(model, mx.make_mesh(axes), mx.Strategy(text))
        assert_equal(trained(split, batches, zero=zero, **options), expected)


@pytest.mark.long
def test_a_large_capacity_changes_nothing_and_evaluation_has_none():
    """Bit for bit in rows without padding, which is not computed where there is a capacity."""
    model = small_model(config=CONFIG)
    texts = np.random.default_rng(0).integers(0, CONFIG.vocab, (4, 13))

    def run(**options):
        state, step = train.TrainState.init(model, OPTIMIZER), train.make_step(OPTIMIZER, **options)
        return step(state, train.one_a_row([train.causal(text) for text in texts], 12))

    (state, metrics), expected = run(capacity=4.0), run()
    for one, other in zip(jax.tree.leaves((state, metrics)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert metrics.router_dropped == 0
    assert {layer.feed_forward.capacity for layer in state.model.pattern} == {None}
    _, dropped = run(capacity=0.5)
    # Each of 8 experts has at most 2 of the 24 choices of a row.
    assert dropped.router_dropped >= 1 / 3


def test_a_capacity_bounds_the_buffers_of_tokens_that_travel():
    """Without one, the program has a gather for buffers that overflow."""
    config = dataclasses.replace(CONFIG, layers=1, windows=(None,))
    model = mx.shard(small_model(config=config), mx.make_mesh({"dp": 4}), mx.Strategy("batch@dp experts@dp"))
    state, one = train.TrainState.init(model, OPTIMIZER), batch(0, rows=4, seq=128)
    for capacity in (None, 1.25):
        text = eqx.filter_jit(train.make_step(OPTIMIZER, capacity=capacity)).lower(state, one).lowered.as_text()
        assert ("stablehlo.all_gather" in text) is (capacity is None)
        assert "stablehlo.all_to_all" in text


def test_zero_keeps_experts_that_are_split_with_the_batch():
    model = mx.shard(
        small_model(config=CONFIG), mx.make_mesh({"dp": 2, "tp": 2}), mx.Strategy("batch@dp,tp experts@dp")
    )
    state = train.TrainState.init(model, OPTIMIZER, zero=3)
    layer = state.model.pattern[0].feed_forward
    # Two shards of experts, each of which ZeRO shards over the other axis of the batch; the router over both.
    assert layer.up_proj.weight.value.addressable_shards[0].data.shape == (2, 2, 40, 24)
    assert layer.router.weight.value.addressable_shards[0].data.shape == (2, 2, 24)


def test_a_dense_model_has_no_routers():
    step = train.make_step(OPTIMIZER, balance_loss=0.01)
    state = train.TrainState.init(small_model(config=dataclasses.replace(CONFIG, routing=None)), OPTIMIZER)
    with refused("The model has no experts, so balance_loss and router_z_loss have no effect"):
        step(state, batch(0))
    with refused("The model has no experts, so capacity has no effect; leave it out"):
        train.make_step(OPTIMIZER, capacity=1.25)(state, batch(0))


@pytest.mark.parity
def test_balance_is_the_auxiliary_loss_of_transformers():
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    model, one = small_model(config=CONFIG), batch(0, rows=6)
    sums = eqx.filter_jit(Stacked.hidden_and_router_sums)(stack(model), one.inputs, one.positions, one.span)[1]
    found = router_losses(sums, jnp.ones(1), mx.SINGLE)
    scores = [torch.from_numpy(np.array(scores).reshape(-1, 8)) for scores, _ in routed(model, one)]
    mask = torch.from_numpy((one.positions >= 0).astype(np.int64))
    expected = mixtral.load_balancing_loss_func(tuple(scores), 8, 2, mask)
    # Float32: sums over tens of tokens.
    np.testing.assert_allclose(found.balance, expected.item(), rtol=1e-5)
