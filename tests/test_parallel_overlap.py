"""Products beside the exchange of their tokens: the same results, in the exchanges of the closed form."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.equality import FLOAT64_BOUND, logits_and_gradients, on, random_model, worst_error
from fixtures.latent import DENSE, LATENT
from fixtures.model import SMALL, relative_error, small_model
from fixtures.sharding import exchanges, sharded
from jax.sharding import PartitionSpec as P
from test_parallel_communication import _counted, _forward, _on, _prefill
from test_train_zero import OPTIMIZER, batch
from test_training_communication import CONFIG, assert_form

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.parallel import Strategy, gathered_product, scattered_product
from mistral_eqx.parallel.mesh import make_mesh
from mistral_eqx.planning import CHIPS, HOP_SECONDS, Training, exposed, forward_pass, prefill, ring_wait
from mistral_eqx.planning.hlo import Program


SMALLEST = dataclasses.replace(SMALL, vocab=48, embed=8, hidden=24, kv_heads=8, q_per_kv=1, layers=1, windows=(None,))


@pytest.mark.parametrize("word", ["overlap", "overlap=1"])
@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        ("hidden@a tokens@a", "a=2"),
        ("hidden@a tokens@a", "a=4"),
        ("hidden@a tokens@a", "a=8"),
        # Over the other axis the sums are added up behind the ring.
        pytest.param("hidden@a,b tokens@b", "a=2,b=4", marks=pytest.mark.slow),
        ("hidden@a,b tokens@b,a", "a=2,b=4"),
    ],
)
def test_the_rings_are_the_products_of_all_tokens(layout, axes, word):
    """Integers, so that the order of the sums does not matter; and the gradients of both products."""
    strategy, mesh = Strategy(f"{layout} {word}"), make_mesh(axes)
    devices = strategy.parts("tokens", mesh)
    draw = np.random.default_rng(0)
    x, up, down = (
        jnp.asarray(draw.integers(-5, 5, shape), jnp.float32) for shape in ((2, 2 * devices, 3), (3, 8), (8, 3))
    )

    def both(x, up, down):
        (hidden,) = gathered_product(lambda up, x: [x @ up], up, x, 2 * devices, strategy, ["hidden"])
        return scattered_product(lambda down, x: x @ down, down, hidden, "hidden", strategy)

    tokens = strategy.spec("batch tokens embed")
    specs = tokens, strategy.spec("embed hidden"), strategy.spec("hidden embed")
    found, collectives = sharded(both, mesh, (x, up, down), specs, tokens)
    np.testing.assert_array_equal(found, x @ up @ down)
    rest = {"all_reduce": 1} if strategy.parts("hidden", mesh) > devices else {}
    assert collectives == {"collective_permute": 2 * (devices - 1), **rest}

    def loss(x, up, down):
        return jnp.sum(jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=tokens)(x, up, down) ** 2)

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, up, down)
    expected = jax.grad(lambda x, up, down: jnp.sum((x @ up @ down) ** 2), argnums=(0, 1, 2))(x, up, down)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_where_the_ring_does_not_fit_all_tokens_are_exchanged_at_once():
    strategy, x = Strategy("hidden@a tokens@a overlap"), jnp.arange(8.0 * 7).reshape(1, 7, 8)
    split = strategy.spec("batch seq hidden")

    def gathered(dims, **options):
        # A result that is not split is the same on all devices, and must be marked as such.
        def of_all(x):
            return gathered_product(lambda _, x: [x], None, x, 8, strategy, [dims], to="invarying", **options)[0]

        return sharded(of_all, make_mesh("a=4"), (jnp.ones((1, 8, 3)),), (P(None, "a"),), P())[1]

    assert gathered("embed") == gathered("hidden", whole=True) == {"all_gather": 1}

    def scattered(x, **options):
        def summed(x):
            return scattered_product(lambda _, x: jnp.sum(x, axis=2), None, x, "hidden", strategy, **options)

        out = P(None, "a") if x.shape[1] == 4 else P()
        return sharded(summed, make_mesh("a=4"), (x,), (split,), out)[1]

    # Seven tokens cannot be split, nor can the one of a decoding step.
    assert scattered(x) == scattered(x[:, :1]) == {"all_reduce": 1}
    assert scattered(x[:, :4], whole=True) == {"reduce_scatter": 1}
    assert scattered(x[:, :4]) == {"collective_permute": 3}


def compare(word, axes, seq=8, layout=mx.SEQUENCE_PARALLEL.layout, config=SMALLEST):
    """Logits and gradients of all weights, in float64."""
    ids, targets = (jr.randint(jr.key(seed), (2, seq), 0, config.vocab) for seed in (0, 1))
    with jax.enable_x64(True):
        model = random_model(config, "float64")
        expected = logits_and_gradients(model, ids, targets)
        found = logits_and_gradients(on(model, Strategy(f"{layout} {word}"), axes), ids, targets)
    assert max(worst_error(one, other) for one, other in zip(found, expected, strict=True)) < FLOAT64_BOUND


def test_a_model_is_that_of_one_device():
    compare("overlap batch@dp", {"dp": 2, "tp": 4})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "devices", "seq"),
    [
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("overlap", 2, 8), ("overlap", 8, 8))),
        ("overlap=1", 4, 12),
        pytest.param("overlap=1", 8, 8, marks=pytest.mark.long),
        ("overlap", 8, 9),
    ],
)
def test_a_model_is_that_of_one_device_in_one_and_in_both_directions(word, devices, seq):
    compare(word, {"tp": devices}, seq)


@pytest.mark.long
def test_other_models_and_layouts():
    compare("overlap seq@cp kv_seq@cp", {"cp": 2, "tp": 4}, seq=16)
    # The sums over the other axis come behind the ring; keys and values are gathered at once.
    layout = f"{mx.KV_REPLICATED.layout} tokens@rep"
    compare("overlap", {"kv": 2, "rep": 2}, layout=layout, config=dataclasses.replace(SMALLEST, q_per_kv=2))
    routed = dataclasses.replace(SMALLEST, routing=mx.Routing(experts=4, per_token=2))
    compare("overlap", {"tp": 4}, layout=f"{mx.EXPERTS.layout} tokens@tp", config=routed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "zero", "axes"),
    [
        ("overlap", 3, {"dp": 2, "tp": 2}),
        ("overlap=1", 2, {"dp": 2, "tp": 4}),
    ],
)
def test_training_steps_are_those_of_one_device(word, zero, axes):
    with jax.enable_x64(True):
        assert_steps(dataclasses.replace(SMALLEST, vocab=64), word, zero, axes)


def assert_steps(config, word, zero, axes):
    model = small_model(config=config, dtype=jnp.float64)
    weights = []
    for one in (model, on(model, mx.SEQUENCE_PARALLEL + f"{word} batch@dp", axes)):
        state = train.TrainState.init(one, OPTIMIZER, dtype=jnp.float64, zero=zero if one.mesh else 0)
        step = train.make_step(OPTIMIZER, compute_dtype=None)
        for number in range(2):
            state, _ = step(state, batch(number))
        weights.append(jax.tree.leaves(eqx.filter(state.unstacked(), eqx.is_array)))
    # As in test_train_zero.py.
    assert max(relative_error(found, expected) for expected, found in zip(*weights, strict=True)) < 1e-10


@pytest.mark.slow
def test_the_gradient_of_a_weight_is_summed_over_its_copies_once():
    """And not once for each slice of tokens."""
    ids = jnp.zeros((2, 16), jnp.int32)
    sums = []
    for word in ("", "overlap"):
        model = on(small_model(config=SMALLEST), mx.SEQUENCE_PARALLEL + f"{word} batch@dp", {"dp": 2, "tp": 4})
        found = exchanges(logits_and_gradients.lower(model, ids, ids))
        sums.append({key: count for key, count in found.items() if key[0] == "all_reduce"})
    assert sums[1] == sums[0]


@pytest.mark.slow
def test_dropout_of_adapters_falls_on_the_same_entries():
    """The adapters with dropout see all tokens at once, whose indices choose what is dropped."""
    tuned = mx.apply_lora(
        small_model(config=dataclasses.replace(SMALLEST, vocab=64)), rank=2, alpha=4.0, dropout=0.5, key=jr.key(1)
    )
    losses = []
    for one in (tuned, on(tuned, mx.SEQUENCE_PARALLEL + "overlap", {"tp": 2})):
        state = train.TrainState.init(one, OPTIMIZER)
        step = train.make_step(OPTIMIZER, compute_dtype=None)
        state, _ = step(state, batch(0))
        losses.append(float(step(state, batch(1))[1].loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_quantized_weights_and_adapters_need_nothing_of_their_own():
    """Also in a prefill, and for the single tokens that follow it."""
    config = dataclasses.replace(SMALL, vocab=64, embed=64, hidden=128, kv_heads=4, head_dim=16)
    model = mx.quantize(small_model(config=config), mx.Int8())
    model = mx.apply_lora(model, rank=2, alpha=4.0, key=jr.key(1))
    ids = jr.randint(jr.key(0), (1, 64), 0, 64)
    overlapped = on(model, mx.SEQUENCE_PARALLEL + "overlap", {"tp": 4})
    # Sixteen tokens on a device: with fewer rows, products of quantized weights round activations on a CPU.
    assert relative_error(eqx.filter_jit(overlapped)(ids), eqx.filter_jit(model)(ids)) < 1e-5
    expected = mx.generate(model, ids[:, :32], max_new_tokens=4).tokens
    np.testing.assert_array_equal(mx.generate(overlapped, ids[:, :32], max_new_tokens=4).tokens, expected)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        # Of the first projections of latent attention all devices have the results.
        DENSE,
        # Dense layers and shared experts have rings, routed experts have none.
        pytest.param(LATENT, marks=pytest.mark.slow),
    ],
)
def test_the_exchanges_of_a_pass_and_a_prefill_are_those_of_the_closed_form(config):
    model = _on(f"{mx.SEQUENCE_PARALLEL.layout} overlap", "tp=2", config=config)
    form, sizes = (config, model.strategy, model.mesh.shape), {"batch": 2, "dtype": "float32"}
    assert _forward(model, 2, 12) == _counted(forward_pass(*form, seq=12, **sizes))
    assert _prefill(model, 2, 8, 32) == _counted(prefill(*form, seq=8, kv_seq=32, **sizes))


@pytest.mark.parametrize(
    ("word", "axes", "training", "options"),
    [
        ("overlap", {"dp": 1, "tp": 4}, Training(8), {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("overlap=1", {"dp": 2, "tp": 2}, Training(8, 3, accumulate=2), {"dtype": "bfloat16"}),
                ("overlap", {"dp": 2, "tp": 4}, Training(8, 2, remat="dots"), {}),
                ("overlap", {"dp": 2, "tp": 4}, Training(8, 1, remat="none"), {}),
                ("overlap", {"dp": 2, "tp": 2}, Training(7), {}),
                ("overlap seq@cp kv_seq@cp", {"dp": 1, "cp": 2, "tp": 2}, Training(8), {}),
            )
        ),
    ],
)
def test_the_exchanges_of_a_training_step_are_those_of_the_closed_form(word, axes, training, options):
    assert_form(mx.SEQUENCE_PARALLEL + f"{word} batch@dp", axes, training, config=CONFIG, **options)


def _schedule(ways, devices, hop, product):
    """When the last product ends: a device multiplies what has arrived, and each direction brings a slice a hop."""
    ahead = devices // 2 if ways == 2 else devices - 1
    arrivals = [0.0, *(hop * at for at in range(1, ahead + 1)), *(hop * at for at in range(1, devices - ahead))]
    end = 0.0
    for arrival in sorted(arrivals):
        end = max(end, arrival) + product
    assert len(arrivals) == devices
    return end


@pytest.mark.parametrize("ways", [1, 2])
def test_products_wait_as_long_as_in_the_schedule(ways):
    for devices in (2, 3, 4, 7, 8):
        for hop in (0.5, 1.5, 3.0):
            assert ring_wait(ways, devices, hop, 1.0) == pytest.approx(_schedule(ways, devices, hop, 1.0) - devices)


def test_known_answers_for_a_7b():
    config, chip = mx.PRESETS["7b-v0.2"], CHIPS["v5e"]

    def waits(word, seq=4096, chip=chip, **options):
        strategy = mx.SEQUENCE_PARALLEL + word
        return {one.what: one.wait for one in exposed(config, strategy, {"tp": 8}, chip, batch=1, seq=seq, **options)}

    slice_seconds = 4096 * 4096 * 2 / 8 / 50e9
    # Two links in a ring: seven slices over both of them, four hops one after the other.
    assert waits("") == pytest.approx(dict.fromkeys(waits(""), 3.5 * slice_seconds + 4 * HOP_SECONDS))
    product = 2 * 512 * 4096 * (2 * 14336 / 8) / 197e12
    found = waits("overlap=1")
    assert found["feed-forward input"] == pytest.approx(7 * (slice_seconds + HOP_SECONDS - product))
    assert sum(waits("overlap").values()) < 0.5 * sum(waits("").values()) < 0.5 * sum(found.values())
    # A device of a switch can send all that it can in one direction.
    assert sum(waits("overlap=1", chip=CHIPS["H100"]).values()) < sum(waits("overlap", chip=CHIPS["H100"]).values())
    # Slices of 64 tokens read the weights as often as they multiply with them.
    assert sum(waits("overlap", 512).values()) > sum(waits("", 512).values())
    # The backward pass has twice the product to hide an exchange behind.
    assert waits("overlap=1", backward=True)["feed-forward input"] == 0
    # A new token cannot be split: two sums over all devices.
    assert waits("overlap", 1) == waits("", 1)
    assert list(waits("", 1)) == ["attention output", "feed-forward output"]
    with pytest.raises(ValueError, match="with experts or latent attention; plan it"):
        exposed(mx.PRESETS["8x7b"], mx.SEQUENCE_PARALLEL, {"tp": 8}, chip, batch=1, seq=64)


def test_the_schedule_is_read_from_the_program():
    """Two permutes, of which one has a product between its start and its end."""
    text = """HloModule made_up, is_scheduled=true

%fused (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %product = f32[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %start = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %y = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%fused
  %done = f32[8,8]{1,0} collective-permute-done(%start)
  %start.1 = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%done), source_target_pairs={{0,1},{1,0}}
  %done.1 = f32[8,8]{1,0} collective-permute-done(%start.1)
  ROOT %sum = f32[8,8]{1,0} add(%y, %done.1)
}
"""
    assert Program(text).permutes_beside_products() == (1, 2)


_COMPILE = """
import json
from mistral_eqx import PRESETS, SEQUENCE_PARALLEL
from mistral_eqx.planning.hlo import Program
from mistral_eqx.planning.programs import Job, programs
from mistral_eqx.planning.worker import _topology
import dataclasses

config = dataclasses.replace(PRESETS["7b-v0.2"], layers=1, windows=(None,), vocab=1024)
layout = f"{SEQUENCE_PARALLEL.layout} overlap"
job = Job(config, "v5e:2x4", 8, layout, {"tp": 8}, batch=1, prompt=512, kv_seq=576, dtype="bfloat16")
prefill = next(programs(job, _topology("v5e:2x4")))
print(json.dumps(Program(prefill.lower("tpu").compile().as_text()).permutes_beside_products()))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra tpu, is not installed.")
def test_the_compiler_for_tpus_runs_products_beside_the_exchanges():
    """In a layer of the shape of Mistral 7B. A few exchanges run beside attention or element-wise operations alone."""
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, env={**os.environ, **variables}, check=True
    )
    beside, total = json.loads(done.stdout.splitlines()[-1])
    assert total == 4 * 7
    assert beside >= 0.8 * total
