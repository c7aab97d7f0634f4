"""Pipelines of models with experts and with latent attention: the results of one device, and what is exchanged."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures.equality import FLOAT64_BOUND, precision, random_model, worst_error
from fixtures.generation import random_prompts
from fixtures.latent import LATENT
from fixtures.model import SMALL
from test_parallel_pipeline import ONE_BY_ONE, _long, _slow, _staged, check_exchanges

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.nn import expert_exchange, in_stages


EXPERTS = dataclasses.replace(
    SMALL,
    vocab=64,
    layers=2,
    windows=(None,) * 2,
    kv_heads=2,
    q_per_kv=1,
    max_positions=256,
    routing=mx.Routing(experts=8, per_token=2),
)
EXPERTS4 = dataclasses.replace(EXPERTS, layers=4, windows=(None,) * 4)
# Groups and shared experts in both layers.
BOTH = dataclasses.replace(LATENT, routing=dataclasses.replace(LATENT.routing, first_dense=0))
LATENT4 = dataclasses.replace(LATENT, layers=4, windows=(None,) * 4, routing=None)
# 128 tokens of a micro-batch on each of four devices are the fewest that travel by all_to_all.
ROWS, SEQ, FAR = 8, 16, 128
TRAVEL = ("layers@pp batch@dp experts@dp", {"pp": 2, "dp": 4})
EVERYTHING = ("layers@pp batch@dp experts@ep kv_heads@tp hidden@tp vocab@tp", {"pp": 2, "dp": 1, "ep": 2, "tp": 2})


def _batch(seed, seq=SEQ):
    draw = np.random.default_rng(seed)
    # All padding chooses the same experts, and would not travel.
    shortest = seq if seq == FAR else seq // 2
    texts = [draw.integers(0, EXPERTS.vocab, length + 1) for length in draw.integers(shortest, seq + 1, ROWS)]
    return train.one_a_row([train.causal(text) for text in texts], seq)


def _as_accumulated(batch, axes, accumulate):
    """The rows in an order in which one device has the same micro-batches: each device splits its own rows."""
    rows = np.arange(ROWS).reshape(axes.get("dp", 1), accumulate, -1).swapaxes(0, 1).reshape(-1)
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def _trained(model, optimizer, batches, *, zero=0, **options):
    state = train.TrainState.init(model, optimizer, dtype=jnp.float64, zero=zero)
    options = {"compute_dtype": None, "clip": None, "balance_loss": 0.5, "router_z_loss": 0.25} | options
    if model.config.routing is None:
        options |= {"balance_loss": 0.0, "router_z_loss": 0.0}
    step, seen = train.make_step(optimizer, **options), []
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append(metrics)
    return seen, state.unstacked()


@pytest.mark.parametrize(
    ("config", "layout", "axes", "options"),
    [
        _slow(EXPERTS, "layers@pp batch@dp experts@ep", {"pp": 2, "dp": 2, "ep": 2}, {"remat": "none", "zero": 1}),
        _long(EXPERTS, *EVERYTHING, ONE_BY_ONE | {"accumulate": 4}),
        _long(EXPERTS, *TRAVEL, {"zero": 1, "seq": FAR}),
        _slow(EXPERTS, *TRAVEL, ONE_BY_ONE | {"zero": 2, "seq": FAR, "capacity": 0.75}),
        _long(EXPERTS, f"{mx.EXPERTS.layout} tokens@tp layers@pp batch@dp", {"pp": 2, "dp": 2, "tp": 2}, {"zero": 3}),
        _long(EXPERTS4, "layers@pp batch@dp experts@ep", {"pp": 2, "dp": 2, "ep": 2}, {"chunks": 2, "zero": 1}),
        _long(BOTH, f"{mx.HEADS.layout} layers@pp batch@dp", {"pp": 2, "dp": 2, "tp": 2}, ONE_BY_ONE | {"zero": 1}),
        _long(LATENT4, "layers@pp kv_heads@tp tokens@tp hidden@tp vocab@tp", {"pp": 2, "tp": 2}, {"chunks": 2}),
    ],
)
def test_the_gradient_of_the_training_loss_is_that_of_one_device(config, layout, axes, options, monkeypatch):
    """With the losses of routers, whose fractions are those of a micro-batch over all layers."""
    # A random router is uneven: with less room, no tokens would travel. They do in ticks in which no stage has zeros.
    monkeypatch.setattr(expert_exchange, "_SLACK", 2.1)
    options = {"accumulate": 2} | options
    optimizer, batch = optax.sgd(1.0), _batch(0, options.pop("seq", SEQ))
    with precision("float64"):
        model = random_model(config, "float64")
        staged = _staged(model, layout, axes, options.pop("chunks", 1))
        (found,), after = _trained(staged, optimizer, [batch], **options)
        same = _as_accumulated(batch, axes, options["accumulate"])
        shared = {name: options[name] for name in ("accumulate", "capacity") if name in options}
        (expected,), alone = _trained(model, optimizer, [same], remat="none", **shared)
        np.testing.assert_allclose(found, expected, rtol=FLOAT64_BOUND)
        # What a step subtracts from the weights is the gradient.
        assert worst_error(*(_difference(model, one) for one in (after, alone))) < FLOAT64_BOUND


def _difference(model, other):
    before, after = (jax.tree.leaves(eqx.filter(one, eqx.is_array)) for one in (model, other))
    return [jnp.asarray(np.asarray(one) - np.asarray(new)) for one, new in zip(before, after, strict=True)]


@pytest.mark.slow
@pytest.mark.long
def test_steps_are_those_of_one_device():
    """Router losses change which expert a token chooses, and both schedules follow."""
    axes, batches = {"pp": 2, "dp": 2, "ep": 2}, [_batch(number) for number in range(4)]
    layout = "layers@pp batch@dp experts@ep"
    with precision("float64"):
        model = random_model(EXPERTS, "float64")
        same = [_as_accumulated(batch, axes, 2) for batch in batches]
        expected, alone = _trained(model, train.adamw(1e-2), same, accumulate=2)
        for options in ({}, ONE_BY_ONE):
            staged = _staged(model, layout, axes)
            found, after = _trained(staged, train.adamw(1e-2), batches, accumulate=2, zero=1, **options)
            # Thousands of operations in 4 steps, each off by 1e-16; AdamW divides by roots of small numbers.
            np.testing.assert_allclose(found, expected, rtol=1e-10)
            assert worst_error(after, alone) < 1e-10


@pytest.mark.parametrize(
    ("config", "layout", "axes", "chunks"),
    [
        _slow(LATENT4, "layers@pp", {"pp": 2}, 2),
        _long(BOTH, "layers@pp experts@ep kv_heads@tp hidden@tp vocab@tp", {"pp": 2, "ep": 2, "tp": 2}, 1),
    ],
)
def test_logits_are_those_of_one_device(config, layout, axes, chunks):
    with precision("float64"):
        model = random_model(config, "float64")
        ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab, (ROWS, SEQ)), jnp.int32)
        run = eqx.filter_jit(lambda model, ids, **options: model(ids, **options))
        found = run(_staged(model, layout, axes, chunks), ids, micro_batches=2)
        assert worst_error(found, run(model, ids)) < FLOAT64_BOUND


@pytest.mark.parametrize(
    ("config", "layout", "axes", "rows", "options"),
    [
        # Two groups of rows, and then one group.
        _long(EXPERTS, "layers@pp experts@ep", {"pp": 2, "ep": 2}, 4, {}),
        _long(EXPERTS, "layers@pp batch@dp experts@dp", {"pp": 2, "dp": 2}, 2, {}),
        _slow(LATENT4, "layers@pp kv_heads@tp", {"pp": 2, "tp": 2}, 4, {"cache_dtype": "int8"}),
        _long(BOTH, f"{mx.EXPERTS.layout} hidden@kv kv_seq@kv layers@pp", {"pp": 2, "tp": 2, "kv": 2}, 3, {}),
    ],
)
def test_tokens_are_those_of_one_device(config, layout, axes, rows, options):
    prompts = random_prompts(*(3, 17, 30, 9)[:rows])
    options = {"max_new_tokens": 16, "prefill_chunk": 8, "eos_id": ()} | options
    with precision("float64"):
        model = random_model(config, "float64")
        staged = in_stages(_staged(model, layout, axes))
        expected, found = (mx.generate(one, prompts, **options).tokens for one in (model, staged))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("layout", "axes", "seq", "options"),
    [
        _slow(*TRAVEL, FAR, {}),
        _long(*TRAVEL, FAR, ONE_BY_ONE | {"zero": 2}),
        _long(*EVERYTHING, SEQ, ONE_BY_ONE | {"remat": "dots"}),
        _long(f"{mx.EXPERTS.layout} tokens@tp layers@pp batch@dp", {"pp": 2, "dp": 2, "tp": 2}, SEQ, {"zero": 1}),
        _long(f"{mx.EXPERTS.layout} tokens@tp layers@pp", {"pp": 2, "tp": 2}, SEQ, ONE_BY_ONE),
    ],
)
def test_the_closed_form_is_what_the_programs_exchange(layout, axes, seq, options):
    check_exchanges(EXPERTS4, layout, axes, _batch(0, seq), accumulate=2, **options)
