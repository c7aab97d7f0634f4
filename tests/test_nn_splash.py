"""The kernel for TPUs is attention in tiles: interpreted here, and compiled for a TPU that is not here."""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import SMALL, relative_error, small_model

import mistral_eqx as mx
from mistral_eqx.nn import Span, attention as layer
from mistral_eqx.nn.kernels import flash
from mistral_eqx.nn.kernels.splash import in_order, splash_attention, splash_gradients, supports
from mistral_eqx.nn.mask import bounds


# More than one block of queries and two of keys, none of them full.
SEQ, KV_SEQ = 530, 600


@jax.jit
def _by_kernel(inputs, d_context):
    found = splash_attention(*inputs, scale=0.4, interpret=True)
    return found, splash_gradients(*inputs, *found, d_context, scale=0.4, interpret=True)


@jax.jit
def _in_tiles(inputs, d_context):
    found = flash._tiles(inputs, scale=0.4)
    more = *found, d_context, jnp.zeros_like(found[1])
    return found, flash._gradients_of_tiles(inputs, *more, scale=0.4)


def _case(seen, dtype=np.float32):
    draw = np.random.default_rng(0)
    q, d_context = draw.standard_normal((2, 2, 2, 3, SEQ, 6))
    k, v = draw.standard_normal((2, 2, 2, KV_SEQ, 6))
    # Padding before, between and behind the keys, and jumps.
    kv_positions = np.full((2, KV_SEQ), -1, np.int32)
    for row in kv_positions:
        row[np.sort(draw.choice(np.arange(5, KV_SEQ - 5), 400, replace=False))] = np.sort(
            draw.choice(700, 400, replace=False)
        )
    positions = jnp.asarray(draw.integers(-1, 720, (2, SEQ)), jnp.int32)
    window, span = seen, None
    if seen == "span":
        window, span = 90, Span(*(jnp.asarray(draw.integers(-1, 720, (2, SEQ)), jnp.int32) for _ in range(2)))
    inputs = flash._Inputs(
        *(jnp.asarray(x, dtype) for x in (q, k, v)), *bounds(positions, window, span), jnp.asarray(kv_positions)
    )
    return inputs, jnp.asarray(d_context, jnp.float32)


@pytest.mark.parametrize("seen", [None, 60, "span"])
@pytest.mark.slow
def test_value_and_gradient_are_those_of_tiles(seen):
    inputs, d_context = _case(seen)
    assert in_order(inputs.kv_positions)
    found, expected = _by_kernel(inputs, d_context), _in_tiles(inputs, d_context)
    # Some queries see nothing, and say so.
    blind = np.asarray(expected[0][1] < -1e30)
    assert 0 < blind.sum() < blind.size
    np.testing.assert_array_equal(np.asarray(found[0][1] < -1e30), blind)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Sums of at most 600 terms in float32, in another order.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_in_bfloat16():
    inputs, d_context = _case(None, jnp.bfloat16)
    found, expected = _by_kernel(inputs, d_context), _in_tiles(inputs, d_context)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        # One rounding to 8 bits of scaled queries, of weights, or of results.
        assert relative_error(np.asarray(one, np.float32), np.asarray(other, np.float32)) < 2**-6


def test_keys_in_order():
    for row, expected in (
        ([0, 1, 2, 3], True),
        ([-1, -1, 0, 5], True),
        ([0, -1, 1, -1], True),
        ([-1, -1, -1, -1], True),
        ([4, 5, 2, 3], False),
        ([0, -1, 0, 1], False),
        ([3, -1, 2, 4], False),
    ):
        assert bool(in_order(jnp.asarray([[0, 1, 2, 3], row]))) == expected, row


def test_what_the_kernel_does_not_know_stays_in_tiles(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(flash.lax, "platform_dependent", refuse)
    assert supports(jnp.dtype("float32"), 65535)
    assert not supports(jnp.dtype("float32"), 65536)
    for dtype in ("float16", "float64"):
        assert not supports(jnp.dtype(dtype), 10)
    inputs, _ = _case(None, np.float16)
    assert flash._flash(inputs, 0.4)[0].shape == inputs.q.shape


@pytest.fixture
def kernel_everywhere(monkeypatch):
    """As on a TPU, where a model has as many tokens as need tiles."""
    monkeypatch.setattr(layer, "_WHOLE", 0)
    monkeypatch.setattr(flash, "TILE", 4)
    for function in (splash_attention, splash_gradients):
        monkeypatch.setattr(flash, function.__name__, functools.partial(function, interpret=True))
    original = jax.lax.platform_dependent

    def chosen(*arguments, default, **branches):
        if "tpu" in branches:
            return branches["tpu"](*arguments)
        return original(*arguments, default=default, **branches)

    monkeypatch.setattr(flash.lax, "platform_dependent", chosen)


@pytest.mark.parametrize("strategy", [mx.SINGLE, mx.HEADS])
@pytest.mark.slow
def test_a_model_on_a_mesh_learns_the_same(kernel_everywhere, strategy):
    """Gradients are added up over devices outside of the kernel, which does not know of them."""
    config = dataclasses.replace(SMALL, layers=1, windows=(7,), vocab=62)
    model = small_model(config=config)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab, (2, 11)), jnp.int32)

    def loss(model, ids):
        return jnp.mean(jnp.sin(model(ids)))

    step = eqx.filter_value_and_grad(loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "_WHOLE", 2**20)
        expected = eqx.filter_jit(lambda *arguments: step(*arguments))(model, ids)
    if strategy != mx.SINGLE:
        mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2])
        model = mx.shard(model, mesh, strategy)
    found = eqx.filter_jit(lambda *arguments: step(*arguments))(model, ids)
    leaves = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (found, expected))
    for one, other in zip(*leaves, strict=True):
        # The angles have no gradient.
        assert relative_error(one, other) < 1e-5 if np.any(other) else not np.any(one)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra tpu, is not installed.")
def test_a_program_for_a_tpu_holds_the_kernel_and_no_score_for_every_pair():
    script = Path(__file__).parent / "fixtures" / "splash_on_tpu.py"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    ran = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True, check=True)
    texts = json.loads(ran.stdout)
    # The sums, the gradient of queries, and that of keys and values.
    for name, calls in (("bfloat16", 3), ("heads", 1), ("float16", 0)):
        assert texts[name].count('custom_call_target="tpu_custom_call"') == calls
        shapes = re.findall(r"\w\[([\d,]+)\]", texts[name])
        assert not [shape for shape in shapes if sum(int(size) >= 2048 for size in shape.split(",")) > 1]
