"""What a row gives does not depend on what stands beside it, on padding, or on how it was read.

`INVARIANCE_EXAMPLES` is how many batches are drawn; run with `-s` to see what they held.
"""

import collections
import os

import numpy as np
import pytest
from fixtures.generation import VOCAB, greedy_without_cache, logits_of, random_prompts, talking_model
from fixtures.model import padded
from hypothesis import HealthCheck, given, settings, strategies as st

import mistral_eqx as mx
from mistral_eqx.generation.request import Request


EXAMPLES = int(os.environ.get("INVARIANCE_EXAMPLES", "8"))
NEW, WIDTH = 6, 64
# Float32 sums in another order: of 300 batches, at most 1e-6 of the largest logit.
TOLERANCE = 1e-5
WINDOWS = {"full": (None, None), "windows": (7, 7), "alternating": (None, 7)}

counts: collections.Counter = collections.Counter()


def alone(model, row):
    """A forward pass over the whole text for each token: the tokens, and the log-probabilities of each."""
    ((tokens,), text) = greedy_without_cache(model, [row], NEW, width=WIDTH), list(row)
    logits = logits_of(model, text + tokens[:-1], width=WIDTH)[len(row) - 1 :].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return tokens, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), np.abs(logits).max()


@settings(
    deadline=None,
    max_examples=EXAMPLES,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    windows=st.sampled_from(sorted(WINDOWS)),
    lengths=st.lists(st.integers(1, 32), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    side=st.sampled_from(["left", "right", "lists"]),
    width=st.sampled_from([32, 48]),
    chunk=st.sampled_from([1, 7, 16, 512]),
    shared=st.sampled_from([0, 0, 1, 9]),
    cache=st.sampled_from(["rolling", "full"]),
    seed=st.integers(0, 2**16),
)
@pytest.mark.slow
def test_rows_are_what_they_are_alone(windows, lengths, order, side, width, chunk, shared, cache, seed):
    model = talking_model(windows=WINDOWS[windows])
    rows = random_prompts(*lengths, seed=seed)
    (start,) = random_prompts(shared, seed=seed + 1) if shared else ([],)
    expected = [alone(model, start + row) for row in rows]

    turned = [rows[index] for index in order]
    ids, positions = padded(turned, width, side) if side != "lists" else (None, None)
    prompts = turned if ids is None else np.where(positions < 0, -1, ids)
    if cache == "full" and not shared:
        options = {"prefill_chunk": chunk, "logprobs": VOCAB}
        request = Request.init(model, turned, NEW, mx.Sampler(), None, None, **options)
        *_, (decoding, _) = request.steps(*request.start(turned, forgets=False), NEW)
        tokens, recorded = np.asarray(decoding.tokens)[:, :NEW], decoding.log_probs
        top_tokens, top = (np.asarray(x)[:, :NEW] for x in (recorded.tokens, recorded.top))
    else:
        prefix = mx.prefill(model, start, prefill_chunk=chunk) if shared else None
        out = mx.generate(model, prompts, max_new_tokens=NEW, prefix=prefix, prefill_chunk=chunk, logprobs=VOCAB)
        tokens, top_tokens, top = (np.asarray(x) for x in (out.tokens, out.top_tokens, out.top_log_probs))

    for place, row in enumerate(order):
        known, log_probs, size = expected[row]
        assert tokens[place].tolist() == known
        found = np.take_along_axis(top[place], np.argsort(top_tokens[place], axis=1), axis=1)
        difference = np.abs(found - log_probs).max() / size
        assert difference < TOLERANCE
        counts["worst"] = max(counts["worst"], difference)
    # From a prefix all of it is kept.
    kept = "full cache" if shared else f"{cache} cache"
    kinds = [windows, side, f"chunks of {chunk}", "a prefix" if shared else "no prefix", kept]
    counts.update({"batches": 1, "rows": 3, "tokens": 3 * NEW} | dict.fromkeys(kinds, 1))


def test_the_batches_held_every_kind():
    """Reads the counts of the test before it."""
    if not counts["batches"]:
        pytest.skip("the other test of this file did not run")
    for name, count in counts.items():
        print(f"{name}: {count:.1e}" if name == "worst" else f"{name}: {count}")  # noqa: T201
    kinds = {"left", "right", "lists", "a prefix", "no prefix", "rolling cache", "full cache", *WINDOWS}
    assert kinds <= set(counts)
    assert 0 < counts["worst"] < TOLERANCE


@pytest.mark.slow
def test_smollm2(smollm2_path):
    """The real model: prompts of 3 to 60 tokens in one batch, however it is padded and read, and each alone."""
    model, tokenizer = mx.load(smollm2_path, dtype="float32"), mx.load_tokenizer(smollm2_path)
    text = "The clock in the tower of our town hall was built by a watchmaker who had never made anything larger than "
    ids = tokenizer.encode(text * 3)
    rows = [ids[:3], ids[5:22], ids[2:42], ids[:60]]
    options = {"max_new_tokens": 16, "logprobs": 0}
    singles = [mx.generate(model, [row], **options) for row in rows]
    expected = [single.tokens[0].tolist() for single in singles]
    ids_right, at = padded(rows, 64, "right")
    prefix = mx.prefill(model, ids[:2])
    found = {
        "a batch": mx.generate(model, rows, **options),
        "in reverse": mx.generate(model, rows[::-1], **options),
        "padded on the right, in pieces of 24": mx.generate(
            model, np.where(at < 0, -1, ids_right), prefill_chunk=24, **options
        ),
        "after a prefix": mx.generate(model, [rows[0][2:], rows[3][2:]], prefix=prefix, **options),
    }
    known = {"in reverse": [3, 2, 1, 0], "after a prefix": [0, 3]}
    worst = 0.0
    for name, out in found.items():
        for place, row in enumerate(known.get(name, range(4))):
            assert out.tokens[place].tolist() == expected[row], name
            worst = max(worst, float(np.abs(out.log_probs[place] - singles[row].log_probs[0]).max()))
    print(f"SmolLM2: 14 rows, 224 tokens, log-probabilities within {worst:.1e}")  # noqa: T201
    # Float32, logits of about 20.
    assert worst < 2e-4
