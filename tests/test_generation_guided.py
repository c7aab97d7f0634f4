"""Masks that come from the host from step to step."""

import jax
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import PROMPTS, VOCAB, count_compilations, logits_of, refused, talking_model
from hypothesis import given, settings, strategies as st

import mistral_eqx as mx
from mistral_eqx import Guided, Sampler, generate, stream


class Automaton:
    """States are rows of a table: which state each token leads to, or -1 where it is forbidden."""

    def __init__(self, table):
        self.table = table

    def guide(self):
        return Walk(self.table)


class Walk:
    def __init__(self, table):
        self.table, self.state = table, 0

    def allowed(self):
        return self.table[self.state] >= 0

    def push(self, id):
        assert self.allowed()[id]
        self.state = self.table[self.state, id]


class OnDevice:
    """The same automaton as functions of JAX."""

    def __init__(self, table):
        self.table = jax.numpy.asarray(table, jax.numpy.int32)

    def allowed(self, state):
        return self.table[state] >= 0

    def advance(self, state, token):
        return jax.numpy.maximum(self.table[state, token], 0)


def random_table(states=5, vocab=VOCAB, seed=0, allowed=0.4):
    """A random automaton in which some of the tokens are allowed in each state, the end tokens 2 and 5 too."""
    draw = np.random.default_rng(seed)
    table = np.where(draw.random((states, vocab)) < allowed, draw.integers(0, states, (states, vocab)), -1)
    table[-1, [2, 5]] = 0
    return table


def guided(table, **numbers):
    return Sampler(processors=[Guided(Automaton(table))], **numbers)


def constrained(table, **numbers):
    automaton = OnDevice(table)
    constraint = mx.Constraint(automaton.allowed, automaton.advance, np.zeros((), np.int32))
    return Sampler(processors=[constraint], **numbers)


def model(**changes):
    return talking_model(windows=(None,), **changes)


def rows_of(out):
    return [row[:length] for row, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)]


def test_greedy_tokens_are_those_of_masks_that_a_slow_loop_walks():
    table, new = random_table(), 12
    expected = []
    for prompt in PROMPTS:
        state, tokens = 0, []
        while len(tokens) < new and not {2, 5} & set(tokens[-1:]):
            logits = logits_of(model(), prompt + tokens, width=64)[-1]
            tokens.append(int(np.argmax(np.where(table[state] >= 0, logits, -np.inf))))
            state = table[state, tokens[-1]]
        expected.append(tokens)
    found = generate(model(), PROMPTS, max_new_tokens=new, sampler=guided(table), eos_id=[2, 5])
    assert rows_of(found) == expected
    assert expected != rows_of(generate(model(), PROMPTS, max_new_tokens=new, eos_id=[2, 5]))


@settings(deadline=None, max_examples=4, derandomize=True)
@given(seed=st.integers(0, 1000), samples=st.integers(1, 2))
@pytest.mark.slow
def test_it_is_the_constraint_of_the_same_automaton(seed, samples):
    table = random_table(seed=seed)
    options = {"max_new_tokens": 12, "eos_id": [2, 5], "key": jr.key(seed), "num_samples": samples}
    numbers = {"temperature": 1.5, "top_p": 0.95}
    found = generate(model(), PROMPTS, sampler=guided(table, **numbers), **options)
    expected = generate(model(), PROMPTS, sampler=constrained(table, **numbers), **options)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.lengths.tolist() == expected.lengths.tolist()


def test_every_way_to_generate_gives_the_same():
    table, options = random_table(seed=3), {"max_new_tokens": 10, "eos_id": [2, 5], "key": jr.key(1)}
    sampler = guided(table, temperature=1.3)
    both = {**options, "num_samples": 2}
    together = rows_of(generate(model(), PROMPTS, sampler=sampler, **both))
    assert together == rows_of(generate(model(), PROMPTS, sampler=constrained(table, temperature=1.3), **both))
    streamed = np.stack(list(stream(model(), PROMPTS, sampler=sampler, **both)), 1)
    assert [row[row >= 0].tolist() for row in streamed] == together


@pytest.mark.slow
def test_a_conversation_follows_a_grammar_in_each_answer():
    table, options = random_table(seed=3), {"max_new_tokens": 10, "eos_id": [2, 5], "key": jr.key(1)}
    alone = {**options, "sampler": guided(table, temperature=1.3)}
    chat = mx.Conversation(model())
    first = list(chat.reply(PROMPTS[0], **alone))
    assert [first] == rows_of(generate(model(), PROMPTS[:1], **alone))
    # A second answer begins at the beginning of the grammar.
    text = [*PROMPTS[0], *first, 4, 4]
    assert [list(chat.reply(text, **alone))] == rows_of(generate(model(), [text], **alone))


def test_another_grammar_compiles_nothing():
    options = {"max_new_tokens": 10, "eos_id": [2, 5]}
    first = generate(model(), PROMPTS, sampler=guided(random_table(seed=4)), **options)
    with count_compilations() as compiled:
        second = generate(model(), PROMPTS, sampler=guided(random_table(seed=5)), **options)
    assert not compiled
    assert first.tokens.tolist() != second.tokens.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["vocab@tp batch@dp", "kv_heads@tp vocab@tp"])
def test_a_split_vocabulary_changes_nothing(layout):
    table = random_table(vocab=60, seed=6)
    sampler = Sampler(1.2, 40, 0.95, processors=[Guided(Automaton(table)), mx.RepetitionPenalty(1.2)])
    prompts = [[min(id, 59) for id in prompt] for prompt in PROMPTS]
    options = {"max_new_tokens": 10, "eos_id": [2, 5], "sampler": sampler, "key": jr.key(1), "num_samples": 2}
    expected = generate(model(vocab=60), prompts, **options)
    # Three prompts for two parts of `batch`: a row is idle.
    split = mx.shard(model(vocab=60), mx.make_mesh("dp=2,tp=2"), mx.Strategy(layout))
    found = generate(split, prompts, **options)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.lengths.tolist() == expected.lengths.tolist()


def test_tokens_that_the_tokenizer_lacks_are_forbidden():
    table = np.zeros((1, 40), int)
    out = generate(model(), PROMPTS, max_new_tokens=10, sampler=guided(table), eos_id=())
    assert np.asarray(out.tokens).max() < 40
    with refused("vocabulary of 62 tokens", f"the model has {VOCAB}", "own tokenizer"):
        generate(model(), PROMPTS, max_new_tokens=10, sampler=guided(np.zeros((1, 62), int)))


def test_what_makes_no_sense_is_refused():
    for after in (0, 3):
        table = np.full((after + 1, VOCAB), -1)
        for state in range(after):
            table[state, 10:20] = state + 1
        with refused("forbid every token to row 0", f"after {after} new ones"):
            generate(model(), PROMPTS, max_new_tokens=8, sampler=guided(table))
    with refused("'a+' is no grammar", "mistral_eqx.Grammar.regex"):
        Guided("a+")
    with refused("A beam search", "takes no sampler"):
        mx.beam_search(model(), PROMPTS, num_beams=2, sampler=guided(random_table()))
