"""The closed form of what is exchanged, against the programs themselves."""

import collections
import dataclasses
import random

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from fixtures.model import SMALL, small_model
from fixtures.sharding import MESHES, exchanges, free_strategy
from hypothesis import given, settings, strategies as st

import mistral_eqx as mx
from mistral_eqx.generation.flat import Flat
from mistral_eqx.generation.loop import Decoding, decode
from mistral_eqx.generation.reading import read_chunk
from mistral_eqx.nn import Cache
from mistral_eqx.parallel import NAMED, with_auto_axes, with_strategy
from mistral_eqx.parallel.mesh import make_mesh
from mistral_eqx.planning import communication


# No two exchanges of one kind have one size by chance.
CONFIG = dataclasses.replace(
    SMALL, vocab=272, embed=24, hidden=80, kv_heads=4, q_per_kv=2, head_dim=16, windows=(3, None)
)
BATCH, SEQ, KV_SEQ = 2, 12, 32
SEVEN = mx.PRESETS["7b-v0.2"]

LAYOUTS = [
    *((layout.layout, axes) for layout in (mx.HEADS, mx.HEAD_DIM, mx.SEQUENCE_PARALLEL) for axes in ("tp=4", "tp=2")),
    *((NAMED[name].layout, "kv=4,rep=2") for name in ("kv_replicated", "heads_x_head_dim", "heads_x_kv_seq")),
    *((f"{layout.layout} batch@dp", "dp=2,tp=4") for layout in (mx.HEADS, mx.HEAD_DIM, mx.SEQUENCE_PARALLEL)),
    *((f"{layout.layout} batch@dp", "dp=2,kv=2,rep=2") for layout in (mx.KV_REPLICATED, mx.HEADS_X_KV_SEQ)),
    (f"{mx.SEQUENCE_PARALLEL.layout} overlap", "tp=4"),
    ("", "tp=2"),
    ("batch@dp", "dp=2,tp=2"),
    ("hidden@tp", "tp=8"),
    ("vocab@b,a", "a=2,b=2"),
    ("embed@tp", "tp=4"),
    ("embed@tp kv_seq@tp", "tp=4"),
    ("embed@a kv_heads@b hidden@b vocab@b batch@c", "a=2,b=2,c=2"),
    ("kv_seq@a,b", "a=2,b=4"),
    ("head_dim@a kv_seq@b", "a=2,b=2"),
    ("kv_heads@a q_per_kv@b head_dim@c hidden@c,a vocab@b", "a=2,b=2,c=2"),
    ("kv_heads@a q_per_kv@b hidden@a,b vocab@b,a tokens@a", "a=2,b=2"),
    ("kv_heads@a q_per_kv@b hidden@a,b vocab@b,a tokens@b,a", "a=2,b=2"),
    ("kv_heads@a kv_seq@b hidden@a,b vocab@a,b tokens@a batch@c", "a=2,b=2,c=2"),
    # An axis of one device exchanges nothing.
    ("kv_heads@a hidden@a vocab@a kv_seq@b tokens@a", "a=1,b=2"),
    # Context parallelism: keys travel along a ring, or each device gathers them.
    ("seq@cp", "cp=3"),
    ("kv_heads@tp hidden@tp vocab@tp tokens@tp seq@cp kv_seq@cp batch@dp", "dp=2,cp=2,tp=2"),
    ("seq@a,b kv_seq@a,b", "a=1,b=2"),
    ("head_dim@tp embed@e seq@cp kv_seq@cp", "cp=2,tp=2,e=2"),
    ("seq@cp kv_seq@cp", "cp=1,tp=2"),
]


def _on(layout, axes, *, config=CONFIG, dtype="float32"):
    """A model that enters this mesh, and nothing placed there: programs are only lowered."""
    mesh, strategy = with_auto_axes(make_mesh(axes)), mx.Strategy(layout)
    strategy.check(config, mesh)
    return dataclasses.replace(with_strategy(small_model(config=config, dtype=dtype), strategy), mesh=mesh)


def _counted(collectives):
    found = collections.Counter()
    for one in collectives:
        found[one.kind, one.bytes, one.devices] += one.count
    return found


def _forward(model, batch, seq):
    return exchanges(eqx.filter_jit(lambda model, ids: model(ids)).lower(model, jnp.zeros((batch, seq), jnp.int32)))


def _prefill(model, batch, seq, kv_seq, cache_dtype=None):
    ids = jnp.zeros((batch, seq), jnp.int32)
    cache = Cache.init(model.config, batch, kv_seq, model.dtype, cache_dtype)
    return exchanges(read_chunk.lower((model, ids, ids), cache))


def _step(model, batch, kv_seq, sampler, cache_dtype=None, cache=None):
    none = jnp.zeros(batch, jnp.int32)
    decoding = Decoding.init(none, none > 0, jr.split(jr.key(0), batch), 8)
    kept = (Flat(model), decoding, sampler, jnp.zeros(2, jnp.int32), jnp.zeros((), jnp.int32))
    cache = cache or Cache.init(model.config, batch, kv_seq, model.dtype, cache_dtype)
    return exchanges(decode.lower(kept, cache))


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        pytest.param(*case, marks=((), pytest.mark.slow, pytest.mark.long)[number % 3])
        for number, case in enumerate(LAYOUTS)
    ],
)
def test_the_closed_form_is_what_the_programs_exchange(layout, axes):
    model = _on(layout, axes)
    form = CONFIG, model.strategy, model.mesh.shape
    sizes = {"batch": BATCH, "dtype": "float32"}
    assert _forward(model, BATCH, SEQ) == _counted(communication.forward_pass(*form, seq=SEQ, **sizes))
    # Five tokens are never dealt out evenly.
    assert _prefill(model, BATCH, 5, KV_SEQ) == _counted(communication.prefill(*form, seq=5, kv_seq=KV_SEQ, **sizes))
    for sampler in (mx.Sampler(), mx.Sampler(0.7, top_k=130, top_p=0.9)):
        assert _step(model, BATCH, KV_SEQ, sampler) == _counted(
            communication.decoding_step(*form, kv_seq=KV_SEQ, sampler=sampler, **sizes)
        )


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        (mx.HEAD_DIM.layout, "tp=4"),
        pytest.param(mx.HEADS_X_KV_SEQ.layout, "kv=4,rep=2", marks=pytest.mark.slow),
        pytest.param("head_dim@a kv_seq@b batch@c", "a=2,b=2,c=2", marks=pytest.mark.slow),
    ],
)
def test_the_scales_of_a_cache_are_exchanged_where_head_dim_is_split(layout, axes):
    model = _on(layout, axes)
    form = CONFIG, model.strategy, model.mesh.shape
    sizes = {"batch": BATCH, "kv_seq": KV_SEQ, "cache_dtype": "int8"}
    found = _prefill(model, BATCH, 5, KV_SEQ, "int8"), _step(model, BATCH, KV_SEQ, mx.Sampler(), "int8")
    assert found[0] == _counted(communication.prefill(*form, seq=5, dtype="float32", **sizes))
    assert found[1] == _counted(communication.decoding_step(*form, dtype="float32", **sizes))


@pytest.mark.parametrize("layout", ["kv_heads@a kv_seq@b hidden@a vocab@a tokens@a", "embed@a head_dim@b", "vocab@a,b"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_what_is_summed_in_float32_is_exchanged_in_float32(layout, dtype):
    model = _on(layout, "a=2,b=4", dtype=dtype)
    form = CONFIG, model.strategy, model.mesh.shape
    sizes = {"batch": BATCH, "dtype": dtype}
    assert _forward(model, BATCH, SEQ) == _counted(communication.forward_pass(*form, seq=SEQ, **sizes))
    for sampler in (mx.Sampler(), mx.Sampler(top_k=3), mx.Sampler(top_p=0.9)):
        assert _step(model, BATCH, KV_SEQ, sampler) == _counted(
            communication.decoding_step(*form, kv_seq=KV_SEQ, sampler=sampler, **sizes)
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1).map(random.Random))
@pytest.mark.slow
def test_the_closed_form_holds_for_any_legal_text(random):
    axes = random.choice(MESHES)
    batch, seq = random.choice([2, 3, 8]), random.choice([1, 3, 6, 8])
    strategy = free_strategy(random, CONFIG, axes, batch)
    model = _on(strategy.layout, axes)
    found = communication.forward_pass(CONFIG, strategy, axes, batch=batch, seq=seq, dtype="float32")
    assert _forward(model, batch, seq) == _counted(found)


# Two and four experts of a token: with 128 tokens on a device and more, they travel by all_to_all where that is less.
@pytest.mark.parametrize(
    ("layout", "axes", "seq"),
    [
        ("batch@dp experts@dp kv_heads@tp hidden@tp vocab@tp", "dp=4,tp=2", 128),
        ("kv_heads@tp experts@tp vocab@tp tokens@tp", "tp=4", 128),
        pytest.param("batch@dp experts@dp kv_heads@tp hidden@tp vocab@tp", "dp=4,tp=2", 64, marks=pytest.mark.slow),
        pytest.param(
            "batch@dp experts@ep,dp kv_heads@tp vocab@tp hidden@tp tokens@tp",
            "dp=4,ep=1,tp=2",
            128,
            marks=pytest.mark.slow,
        ),
        pytest.param("batch@dp kv_heads@tp experts@tp,dp vocab@tp tokens@tp", "dp=2,tp=4", 256, marks=pytest.mark.slow),
        pytest.param("batch@dp experts@dp,ep", "dp=4,ep=2", 256, marks=pytest.mark.slow),
        pytest.param(
            "kv_heads@a q_per_kv@b vocab@a,b experts@a hidden@b tokens@b,a", "a=4,b=2", 256, marks=pytest.mark.slow
        ),
    ],
)
def test_the_exchanges_of_experts_are_those_of_the_closed_form(layout, axes, seq):
    config = dataclasses.replace(CONFIG, layers=2, max_positions=512, routing=mx.Routing(experts=8, per_token=2))
    model = _on(layout, axes, config=config)
    form, sizes = (config, model.strategy, model.mesh.shape), {"batch": 4, "dtype": "float32"}
    found = communication.forward_pass(*form, seq=seq, **sizes)
    assert ("all_to_all" in {one.kind for one in found}) is (seq > 64)
    assert _forward(model, 4, seq) == _counted(found)
    # A decoding step has few tokens: each device gathers them.
    found = communication.decoding_step(*form, kv_seq=KV_SEQ, **sizes)
    assert "all_to_all" not in {one.kind for one in found}
    assert _step(model, 4, KV_SEQ, mx.Sampler()) == _counted(found)


def _in_a_layer(collectives):
    """What is exchanged as often as there are layers, a layer, and all the rest."""
    layers = SEVEN.layers
    return (
        {one.what: one.count // layers for one in collectives if one.count >= layers},
        {one.what: one.count for one in collectives if one.count < layers},
    )


@pytest.mark.parametrize(
    ("strategy", "axes", "a_layer", "else_"),
    [
        (mx.HEADS, {"tp": 8}, 2, 1),
        (mx.HEAD_DIM, {"tp": 16}, 3, 1),
        (mx.KV_REPLICATED, {"kv": 8, "rep": 2}, 2, 1),
        (mx.HEADS_X_HEAD_DIM, {"kv": 8, "rep": 2}, 3, 1),
        (mx.HEADS_X_KV_SEQ, {"kv": 8, "rep": 2}, 4, 1),
        (mx.SEQUENCE_PARALLEL, {"tp": 8}, 4, 2),
        (mx.Strategy("embed@tp"), {"tp": 8}, 7, 2),
        (mx.SINGLE, {"tp": 8}, 0, 0),
    ],
)
def test_known_answers_a_layer(strategy, axes, a_layer, else_):
    inside, outside = _in_a_layer(communication.forward_pass(SEVEN, strategy, axes, batch=8, seq=64))
    assert (sum(inside.values()), sum(outside.values())) == (a_layer, else_)
    # One token cannot be dealt out: it is added up everywhere, as under HEADS.
    if strategy is not mx.SEQUENCE_PARALLEL:
        inside, outside = _in_a_layer(communication.decoding_step(SEVEN, strategy, axes, batch=8, kv_seq=64))
        greedy = {"best logit": 1, "best token": 1} if strategy.axes("vocab") else {}
        assert sum(inside.values()) == a_layer
        assert sum(outside.values()) == else_ + sum(greedy.values())
        assert greedy.items() <= outside.items()


def test_known_answers_in_bytes():
    """Mistral 7B in bfloat16: what the residual stream, scores, a merge of the softmax, and a token's choice weigh."""

    def step(strategy, axes, **sizes):
        found = communication.decoding_step(SEVEN, strategy, axes, kv_seq=4096, **sizes)
        return {one.what: (one.kind, one.bytes, one.devices) for one in found}

    heads = step(mx.HEADS + "batch@dp", {"dp": 2, "tp": 8}, batch=16)
    assert heads["attention output"] == heads["feed-forward output"] == ("all_reduce", 8 * 4096 * 2, 8)
    assert heads["best logit"] == heads["best token"] == ("all_reduce", 8 * 4, 8)
    assert heads["unfinished rows"] == ("all_reduce", 4, 2)
    by_head_dim = step(mx.HEAD_DIM, {"tp": 16}, batch=1)
    assert by_head_dim["attention scores"] == ("all_reduce", 32 * 4096 * 4, 16)
    by_kv_seq = step(mx.HEADS_X_KV_SEQ, {"kv": 8, "rep": 2}, batch=1)
    assert by_kv_seq["softmax maximum"] == ("all_reduce", 4 * 4, 2)
    assert by_kv_seq["softmax sum and values"] == ("all_reduce", 4 * 129 * 4, 2)
    # A prompt's scores under HEAD_DIM, 2.1 GB a layer, are what a long prompt cannot pay.
    found = communication.prefill(SEVEN, mx.HEAD_DIM, {"tp": 8}, batch=1, seq=4096, kv_seq=4096)
    (scores,) = [one for one in found if one.what == "attention scores"]
    assert (scores.count, scores.bytes) == (32, 32 * 4096 * 4096 * 4)
    # The same bytes as HEADS, in two halves: what one device puts in and what one takes out.
    found = communication.forward_pass(SEVEN, mx.SEQUENCE_PARALLEL, {"tp": 8}, batch=1, seq=512)
    kinds = {one.what: (one.kind, one.count, one.bytes) for one in found}
    assert kinds["attention output"] == ("reduce_scatter", 32, 512 * 4096 * 2)
    assert kinds["feed-forward input"] == ("all_gather", 32, 64 * 4096 * 2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"A batch of 3 cannot be split over 2 devices; take a multiple of that\."):
        communication.forward_pass(SEVEN, mx.Strategy("batch@dp"), {"dp": 2}, batch=3, seq=4)
    with pytest.raises(ValueError, match=r"A kv_seq of 33 cannot be split over 2 devices; take a multiple of that\."):
        communication.decoding_step(SEVEN, mx.HEADS_X_KV_SEQ, {"kv": 8, "rep": 2}, batch=1, kv_seq=33)
    with pytest.raises(ValueError, match="8 kv_heads cannot be split over 16 devices"):
        communication.forward_pass(SEVEN, mx.HEADS, {"tp": 16}, batch=1, seq=4)


def test_the_reader_counts_turns_of_a_loop():
    """The referee itself: a sum in a loop of five, called from two places, and one in a group of one device."""
    mesh = jax.make_mesh((2, 1), ("a", "b"), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    strategy = mx.Strategy("hidden@a embed@b")

    @jax.jit
    def add(x):
        return mx.parallel.psum(x, "hidden", strategy) / 2

    def program(x):
        x = jax.lax.fori_loop(0, 5, lambda turn, x: x + jnp.sum(add(x)), x)
        return mx.parallel.psum(add(x), "hidden embed", strategy) + mx.parallel.psum(jnp.sum(x), "embed", strategy)

    mapped = jax.shard_map(program, mesh=mesh, in_specs=jax.P("a"), out_specs=jax.P(), check_vma=False)
    found = exchanges(jax.jit(mapped).lower(jnp.ones(6, jnp.bfloat16)))
    assert found == {("all_reduce", 6, 2): 7}
