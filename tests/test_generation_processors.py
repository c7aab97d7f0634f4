import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import PROMPTS, VOCAB, count_compilations, logits_of, refused, talking_model
from fixtures.sharding import mesh, sharded
from hypothesis import given, settings, strategies as st
from jaxtyping import Array, Int

import mistral_eqx as mx
from mistral_eqx import Sampler, generate, stream
from mistral_eqx.generation.request import Request
from mistral_eqx.parallel import Strategy, specs


class Automaton(eqx.Module):
    """States are rows of a table: which state each token leads to, or -1 where it is forbidden."""

    table: jax.Array

    def allowed(self, state):
        return self.table[state] >= 0

    def advance(self, state, token):
        return jnp.maximum(self.table[state, token], 0)


def constraint(table):
    automaton = Automaton(jnp.asarray(table, jnp.int32))
    return mx.Constraint(automaton.allowed, automaton.advance, jnp.zeros((), jnp.int32))


def table(states=4, vocab=VOCAB, seed=0):
    """A random automaton in which about half of the tokens are forbidden in each state."""
    draw = np.random.default_rng(seed)
    return np.where(draw.random((states, vocab)) < 0.5, draw.integers(0, states, (states, vocab)), -1)


def every_processor(vocab=VOCAB):
    return [
        mx.LogitBias({3: 1.5, 40: -2.0, vocab - 1: -math.inf}),
        mx.RepetitionPenalty(1.3),
        mx.PresencePenalty(0.5),
        mx.FrequencyPenalty(0.7),
        mx.MinNewTokens(5),
        mx.BannedTokens([1, 33]),
        constraint(table(vocab=vocab)),
    ]


def said(processors, prompts=PROMPTS, new=16, **options):
    sampler = Sampler(processors=processors)
    return generate(talking_model(windows=(None,)), prompts, max_new_tokens=new, sampler=sampler, **options)


def with_auto_axes(change, new=16, prompts=PROMPTS):
    """Greedy decoding in Python: `change(logits, prompt, tokens)` says what a processor should do to one row."""
    rows = []
    for prompt in prompts:
        tokens = []
        for _ in range(new):
            logits = logits_of(talking_model(windows=(None,)), prompt + tokens, width=64)[-1].astype(np.float64)
            tokens.append(int(np.argmax(change(logits, prompt, tokens))))
        rows.append(tokens)
    return rows


def repeated(logits, prompt, tokens, penalty=2.5):
    seen = np.isin(np.arange(VOCAB), prompt + tokens)
    return np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)


def counted(logits, prompt, tokens):
    counts = np.bincount(tokens, minlength=VOCAB)
    return logits - 0.9 * counts - 1.1 * (counts > 0)


def biased(logits, prompt, tokens):
    logits[7] += 9.0
    logits[[8, 9]] = -np.inf
    return logits


def banned(logits, prompt, tokens):
    logits[::2] = -np.inf
    return logits


def constrained(logits, prompt, tokens):
    state = 0
    for token in tokens:
        state = table()[state, token]
    return np.where(table()[state] >= 0, logits, -np.inf)


@pytest.mark.parametrize(
    ("processors", "change"),
    [
        pytest.param([mx.RepetitionPenalty(2.5)], repeated, marks=pytest.mark.slow),
        pytest.param([mx.FrequencyPenalty(0.9), mx.PresencePenalty(1.1)], counted, marks=pytest.mark.slow),
        pytest.param([mx.LogitBias({7: 9.0, 8: -math.inf, 9: -math.inf})], biased, marks=pytest.mark.slow),
        pytest.param([mx.BannedTokens(range(0, VOCAB, 2))], banned, marks=pytest.mark.slow),
        pytest.param([constraint(table())], constrained, marks=pytest.mark.slow),
        ([constraint(table()), mx.RepetitionPenalty(2.5)], lambda *row: repeated(constrained(*row), *row[1:])),
    ],
    ids=["repetition", "presence and frequency", "bias", "banned", "constraint", "two"],
)
def test_the_loop_does_what_the_definition_says(processors, change):
    tokens = said(processors).tokens.tolist()
    assert tokens == with_auto_axes(change)
    assert tokens != said([]).tokens.tolist()


def test_an_end_token_waits_for_the_least_number_of_tokens():
    free = said([]).tokens.tolist()
    ends = sorted({row[0] for row in free} | {row[3] for row in free})

    def late(logits, prompt, tokens):
        if len(tokens) < 7:
            logits[ends] = -np.inf
        return logits

    out = said([mx.MinNewTokens(7)], eos_id=ends)
    assert (np.asarray(out.lengths) > 7).all()
    for row, length, expected in zip(out.tokens.tolist(), out.lengths.tolist(), with_auto_axes(late), strict=True):
        assert row[:length] == expected[:length]
    # Another number is a value; with none it holds nothing back.
    assert said([mx.MinNewTokens(0)], eos_id=ends).lengths.tolist() == [1, 1, 1]


@pytest.mark.slow
def test_processors_come_before_the_sampler_in_their_order():
    # A ban after a bias counts; a bias after a ban does not bring the token back.
    for processors in (
        [mx.LogitBias({7: 100.0}), mx.BannedTokens([7])],
        [mx.BannedTokens([7]), mx.LogitBias({7: 100.0})],
    ):
        assert 7 not in np.asarray(said(processors).tokens)
    # A bias is divided by the temperature, as it was there before.
    sampler = Sampler(temperature=1e4, processors=[mx.LogitBias({7: 1e6})])
    out = generate(talking_model(windows=(None,)), PROMPTS, max_new_tokens=8, sampler=sampler, key=jr.key(0))
    assert (np.asarray(out.tokens) == 7).all()
    # Penalties do not commute: a divided logit from which one is taken is another one than the reverse.
    penalties = [mx.RepetitionPenalty(3.0), mx.PresencePenalty(2.0)]
    for processors, expected in ((penalties, 4 / 3 - 2), (penalties[::-1], (4 - 2) / 3)):
        sampler = Sampler(processors=processors)
        states = [processor.init_state([[0]], [], 3) for processor in processors]
        logits = jnp.full((1, 3), 4.0)
        states = sampler.next_states(states, jnp.ones(1, jnp.int32), logits)
        np.testing.assert_allclose(sampler.process(logits, states)[0, 1], expected, rtol=1e-6)


@settings(deadline=None, max_examples=5, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=16), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_a_row_gives_what_it_gives_alone_with_processors_too(rows, order, seed):
    model, keys = talking_model(windows=(None,)), jr.split(jr.key(seed), 3)
    sampler = Sampler(temperature=1.5, min_p=0.01, typical_p=0.95, processors=every_processor())

    def continued(rows, keys):
        out = generate(model, rows, max_new_tokens=10, sampler=sampler, eos_id=[2, 5], key=keys)
        return list(zip(out.tokens.tolist(), out.lengths.tolist(), strict=True))

    together = continued(rows, keys)
    assert together == [continued([row], keys[index : index + 1])[0] for index, row in enumerate(rows)]
    assert continued([rows[index] for index in order], keys[jnp.asarray(order)]) == [together[i] for i in order]


@pytest.mark.slow
def test_a_stream_and_a_conversation_use_processors_as_generate_does():
    sampler = Sampler(temperature=1.2, processors=every_processor())
    options = {"max_new_tokens": 10, "sampler": sampler, "key": jr.key(4)}
    expected = generate(talking_model(windows=(None,)), PROMPTS, **options).tokens
    np.testing.assert_array_equal(
        np.stack(list(stream(talking_model(windows=(None,)), PROMPTS, **options)), 1), expected
    )
    chat = mx.Conversation(talking_model(windows=(None,)))
    first = list(chat.reply(PROMPTS[0], **options))
    assert first == expected[0].tolist()
    # The whole text counts as the prompt of a second turn.
    text = [*PROMPTS[0], *first, 4, 4]
    second = list(chat.reply(text, **options))
    assert [second] == generate(talking_model(windows=(None,)), [text], **options).tokens.tolist()


def test_other_values_compile_nothing():
    model = talking_model(windows=(None,))

    def draw(penalty, bias, count, seed):
        processors = [
            mx.RepetitionPenalty(penalty),
            mx.PresencePenalty(penalty),
            mx.FrequencyPenalty(penalty),
            mx.LogitBias({bias: 2.0, bias + 1: -1.0}),
            mx.BannedTokens([bias + 5]),
            mx.MinNewTokens(count),
            constraint(table(seed=seed)),
        ]
        sampler = Sampler(temperature=penalty, min_p=penalty / 100, typical_p=penalty / 3, processors=processors)
        return generate(model, PROMPTS, max_new_tokens=10, sampler=sampler, key=jr.key(0), eos_id=2).tokens.tolist()

    first = draw(1.1, 3, 4, 0)
    with count_compilations() as compiled:
        second = draw(1.7, 9, 8, 1)
    assert not {"read_chunk", "decode", "first_tokens"} & set(compiled)
    assert second != first


def test_without_options_the_loop_carries_nothing_for_them():
    request = Request.init(talking_model(windows=(None,)), PROMPTS, 4, Sampler(), None, None)
    decoding, _ = request.start(PROMPTS)
    assert decoding.states == ()
    assert decoding.log_probs is None
    # The eight that each loop needs, and whether a row has nothing to choose from.
    assert len(jax.tree.leaves(decoding)) == 9
    assert jax.tree.leaves(request.sampler) == []


@pytest.mark.parametrize("devices", [4])
@pytest.mark.parametrize("index", range(7), ids=lambda index: type(every_processor()[index]).__name__)
@pytest.mark.slow
def test_a_split_vocabulary_changes_nothing(index, devices, getkey):
    vocab, batch, strategy = 48, 5, Strategy("vocab@tp")
    processor = every_processor(vocab)[index]
    logits = jr.normal(getkey(), (batch, vocab)) * 3
    tokens = jr.randint(getkey(), (6, batch), 0, vocab)
    state = processor.init_state([[1, 2, 47], [0], [30], [24, 23], [5]], [2, 25, 47], vocab)

    def apply(processor, state, logits, tokens, strategy):
        sampler, states, results = Sampler(processors=[processor]), [state], []
        for step in range(6):
            results.append(sampler.process(logits, states, strategy))
            states = sampler.next_states(states, tokens[step], logits, strategy)
        return jnp.stack(results, 1)

    expected = apply(processor, state, logits, tokens, mx.SINGLE)
    in_specs = specs(processor, strategy), specs(state, strategy), jax.P(None, "tp"), jax.P()
    # Numpy arrays count as no arrays outside of a compiled program.
    processor = jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, processor)
    in_specs = (specs(processor, strategy), *in_specs[1:])
    found, exchanged = sharded(
        lambda *arguments: apply(*arguments, strategy),
        mesh(devices),
        (processor, state, logits, tokens),
        in_specs,
        jax.P(None, None, "tp"),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert exchanged == {}


@pytest.mark.long
def test_a_mesh_changes_nothing():
    model = talking_model(windows=(None,), vocab=60)
    prompts = [[min(id, 59) for id in prompt] for prompt in PROMPTS]
    options = {
        "max_new_tokens": 10,
        "eos_id": [2, 5],
        "sampler": Sampler(1.2, 40, 0.95, 0.01, 0.9, processors=every_processor(60)),
        "key": jr.key(1),
        "num_samples": 2,
        "logprobs": 3,
    }
    expected = generate(model, prompts, **options)
    split = mx.shard(model, mx.make_mesh("dp=2,tp=2"), mx.HEADS + "batch@dp")
    found = generate(split, prompts, **options)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert found.top_tokens.tolist() == expected.top_tokens.tolist()
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=2e-5)
    np.testing.assert_allclose(found.top_log_probs, expected.top_log_probs, atol=2e-5)


def test_a_row_ends_where_its_automaton_does():
    # Three tokens of the first kind, then the end and nothing else.
    steps = np.full((4, VOCAB), -1)
    for state in range(3):
        steps[state, 10:20] = state + 1
    steps[3, 2] = 3
    out = said([constraint(steps)], eos_id=2)
    assert out.lengths.tolist() == [4, 4, 4]
    assert ((np.asarray(out.tokens[:, :3]) >= 10) & (np.asarray(out.tokens[:, :3]) < 20)).all()
    # After the end the automaton goes nowhere, which is no mistake.
    steps[3, 2] = 0
    steps[0, 2] = -1
    assert said([constraint(steps)], eos_id=2).lengths.tolist() == [4, 4, 4]


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_mask_that_forbids_every_token_is_refused(after):
    steps = np.full((after + 1, VOCAB), -1)
    for state in range(after):
        steps[state, 10:20] = state + 1
    for call in (generate, lambda *arguments, **options: list(stream(*arguments, **options))):
        with refused("forbid every token to row 0", f"after {after} new ones"):
            call(
                talking_model(windows=(None,)),
                PROMPTS,
                max_new_tokens=8,
                sampler=Sampler(processors=[constraint(steps)]),
            )


class Tokens(eqx.Module):
    last: Int[Array, " batch"]


class NeverTwice(mx.AbstractProcessor):
    """Forbids the token that came last."""

    def init_state(self, texts, ends, vocab):
        return Tokens(jnp.asarray([text[-1] for text in texts], jnp.int32))

    def __call__(self, logits, state, ids):
        return jnp.where(ids[None] == state.last[:, None], -jnp.inf, logits)

    def next_state(self, state, tokens, ids):
        return Tokens(tokens)


@pytest.mark.parametrize("split", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_processor_of_ones_own(split):
    model = talking_model(windows=(None,), vocab=60)
    if split:
        model = mx.shard(model, mx.make_mesh("tp=4"), mx.Strategy("vocab@tp"))
    prompts = [[min(id, 59) for id in prompt] for prompt in PROMPTS]
    sampler = Sampler(processors=[NeverTwice()])
    rows = generate(model, prompts, max_new_tokens=40, sampler=sampler).tokens.tolist()
    assert all(
        a != b for prompt, row in zip(prompts, rows, strict=True) for a, b in itertools.pairwise([prompt[-1], *row])
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mx.RepetitionPenalty(0.0), ["repetition penalty is 0.0", "greater than 0"]),
        (lambda: mx.RepetitionPenalty(-1.0), ["repetition penalty is -1.0"]),
        (lambda: mx.RepetitionPenalty(math.nan), ["repetition penalty is nan"]),
        (lambda: mx.PresencePenalty(2.5), ["presence penalty is 2.5", "at most 2"]),
        (lambda: mx.FrequencyPenalty(-3.0), ["frequency penalty is -3.0", "at least -2"]),
        (lambda: mx.LogitBias({4: math.inf}), ["bias of the token 4 is inf"]),
        (lambda: mx.LogitBias({4: math.nan}), ["bias of the token 4 is nan"]),
        (lambda: mx.MinNewTokens(-1), ["least number of new tokens is -1"]),
        (lambda: mx.MinNewTokens(1.5), ["least number of new tokens is 1.5", "whole number"]),
        (lambda: Sampler(processors=mx.MinNewTokens(1)), ["MinNewTokens is one processor", "give a list"]),
        (lambda: Sampler(processors=[abs]), ["is no processor", "AbstractProcessor"]),
    ],
)
def test_values_outside_their_range_are_refused(make, words):
    with refused(*words):
        make()


class Wrong(eqx.Module):
    """An automaton that gives back what it was told to."""

    mask: jax.Array
    after: jax.Array

    def allowed(self, state):
        return self.mask

    def advance(self, state, token):
        return self.after


def wrong(mask, after):
    automaton = Wrong(mask, after)
    return mx.Constraint(automaton.allowed, automaton.advance, jnp.zeros((), jnp.int32))


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        (mx.BannedTokens([3, VOCAB]), [f"banned token {VOCAB}", f"vocabulary of {VOCAB}"]),
        (mx.BannedTokens([-1]), ["banned token -1"]),
        (mx.LogitBias({VOCAB: 1.0}), [f"biased token {VOCAB}"]),
        (mx.BannedTokens(range(VOCAB)), [f"All {VOCAB} tokens", "forbidden"]),
        (mx.LogitBias(dict.fromkeys(range(VOCAB), -math.inf)), [f"All {VOCAB} tokens", "forbidden"]),
        (wrong(jnp.ones(VOCAB - 1, bool), jnp.int32(0)), ["`allowed`", f"each of the {VOCAB} tokens", "bool[60]"]),
        (wrong(jnp.ones(VOCAB), jnp.int32(0)), ["`allowed`", "float32[61]"]),
        (wrong(jnp.ones(VOCAB, bool), jnp.float32(0)), ["`advance`", "int32[]", "float32[]"]),
        (wrong(jnp.ones(VOCAB, bool), jnp.zeros(2, int)), ["`advance`", "int32[2]"]),
    ],
)
@pytest.mark.parametrize("call", [generate, stream])
def test_processors_that_do_not_fit_are_refused_at_the_call(call, processor, words):
    with refused(*words):
        call(talking_model(windows=(None,)), PROMPTS, max_new_tokens=4, sampler=Sampler(processors=[processor]))


def test_a_processor_is_a_pytree_whose_values_are_arrays():
    for processor in every_processor()[:-1]:
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(processor))
        assert jax.tree.leaves(processor)
