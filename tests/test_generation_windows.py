"""Layers with a window keep what the window reaches, and say the same as those that keep everything."""

import jax
import numpy as np
import pytest
from fixtures.generation import random_prompts, talking_model
from hypothesis import given, settings, strategies as st

import mistral_eqx as mx
from mistral_eqx.generation.request import Request
from mistral_eqx.generation.sampler import Sampler


NEW = 60


def _tokens(model, prompts, *, forgets, chunk, new=NEW):
    request = Request.init(model, prompts, new, Sampler(), None, None, prefill_chunk=chunk)
    *_, (decoding, cache) = request.steps(*request.start(prompts, forgets=forgets), new)
    return np.asarray(decoding.tokens)[: len(prompts), :new], cache


@pytest.fixture(scope="module")
def model():
    return talking_model(windows=(7, None, 12))


# Shorter than the window, as long, one longer, many times as long; together, and in pieces that end anywhere.
@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 6, 7, 8, 11, 12, 13, 40, 90]), min_size=1, max_size=3),
    chunk=st.sampled_from([5, 16, 512]),
    seed=st.integers(0, 100),
)
@pytest.mark.slow
def test_the_text_is_that_of_a_full_cache(model, lengths, chunk, seed):
    prompts = random_prompts(*lengths, seed=seed)
    expected, _ = _tokens(model, prompts, forgets=False, chunk=512)
    found, _ = _tokens(model, prompts, forgets=True, chunk=chunk)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(dtype):
    model = talking_model(windows=(7, 7), dtype=dtype)
    sizes = []
    for new in (20, 400, 1200):
        _, cache = _tokens(model, random_prompts(30), forgets=True, chunk=16, new=new)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers)))
    assert sizes[0] == sizes[1] == sizes[2]
    (slots,) = {layer.slots for layer in cache.layers}
    assert slots == 7 + 16 + 2
    assert cache.kv_seq > 1200


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        pytest.param("kv_heads@tp hidden@tp", "tp=2", marks=pytest.mark.long),
        pytest.param("kv_seq@x", "x=3", marks=pytest.mark.long),
        ("kv_seq@x batch@dp vocab@x", "dp=2,x=2"),
    ],
)
@pytest.mark.slow
def test_under_a_strategy(layout, axes):
    model = talking_model(windows=(7, None), vocab=64)
    prompts = random_prompts(3, 40, 9)
    expected, _ = _tokens(model, prompts, forgets=False, chunk=512)
    parts = mx.shard(model, mx.make_mesh(axes), mx.Strategy(layout))
    found, _ = _tokens(parts, prompts, forgets=True, chunk=16)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_conversation_keeps_everything():
    """From it turns are taken away, and what was before them must still be there."""
    model = talking_model(windows=(7, 7))
    chat = mx.Conversation(model)
    first = random_prompts(30)[0]
    list(chat.reply(first, max_new_tokens=50))
    again = list(chat.reply(first[:25], max_new_tokens=20))
    assert again == np.asarray(mx.generate(model, [first[:25]], max_new_tokens=20).tokens)[0].tolist()
