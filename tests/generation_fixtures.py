"""What tests of generation share: a model that says something else at each token, prompts, and counts of what runs."""

import collections
import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from model_fixtures import SMALL, run, small_model

from mistral_eqx.generation import reading, request


VOCAB = SMALL.vocab
# Three rows in 16 columns; all tests that can take these do, for each shape is compiled once.
PROMPTS = [[7, 30, 2], [11, 5, 5, 48, 3, 60, 1], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 13, 21, 34, 55]]


def talking_model(*, windows=(None, 7), dtype=jnp.float32, max_positions=4096, **changes):
    """A random model, of a shape that tests share unless they need another."""
    changes |= {"windows": windows, "layers": len(windows), "max_positions": max_positions}
    return small_model(config=dataclasses.replace(SMALL, **changes), dtype=dtype)


def random_prompts(*lengths, seed=0):
    """Lists of random tokens."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCAB, length).tolist() for length in lengths]


def logits_of(model, text, *, width):
    """The logits after each token of a text, without a cache.

    The text stands on the left of `width` columns, so that one program is compiled: no token sees what comes after it.
    """
    ids = np.zeros((1, width), np.int32)
    ids[0, : len(text)] = text
    return np.asarray(run(model, jnp.asarray(ids))[0])[0, : len(text)]


def greedy_without_cache(model, prompts, new, *, width=64):
    """What greedy decoding means: a forward pass over the whole text for each token, in a Python loop."""
    rows = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(new):
            text.append(int(np.argmax(logits_of(model, text, width=width)[-1])))
        rows.append(text[len(prompt) :])
    return rows


# The compiled programs of generation, and where each is called.
PROGRAMS = {"read_chunk": reading, "decode": request}


def spy(monkeypatch, name):
    """Lets a compiled program run as ever, and gives a list of its calls: arguments and result."""
    original, calls = getattr(PROGRAMS[name], name), []

    def spied(*arguments):
        result = original(*arguments)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(PROGRAMS[name], name, spied)
    return calls


@contextlib.contextmanager
def count_compilations():
    """Gives a counter of the programs that are compiled meanwhile, by the name of their function."""
    compiled = collections.Counter()

    def listener(event, duration, fun_name=None, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled[str(fun_name).removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@contextlib.contextmanager
def refused(*words):
    """Expects a `ValueError` of one sentence that has these words, from a call without this suite's type checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (its words are looked at below)
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    message = str(caught.value)
    assert message.endswith((".", "?"))
    assert "\n" not in message
    assert len(re.sub(r"/[^' ]*/", "", message)) < 300  # but for the folders of a path
    for word in words:
        assert word in message
