"""Whatever stands where an argument should, a public function says so in one sentence of its own."""

import math

import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
from fixtures.generation import PROMPTS, refused, talking_model

import mistral_eqx as mx
from mistral_eqx.parallel import read_strategy


WRONG = [math.nan, math.inf, -1.5, True, 2**70, 10**5000, None, "x", {}, object(), np.array([1.5, 2.5])]
MODEL = talking_model(windows=(None,), max_positions=64)
KEY = jr.key(0)


def _generate(**changes):
    return mx.generate(**{"model": MODEL, "prompts": PROMPTS, "max_new_tokens": 1, **changes})


def _beams(**changes):
    return mx.beam_search(**{"model": MODEL, "prompts": PROMPTS, "max_new_tokens": 1, "num_beams": 1, **changes})


def _lora(**changes):
    return mx.apply_lora(**{"model": MODEL, "rank": 2, "alpha": 4.0, "key": KEY, **changes})


def _init(**changes):
    return mx.Mistral.init(**{"config": MODEL.config, "key": KEY, **changes})


def _sharded(**changes):
    return mx.shard(**{"model": MODEL, "mesh": mx.make_mesh("tp=1"), "strategy": mx.HEADS, **changes})


def _einshard(**changes):
    return mx.einshard(**{"x": np.zeros(2), "expression": "a", "mesh": mx.make_mesh("tp=1"), **changes})


def _perplexity(**changes):
    return mx.perplexity(**{"model": MODEL, "tokenizer": None, "text": "", **changes})


# A function, the arguments of which each is tried, and of what is tried all that is right there.
CASES = [
    (mx.Sampler, "temperature", (2**70, None)),
    (mx.Sampler, "top_k", (None,)),
    (mx.Sampler, "top_p", (None,)),
    (mx.Sampler, "min_p", (None,)),
    (mx.Sampler, "typical_p", (None,)),
    (mx.Sampler, "processors", ()),
    (mx.RepetitionPenalty, "penalty", (2**70,)),
    (mx.PresencePenalty, "penalty", (-1.5,)),
    (mx.FrequencyPenalty, "penalty", (-1.5,)),
    (mx.LogitBias, "biases", ({},)),
    (mx.BannedTokens, "ids", ({},)),
    (mx.MinNewTokens, "count", ()),
    *((_generate, name, ()) for name in ("model", "prompts", "num_samples", "prefill_chunk")),
    *((_generate, name, (None,)) for name in ("max_new_tokens", "sampler", "key", "logprobs", "prefix", "cache_dtype")),
    (_generate, "eos_id", (None, {})),
    *((_beams, name, ()) for name in ("model", "prompts", "num_beams", "num_return_sequences")),
    (_beams, "max_new_tokens", (None,)),
    (_beams, "length_penalty", (2**70, -1.5)),
    (_beams, "early_stopping", (True,)),
    (_beams, "sampler", (None,)),
    (lambda prefix: mx.prefill(MODEL, prefix), "prefix", ()),
    (mx.Conversation, "model", ()),
    (lambda rows: mx.score(MODEL, rows), "rows", ()),
    (lambda prefill_chunk: mx.score(MODEL, PROMPTS, prefill_chunk=prefill_chunk), "prefill_chunk", ()),
    (lambda last: mx.score(MODEL, PROMPTS, last=last), "last", (None,)),
    # Without one, what is wrong is the empty text.
    *((_perplexity, name, ()) for name in ("model", "context", "stride", "batch")),
    (_lora, "rank", ()),
    (_lora, "alpha", (2**70,)),
    (_lora, "targets", ()),
    (_lora, "dropout", ()),
    (_lora, "use_rslora", (True,)),
    (_lora, "train_embeddings", (True,)),
    (_lora, "dtype", ()),
    (_lora, "key", ()),
    (mx.merge_lora, "model", ()),
    *((_init, name, ()) for name in ("config", "key", "dtype", "strategy")),
    (mx.Strategy, "layout", ()),
    (read_strategy, "text", ()),
    *((_sharded, name, ()) for name in ("model", "mesh", "strategy")),
    *((_einshard, name, ()) for name in ("x", "mesh")),
    (_einshard, "expression", ("x",)),
    (lambda n_devices: mx.strategies(MODEL.config, n_devices), "n_devices", ()),
]


@pytest.mark.parametrize(
    ("function", "name", "right"), CASES, ids=[f"{getattr(case[0], '__name__', 'call')}-{case[1]}" for case in CASES]
)
def test_a_wrong_argument_is_refused(function, name, right, monkeypatch):
    for value in WRONG:
        if any(value is one or (type(value) is type(one) and value == one) for one in right):
            continue
        if function is _perplexity and name in ("context", "stride") and value is None:
            continue
        if name == "x" and isinstance(value, np.ndarray):
            continue
        if name == "prefix" and function is not _generate and isinstance(value, np.ndarray):
            continue
        with refused():
            function(**{name: value})


@pytest.mark.parametrize("bias", [math.nan, math.inf, True, None, "x", 1e39])
def test_a_wrong_bias_is_refused(bias):
    with refused("bias of the token 3"):
        mx.LogitBias({3: bias})
    for id in (1.5, True, "3", 2**70):
        with refused("biased token"):
            mx.LogitBias({id: 1.0})


def test_an_end_token_that_no_row_can_reach():
    sampler = mx.Sampler(processors=[mx.MinNewTokens(3)])
    with refused("at least 3 new tokens", "max_new_tokens is 2"):
        mx.generate(MODEL, PROMPTS, max_new_tokens=2, eos_id=1, sampler=sampler)


def test_a_beam_search_has_no_sampler():
    with refused("no sampler", "mistral_eqx.generate"):
        _beams(sampler=mx.Sampler(temperature=1.0))


def test_an_adapter_is_not_wider_than_its_layers():
    with refused("rank is 1000000", "inputs or outputs"):
        _lora(rank=1_000_000)


def test_ids_of_a_wrong_kind(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for ids in (jnp.zeros((1, 3)), jnp.zeros(3, jnp.int32)):
        with pytest.raises(mx.InputError, match="give integers of shape"):
            MODEL(ids)
    with refused("token id -1"):
        _generate(prompts=np.array([[1, -1, 2]]))
    with refused("flat list of token ids"):
        _generate(prompts=[[[1], [2, 3]]])
