"""Latent attention: its two forms, its cache, and the choice of experts in groups."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.equality import FLOAT64_BOUND, precision, random_model
from fixtures.generation import refused
from fixtures.latent import DENSE, LATENT
from fixtures.model import FLOAT32_TOLERANCE, both_sides, empty_cache, relative_error, run, run_in_pieces, small_model

import mistral_eqx as mx
from mistral_eqx.nn import Context, DenseWeight, LatentCache, Router, attention, latent_attention, latent_operations


IDS = np.random.default_rng(0).integers(0, LATENT.vocab, (2, 24)).astype(np.int32)
SIZES = LATENT.latent


@pytest.fixture(scope="module")
def model():
    return small_model(config=DENSE)


@pytest.mark.parametrize("tiled", [False, True])
def test_absorbed_is_expanded(tiled, monkeypatch):
    """In float64: the two forms differ in the order of their sums alone."""
    monkeypatch.setattr(attention, "_WHOLE", 0 if tiled else 2**20)
    with precision("float64"):
        layer = random_model(DENSE, "float64").blocks[0].attention
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, LATENT.embed)))
        # A row begins with padding.
        positions = jnp.stack([jnp.arange(9), jnp.arange(9) - 4])
        context = Context.init(LATENT.rope, jnp.maximum(positions, -1), dtype=x.dtype)
        found = {}
        for form in (True, False):
            monkeypatch.setattr(
                latent_attention, "latent_operations", lambda *_, absorbed, form=form: int(absorbed != form)
            )
            found[form] = eqx.filter_jit(lambda layer, x: layer(x, context)[0])(layer, x)
        tokens = np.asarray(positions) >= 0
        assert relative_error(np.asarray(found[True])[tokens], np.asarray(found[False])[tokens]) < FLOAT64_BOUND


def test_operations():
    small_4 = mx.PRESETS["small-4-119b"].latent
    maps = 256 * (64 + 128)
    assert latent_operations(1, 4096, small_4, absorbed=True) == maps + 4096 * 2 * (256 + 64)
    assert latent_operations(1, 4096, small_4, absorbed=False) == 4096 * maps + 4096 * 2 * 128

    def absorbs(queries, keys):
        return latent_operations(queries, keys, small_4, absorbed=True) < latent_operations(
            queries, keys, small_4, absorbed=False
        )

    # Decoding is absorbed and a prefill is expanded; so is a long chunk after a long text, but not a short one.
    assert absorbs(1, 2)
    assert absorbs(1, 32_768)
    assert not absorbs(4096, 4096)
    assert absorbs(64, 32_768)
    assert not absorbs(256, 32_768)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_has_one_vector_in_the_cache(dtype):
    cache = mx.nn.Cache.init(DENSE, 3, 10, dtype)
    for layer in cache.layers:
        assert type(layer) is LatentCache
        (numbers,) = jax.tree.leaves(layer)
        assert numbers.shape == (3, 1, 10, SIZES.kv_rank + SIZES.rope_dim)
        assert numbers.dtype.itemsize == jnp.dtype(dtype).itemsize
    # Small 4 stores 320 numbers for each token of a layer; keys and values of its 32 heads would be 8192.
    shapes = eqx.filter_eval_shape(mx.nn.Cache.init, mx.PRESETS["small-4-119b"], 1, 1, "bfloat16")
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes.layers)) == 36 * 320


def test_chunks_and_decoding_are_the_whole_pass(model):
    expected = run(model, IDS)[0]
    for pieces in ((8, 8, 8), (8, 8, *(1,) * 8)):
        logits, cache = run_in_pieces(model, IDS, pieces, empty_cache(model, 2, 30))
        assert relative_error(logits, expected) < FLOAT32_TOLERANCE
    assert cache.grow(40).layers[0].slots == 40


def test_16_bits_round_both_forms_alike():
    """Decoding, which is absorbed, is as far from the same weights in float32 as a whole pass, which is expanded."""
    short = small_model(config=DENSE, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf, short)
    expected = run(wide, IDS)[0]
    whole, _ = run(short, IDS)
    decoded, _ = run_in_pieces(short, IDS, (8, 8, *(1,) * 8), empty_cache(short, 2, 30))
    assert relative_error(decoded, expected) < 2 * relative_error(whole, expected)


def test_padding_and_tiles_change_nothing(model, monkeypatch):
    expected = run(model, IDS[:1, :7])[0][0]
    ids, positions = both_sides([IDS[0, :7].tolist()], 10)
    monkeypatch.setattr(attention, "_WHOLE", 0)
    logits, _ = run(model, ids, positions)
    for row, columns in zip(logits, (slice(3, None), slice(7)), strict=True):
        assert relative_error(row[columns], expected) < FLOAT32_TOLERANCE


@pytest.mark.slow
def test_a_cache_of_8_bits(model):
    ids = IDS.tolist()
    whole, chunked = (
        mx.generate(model, ids, max_new_tokens=6, eos_id=(), cache_dtype="int8", prefill_chunk=chunk).tokens
        for chunk in (24, 12)
    )
    np.testing.assert_array_equal(chunked, whole)


@pytest.mark.slow
def test_beams_are_texts_of_their_scores(model):
    best = mx.beam_search(model, [IDS[0, :5].tolist()], num_beams=3, max_new_tokens=5, eos_id=(), length_penalty=0.0)
    text = np.concatenate([IDS[0, :5], np.ravel(best.tokens)])
    log_probs = jax.nn.log_softmax(run(model, text[None].astype(np.int32))[0][0])
    total = sum(log_probs[at - 1, text[at]] for at in range(5, 10))
    assert float(np.ravel(best.scores)[0]) == pytest.approx(float(total), rel=FLOAT32_TOLERANCE)


def test_experts_come_from_the_best_groups():
    draw = np.random.default_rng(0).standard_normal
    weight, x = draw((12, 6)).astype(np.float32), draw((2, 5, 6)).astype(np.float32)
    router = Router(DenseWeight(jnp.asarray(weight)), 3, groups=4, groups_per_token=2, scale=2.5, normalized=False)
    experts, shares = router(jnp.asarray(x))
    normalized = dataclasses.replace(router, normalized=True)(jnp.asarray(x))[1]
    for row, column in np.ndindex(2, 5):
        scores = np.exp(weight @ x[row, column])
        scores /= scores.sum()
        best = np.argsort(-np.sort(scores.reshape(4, 3), axis=1)[:, -2:].sum(axis=1))[:2]
        chosen = sorted((expert for expert in range(12) if expert // 3 in best), key=lambda expert: -scores[expert])[:3]
        assert experts[row, column].tolist() == chosen
        # The rounding of float32 in a softmax of 12 numbers.
        np.testing.assert_allclose(shares[row, column], 2.5 * scores[chosen], rtol=1e-5)
        np.testing.assert_allclose(normalized[row, column], 2.5 * scores[chosen] / scores[chosen].sum(), rtol=1e-5)


def test_shared_experts_are_added():
    layer = small_model(config=LATENT).blocks[1].feed_forward
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 4, LATENT.embed)), jnp.float32)
    assert layer.shared.up_proj.weight.value.shape == (80, LATENT.embed)
    alone = dataclasses.replace(layer, shared=None)
    y, routed, shared = eqx.filter_jit(lambda *layers: [layer(x) for layer in layers])(layer, alone, layer.shared)
    np.testing.assert_allclose(y, routed + shared, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_scanned_blocks_are_the_blocks():
    config = dataclasses.replace(LATENT, routing=dataclasses.replace(LATENT.routing, first_dense=0))
    model = small_model(config=config)
    stacked = mx.nn.stack(model)
    assert stacked.repeats == 2
    positions = np.broadcast_to(np.arange(24), (2, 24))
    hidden = eqx.filter_jit(lambda stacked: stacked.hidden(IDS, positions))(stacked)
    assert relative_error(hidden, model.hidden(jnp.asarray(IDS))[0]) < FLOAT32_TOLERANCE
    assert mx.nn.stack(small_model(config=LATENT)).repeats == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_per_kv": 2}, "2 query heads for each key/value head"),
        ({"head_dim": 18}, "latent.nope_dim + latent.rope_dim = 16 entries"),
        ({"windows": (None, 4)}, "latent attention in layers with windows"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(change, words):
    with refused(words):
        dataclasses.replace(LATENT, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": 3}, "8 experts into 3 groups"),
        ({"groups": 8, "groups_per_token": 4}, "8 experts into 8 groups"),
        ({"per_token": 5}, "5 experts of 2 groups, but a layer has 4 groups of 2"),
        ({"groups_per_token": 5}, "3 experts of 5 groups"),
    ],
)
def test_groups_that_do_not_fit_are_refused(change, words):
    with refused(words):
        dataclasses.replace(LATENT.routing, **change)
    with refused("latent.rope_dim is 5"):
        dataclasses.replace(SIZES, rope_dim=5)
