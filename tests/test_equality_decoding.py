"""The decoding loop on several devices: what it keeps in memory, what it exchanges, and what it says."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import PROMPTS, talking_model
from fixtures.model import SMALL, relative_error, run, small_model
from fixtures.sharding import exchanges, sharded, written
from jax.sharding import PartitionSpec as P

import mistral_eqx as mx
from mistral_eqx.generation.caches import empty_cache, slots
from mistral_eqx.generation.flat import Flat
from mistral_eqx.generation.loop import Decoding, decode
from mistral_eqx.nn import Cache
from mistral_eqx.parallel import Strategy, with_auto_axes, with_strategy
from mistral_eqx.parallel.mesh import make_mesh


def _on(model, layout, axes):
    return mx.shard(model, make_mesh(axes), Strategy(layout))


def _lowered(model, sampler, *, batch, kv_seq):
    none = jnp.zeros(batch, jnp.int32)
    decoding = Decoding.init(none, none > 0, jr.split(jr.key(0), batch), 8)
    kept = (Flat(model), decoding, sampler, jnp.zeros(2, jnp.int32), jnp.zeros((), jnp.int32))
    return decode.lower(kept, empty_cache(model, batch, kv_seq))


# Memory.

CACHE = dataclasses.replace(
    SMALL, vocab=64, embed=64, hidden=96, layers=3, kv_heads=4, head_dim=32, windows=(None,) * 3
)
KV_SEQ, BATCH = 4096, 2


@pytest.mark.parametrize(
    ("layout", "axes", "parts"),
    [
        (mx.HEADS.layout, "tp=4", {"kv_heads": 4}),
        (mx.HEAD_DIM.layout, "tp=4", {"head_dim": 4}),
        (mx.HEADS_X_KV_SEQ.layout, "kv=2,rep=2", {"kv_heads": 2, "kv_seq": 2}),
        (f"{mx.HEADS.layout} batch@dp", "dp=2,tp=2", {"batch": 2, "kv_heads": 2}),
    ],
)
@pytest.mark.slow
def test_the_loop_on_four_devices_keeps_the_cache_in_place(layout, axes, parts):
    model = _on(small_model(config=CACHE), layout, axes)
    compiled = _lowered(model, mx.Sampler(), batch=BATCH, kv_seq=KV_SEQ).compile().compiled
    batch, heads = BATCH // parts.get("batch", 1), CACHE.kv_heads // parts.get("kv_heads", 1)
    kv_seq = KV_SEQ // parts.get("kv_seq", 1)
    entries = batch * heads * kv_seq * CACHE.head_dim // parts.get("head_dim", 1)
    memory, size = compiled.memory_analysis(), 2 * CACHE.layers * entries * 4
    # Each device gives away its part of the cache and gets it back, and has not even one layer of it twice.
    assert size <= memory.alias_size_in_bytes < 1.1 * size
    scores = 4 * batch * heads * CACHE.q_per_kv * kv_seq
    assert memory.temp_size_in_bytes < 4 * scores + 8 * batch * kv_seq + 64 * 1024
    assert memory.temp_size_in_bytes < size / 2
    passed_on = ("parameter", "get-tuple-element", "tuple", "while", "bitcast")
    large = [operation for operation, count, _ in written(compiled.as_text()) if count >= entries]
    assert [operation for operation in large if operation not in passed_on] == [
        "dynamic-update-slice"
    ] * 2 * CACHE.layers


# What is exchanged for a token.

VOCAB = dataclasses.replace(SMALL, vocab=32768, embed=8, layers=1, windows=(None,))
SAMPLERS = {
    "greedy": mx.Sampler(),
    "temperature": mx.Sampler(0.7),
    "top_k": mx.Sampler(top_k=50),
    "top_p": mx.Sampler(top_p=0.9),
    "all": mx.Sampler(0.7, top_k=50, top_p=0.9),
}


@functools.lru_cache
def _wide_model():
    return small_model(config=VOCAB)


def _only_lowered(layout, axes):
    """Enters the mesh, but is not placed there: nothing runs."""
    return dataclasses.replace(with_strategy(_wide_model(), Strategy(layout)), mesh=with_auto_axes(make_mesh(axes)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("layout", "axes"), [("vocab@tp", "tp=8"), ("vocab@b,a batch@c", "a=2,b=2,c=2")])
def test_a_split_vocabulary_exchanges_candidates_and_no_logits(layout, axes, sampler):
    batch = 2
    found = exchanges(_lowered(_only_lowered(layout, axes), SAMPLERS[sampler], batch=batch, kv_seq=16))
    assert found
    # Not more than the 50 largest of each device, or 31 sums, in float32.
    assert max(size for _, size, _ in found) <= batch * 50 * 4
    if sampler in ("greedy", "temperature"):
        assert max(size for _, size, _ in found) <= batch * VOCAB.embed * 4


def test_logits_that_are_exchanged_would_be_seen():
    """Where `embed` is split every logit is a sum over devices."""
    found = exchanges(_lowered(_only_lowered("embed@tp", "tp=8"), mx.Sampler(), batch=2, kv_seq=16))
    assert max(size for _, size, _ in found) == 2 * VOCAB.vocab * 4


# Draws.

LAYOUTS = {"one axis": ("vocab@a", "a=8,b=1"), "two axes": ("vocab@b,a", "a=2,b=2")}


def _filtered_and_drawn(logits, sampler, keys, strategy):
    keys = jr.wrap_key_data(keys)
    return sampler.filter(logits, strategy), sampler(logits, keys, strategy)


# Compiled once for each kind of sampler, whatever its values and the layout that it is compared with.
_on_one_device = eqx.filter_jit(_filtered_and_drawn)


def _draws(logits, sampler, keys, layout, axes):
    """What is left of the logits, and a draw of each row, on one device and on several."""
    strategy, data = Strategy(layout), jr.key_data(keys)
    sampler = jax.tree.map(jnp.asarray, sampler)
    expected = _on_one_device(logits, sampler, data, mx.SINGLE)
    in_specs = strategy.spec("batch vocab"), jax.tree.map(lambda leaf: P(), sampler), P(), None
    arguments = jnp.asarray(logits), sampler, data, strategy
    out_specs = strategy.spec("batch vocab"), P()
    found, _ = sharded(_filtered_and_drawn, make_mesh(axes), arguments, in_specs, out_specs)
    return found, expected


def _rows(vocab=64):
    """Logits of several kinds; in all but the first many are equal."""
    draw = np.random.default_rng(0)
    far = np.full(vocab, -80.0)
    far[vocab // 2] = 80.0
    masked = draw.integers(-3, 4, vocab).astype(float)
    masked[draw.random(vocab) < 0.7] = -np.inf
    return np.stack(
        [
            draw.standard_normal(vocab) * 3,
            draw.integers(-2, 3, vocab),
            np.zeros(vocab),
            np.repeat(draw.standard_normal(vocab // 8), 8),
            np.tile(draw.standard_normal(vocab // 8), 8),
            far,
            masked,
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("split", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        # One candidate; as many as a device has, fewer, more; more than there are.
        {"temperature": 0.1, "top_k": 1},
        {"top_k": 5},
        {"top_k": 8},
        {"top_k": 13},
        {"top_k": 100},
        {"top_p": 1e-6},
        {"top_p": 0.37},
        {"top_p": 0.9},
        {"top_p": 1 - 1e-6},
        {"top_p": 1.0},
        {"temperature": 0.8, "top_k": 13, "top_p": 0.77},
        # Logits divided by these are so large that two roundings of one of them are far apart.
        {"temperature": 1e-30, "top_p": 0.5},
        {"temperature": 1e-9, "top_k": 2, "top_p": 0.5},
        {"temperature": 1e30, "top_k": 3},
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_draw_from_a_split_vocabulary_is_that_of_one_device(split, options):
    logits = jnp.asarray(_rows())
    keys = jr.split(jr.key(3), logits.shape[0])
    found, expected = _draws(logits, mx.Sampler(**options), keys, *LAYOUTS[split])
    np.testing.assert_array_equal(np.isinf(found[0]), np.isinf(expected[0]))
    np.testing.assert_allclose(found[0], expected[0], rtol=3e-7)
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("split", LAYOUTS)
def test_of_equal_logits_on_several_devices_the_first_is_greedy(split):
    logits = np.zeros((3, 64), np.float32)
    logits[1, [17, 23, 24, 63]] = 2
    logits[2, [40, 63]] = 1
    found, expected = _draws(jnp.asarray(logits), mx.Sampler(), jr.split(jr.key(0), 3), *LAYOUTS[split])
    assert found[1].tolist() == expected[1].tolist() == [0, 17, 40]


# Streams and conversations.

# One row over two devices: one of them has a row that nobody asked for. Slots dealt out to two, or to three.
TALKS = f"{mx.HEADS_X_KV_SEQ.layout} batch@dp", "dp=2,kv=2,rep=2"
STREAMS = "kv_heads@a hidden@a vocab@a tokens@a kv_seq@b", "a=2,b=3"


@functools.lru_cache
def _talking():
    return talking_model(vocab=72, max_positions=512)


def _streamed(model, **options):
    return [step.tolist() for step in mx.stream(model, PROMPTS, max_new_tokens=9, **options)]


@functools.lru_cache
def _expected_streams():
    model = _talking()
    options = [{}, {"sampler": mx.Sampler(0.8, top_k=20, top_p=0.9), "key": jr.key(5)}]
    end = _streamed(model)[3][1]
    options.append({"eos_id": end})
    return [(one, _streamed(model, **one)) for one in options]


@pytest.mark.long
def test_a_stream_from_a_mesh_is_that_of_one_device():
    model = _on(_talking(), *STREAMS)
    for options, expected in _expected_streams():
        assert _streamed(model, **options) == expected
    # The last option ends a row early.
    assert [step[1] for step in expected].count(-1) > 0


def _talk(model):
    """A conversation whose text grows, is edited, and outgrows its cache."""
    chat, said = mx.Conversation(model), []
    text = [7, 30, 2, 11]
    for more, new in (([5, 5], 6), (list(range(40)), 3), ([1], 99)):
        text = [*text, *more]
        said.append(list(chat.reply(text, max_new_tokens=new)))
        text += said[-1]
    edited = [*text[:20], 3, 4]
    said.append(list(chat.reply(edited, max_new_tokens=5)))
    # Left early, in the middle of an answer.
    reply = chat.reply([*edited, 6], max_new_tokens=9)
    said.append([next(reply), next(reply)])
    said.append(list(chat.reply([*edited, 6, *said[-1], 12], max_new_tokens=4)))
    return said


@pytest.mark.long
def test_a_conversation_on_a_mesh_is_that_of_one_device():
    assert _talk(_on(_talking(), *TALKS)) == _talk(_talking())


# Reading in pieces.


@pytest.mark.parametrize(("layout", "axes"), [("kv_seq@b,a embed@b", "a=2,b=3"), STREAMS])
@pytest.mark.parametrize("pieces", [(1, 2, 5, 3), (7, 1, 1, 2)])
@pytest.mark.slow
def test_pieces_of_any_length_go_to_their_slots(layout, axes, pieces):
    """Positions are not given: they follow those in the cache, wherever these are."""
    model = _talking()
    ids = np.random.default_rng(1).integers(0, 72, (2, sum(pieces)), np.int32)
    expected, _ = run(model, ids)
    split = _on(model, layout, axes)
    cache, start, found = empty_cache(split, 2, slots(split, sum(pieces))), 0, []
    for piece in pieces:
        logits, cache = run(split, ids[:, start : start + piece], None, cache)
        found.append(logits)
        start += piece
    assert relative_error(np.concatenate(found, axis=1), expected) < 1e-5
    assert isinstance(cache, Cache)
    # Each token has one slot.
    positions = np.asarray(cache.positions)
    assert [sorted(row[row >= 0]) for row in positions] == [list(range(sum(pieces)))] * 2
