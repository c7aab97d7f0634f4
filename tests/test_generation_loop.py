import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import (
    PROMPTS,
    VOCAB,
    count_compilations,
    greedy_without_cache,
    logits_of,
    random_prompts,
    refused,
    spy,
    talking_model,
)
from fixtures.model import padded, run
from hypothesis import given, settings, strategies as st

import mistral_eqx as mx
from mistral_eqx import Conversation, Sampler, generate, prefill, stream
from mistral_eqx.generation import reading, request
from mistral_eqx.generation.prompt import pad_left
from mistral_eqx.generation.request import Request
from mistral_eqx.nn import Cache


NUCLEUS = Sampler(temperature=1.5, top_p=0.95)
# Nearly uniform over the vocabulary: whatever repeats, repeats because of the random numbers.
ANYTHING = Sampler(temperature=1e4, top_p=1.0)


@pytest.mark.parametrize(
    "changes",
    [{"windows": (None, None), "tied": True}, {"windows": (7, 7)}, {"windows": (None, 7)}],
    ids=["full, tied", "window", "alternating"],
)
@pytest.mark.slow
def test_greedy_tokens_are_those_of_forward_passes_over_the_whole_text(changes):
    model = talking_model(**changes)
    out = generate(model, PROMPTS, max_new_tokens=24)
    assert out.tokens.dtype == out.lengths.dtype == jnp.int32
    assert out.tokens.tolist() == greedy_without_cache(model, PROMPTS, 24)
    assert out.lengths.tolist() == [24, 24, 24]
    # A model that says the same again and again would prove little.
    assert min(len(set(row)) for row in out.tokens.tolist()) >= 6


@pytest.mark.slow
def test_prompts_that_are_read_in_several_pieces_and_fill_the_context():
    model = talking_model(max_positions=1006)
    prompts = random_prompts(1000, 40)
    out = generate(model, prompts, max_new_tokens=6)
    assert out.tokens.tolist() == greedy_without_cache(model, prompts, 6, width=1006)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.long), 2, 8])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.slow
def test_16_bit_models_decode_in_any_batch(dtype, batch):
    model = talking_model(windows=(None,), dtype=dtype)
    prompts = random_prompts(*range(4, 4 + batch))
    out = generate(model, prompts, max_new_tokens=8)
    for prompt, tokens in zip(prompts, out.tokens.tolist(), strict=True):
        logits = logits_of(model, prompt + tokens, width=32)[len(prompt) - 1 : -1]
        chosen = logits[np.arange(8), tokens]
        # The likeliest each time, but for what rounding to 16 bits makes of two that are close.
        assert (logits.max(axis=-1) - chosen).max() < 0.03 * np.abs(logits).max()
        assert len(set(tokens)) > 1


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=16), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    sampler=st.sampled_from([Sampler(), NUCLEUS]),
    ends=st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_a_row_gives_what_it_gives_alone_in_any_order(rows, order, sampler, ends, seed):
    model = talking_model()
    keys = jr.split(jr.key(seed), 3)

    def continued(rows, keys):
        out = generate(model, rows, max_new_tokens=10, sampler=sampler, eos_id=ends, key=keys)
        return list(zip(out.tokens.tolist(), out.lengths.tolist(), strict=True))

    together = continued(rows, keys)
    assert together == [continued([row], keys[index : index + 1])[0] for index, row in enumerate(rows)]
    assert continued([rows[index] for index in order], keys[jnp.asarray(order)]) == [together[i] for i in order]


def test_prompts_as_arrays():
    model, rows = talking_model(), random_prompts(5, 5, 5)
    expected = generate(model, rows, max_new_tokens=4).tokens.tolist()
    for prompts in (np.array(rows), jnp.array(rows), [np.array(row) for row in rows]):
        assert generate(model, prompts, max_new_tokens=4).tokens.tolist() == expected


def ended(free, ends):
    """The tokens and lengths of rows that would go on as `free`, with end tokens."""
    lengths = [next((at + 1 for at, token in enumerate(row) if token in ends), len(row)) for row in free]
    return [row[:end] + [row[end - 1]] * (len(row) - end) for row, end in zip(free, lengths, strict=True)], lengths


@pytest.fixture(scope="module")
def free():
    """What `PROMPTS` give without an end token."""
    return generate(talking_model(), PROMPTS, max_new_tokens=24).tokens.tolist()


@pytest.mark.parametrize("as_given", [int, lambda end: (end,), lambda end: [end]], ids=["int", "tuple", "list"])
def test_an_end_token_ends_its_row_only(as_given, free):
    only_first = next(token for token in free[0][2:] if all(token not in row for row in free[1:]))
    tokens, lengths = ended(free, [only_first])
    assert lengths[0] < 24
    assert lengths[1:] == [24, 24]
    out = generate(talking_model(), PROMPTS, max_new_tokens=24, eos_id=as_given(only_first))
    assert out.lengths.tolist() == lengths
    assert out.tokens.tolist() == tokens


def test_trap_no_stop_at_eos(free, monkeypatch):
    calls = spy(monkeypatch, "decode")
    ends = [free[0][9], free[1][6], free[2][3]]
    tokens, lengths = ended(free, ends)
    # Each row ends by itself, and the length counts the end token.
    assert max(lengths) <= 10
    assert len(set(lengths)) > 1
    assert all(row[length - 1] in ends for row, length in zip(free, lengths, strict=True))
    out = generate(talking_model(), PROMPTS, max_new_tokens=24, eos_id=ends)
    assert out.lengths.tolist() == lengths
    assert out.tokens.tolist() == tokens
    # No step was taken after the last row's end.
    ((_, (decoding, _)),) = calls
    assert int(decoding.step) == max(lengths)


def test_no_end_token_stops_nothing(free):
    for eos_id in (None, (), []):
        assert generate(talking_model(), PROMPTS, max_new_tokens=24, eos_id=eos_id).tokens.tolist() == free


def test_rows_that_end_with_their_first_token(free):
    out = generate(talking_model(), PROMPTS, max_new_tokens=24, eos_id=[row[0] for row in free])
    assert out.lengths.tolist() == [1, 1, 1]
    assert out.tokens.tolist() == [[row[0]] * 24 for row in free]


def test_one_token_needs_no_loop(free, monkeypatch):
    calls = spy(monkeypatch, "decode")
    out = generate(talking_model(), PROMPTS, max_new_tokens=1)
    assert out.tokens.tolist() == [row[:1] for row in free]
    assert out.lengths.tolist() == [1, 1, 1]
    assert calls == []


def test_trap_key_never_split():
    model = talking_model()

    def drawn(key, prompts=(PROMPTS[0],) * 3):
        return generate(model, prompts, max_new_tokens=24, sampler=ANYTHING, key=key).tokens.tolist()

    first = drawn(jr.key(0))
    # Two steps draw on their own, two rows with the same prompt too.
    assert min(len(set(row)) for row in first) > 12
    for row, other in itertools.combinations(first, 2):
        assert sum(a == b for a, b in zip(row, other, strict=True)) < 6
    # The same key gives the same again, another one does not.
    assert drawn(jr.key(0)) == first
    assert drawn(jr.key(1)) != first


def test_a_row_draws_by_its_place_or_by_its_own_key():
    model = talking_model()

    def drawn(prompts, key):
        return generate(model, prompts, max_new_tokens=8, sampler=ANYTHING, key=key).tokens.tolist()

    # One key for all: what a row draws depends on its place, not on how many rows follow.
    assert drawn(PROMPTS, jr.key(3))[0] == drawn(PROMPTS[:1], jr.key(3))[0]
    # One key each: equal keys draw equally.
    keys = jr.key(3), jr.key(4), jr.key(3)
    rows = drawn([PROMPTS[0]] * 3, jnp.stack(keys))
    assert rows[0] == rows[2] != rows[1]


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
@pytest.mark.slow
def test_trap_temperature_alone_crashed(options):
    model = talking_model(windows=(None,))
    out = generate(model, PROMPTS[:1], max_new_tokens=4, sampler=Sampler(**options), key=jr.key(0))
    assert out.tokens.shape == (1, 4)
    assert np.isin(out.tokens, range(VOCAB)).all()


def test_trap_top_p_filter_undone_while_decoding():
    model, nucleus = talking_model(), Sampler(top_p=0.5)
    (tokens,) = generate(model, PROMPTS[:1], max_new_tokens=50, sampler=nucleus, key=jr.key(0)).tokens.tolist()
    logits = logits_of(model, PROMPTS[0] + tokens, width=64)[2:-1]
    kept = np.isfinite(nucleus.filter(jnp.asarray(logits)))
    assert kept[np.arange(50), tokens].all()
    # There was something to leave out, and something to choose from.
    assert kept.sum(axis=1).max() > 1
    assert kept.sum(axis=1).max() < VOCAB


def started(prompts, new=24):
    """A request and its state after the prompts were read."""
    request = Request.init(talking_model(), prompts, new, Sampler(), None, None)
    return request, *request.start(prompts)


def in_order(cache, row):
    """The positions of a row, ascending, and the keys at these positions of the layers that keep all of them."""
    positions = np.asarray(cache.positions[row])
    slots = [slot for slot in np.argsort(positions) if positions[slot] >= 0]
    whole = [layer for layer in cache.layers if max(slots) < layer.slots]
    return positions[slots].tolist(), [np.asarray(layer.k[row])[:, slots] for layer in whole]


def test_trap_rope_positions_not_shifted_for_left_padding():
    request, decoding, on_the_left = started(PROMPTS)
    _, on_the_right = run(request.model, *padded(PROMPTS, 16, "right"), Cache.init(request.model.config, 3, 16))
    for row, prompt in enumerate(PROMPTS):
        positions, keys = in_order(on_the_left, row)
        assert positions == list(range(len(prompt)))
        assert int(decoding.position[row]) == len(prompt)
        # The keys are turned as they are where the text begins in the first column.
        for left, right in zip(keys, in_order(on_the_right, row)[1], strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def test_trap_masks_not_extended_to_padding():
    model = talking_model()
    ids, positions = pad_left(PROMPTS, 16)
    read = [
        reading.read_chunk((model, jnp.where(positions < 0, filler, ids), positions), Cache.init(model.config, 3, 16))
        for filler in (0, 17)
    ]
    # Whatever stands in the padding, no token sees it.
    np.testing.assert_array_equal(read[0][0], read[1][0])
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(read[0][0][row], logits_of(model, prompt, width=64)[-1], rtol=1e-4, atol=1e-4)


def test_trap_mask_of_the_prompt_reused_while_decoding():
    request, decoding, cache = started(PROMPTS)
    decoding, cache = request.decode(decoding, cache, 12)
    logits, _ = run(request.model, decoding.token[:, None], decoding.position[:, None], cache)
    for row, prompt in enumerate(PROMPTS):
        tokens = decoding.tokens[row, :12].tolist()
        # The last token is not in the cache yet; all before it are, each at its place.
        assert in_order(cache, row)[0] == list(range(len(prompt) + 11))
        np.testing.assert_allclose(
            logits[row, 0], logits_of(request.model, prompt + tokens, width=64)[-1], rtol=1e-4, atol=1e-4
        )


def test_trap_list_of_caches_aliased():
    config = talking_model().config
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(Cache.init(config, 3, 16))]
    assert len(set(buffers)) == len(buffers)
    # After a prompt no layer has the keys or values of another.
    _, _, cache = started(PROMPTS)
    arrays = [array for layer in cache.layers for array in (layer.k, layer.v)]
    for one, other in itertools.combinations(arrays, 2):
        assert not np.allclose(one[:, :, :16], other[:, :, :16])


def test_trap_padding_to_a_fixed_maximum_made_every_step_slow(monkeypatch):
    prefills, decodes = spy(monkeypatch, "read_chunk"), spy(monkeypatch, "decode")
    generate(talking_model(max_positions=4096), PROMPTS, max_new_tokens=24)
    # The prompt is read into no more slots than it has columns; the loop has those that it can fill, in few sizes.
    assert [cache.kv_seq for _, (_, cache) in prefills] == [16]
    assert [cache.kv_seq for _, (_, cache) in decodes] == [128]


@pytest.mark.slow
def test_the_cache_grows_as_the_text_does(monkeypatch):
    model = talking_model(windows=(None,))
    decodes = spy(monkeypatch, "decode")
    # Few tokens of many that are allowed: not a cache for all of these.
    (end,) = set(generate(model, PROMPTS[:1], max_new_tokens=1).tokens[0].tolist())
    assert decodes == []
    generate(model, PROMPTS[:1], max_new_tokens=4000, eos_id=[id for id in range(VOCAB) if id != end])
    assert [cache.kv_seq for _, (_, cache) in decodes] == [256]
    decodes.clear()
    expected = generate(model, PROMPTS, max_new_tokens=1000).tokens
    # 16 columns of prompts, and then slots for 999 tokens: each cache is at most twice the one before, and is full.
    assert [cache.kv_seq for _, (_, cache) in decodes] == [256, 512, 1024]
    assert [int(decoding.step) for _, (decoding, _) in decodes] == [241, 497, 1000]
    assert [decoding.tokens.shape for _, (decoding, _) in decodes] == [(3, 256), (3, 512), (3, 1024)]
    decodes.clear()
    # In one cache from the start it is the same.
    with monkeypatch.context() as patch:
        patch.setattr(request, "first_room", lambda max_new_tokens: max_new_tokens)
        np.testing.assert_array_equal(generate(model, PROMPTS, max_new_tokens=1000).tokens, expected)
    assert [cache.kv_seq for _, (_, cache) in decodes] == [1024]
    decodes.clear()
    streamed = np.stack(list(stream(model, PROMPTS, max_new_tokens=300)), 1)
    np.testing.assert_array_equal(streamed, expected[:, :300])
    assert [cache.kv_seq for _, (_, cache) in decodes] == [256] * 240 + [384] * 59


@pytest.mark.slow
def test_a_conversation_grows_its_cache_as_its_text_does():
    model, chat = talking_model(windows=(None,)), Conversation(talking_model(windows=(None,)))
    said = list(chat.reply(PROMPTS[0], max_new_tokens=300))
    assert [said] == generate(model, PROMPTS[:1], max_new_tokens=300).tokens.tolist()
    assert chat._cache is not None
    assert chat._cache.kv_seq == 384
    text = [*PROMPTS[0], *said, 5]
    assert [list(chat.reply(text, max_new_tokens=20))] == generate(model, [text], max_new_tokens=20).tokens.tolist()


@pytest.mark.slow
def test_a_cache_that_grows_on_a_mesh():
    model = talking_model(windows=(None,), vocab=60)
    prompts, options = [[1, 2, 3], [4] * 9], {"max_new_tokens": 300, "logprobs": 1}
    expected = generate(model, prompts, **options)
    split = mx.shard(model, mx.make_mesh("kv=2,rep=2"), mx.HEADS_X_KV_SEQ)
    found = generate(split, prompts, **options)
    assert found.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)


# What is compiled for one length serves many draws of these.
_WIDTHS, _CHUNKS = st.sampled_from([16, 32]), st.sampled_from([1, 5, 16])


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=16), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    width=_WIDTHS,
    chunk=_CHUNKS,
    side=st.sampled_from(["left", "right"]),
)
@pytest.mark.slow
def test_padding_order_and_pieces_change_nothing(rows, order, width, chunk, side):
    model = talking_model()
    alone = [logits_of(model, row, width=64)[-1] for row in rows]
    ids, positions = padded([rows[index] for index in order], width, side)
    cache, logits = Cache.init(model.config, 3, width), {}
    for start in range(0, width, chunk):
        columns = slice(start, start + chunk)
        piece, cache = run(model, ids[:, columns], positions[:, columns], cache)
        # The last column that holds a token of a row tells what comes after it.
        for row in range(3):
            last = len(rows[order[row]]) - 1
            if last in positions[row, columns]:
                logits[row] = piece[row, positions[row, columns].tolist().index(last)]
    for row in range(3):
        np.testing.assert_allclose(logits[row], alone[order[row]], atol=1e-5 * np.abs(alone[order[row]]).max())


@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=16), min_size=3, max_size=3),
    width=_WIDTHS,
    chunk=_CHUNKS,
    side=st.sampled_from(["left", "right"]),
    begin=st.integers(0, 8),
)
@pytest.mark.slow
def test_arrays_with_padding_pieces_and_prefixes_give_the_same_tokens(rows, width, chunk, side, begin):
    model = talking_model(windows=(7,))
    expected = generate(model, rows, max_new_tokens=6).tokens.tolist()
    ids, positions = padded(rows, width, side)
    array = np.where(positions < 0, -1, ids)
    assert generate(model, array, max_new_tokens=6, prefill_chunk=chunk).tokens.tolist() == expected
    # The same texts, of which a part was read before.
    start = [17, *[3] * begin]
    whole = generate(model, [start + row for row in rows], max_new_tokens=6).tokens.tolist()
    prefix = prefill(model, start, prefill_chunk=chunk)
    assert generate(model, rows, max_new_tokens=6, prefix=prefix, prefill_chunk=chunk).tokens.tolist() == whole


def read_tokens(prefills):
    return [int((np.asarray(positions) >= 0).sum()) for ((_, _, positions), _), _ in prefills]


def test_a_prefix_is_read_once(monkeypatch):
    model, prefills = talking_model(windows=(None,)), spy(monkeypatch, "read_chunk")
    (start,) = random_prompts(40)
    prefix = prefill(model, np.asarray(start))
    assert read_tokens(prefills) == [40]
    prefills.clear()
    options = {"max_new_tokens": 8, "sampler": NUCLEUS, "key": jr.key(2)}
    for rows in (PROMPTS, PROMPTS):
        out = generate(model, rows, prefix=prefix, **options)
        assert read_tokens(prefills) == [sum(map(len, rows))]
        expected = generate(model, [start + row for row in rows], **options)
        assert out.tokens.tolist() == expected.tokens.tolist()
        streamed = stream(model, rows, prefix=prefix, **options)
        assert np.stack(list(streamed), 1).tolist() == expected.tokens.tolist()
        prefills.clear()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(prefix.cache))


@pytest.mark.parametrize(
    ("axes", "strategy"), [("dp=2,tp=2", mx.HEADS + "batch@dp"), ("kv=2,rep=2", mx.HEADS_X_KV_SEQ)]
)
@pytest.mark.slow
def test_prefixes_and_samples_on_a_mesh(axes, strategy):
    model = talking_model(windows=(None,), vocab=60)
    start, rows = [1, 2, 3, 4, 5], [[7, 8], [9] * 5, [10]]
    options = {"max_new_tokens": 6, "sampler": NUCLEUS, "key": jr.key(2), "num_samples": 2}
    expected = generate(model, [start + row for row in rows], **options).tokens.tolist()
    split = mx.shard(model, mx.make_mesh(axes), strategy)
    prefix = prefill(split, start)
    for _ in range(2):
        assert generate(split, rows, prefix=prefix, **options).tokens.tolist() == expected


@pytest.mark.slow
def test_samples_of_a_prompt_read_it_once(monkeypatch):
    model, prefills = talking_model(windows=(None,)), spy(monkeypatch, "read_chunk")
    options = {"max_new_tokens": 8, "sampler": ANYTHING, "key": jr.key(5)}
    out = generate(model, PROMPTS, num_samples=4, **options)
    assert [ids.shape for ((_, ids, _), _), _ in prefills] == [(3, 16)]
    assert out.tokens.shape == (12, 8)
    # They are those of a batch in which each prompt stands four times, and differ from each other.
    assert out.tokens.tolist() == generate(model, [row for row in PROMPTS for _ in range(4)], **options).tokens.tolist()
    assert len({tuple(row) for row in out.tokens.tolist()}) == 12
    # One key a prompt: its samples depend on that alone.
    keys = jr.split(jr.key(6), 3)
    out = generate(model, PROMPTS, num_samples=2, **(options | {"key": keys}))
    alone = generate(model, PROMPTS[1:2], num_samples=2, **(options | {"key": keys[1:2]}))
    assert out.tokens[2:4].tolist() == alone.tokens.tolist()
    assert out.tokens[2].tolist() != out.tokens[3].tolist()


@pytest.mark.slow
def test_log_probabilities_are_the_models_own():
    model = talking_model(windows=(None,))
    for sampler in (Sampler(), Sampler(temperature=3.0, top_k=5, processors=[mx.BannedTokens([1, 2])])):
        out = generate(model, PROMPTS, max_new_tokens=12, sampler=sampler, key=jr.key(0), logprobs=5)
        assert out.log_probs.shape == (3, 12)
        assert out.top_tokens.shape == out.top_log_probs.shape == (3, 12, 5)
        for row, prompt in enumerate(PROMPTS):
            tokens = out.tokens[row].tolist()
            logits = logits_of(model, prompt + tokens, width=64)[len(prompt) - 1 : -1].astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            np.testing.assert_allclose(out.log_probs[row], expected[np.arange(12), tokens], atol=1e-4)
            order = np.argsort(-expected, axis=-1)[:, :5]
            np.testing.assert_array_equal(out.top_tokens[row], order)
            np.testing.assert_allclose(out.top_log_probs[row], np.take_along_axis(expected, order, 1), atol=1e-4)


def test_log_probabilities_of_the_chosen_tokens_alone():
    out = generate(talking_model(windows=(None,)), PROMPTS, max_new_tokens=12, logprobs=0)
    assert out.top_tokens.shape == (3, 12, 0)
    both = generate(talking_model(windows=(None,)), PROMPTS, max_new_tokens=12, logprobs=1)
    np.testing.assert_array_equal(out.log_probs, both.log_probs)
    # Greedy: the chosen one is the likeliest.
    np.testing.assert_array_equal(both.log_probs, both.top_log_probs[..., 0])
    np.testing.assert_array_equal(both.tokens, both.top_tokens[..., 0])
    without = generate(talking_model(), PROMPTS, max_new_tokens=12)
    assert without.log_probs is without.top_tokens is without.top_log_probs is without.texts is None


def test_trap_recompiled_every_token():
    # A model of its own shape, for which nothing has been compiled yet.
    model = talking_model(windows=(None,), norm_eps=2e-5)
    with count_compilations() as compiled:
        generate(model, [[1, 2, 3]], max_new_tokens=40)
    assert compiled["read_chunk"] == compiled["decode"] == 1
    with count_compilations() as compiled:
        generate(model, [[4, 5, 6, 7, 8]], max_new_tokens=40)
    assert not compiled
    with count_compilations() as compiled:
        assert len(list(stream(model, [[4, 5]], max_new_tokens=40))) == 40
        # Fewer new tokens, in the same cache.
        generate(model, [[6]], max_new_tokens=30)
    assert compiled["read_chunk"] == compiled["decode"] == compiled["first_tokens"] == 0


def test_prompts_of_many_lengths_share_programs():
    model = talking_model(windows=(None,), norm_eps=3e-5)
    with count_compilations() as compiled:
        for length in (1, 16, 17, 23, 32):
            generate(model, random_prompts(length), max_new_tokens=2)
    assert compiled["read_chunk"] == 2
    assert compiled["decode"] == 1


def test_another_temperature_or_top_p_compiles_nothing():
    model = talking_model()

    def draw(sampler):
        return generate(model, PROMPTS, max_new_tokens=10, sampler=sampler, key=jr.key(0)).tokens.tolist()

    warm = draw(NUCLEUS)
    with count_compilations() as compiled:
        cold = draw(Sampler(temperature=1e-3, top_p=0.5))
    assert not compiled
    assert cold != warm
    assert cold == generate(model, PROMPTS, max_new_tokens=10).tokens.tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": []}, ["There is no prompt"]),
        ({"prompts": [[1], []]}, ["Prompt 1 is empty"]),
        ({"prompts": [[1, VOCAB]]}, [f"token id {VOCAB}"]),
        ({"prompts": [[-1]]}, ["token id -1"]),
        ({"prompts": [[0.5]]}, ["flat list of token ids"]),
        ({"prompts": [1, 2]}, ["flat list of token ids"]),
        ({"prompts": [[1] * 60], "max_new_tokens": 5}, ["60 tokens", "5 new ones", "context of 64 tokens"]),
        ({"prompts": [[1], [1] * 70]}, ["70 tokens", "context of 64 tokens"]),
        ({"max_new_tokens": 0}, ["max_new_tokens is 0", "at least 1"]),
        ({"max_new_tokens": -1}, ["max_new_tokens is -1", "at least 1"]),
        ({"eos_id": VOCAB}, [f"end token {VOCAB}", f"vocabulary of {VOCAB}"]),
        ({"eos_id": [2, -1]}, ["end token -1"]),
        ({"sampler": NUCLEUS}, ["give a key"]),
        ({"sampler": NUCLEUS, "key": jr.split(jr.key(0), 3)}, ["2 prompts", "keys of shape (3,)"]),
        ({"sampler": NUCLEUS, "key": jr.split(jr.key(0), (2, 1))}, ["2 prompts", "keys of shape (2, 1)"]),
        ({"sampler": NUCLEUS, "key": jr.PRNGKey(0)}, ["jax.random.key"]),
        ({"sampler": NUCLEUS, "key": 0}, ["jax.random.key"]),
        ({"num_samples": 0, "sampler": NUCLEUS}, ["num_samples is 0", "at least 1"]),
        ({"num_samples": 3}, ["num_samples is 3", "are the same", "temperature"]),
        ({"prefill_chunk": 0}, ["prefill_chunk is 0", "at least 1"]),
        ({"prefill_chunk": 2.5}, ["prefill_chunk is 2.5", "whole number"]),
        ({"max_new_tokens": 2.5}, ["max_new_tokens is 2.5", "whole number"]),
        ({"num_samples": 1.5, "sampler": NUCLEUS}, ["num_samples is 1.5", "whole number"]),
        ({"eos_id": 1.5}, ["end token is 1.5", "whole number"]),
    ],
)
@pytest.mark.parametrize("call", [generate, stream])
def test_mistakes_are_refused_in_one_sentence(call, arguments, words):
    # `stream` too refuses at the call, not when its first token is asked for.
    with refused(*words):
        call(talking_model(max_positions=64), **({"prompts": [[1], [2]], "max_new_tokens": 4} | arguments))


def test_mistakes_of_generate_alone_are_refused_in_one_sentence():
    model, other = talking_model(max_positions=64), talking_model()
    for number in (-1, VOCAB + 1, 1.5):
        with refused(f"logprobs is {number}", {-1: "at least 0", 1.5: "whole number"}.get(number, f"at most {VOCAB}")):
            generate(model, PROMPTS, max_new_tokens=4, logprobs=number)
    with refused("belongs to another model"):
        generate(model, PROMPTS, max_new_tokens=4, prefix=prefill(other, [1, 2]))
    with refused("54 tokens", "context of 64"):
        generate(model, PROMPTS, max_new_tokens=20, prefix=prefill(model, [1] * 40))
    for prefix, words in (([], ["is empty"]), ([VOCAB], [f"token id {VOCAB}"]), ([1] * 64, ["64 tokens"])):
        with refused(*words):
            prefill(model, prefix)
    with refused("Prompt 1 is empty"):
        generate(model, np.array([[1, 2], [-1, -1]]), max_new_tokens=4)
    with refused("token id -1"):
        generate(model, np.array([[1, -1, 2]]), max_new_tokens=4)
