"""Samplers and processors against those of transformers, on random logits and in whole generations."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.model import MODELS, recorded, variant_model

import mistral_eqx as mx


pytestmark = pytest.mark.parity

VOCAB, ROWS, PROMPT = 1000, 16, 12

filtered = eqx.filter_jit(lambda sampler, logits: sampler.filter(logits))
processed = eqx.filter_jit(lambda processor, logits, state: processor(logits, state, jnp.arange(VOCAB)))
following = eqx.filter_jit(lambda processor, state, tokens: processor.next_state(state, tokens, jnp.arange(VOCAB)))


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="module")
def process(torch):
    return pytest.importorskip("transformers.generation.logits_process")


def texts(new, seed=0):
    """Random prompts and new tokens, of which some come again."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 40, (ROWS, PROMPT)), draw.integers(20, 60, (ROWS, new))


def after(processor, logits, new, ends=()):
    """What a processor makes of logits after so many new tokens."""
    prompts, tokens = texts(new)
    state = processor.init_state(prompts.tolist(), list(ends), VOCAB)
    for column in tokens.T:
        state = following(processor, state, jnp.asarray(column, jnp.int32))
    return np.asarray(processed(processor, jnp.asarray(logits), state))


def theirs(torch, processor, logits, new):
    ids = np.concatenate(texts(new), axis=1)
    return processor(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()


@pytest.fixture
def logits(getkey):
    logits = np.array(jr.normal(getkey(), (ROWS, VOCAB)) * 4)
    # A token that a step before has forbidden stays so.
    logits[:, 7] = -np.inf
    return logits


@pytest.mark.parametrize("new", [0, 1, 9])
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2, 3.0])
def test_repetition_penalty(torch, process, logits, penalty, new):
    expected = theirs(torch, process.RepetitionPenaltyLogitsProcessor(penalty), logits, new)
    np.testing.assert_array_equal(after(mx.RepetitionPenalty(penalty), logits, new), expected)


def test_logit_bias(torch, process, logits):
    biases = {0: 1.5, 7: 3.0, 8: -2.25, 999: -float("inf"), 500: 100.0}
    expected = theirs(
        torch, process.SequenceBiasLogitsProcessor({(id,): bias for id, bias in biases.items()}), logits, 3
    )
    np.testing.assert_array_equal(after(mx.LogitBias(biases), logits, 3), expected)


def test_banned_tokens(torch, process, logits):
    banned = [0, 3, 7, 512, 999]
    expected = theirs(torch, process.SuppressTokensLogitsProcessor(banned), logits, 3)
    np.testing.assert_array_equal(after(mx.BannedTokens(banned), logits, 3), expected)


@pytest.mark.parametrize("new", [0, 4, 5, 6])
def test_min_new_tokens(torch, process, logits, new):
    processor = process.MinNewTokensLengthLogitsProcessor(PROMPT, 5, [2, 900])
    expected = theirs(torch, processor, logits, new)
    np.testing.assert_array_equal(after(mx.MinNewTokens(5), logits, new, ends=[2, 900]), expected)
    assert np.isneginf(expected[:, 900]).all() == (new < 5)


@pytest.mark.parametrize("new", [0, 1, 30])
@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.3), (-2.0, 1.1), (2.0, 2.0)])
def test_presence_and_frequency_penalties_are_the_formula(logits, presence, frequency, new):
    # logit[token] - count[token] * frequency - (count[token] > 0) * presence, over the new tokens alone.
    counts = np.stack([np.bincount(row, minlength=VOCAB) for row in texts(new)[1]])
    expected = logits - counts * frequency - (counts > 0) * presence
    found = after(mx.PresencePenalty(presence), after(mx.FrequencyPenalty(frequency), logits, new), new)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.0},
        {"min_p": 0.02},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"typical_p": 0.05},
        {"typical_p": 0.2},
        {"typical_p": 0.9},
        {"typical_p": 0.995},
        {"temperature": 0.6, "min_p": 0.1},
        {"temperature": 2.0, "typical_p": 0.5},
        {"top_k": 50, "typical_p": 0.7},
        {"top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 100, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.8},
    ],
    ids=str,
)
def test_the_filter(torch, process, logits, options):
    kinds = ("temperature", "Temperature"), ("top_k", "TopK"), ("top_p", "TopP"), ("min_p", "MinP")
    expected = torch.from_numpy(logits.copy())
    for option, name in (*kinds, ("typical_p", "Typical")):
        if option in options:
            expected = getattr(process, f"{name}LogitsWarper")(options[option])(None, expected)
    expected, found = expected.numpy(), np.asarray(filtered(mx.Sampler(**options), logits))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("processors", "options"),
    [
        ([mx.RepetitionPenalty(1.3)], {"repetition_penalty": 1.3}),
        ([mx.BannedTokens(range(0, 60, 2))], {"suppress_tokens": list(range(0, 60, 2))}),
        (
            [mx.LogitBias({5: 4.0, 9: -8.0}), mx.RepetitionPenalty(1.7)],
            {"sequence_bias": {(5,): 4.0, (9,): -8.0}, "repetition_penalty": 1.7},
        ),
        (
            [mx.LogitBias({5: 4.0}), mx.RepetitionPenalty(1.2), mx.MinNewTokens(20), mx.BannedTokens([3, 8])],
            {
                "sequence_bias": {(5,): 4.0},
                "repetition_penalty": 1.2,
                "min_new_tokens": 20,
                "suppress_tokens": [3, 8],
            },
        ),
    ],
    ids=["repetition", "banned", "bias and repetition", "all"],
)
def test_whole_generations(torch, processors, options):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(MODELS / "gqa_3", dtype=torch.float32)
    ours = variant_model("gqa_3")
    prompt = recorded("gqa_3")["ids_40"].tolist()
    # The likeliest token of the first step, so that a text without a least length ends early.
    plain = mx.generate(ours, [prompt], max_new_tokens=24, eos_id=()).tokens[0].tolist()
    ends = plain[:1]
    out = mx.generate(ours, [prompt], max_new_tokens=24, eos_id=ends, sampler=mx.Sampler(processors=processors))
    (expected,) = reference.generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
        **options,
    ).tolist()
    assert out.tokens[0, : out.lengths[0]].tolist() == expected[len(prompt) :]


def test_log_probabilities(torch):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(MODELS / "gqa_3", dtype=torch.float32)
    prompt = recorded("gqa_3")["ids_40"].tolist()
    out = mx.generate(variant_model("gqa_3"), [prompt], max_new_tokens=16, logprobs=4)
    generated = reference.generate(
        torch.tensor([prompt]),
        max_new_tokens=16,
        min_new_tokens=16,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = torch.stack(generated.logits, 1).log_softmax(-1)
    top = expected.topk(4)
    assert out.tokens.tolist() == generated.sequences[:, len(prompt) :].tolist()
    np.testing.assert_array_equal(out.top_tokens, top.indices.numpy())
    np.testing.assert_allclose(out.top_log_probs, top.values.numpy(), atol=2e-5)
    chosen = expected.gather(2, generated.sequences[:, len(prompt) :, None])[..., 0]
    np.testing.assert_allclose(out.log_probs, chosen.numpy(), atol=2e-5)
