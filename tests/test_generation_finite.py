"""A logit that is not finite ends whatever needs it, with a sentence that says where."""

import functools
import re

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import random_prompts, refused, talking_model

import mistral_eqx as mx
from mistral_eqx.generation.flat import Flat
from mistral_eqx.generation.loop import Decoding, decode
from mistral_eqx.nn import Cache


# Each row says something else, so that a row can be chosen that alone meets a token.
ROWS = random_prompts(5, 3, 7, 4, seed=2)
ROWS = [[token % 60 for token in row] for row in ROWS]
NEW = 4

STRATEGIES = pytest.mark.parametrize(
    ("axes", "layout"),
    [
        (None, ""),
        ("kv=2,rep=3", mx.HEADS_X_KV_SEQ.layout),
        pytest.param("dp=2,tp=2", f"{mx.HEADS.layout} batch@dp", marks=pytest.mark.slow),
    ],
    ids=["single", "heads_x_kv_seq", "heads and batch"],
)

CALLS = {
    "greedy": lambda model: mx.generate(model, ROWS, max_new_tokens=NEW),
    "drawn": lambda model: mx.generate(
        model, ROWS, max_new_tokens=NEW, sampler=mx.Sampler(1e-9, top_p=0.9), key=jr.key(0)
    ),
    "stream": lambda model: list(mx.stream(model, ROWS, max_new_tokens=NEW)),
    "beams": lambda model: mx.beam_search(model, ROWS, num_beams=1, max_new_tokens=NEW),
    "processors": lambda model: mx.generate(
        model, ROWS, max_new_tokens=NEW, sampler=mx.Sampler(processors=[mx.LogitBias({7: 0.0})])
    ),
}


@functools.lru_cache
def sound():
    return talking_model(windows=(None,), vocab=60, hidden=48)


@functools.lru_cache
def answers():
    return np.asarray(mx.generate(sound(), ROWS, max_new_tokens=NEW).tokens)


def on(model, axes, layout):
    return model if axes is None else mx.shard(model, mx.make_mesh(axes), mx.Strategy(layout))


def with_head(token, value):
    """The model with an entry of a token's row of the head replaced; the sign of its logit differs from row to row."""
    where = lambda model: model.head.weight.value  # noqa: E731
    return eqx.tree_at(where, sound(), where(sound()).at[token, 0].set(value))


def that_fails_after(row, step):
    """The model that cannot go on once a row has had so many new tokens."""
    token = answers()[row, step - 1]
    assert (answers()[:, :step] == token).sum() == 1
    assert not any(token in prompt for prompt in ROWS)
    where = lambda model: model.embedding.weight.value  # noqa: E731
    return eqx.tree_at(where, sound(), where(sound()).at[int(token)].set(jnp.nan))


# The same entry of a logit shows any value that is not finite, so infinities take two of the calls.
VALUES = [
    *((np.nan, call) for call in CALLS),
    *(pytest.param(value, call, marks=pytest.mark.slow) for value in (np.inf, -np.inf) for call in ("drawn", "beams")),
]


@STRATEGIES
@pytest.mark.parametrize(("value", "call"), VALUES)
def test_from_the_first_token_on(value, call, axes, layout):
    # Infinity of either sign makes some rows plus infinity, others minus infinity, which is never the largest.
    with refused("logits for new token 1 of row 0", "not finite", "check=True", "float32"):
        CALLS[call](on(with_head(59, value), axes, layout))


@STRATEGIES
@pytest.mark.parametrize("call", CALLS)
def test_in_the_middle_of_the_loop(call, axes, layout):
    row, step = 3, 2
    with refused(f"logits for new token {step + 1} of row {row}", "not finite"):
        CALLS[call](on(that_fails_after(row, step), axes, layout))


def test_a_row_that_has_ended_does_not_matter():
    row, step = 3, 1
    model = that_fails_after(row, step)
    out = mx.generate(model, ROWS, max_new_tokens=NEW, eos_id=int(answers()[row, 0]))
    assert out.tokens[:row].tolist() == answers()[:row].tolist()
    assert int(out.lengths[row]) == 1
    # Nor does one that stands there to fill a batch up.
    parts = on(model, "dp=2,tp=2", f"{mx.HEADS.layout} batch@dp")
    assert mx.generate(parts, ROWS[:3], max_new_tokens=NEW).tokens.tolist() == answers()[:3].tolist()


def test_what_processors_forbid_is_no_fault():
    everything_but = mx.BannedTokens([token for token in range(60) if token != 5])
    out = mx.generate(sound(), ROWS, max_new_tokens=2, sampler=mx.Sampler(processors=[everything_but]))
    assert (out.tokens == 5).all()


@pytest.mark.parametrize("made", [np.nan, np.inf])
def test_what_processors_make_of_logits_is_finite_too(made):
    class Wrong(mx.AbstractProcessor):
        def init_state(self, texts, ends, vocab):
            return None

        def __call__(self, logits, state, ids):
            return logits.at[2, 30].set(made)

        def next_state(self, state, tokens, ids):
            return None

    with refused("new token 1 of row 2", "processors", "not finite"):
        mx.generate(sound(), ROWS, max_new_tokens=2, sampler=mx.Sampler(processors=[Wrong()]))


@STRATEGIES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores(value, axes, layout):
    with refused("logits for token 1 of row 0", "not finite", "check=True"):
        mx.score(on(with_head(59, value), axes, layout), ROWS)


def test_a_conversation():
    chat = mx.Conversation(that_fails_after(0, 1))
    with refused("new token 2 of row 0"):
        list(chat.reply(ROWS[0], max_new_tokens=NEW))
    # It may go on with another text.
    assert next(iter(chat.reply(ROWS[1], max_new_tokens=1))) == answers()[1, 0]


def test_the_decoding_loop_reduces_the_vocabulary_no_more_often():
    """One reduction finds the largest logit and one its token; what tells of infinity is part of the first."""
    model, none = sound(), jnp.zeros(2, jnp.int32)
    decoding = Decoding.init(none, none > 0, jr.split(jr.key(0), 2), 8)
    kept = (Flat(model), decoding, mx.Sampler(), np.zeros(1, np.int32), np.zeros((), np.int32))
    text = decode.lower(kept, Cache.init(model.config, 2, 16, model.dtype)).as_text()
    reductions = re.findall(r"stablehlo\.reduce\(.*?across dimensions = \[1\] : \(tensor<2x60x(\w+)>", text)
    assert reductions == ["f32", "i32"]
