"""Windows are those of the definition, tokens those of the whole text, and memory does not grow with it."""

import io
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.generation import VOCAB, logits_of, refused, talking_model

import mistral_eqx as mx
from mistral_eqx.evaluate import windows as module


BOOK = Path(__file__).parents[1] / "examples/data/moby-dick.txt"


class Letters:
    """A tokenizer with a token a character, of two bytes each, and one for the beginning if asked."""

    def __init__(self, bos=()):
        self.bos = list(bos)

    def encode(self, text, *, add_bos=None, parse_special=False):
        return [*([] if add_bos is False else self.bos), *self.encode_plain(text, first=True)]

    def encode_plain(self, text, *, first):
        return [ord(character) % VOCAB for character in text]

    def token_bytes(self, id, *, first):
        return b"ab"


@pytest.fixture(scope="module")
def model():
    return talking_model(windows=(None,), max_positions=64)


def expected(model, ids, context, stride):
    """The loop of Hugging Face's page, with each token counted once: the sum of log-probabilities, and their number.

    The page itself weighs each window's mean loss by one token less than it has after the first window.
    """
    total, count, end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        before, end = end, min(begin + context, len(ids))
        logits = logits_of(model, ids[begin:end], width=64).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for at in range(max(before, begin + 1), end):
            total += log_probs[at - begin - 1, ids[at]]
            count += 1
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize(
    ("context", "stride", "bos"),
    [
        (None, None, []),
        (64, 64, [3]),
        (20, 20, []),
        (20, 20, [3]),
        (20, 7, [3]),
        (20, 19, []),
        (20, 1, [3]),
        (3, 2, [3]),
        (2, 1, []),
        (2, 1, [3]),
    ],
)
@pytest.mark.slow
def test_windows_slide_as_defined(model, context, stride, bos):
    text = BOOK.read_text()[:90] if context == 20 else BOOK.read_text()[:70]
    tokenizer = Letters(bos)
    total, count = expected(model, tokenizer.encode(text), context or 64, stride or 32)
    found = mx.perplexity(model, tokenizer, text, context=context, stride=stride, batch=4)
    assert (found.tokens, found.bytes) == (count, 2 * count)
    # 70 sums of float32, each within 1e-5.
    assert found.log_prob == pytest.approx(total, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-total / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(-total / count / 2 / math.log(2), rel=1e-5)


def test_progress_tells_what_was_measured_so_far(model):
    text, seen = "x" * 40, []
    found = mx.perplexity(model, Letters(), text, context=10, stride=5, batch=2, progress=seen.append)
    assert seen[-1] == found
    assert [one.tokens for one in seen] == [14, 24, 34, 39]
    first = mx.perplexity(model, Letters(), "x" * 15, context=10, stride=5, batch=2)
    assert seen[0] == first


@pytest.mark.long
def test_a_quantized_cache_costs_smollm2_little(smollm2_path):
    """The text and the windows of `examples/quantize.py`."""
    smollm2, tokenizer = mx.load(smollm2_path, dtype="float32"), mx.load_tokenizer(smollm2_path)
    text = BOOK.read_text(encoding="utf-8")[:1500]
    found = {
        cache_dtype: mx.perplexity(smollm2, tokenizer, text, context=512, cache_dtype=cache_dtype).perplexity
        for cache_dtype in (None, "int8", "float8_e4m3")
    }
    assert found["int8"] == pytest.approx(found[None], rel=0.01)
    assert found["float8_e4m3"] == pytest.approx(found[None], rel=0.05)


def whole_and_parts(tokenizer, text):
    tokens = [token for part in module.encode_parts(tokenizer, io.StringIO(text)) for token in part]
    assert sum(token.bytes for token in tokens) == len(text.encode())
    return tokenizer.encode(text), [token.id for token in tokens]


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3", "tekken_240911.json", None]
)
@pytest.mark.slow
def test_tokens_are_those_of_the_whole_text(monkeypatch, smollm2_path, name):
    path = smollm2_path
    if name:
        data = pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer._data_path()
        path = next(data.glob(f"{name}*"))
    text = (
        BOOK.read_text()[:12_000]
        + "\n\n  1851,  in  3 parts .\n\tif x:  y\n"
        + "Être où ça été ça va\r\n Ёлка и дом 東京" * 20
    )
    monkeypatch.setattr(module, "_BLOCK", 150)
    whole, parts = whole_and_parts(mx.load_tokenizer(path), text)
    assert whole == parts


def test_a_text_without_words_is_cut_anyway(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 10)
    monkeypatch.setattr(module, "_MOST_BLOCKS", 3)
    text = "東京" * 50 + "1 2 , 3 " * 20 + "a b" * 40
    parts = list(module._parts(io.StringIO(text)))
    assert "".join(parts) == text
    assert max(map(len, parts)) == 30


class Words(Letters):
    """A tokenizer with a token a word."""

    def encode_plain(self, text, *, first):
        return [len(word) % VOCAB for word in text.split()]


class Endless:
    """A text of words of a thousand letters, of which nothing is kept."""

    def __init__(self, size):
        self.left = size

    def read(self, size):
        size = min(size, self.left)
        self.left -= size
        return (("x" * 999 + " ") * (size // 1000 + 1))[:size]


def test_memory_does_not_grow_with_the_text(model, monkeypatch):
    def nothing(model, rows, *, last, cache_dtype):
        return SimpleNamespace(log_probs=np.zeros((len(rows), max(map(len, rows)))))

    monkeypatch.setattr(module, "score", nothing)
    peaks = []
    for megabytes in (1, 64):
        tracemalloc.start()
        found = module.perplexity(model, Words(), Endless(megabytes * 10**6), context=64, stride=32, batch=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert 0.9 < found.tokens / (megabytes * 1000) < 1.1
    # Half a dozen blocks of 64 KB; the text has a thousand.
    assert peaks[1] < peaks[0] + 10**5 < 10**6


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, ["The text is empty"]),
        ("x", {}, ["The text has one token"]),
        ("xyz", {"stride": 0}, ["stride is 0"]),
        ("xyz", {"stride": 21, "context": 20}, ["stride is 21", "context of 20"]),
        ("xyz", {"context": 65}, ["context is 65", "context of 64"]),
        ("xyz", {"context": 1}, ["context is 1"]),
        ("xyz", {"batch": 0}, ["batch is 0"]),
    ],
)
def test_bad_input_is_refused(model, text, options, words):
    with refused(*words):
        mx.perplexity(model, Letters(), text, **options)


def test_what_comes_before_a_text_is_enough_to_score_its_first_token(model):
    assert mx.perplexity(model, Letters([3]), "x").tokens == 1
    with refused("The text is empty"):
        mx.perplexity(model, Letters([3]), "")
