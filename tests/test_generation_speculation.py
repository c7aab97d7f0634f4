"""Speculation changes the time, never the tokens: greedy or drawn, they are those of plain decoding."""

import dataclasses
import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import (
    PROMPTS,
    VOCAB,
    count_compilations,
    logits_of,
    near_model,
    random_prompts,
    refused,
    talking_model,
)
from fixtures.model import SMALL, small_model
from fixtures.sharding import written as writes
from hypothesis import given, settings, strategies as st
from jaxtyping import Array, Int
from scipy.stats import chi2

import mistral_eqx as mx
from mistral_eqx import Conversation, Draft, PromptLookup, Sampler, generate, prefill, stream
from mistral_eqx.generation import clock, request
from mistral_eqx.generation.flat import Flat
from mistral_eqx.generation.loop import Decoding
from mistral_eqx.generation.proposals import look_up
from mistral_eqx.generation.speculation import Balance, Limits, Speculation, Tally, speculate
from mistral_eqx.nn import Cache
from mistral_eqx.parallel import Strategy


# Proposals in each pass, however few are accepted: what can go wrong goes wrong most often so. In a vocabulary of 61
# tokens, most have occurred before.
LOOKUP = PromptLookup(tokens=3, ngram=1, cost=0.0)
NUCLEUS = Sampler(temperature=1.5, top_p=0.95)
# Low enough that two models often agree.
COLD = Sampler(temperature=0.3, top_k=20)


def compare(model, prompts, proposer, **options):
    """Checks that the tokens are those of plain decoding, and gives the acceptance."""
    # As many end tokens as the other tests have, so that they share a program; none of these is ever said.
    options = {"max_new_tokens": 24, "eos_id": [VOCAB - 1] * 3, **options}
    expected, found = (generate(model, prompts, **options, **more) for more in ({}, {"speculate": proposer}))
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert expected.acceptance is None
    accepted, proposed, passes, steps = found.acceptance
    # Each pass gives a row at least one token, and its accepted proposals.
    longest = int(max(found.lengths)) - 1
    assert 0 <= accepted <= proposed
    assert -(-longest // (1 + proposer.tokens)) <= passes + steps <= longest
    return found.acceptance


def test_greedy_tokens_are_those_without_lookups():
    # One layer has a window, and rows accept different numbers.
    found = compare(talking_model(), PROMPTS, LOOKUP)
    assert found.proposed > 3 * 10
    assert found.steps == 0


def test_greedy_tokens_are_those_without_a_draft():
    found = compare(talking_model(), PROMPTS, Draft(near_model(), tokens=3, cost=0.0))
    assert 0.1 < found.rate < 1
    # The model itself is always right: one token comes from the prompt's logits, then four from each pass.
    found = compare(talking_model(), PROMPTS, Draft(talking_model(), tokens=3, cost=0.0), max_new_tokens=25)
    assert found == (3 * 18, 3 * 18, 6, 0)
    assert found.rate == 1


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.slow
def test_drawn_tokens_are_those_without_speculation(kind):
    proposer = LOOKUP if kind == "lookup" else Draft(near_model(), tokens=3, cost=0.0)
    found = compare(talking_model(), PROMPTS, proposer, sampler=COLD, key=jr.key(3))
    assert found.accepted > 0


PROCESSORS = [
    # Less than one and negative: what was said before is said again.
    mx.RepetitionPenalty(0.7),
    mx.FrequencyPenalty(-0.5),
    mx.LogitBias({3: 1.0}),
    mx.BannedTokens([5]),
    mx.MinNewTokens(9),
]


def _no_repeats():
    """Forbids the last token, by a state that has the dimension of rows alone."""

    def allowed(last):
        return jnp.arange(VOCAB) != last

    return mx.Constraint(allowed, lambda last, token: token, jnp.zeros((), jnp.int32))


@pytest.mark.slow
def test_processors_see_the_tokens_of_each_row():
    options = {"max_new_tokens": 24, "key": jr.key(2)}
    options["sampler"] = Sampler(temperature=0.7, top_p=0.95, processors=(*PROCESSORS, _no_repeats()))
    ends = [VOCAB - 1] * 3
    free = generate(talking_model(), PROMPTS, eos_id=ends, **options).tokens.tolist()
    # Each row would end early but for the processor, and ends at another length.
    ends = [free[0][3], free[1][12], free[2][16]]
    found = compare(talking_model(), PROMPTS, LOOKUP, eos_id=ends, **options)
    assert found.accepted > 0


def test_rows_end_in_the_middle_of_a_pass():
    free = generate(talking_model(), PROMPTS, max_new_tokens=24, eos_id=[VOCAB - 1] * 3).tokens.tolist()
    draft = Draft(talking_model(), tokens=3, cost=0.0)
    for at in range(2, 6):
        compare(talking_model(), PROMPTS, draft, eos_id=[row[at] for row in free])
    for new in (1, 2, 3, 4):
        compare(talking_model(), PROMPTS, LOOKUP, max_new_tokens=new)


def test_a_stream_gives_each_row_its_tokens():
    free = generate(talking_model(), PROMPTS, max_new_tokens=24, eos_id=[VOCAB - 1] * 3).tokens.tolist()
    for ends in ([VOCAB - 1] * 3, [free[1][7]] * 3):
        options = {"max_new_tokens": 24, "eos_id": ends}
        plain = np.stack(list(stream(talking_model(), PROMPTS, **options)))
        tokens = stream(talking_model(), PROMPTS, speculate=LOOKUP, **options)
        np.testing.assert_array_equal(np.stack(list(tokens)), plain)
        assert tokens.acceptance.proposed >= tokens.acceptance.accepted > 0


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.slow
def test_a_conversation_keeps_both_caches(kind):
    model = talking_model()
    proposer = LOOKUP if kind == "lookup" else Draft(near_model(), tokens=3, cost=0.0)
    chat, text = Conversation(model, speculate=proposer), [7, 30, 2, 11]
    for more, new in (([5, 5], 7), ([9, 1, 2], 8), ([], 5)):
        text = [*text, *more]
        said = list(chat.reply(text, max_new_tokens=new))
        assert [said] == generate(model, [text], max_new_tokens=new).tokens.tolist()
        text += said
    # Left in the middle of a pass, then edited.
    reply = chat.reply([*text, 6], max_new_tokens=9)
    left = [next(reply), next(reply)]
    for edited in ([*text, 6, *left, 12], [*text[:9], 3, 4]):
        said = list(chat.reply(edited, max_new_tokens=6))
        assert [said] == generate(model, [edited], max_new_tokens=6).tokens.tolist()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=16), min_size=2, max_size=2),
    ngram=st.integers(1, 3),
)
def test_a_lookup_is_what_it_is_defined_to_be(rows, ngram):
    text = np.full((2, 20), 9, np.int32)
    for index, row in enumerate(rows):
        text[index, : len(row)] = row
    last = jnp.asarray([len(row) - 1 for row in rows], jnp.int32)
    found = look_up(jnp.asarray(text), last, 5, ngram).tolist()
    for row, proposed in zip(rows, found, strict=True):
        expected = [-1] * 5
        for end in range(ngram, len(row)):
            if row[end - ngram : end] == row[-ngram:]:
                expected = list(itertools.islice(itertools.cycle(row[end:]), 5))
        assert proposed == expected


def test_proposals_pause_where_they_do_not_pay():
    lookup, cost = Balance.init(PromptLookup(tokens=4)), jnp.float32(1.5)
    # Two new tokens a pass to begin with.
    assert float(lookup.gain) == 2
    trials, balance = [], lookup
    for _ in range(6):
        passes = 0
        while int(balance.wait) == 0:
            balance, passes = balance.after_pass(jnp.float32(1), cost), passes + 1
        trials.append((passes, int(balance.wait)))
        for _ in range(int(balance.wait)):
            balance = balance.after_step()
    # Each bad trial makes the next pause longer.
    assert trials == [(3, 8), (1, 16), (1, 32), (1, 64), (1, 128), (1, 128)]
    # A good one makes it short again.
    assert int(balance.after_pass(jnp.float32(4), cost).pause) == 8
    draft = Balance.init(Draft(talking_model()))
    for _ in range(100):
        draft = draft.after_pass(jnp.float32(1), cost)
    assert int(draft.wait) > 10**9


def test_what_does_not_pay_is_turned_off():
    model, never = talking_model(), PromptLookup(tokens=3, ngram=1, cost=4.0)
    found = compare(model, PROMPTS, never, max_new_tokens=60)
    # A trial, then one pass after each pause.
    assert found.passes <= 6
    assert found.steps > 40
    bad = Draft(small_model(seed=5, config=model.config), tokens=3, cost=3.0)
    found = compare(model, PROMPTS, bad, max_new_tokens=60)
    assert found.steps > 0


def test_the_cost_is_measured_once(monkeypatch):
    model, measured, add = talking_model(), [], clock.Clock.add
    clock.clock_of.cache_clear()
    monkeypatch.setattr(clock.Clock, "add", lambda self, seconds: measured.append(self.wanted) or add(self, seconds))
    proposer = PromptLookup(tokens=3, ngram=1)
    options = {"max_new_tokens": 48, "eos_id": [VOCAB - 1] * 3}
    expected = generate(model, PROMPTS, **options).tokens.tolist()
    first = generate(model, PROMPTS, **options, speculate=proposer)
    # Three passes of each kind are measured, in the program that decodes.
    assert measured == [0, np.inf] * 3
    with count_compilations() as compiled:
        second = generate(model, PROMPTS, **options, speculate=proposer)
        other = generate(model, PROMPTS, **options, speculate=dataclasses.replace(proposer, cost=2.5))
    assert not compiled
    assert len(measured) == 6
    assert first.tokens.tolist() == second.tokens.tolist() == other.tokens.tolist() == expected


@pytest.mark.slow
def test_the_caches_are_updated_in_place():
    """Two loops inside a loop, and no copy of a cache in any of them."""
    config = dataclasses.replace(SMALL, vocab=64, embed=64, hidden=96, head_dim=32, max_positions=4096)
    model, kv_seq = small_model(config=config), 4096
    none = jnp.zeros(2, jnp.int32)
    proposer = Draft(small_model(seed=1, config=config), tokens=3)
    now = Speculation(
        Cache.init(config, 2, kv_seq),
        Cache.init(config, 2, kv_seq),
        jnp.zeros((2, kv_seq), jnp.int32),
        Balance.init(proposer),
        Tally.init(),
    )
    decoding = Decoding.init(none, none > 0, jr.split(jr.key(0), 2), 64)
    limits = Limits.init(until=9, new_tokens=9, room=kv_seq, draft_room=kv_seq, passes=9, cost=0.0)
    kept = (Flat(model), proposer.flat, decoding, Sampler(), jnp.zeros(1, jnp.int32), limits, 3, 0)
    compiled = speculate.lower(kept, now).compile().compiled
    size, memory = sum(leaf.nbytes for leaf in jax.tree.leaves((now.cache.layers, now.draft.layers))), None
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4
    entries = 2 * config.kv_heads * kv_seq * config.head_dim
    passed_on = ("parameter", "get-tuple-element", "tuple", "while", "bitcast")
    large = [operation for operation, count, _ in writes(compiled.as_text()) if count >= entries]
    assert {operation for operation in large if operation not in passed_on} == {"dynamic-update-slice"}


class AnyText:
    """A grammar, and a guide, that allows all tokens."""

    def guide(self):
        return self

    def allowed(self):
        return np.ones(VOCAB, bool)

    def push(self, id):
        pass


@pytest.mark.parametrize(
    ("proposer", "options", "words"),
    [
        (3, {}, ["speculate is 3", "PromptLookup"]),
        (LOOKUP, {"logprobs": 2}, ["logprobs", "speculate", "leave one"]),
        (LOOKUP, {"sampler": Sampler(processors=[mx.Guided(AnyText())])}, ["A grammar", "leave speculate out"]),
        ("vocab", {}, ["vocabulary of 60", "one of 61"]),
        ("mesh", {}, ["other devices", "mistral_eqx.shard"]),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(proposer, options, words):
    if proposer == "vocab":
        proposer = Draft(talking_model(vocab=60))
    elif proposer == "mesh":
        proposer = Draft(mx.shard(talking_model(), mx.make_mesh("dp=2"), Strategy("batch@dp")))
    with refused(*words):
        generate(talking_model(), PROMPTS, speculate=proposer, **options)


def test_numbers_outside_their_range_are_refused():
    for make, words in (
        (lambda: PromptLookup(tokens=0), "tokens is 0"),
        (lambda: PromptLookup(tokens=65), "tokens is 65"),
        (lambda: PromptLookup(ngram=0), "ngram is 0"),
        (lambda: PromptLookup(cost=-1.0), "cost is -1.0"),
        (lambda: Draft(3), "model is 3"),
    ):
        with refused(words):
            make()


# Longer ones.


class Counter(eqx.Module):
    count: Int[Array, ""]


class EveryOther(mx.AbstractProcessor):
    """Counts for all rows together."""

    def init_state(self, texts, ends, vocab):
        return Counter(jnp.zeros((), jnp.int32))

    def __call__(self, logits, state, ids):
        return jnp.where(state.count % 2 == 0, logits, -logits)

    def next_state(self, state, tokens, ids):
        return Counter(state.count + 1)


@pytest.mark.slow
def test_a_state_for_all_rows_together_is_refused():
    with refused("[0].count", "no dimension 'batch'", "one entry a row"):
        generate(talking_model(), PROMPTS, sampler=Sampler(processors=[EveryOther()]), speculate=LOOKUP)


@pytest.mark.slow
def test_stop_strings_end_a_row_in_the_middle_of_a_pass():
    from test_generation_stops import TOKENIZER

    model = talking_model()
    free = generate(model, PROMPTS, max_new_tokens=24, tokenizer=TOKENIZER)
    for word in {text[at : at + 2] for text in free.texts for at in (4, 9)}:
        options = {"max_new_tokens": 24, "stop": word, "tokenizer": TOKENIZER}
        expected = generate(model, PROMPTS, **options)
        steps = np.stack(list(stream(model, PROMPTS, **options)))
        for proposer in (LOOKUP, Draft(model, tokens=3, cost=0.0)):
            found = generate(model, PROMPTS, speculate=proposer, **options)
            assert found.texts == expected.texts
            assert found.lengths.tolist() == expected.lengths.tolist()
            streamed = np.stack(list(stream(model, PROMPTS, speculate=proposer, **options)))
            np.testing.assert_array_equal(streamed, steps)


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.slow
def test_caches_are_packed_and_grow(kind, monkeypatch):
    model = talking_model(windows=(None,), max_positions=2048)
    # One row repeats itself from the start, the others do not: their slots become padding.
    prompts = [[3, 4] * 8, *random_prompts(5, 9, 16)]
    draft = Draft(model, tokens=6, cost=0.0)
    proposer = PromptLookup(tokens=6, ngram=1, cost=0.0) if kind == "lookup" else draft
    packed, pack = [], request.pack
    monkeypatch.setattr(request, "pack", lambda *arguments: packed.append(pack(*arguments)) or packed[-1])
    bias = Sampler(processors=[mx.RepetitionPenalty(0.6)])
    compare(model, prompts, proposer, max_new_tokens=600, sampler=bias)
    if kind == "lookup":
        assert packed


@pytest.mark.long
def test_prefixes_samples_chunks_and_codes():
    model, start = talking_model(), random_prompts(20)[0]
    for proposer, code in ((LOOKUP, "int8"), (Draft(near_model(), tokens=3, cost=0.0), None)):
        prefix = prefill(model, start, cache_dtype=code)
        options = {"sampler": COLD, "key": jr.key(4), "num_samples": 2, "prefill_chunk": 5}
        compare(model, PROMPTS, proposer, prefix=prefix, **options)


# The model's strategy and the draft's: slots dealt out, the vocabulary split, rows split, all by other axes.
STRATEGIES = [
    ("dp=2,kv=2,rep=2", f"{mx.HEADS_X_KV_SEQ.layout} batch@dp", "vocab@kv kv_seq@rep batch@dp"),
    ("a=2,b=3", "kv_heads@a hidden@a vocab@a tokens@a kv_seq@b", ""),
]


@functools.lru_cache
def _divisible(norm_eps=1e-5):
    config = talking_model().config
    return small_model(config=dataclasses.replace(config, vocab=72, hidden=48, norm_eps=norm_eps))


@pytest.mark.parametrize(("axes", "layout", "drafted"), STRATEGIES)
@pytest.mark.long
def test_every_strategy_gives_the_tokens_of_one_device(axes, layout, drafted):
    mesh = mx.make_mesh(axes)
    split = mx.shard(_divisible(), mesh, Strategy(layout))
    draft = Draft(mx.shard(_divisible(3e-2), mesh, Strategy(drafted)), tokens=3, cost=0.0)
    # Long enough that passes begin at many slots of each device; sampled and greedy, three rows on two devices.
    for proposer, options in ((LOOKUP, {}), (draft, {"sampler": COLD, "key": jr.key(5)})):
        options = {"max_new_tokens": 20, **options}
        expected = generate(_divisible(), PROMPTS, **options)
        found = generate(split, PROMPTS, speculate=proposer, **options)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.acceptance.accepted > 0


TINY = dataclasses.replace(SMALL, vocab=7, layers=1, windows=(None,))
SAMPLES = 6000


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.slow
def test_drawn_tokens_have_the_models_distribution(kind):
    """Of all continuations by three tokens, each comes as often as the model's probabilities say (chi-square)."""
    model, prompt = small_model(config=TINY), [1, 2, 3, 1, 2, 3, 1, 2]
    sampler = Sampler(temperature=2.0, top_k=4)
    draft = Draft(small_model(seed=4, config=TINY), tokens=2, cost=0.0)
    proposer = PromptLookup(tokens=2, ngram=1, cost=0.0) if kind == "lookup" else draft
    out = generate(
        model, [prompt], max_new_tokens=3, sampler=sampler, key=jr.key(0), num_samples=SAMPLES, speculate=proposer
    )
    assert 0.1 < out.acceptance.rate < 0.9

    @functools.lru_cache
    def probabilities(text):
        logits = jnp.asarray(logits_of(model, text, width=16)[-1:])
        return np.asarray(jax.nn.softmax(sampler.filter(logits)), np.float64)[0]

    counts, statistic, cells = {}, 0.0, 0
    for row in map(tuple, out.tokens.tolist()):
        counts[row] = counts.get(row, 0) + 1
    for row in itertools.product(range(TINY.vocab), repeat=3):
        expected = SAMPLES * np.prod([probabilities((*prompt, *row[:at]))[row[at]] for at in range(3)])
        assert expected > 0 or row not in counts
        # Cells with fewer than five would not follow the distribution of the statistic.
        if expected >= 5:
            statistic += (counts.get(row, 0) - expected) ** 2 / expected
            cells += 1
    assert cells > 30
    assert statistic < chi2.ppf(0.999, cells - 1)


@pytest.mark.long
def test_quantized_weights_and_passes_of_fewer_than_16_rows():
    """Products of so few rows round each row alike, however many there are."""
    config = dataclasses.replace(SMALL, embed=64, hidden=96, kv_heads=2, head_dim=32, vocab=96)
    model = mx.quantize(small_model(config=config), mx.GGUF("Q8_0"))
    rows = [[7, 30, 2, 7], [11, 5, 5, 48]]
    compare(model, rows, LOOKUP)
    compare(model, rows[:1], Draft(model, tokens=4, cost=0.0))


@pytest.mark.long
def test_the_real_model(smollm2_path):
    model, tokenizer = mx.load(smollm2_path, dtype="float32"), mx.load_tokenizer(smollm2_path)
    text = "The frame was cast in an iron works down by the river, and on a wet morning in March sixteen horses pulled "
    text += "it up the hill, while children ran beside the cart and counted the turns of its wheels.\n"
    prompts = [tokenizer.encode(text) for text in (text + text + text[:40], "Once upon a time")]
    found = compare(model, prompts[:1], PromptLookup(cost=0.0), max_new_tokens=24)
    assert found.accepted > 8
    compare(model, prompts, PromptLookup(tokens=4), max_new_tokens=16)
