"""What a span says is what a token sees."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import SMALL, relative_error, small_model

import mistral_eqx as mx
from mistral_eqx.nn import Cache, Span, attention as layer, attention_mask
from mistral_eqx.nn.mask import bounds


CONFIG = dataclasses.replace(SMALL, windows=(None, 5), layers=2)


def _hidden(model, ids, positions=None, span=None):
    return eqx.filter_jit(lambda *arguments: model.hidden(*arguments[:2], span=arguments[2])[0])(ids, positions, span)


@pytest.fixture(params=["whole", "in tiles"])
def model(request, monkeypatch):
    if request.param == "in tiles":
        monkeypatch.setattr(layer, "_WHOLE", 0)
    return small_model(config=CONFIG)


@pytest.mark.slow
def test_packed_documents_say_what_each_says_alone(model):
    lengths = (7, 1, 11, 4)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab, (1, sum(lengths) + 3)), jnp.int32)
    starts = np.cumsum((0, *lengths[:-1]))
    positions = np.full(ids.shape, -1, np.int32)
    first = np.zeros(ids.shape, np.int32)
    for start, length in zip(starts, lengths, strict=True):
        positions[0, start : start + length] = np.arange(length)
        first[0, start : start + length] = start
    packed = _hidden(model, ids, jnp.asarray(positions), Span(first=jnp.asarray(first)))
    for start, length in zip(starts, lengths, strict=True):
        alone = _hidden(model, ids[:, start : start + length])
        # Float32 sums over other numbers of masked columns.
        assert relative_error(packed[:, start : start + length], alone) < 2e-6


@pytest.mark.slow
def test_a_prefix_is_seen_from_both_sides(model):
    """Up to the end of the prefix all of it depends on its last token, and after it nothing does on later ones."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab, (1, 9)), jnp.int32)
    columns = jnp.arange(9, dtype=jnp.int32)[None]
    span = Span(last=jnp.maximum(columns, 4))
    before = _hidden(model, ids, None, span)
    inside = _hidden(model, ids.at[0, 4].add(1), None, span)
    after = _hidden(model, ids.at[0, 7].add(1), None, span)
    assert np.all(np.any(np.asarray(inside != before), axis=2)[0])
    np.testing.assert_array_equal(np.any(np.asarray(after != before), axis=2)[0], np.arange(9) >= 7)


def test_both_sides_without_rotary_angles_do_not_know_an_order():
    """Bidirectional attention over a permuted row is the permuted result, where all tokens have one position."""
    model = small_model(config=dataclasses.replace(SMALL, windows=(None,), layers=1))
    ids = jnp.asarray(np.random.default_rng(0).permutation(SMALL.vocab)[None, :9], jnp.int32)
    order = np.random.default_rng(1).permutation(9)
    span = Span(last=jnp.full((1, 9), 8, jnp.int32))
    found, turned = (_hidden(model, x, jnp.zeros_like(x), span) for x in (ids, ids[:, order]))
    assert relative_error(turned, found[:, order]) < 2e-6


def test_a_window_reaches_to_both_sides_and_no_further_than_the_span():
    positions = jnp.arange(8, dtype=jnp.int32)[None]
    span = Span(first=jnp.where(positions < 4, 0, 4), last=jnp.where(positions < 4, 3, 7))
    seen = np.asarray(attention_mask(*bounds(positions, 2, span), positions))[0]
    expected = [[abs(a - b) < 2 and a // 4 == b // 4 for b in range(8)] for a in range(8)]
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("name", ["HEADS", "SEQUENCE_PARALLEL", "HEAD_DIM"])
@pytest.mark.slow
def test_a_span_is_the_same_on_several_devices(name):
    model = small_model(config=dataclasses.replace(CONFIG, vocab=64))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 8)), jnp.int32)
    columns = jnp.arange(8, dtype=jnp.int32)[None] * jnp.ones((2, 1), jnp.int32)
    span = Span(first=jnp.where(columns < 3, 0, 3), last=jnp.maximum(columns, 1))
    sharded = mx.shard(model, mx.make_mesh({"tp": 2}), getattr(mx, name))
    assert relative_error(_hidden(sharded, ids, columns, span), _hidden(model, ids, columns, span)) < 2e-6


def test_a_cache_has_no_columns():
    model = small_model(config=CONFIG)
    with pytest.raises(ValueError, match="without a cache"):
        model.hidden(jnp.zeros((1, 2), jnp.int32), None, Cache.init(CONFIG, 1, 8), span=Span())
