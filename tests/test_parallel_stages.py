"""Generation by stage: each device has its layers and their caches alone, and activations pass from stage to stage."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.equality import FLOAT64_BOUND, precision, random_model, worst_error
from fixtures.generation import random_prompts, refused
from fixtures.lora import LINEAR
from fixtures.model import SMALL, small_model
from fixtures.sharding import exchanges
from test_parallel_communication import CONFIG as COUNTED, _counted, _step

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.evaluate import score
from mistral_eqx.generation.caches import empty_cache
from mistral_eqx.generation.reading import read_chunk
from mistral_eqx.nn import in_stages, stack
from mistral_eqx.planning import communication


CONFIG = dataclasses.replace(SMALL, vocab=64, layers=4, windows=(3, None) * 2)
PLAIN = dataclasses.replace(CONFIG, layers=2, windows=(None, None))
DEEP = dataclasses.replace(CONFIG, windows=(None,) * 4)
ROWS, KV_SEQ = 4, 24
TENSOR = "layers@pp kv_heads@tp hidden@tp vocab@tp"
DRAWS = mx.Sampler(0.8, processors=(mx.RepetitionPenalty(1.2),))


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def _staged(model, layout, axes):
    return in_stages(mx.shard(stack(model), mx.make_mesh(axes), mx.Strategy(layout)))


@eqx.filter_jit
def _passes(model, ids, cache, parts):
    """Logits of a pass with all of its tokens, of a prefill in parts, and of a pass of one token; and the cache."""
    first, cache = model.hidden(ids[:, :5], None, cache)
    positions = jnp.broadcast_to(jnp.arange(5, 17, dtype=jnp.int32), (ROWS, 12))
    last, cache = model.prefill(ids[:, 5:17], positions, cache, parts)
    one, cache = model.hidden(ids[:, 17:18], None, cache)
    return [model.logits(hidden) for hidden in (first, last, one)], cache


@pytest.mark.parametrize(
    ("config", "layout", "axes", "options"),
    [
        _slow(PLAIN, "layers@pp", {"pp": 2}, {}),
        _slow(CONFIG, f"{mx.SEQUENCE_PARALLEL.layout} layers@pp batch@dp", {"pp": 2, "tp": 2, "dp": 2}, {"chunk": 12}),
    ],
)
def test_logits_and_caches_are_those_of_one_device(config, layout, axes, options):
    with precision("float64"):
        model = random_model(config, "float64")
        staged = _staged(model, layout, axes)
        ids = jnp.asarray(random_prompts(*(18,) * ROWS), jnp.int32)
        whole, found = (empty_cache(one, ROWS, KV_SEQ, **options) for one in (model, staged))
        # Two layers pass in one tick of either stage.
        expected, whole = _passes(model, ids, whole, 1)
        logits, found = _passes(staged, ids, found, 3)
        for one, other in zip(logits, expected, strict=True):
            assert np.abs(one - other).max() < FLOAT64_BOUND * np.abs(other).max()
        stages = 2
        # The second stage's layers come after those of the first.
        by_stage = [
            jax.tree.map(lambda x, s=s: jnp.asarray(np.split(np.asarray(x), stages)[s]), layer)
            for s in range(stages)
            for layer in found.layers
        ]
        assert worst_error(by_stage, list(whole.layers)) < FLOAT64_BOUND
        np.testing.assert_array_equal(found.next_positions, whole.next_positions)
        assert len(found.layers) == config.layers // stages
        devices = int(np.prod(list(axes.values())))
        for layer in found.layers:
            for x in (layer.k, layer.v):
                assert x.addressable_shards[0].data.nbytes * devices == x.nbytes


@pytest.mark.parametrize(
    ("config", "layout", "axes", "rows", "options"),
    [
        # Two groups of two rows; then one group, in which a row is added so that the devices can split the batch.
        (PLAIN, "layers@pp", {"pp": 2}, 4, {"logprobs": 3}),
        _slow(CONFIG, f"{TENSOR} batch@dp", {"pp": 2, "tp": 2, "dp": 2}, 3, {"sampler": DRAWS, "num_samples": 2}),
        _slow(DEEP, "layers@pp kv_seq@kv", {"pp": 4, "kv": 2}, 4, {"cache_dtype": "int8"}),
        _slow(PLAIN, "layers@pp", {"pp": 2}, 3, {"speculate": mx.PromptLookup()}),
    ],
)
def test_tokens_are_those_of_one_device(config, layout, axes, rows, options):
    """Prompts of several lengths, which are read in several parts, and rows that end before others."""
    prompts = random_prompts(*(3, 17, 30, 9)[:rows])
    options = {"max_new_tokens": 24, "prefill_chunk": 8, "key": jr.key(0), "eos_id": ()} | options
    with precision("float64"):
        model = random_model(config, "float64")
        free = mx.generate(model, prompts, **options)
        options["eos_id"] = (int(free.tokens[0, 2]), int(free.tokens[-1, 9]))
        expected, found = (mx.generate(one, prompts, **options) for one in (model, _staged(model, layout, axes)))
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        assert found.lengths[0] <= 3
        if expected.log_probs is not None:
            # Sums of logits of size 10 in float64.
            np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=10 * FLOAT64_BOUND)


@pytest.mark.slow
def test_what_else_generates_and_scores():
    """A stream with a prefix, a draft that all devices have, beams and scores, in float32."""
    model = small_model(config=PLAIN)
    layout, axes, prompts = "layers@pp", {"pp": 2}, random_prompts(5, 12)
    staged, copied = _staged(model, layout, axes), mx.shard(model, mx.make_mesh(axes), mx.SINGLE)
    options = {"max_new_tokens": 6, "eos_id": ()}
    for run in (
        lambda one, draft: np.stack(list(mx.stream(one, prompts, prefix=mx.prefill(one, prompts[1]), **options))),
        lambda one, draft: mx.generate(one, prompts, speculate=mx.Draft(draft, cost=0.1), **options).tokens,
        lambda one, draft: mx.beam_search(one, prompts, num_beams=2, **options).tokens,
    ):
        np.testing.assert_array_equal(run(staged, copied), run(model, model))
    found, expected = (score(one, prompts, prefill_chunk=4) for one in (staged, model))
    # Float32 sums in another order.
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)


# What is exchanged, and what is refused.


@pytest.mark.slow
def test_the_closed_form_is_what_the_programs_exchange():
    """A token passes each stage once, and a prefill in parts takes a tick more for each further part."""
    axes = {"pp": 2, "tp": 2}
    strategy, config = mx.Strategy(TENSOR), dataclasses.replace(COUNTED, layers=4, windows=(3, None) * 2)
    model = in_stages(mx.shard(stack(small_model(config=config)), mx.make_mesh(axes), strategy))
    sizes, parts = {"batch": ROWS, "kv_seq": KV_SEQ, "dtype": "float32"}, 3
    cache = empty_cache(model, ROWS, KV_SEQ)
    form = communication.decoding_step(config, strategy, axes, **sizes)
    assert _step(model, ROWS, KV_SEQ, mx.Sampler(), cache=cache) == _counted(form)
    (sent,) = [one for one in form if one.what == "activations to the next stage"]
    assert (sent.count, sent.bytes) == (2, ROWS // axes.get("dp", 1) * config.embed * 4)
    ids = jnp.zeros((ROWS, 12), jnp.int32)
    form = communication.prefill(config, strategy, axes, seq=12, parts=parts, **sizes)
    assert exchanges(read_chunk.lower((model, ids, ids), cache, parts)) == _counted(form)
    (sent,) = [one for one in form if one.what == "activations to the next stage"]
    assert sent.count == parts + 2 - 1


def test_what_stages_cannot_do_is_refused(tmp_path):
    model = small_model(config=PLAIN)
    stacked = mx.shard(stack(model), mx.make_mesh("pp=2"), mx.Strategy("layers@pp"))
    with refused("Stacked", "must be a Mistral", "mistral_eqx.nn.unstack or in_stages"):
        mx.generate(stacked, [[1, 2]], max_new_tokens=2)
    with refused("does not split 'layers'", "mistral_eqx.nn.unstack"):
        in_stages(stack(model))
    staged = in_stages(stacked)
    for run in (
        stack,
        lambda model: mx.save(model, tmp_path / "model"),
        lambda model: mx.quantize(model, mx.NF4()),
        lambda model: mx.apply_lora(model, rank=2, alpha=4.0, targets=LINEAR, key=jr.key(0)),
        lambda model: train.TrainState.init(model, train.adamw(1e-3)),
    ):
        with refused("mistral_eqx.nn.in_stages", "mistral_eqx.nn.unstack"):
            run(staged)
    with refused("12 columns", "5 equal parts"):
        staged.prefill(jnp.zeros((1, 12), jnp.int32), jnp.zeros((1, 12), jnp.int32), empty_cache(staged, 1, 16), 5)
