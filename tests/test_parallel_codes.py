"""Sums that travel as int8 codes: their error in closed form, and the bytes of the programs."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.equality import logits_and_gradients, on
from fixtures.latent import LATENT
from fixtures.model import small_model
from fixtures.sharding import sharded
from jax.sharding import PartitionSpec as P
from test_parallel_communication import CONFIG, _counted, _forward, _on, _prefill, _step
from test_train_zero import OPTIMIZER

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.parallel import Strategy, all_tokens, psum_tokens
from mistral_eqx.parallel.codes import block_size, decode, encode
from mistral_eqx.parallel.mesh import make_mesh
from mistral_eqx.planning import CHIPS, Training, exposed, forward_pass, prefill, training_step
from mistral_eqx.planning.communication import decoding_step


def _summed(layout, axes, parts):
    """The sum of the parts of all devices, and the exchanges."""
    strategy, seq = Strategy(f"{layout} exchange=int8"), parts.shape[2]

    def add(parts):
        return all_tokens(psum_tokens(parts[0], "hidden", strategy), seq, strategy, to="invarying")

    return sharded(add, make_mesh(axes), (parts,), (strategy.spec("hidden"),), P())


# The roundings of codes: an all-reduce makes two, and so do a reduce-scatter and an all-gather.
@pytest.mark.parametrize(
    ("layout", "axes", "seq", "made", "roundings"),
    [
        ("hidden@a", "a=2", 32, {"all_to_all": 1, "all_gather": 1}, 2),
        # 33 tokens of 3 blocks in each of 2 rows do not fill 4 equal shares.
        ("hidden@a", "a=4", 33, {"all_to_all": 1, "all_gather": 1}, 2),
        ("hidden@a,b", "a=2,b=4", 33, {"all_to_all": 1, "all_gather": 1}, 2),
        ("hidden@a tokens@a", "a=4", 32, {"all_to_all": 1, "all_gather": 1}, 2),
        ("hidden@a tokens@a", "a=4", 33, {"all_to_all": 1, "all_gather": 1}, 2),
        ("hidden@a,b tokens@b", "a=2,b=2", 32, {"all_to_all": 2, "all_gather": 2}, 4),
        # With one device there is nothing to round.
        ("hidden@a", "a=1", 32, {"all_reduce": 1}, 0),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_error_is_that_of_the_closed_form(layout, axes, seq, made, roundings, dtype):
    devices, numbers = make_mesh(axes).size, 3 * 128
    draw = np.random.default_rng(0)
    # Numbers of very different size: a scale is right for its own block alone.
    sizes = 10.0 ** draw.integers(-3, 4, (devices, 2, seq, 3, 1))
    parts = jnp.asarray((draw.normal(size=(devices, 2, seq, 3, 128)) * sizes).reshape(devices, 2, seq, numbers), dtype)
    found, collectives = _summed(layout, axes, parts)
    assert collectives == made
    assert found.dtype == parts.dtype
    exact = np.asarray(parts, np.float64)
    largest = np.abs(exact).reshape(devices, 2, seq, 3, 128).max(axis=-1, keepdims=True).sum(axis=0)
    # Each rounding changes a number by half of 1/127 of the largest of its block, and no block of a sum is larger than
    # those of its parts together, but for 1/254 of them for each rounding before.
    bound = roundings * largest / 254 * (1 + max(roundings - 2, 0) / 254)
    # Sums and scales in float32, and the type of the result.
    bound = bound + largest * ((devices + 4) * 2**-24 + (2**-8 if dtype == "bfloat16" else 0))
    error = np.abs(np.asarray(found, np.float64) - exact.sum(axis=0)).reshape(2, seq, 3, 128)
    assert (error <= bound).all()
    # The bound is not loose by an order of magnitude.
    assert roundings == 0 or (error / bound).max() > 0.4
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, found)


def test_few_tokens_are_summed_as_they_are():
    parts = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (4, 2, 31, 24)), jnp.float32)
    found, collectives = _summed("hidden@a", "a=4", parts)
    assert collectives == {"all_reduce": 1}
    np.testing.assert_array_equal(found, parts.sum(axis=0))
    # In a decoding step of any number of rows, each has one token.
    assert _summed("hidden@a tokens@a", "a=4", parts.reshape(4, 62, 1, 24))[1] == {"all_reduce": 1}


def test_codes_of_any_block():
    assert [block_size(numbers) for numbers in (4096, 576, 128, 130, 24, 1)] == [128, 96, 128, 65, 24, 1]
    x = jnp.asarray([[[1.0, -127, 63], [0, 0, 0], [1e-42, 0, 0], [1, jnp.nan, 2], [3, 4, -jnp.inf]]])
    codes = encode(x)
    assert (codes.dtype, codes.shape) == (jnp.int8, (1, 5 * (3 + 4)))
    found = decode(codes, 3)[0]
    np.testing.assert_array_equal(found[:2], x[0, :2])
    assert abs(found[2] - x[0, 2]).max() <= 1e-42
    # What is not finite stays so, and in its own block.
    assert np.isnan(found[3:]).all()


LAYOUTS = [
    (mx.HEADS.layout, "tp=4"),
    (f"{mx.SEQUENCE_PARALLEL.layout} batch@dp", "dp=2,tp=4"),
    ("embed@a kv_heads@b hidden@b vocab@b", "a=2,b=2"),
    ("kv_heads@tp hidden@tp vocab@tp tokens@tp seq@cp kv_seq@cp", "cp=2,tp=2"),
]


@pytest.mark.parametrize(
    ("layout", "axes"), [LAYOUTS[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in LAYOUTS[1:])]
)
def test_the_bytes_are_those_of_the_closed_form(layout, axes):
    model = _on(f"{layout} exchange=int8", axes, dtype="bfloat16")
    form, sizes = (CONFIG, model.strategy, model.mesh.shape), {"batch": 2, "dtype": "bfloat16"}
    # With context parallelism a device has half of the 64 tokens.
    for seq in (64, 36) if "seq@cp" in layout else (36,):
        found = forward_pass(*form, seq=seq, **sizes)
        assert any(one.kind == "all_to_all" for one in found) is (seq == 64 or "seq@cp" not in layout)
        assert _forward(model, 2, seq) == _counted(found)
    assert _prefill(model, 2, 35, 64) == _counted(prefill(*form, seq=35, kv_seq=64, **sizes))
    # A decoding step is that without the word.
    found = decoding_step(*form, kv_seq=64, **sizes)
    assert found == decoding_step(CONFIG, Strategy(layout), model.mesh.shape, kv_seq=64, **sizes)
    assert _step(model, 2, 64, mx.Sampler()) == _counted(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "axes", "seq", "config"),
    [
        ("kv_heads@tp experts@tp vocab@tp tokens@tp", "tp=4", 128, {}),
        ("kv_heads@a q_per_kv@b vocab@a,b experts@a hidden@b tokens@b,a", "a=4,b=2", 256, {}),
        # Dense layers, shared experts and latent attention.
        (mx.SEQUENCE_PARALLEL.layout, "tp=2", 32, LATENT),
    ],
)
def test_the_bytes_of_other_models_are_those_of_the_closed_form(layout, axes, seq, config):
    if not config:
        routing = mx.Routing(experts=8, per_token=2)
        config = dataclasses.replace(CONFIG, layers=2, max_positions=512, routing=routing)
    model = _on(f"{layout} exchange=int8", axes, config=config)
    found = forward_pass(config, model.strategy, model.mesh.shape, batch=4, seq=seq, dtype="float32")
    assert _forward(model, 4, seq) == _counted(found)


def test_known_answers_for_a_7b():
    """A row of 512 tokens in bfloat16 on 8 devices: 33/64 of the bytes that an all-reduce puts on the links."""
    config, axes = mx.PRESETS["7b-v0.2"], {"tp": 8}
    word, size = "exchange=int8", 512 * 4096

    def entries(strategy):
        found = forward_pass(config, strategy, axes, batch=1, seq=512)
        return [(one.kind, one.count, one.bytes) for one in found if one.what == "attention output"]

    assert entries(mx.HEADS) == [("all_reduce", 32, 2 * size)]
    codes = size + size // 128 * 4
    assert entries(mx.HEADS + word) == [("all_to_all", 32, codes), ("all_gather", 32, codes // 8)]
    assert entries(mx.SEQUENCE_PARALLEL + word) == [("all_to_all", 32, codes)]
    sent = 7 / 8 * codes + 7 * codes / 8
    assert sent == 2 * 7 / 8 * (1 + 4 / 128) * size == 33 / 64 * 2 * 7 / 8 * (2 * size)

    def waits(strategy, seq):
        return [one.wait for one in exposed(config, strategy, axes, CHIPS["v5e"], batch=1, seq=seq)]

    for strategy in (mx.HEADS, mx.SEQUENCE_PARALLEL):
        # Of the time that is left, the latency of the hops is the same.
        for coded, plain in zip(waits(strategy + word, 4096), waits(strategy, 4096), strict=True):
            assert 33 / 64 * plain < coded < 0.53 * plain
        assert waits(strategy + word, 31) == waits(strategy, 31)


@pytest.mark.slow
def test_the_logits_of_a_model_and_its_continuations():
    """The prompt is read with codes; each new token has the sums of the strategy without the word."""
    config = dataclasses.replace(CONFIG, embed=64, hidden=128, max_positions=64)
    model = small_model(config=config)
    ids = jr.randint(jr.key(0), (2, 40), 0, config.vocab)
    expected = np.asarray(eqx.filter_jit(model)(ids))
    coded = on(model, mx.SEQUENCE_PARALLEL + "exchange=int8", {"tp": 4})
    found = np.asarray(eqx.filter_jit(coded)(ids))
    # A rounding is a/254/sqrt(3) in the mean, and the largest of 64 normal numbers about 2.5 times their size: 0.6 % of
    # each of 5 sums and 5 inputs of layers. Attention and norms amplify this a few times.
    assert 0.002 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.1
    tokens = mx.generate(coded, np.asarray(ids), max_new_tokens=3).tokens
    assert tokens.shape == (2, 3)


def test_what_is_not_made_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="has the word 'exchange' twice; keep one"):
        mx.HEADS + "exchange=int8 exchange=int8"
    with pytest.raises(ValueError, match=r"'exchange=int4' of the strategy .* or the word .* 'exchange=int8'"):
        mx.HEADS + "exchange=int4"
    assert [mx.HEADS.exchange, (mx.HEADS + "exchange=int8").exchange] == [None, "int8"]
    assert (mx.HEADS + "exchange=int8").name == "heads exchange=int8"
    mesh = make_mesh("tp=2")
    for strategy, words in [
        (mx.SEQUENCE_PARALLEL + "overlap exchange=int8", "'exchange=int8' and 'overlap', which cannot be combined"),
        (Strategy("batch@tp exchange=int8"), "splits no weights, whose sums would be exchanged; leave the word out"),
    ]:
        with pytest.raises(ValueError, match=words):
            strategy.check(CONFIG, mesh)
    words = "as int8 codes have no gradient; leave 'exchange=int8' out of the strategy to train"
    model = on(small_model(config=CONFIG), mx.HEADS + "exchange=int8", {"tp": 2})
    with pytest.raises(ValueError, match=words):
        train.TrainState.init(model, OPTIMIZER)
    with pytest.raises(ValueError, match=words):
        training_step(CONFIG, model.strategy, {"tp": 2}, batch=2, training=Training(64))
    ids = jnp.zeros((1, 40), jnp.int32)
    with pytest.raises(ValueError, match=words):
        eqx.filter_eval_shape(logits_and_gradients, model, ids, ids)
