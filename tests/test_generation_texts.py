"""Texts as prompts, and what a call need not say."""

import dataclasses

import equinox as eqx
import pytest
from fixtures.cli import save_tiny_model
from fixtures.generation import PROMPTS, refused, talking_model

import mistral_eqx as mx


class Letters:
    """A tokenizer of lower-case letters, with a beginning of sequence."""

    def encode(self, text):
        return [0, *(ord(letter) - 96 for letter in text)]

    def decode(self, ids, *, skip_special=True, after=()):
        return f"{len(after)}:" + "".join(chr(96 + int(id)) for id in ids)

    def find_stops(self, stop, after):
        raise NotImplementedError


LETTERS = Letters()
TEXTS, IDS = ["ab", "hello"], [[0, 1, 2], [0, 8, 5, 12, 12, 15]]


def test_a_text_is_a_prompt():
    model = talking_model()
    out = mx.generate(model, IDS, max_new_tokens=5)
    from_texts = mx.generate(model, TEXTS, max_new_tokens=5, tokenizer=LETTERS)
    assert from_texts.tokens.tolist() == out.tokens.tolist()
    assert from_texts.texts == [LETTERS.decode(row, after=ids) for row, ids in zip(out.tokens, IDS, strict=True)]
    alone = mx.generate(model, TEXTS[1], max_new_tokens=5, tokenizer=LETTERS)
    assert alone.tokens.tolist() == out.tokens.tolist()[1:]
    mixed = mx.generate(model, [TEXTS[0], IDS[1]], max_new_tokens=5, tokenizer=LETTERS)
    assert mixed.texts == from_texts.texts
    assert [row.tolist() for row in mx.stream(model, TEXTS, max_new_tokens=5, tokenizer=LETTERS)] == (
        out.tokens.T.tolist()
    )


def test_a_text_after_a_prefix_is_refused():
    model = talking_model()
    with refused("Prompt 0 is the text 'ab'", "prefix"):
        mx.generate(model, "ab", tokenizer=LETTERS, prefix=mx.prefill(model, [1, 2]))


@pytest.mark.parametrize(("positions", "new"), [(32, 18), (400, 256), (15, 1)])
def test_new_tokens_are_as_many_as_the_context_has_room_for(positions, new):
    model = talking_model(max_positions=positions)
    assert mx.generate(model, PROMPTS).tokens.shape == (3, new)


@pytest.mark.slow
def test_the_config_says_what_ends_a_row():
    model = talking_model()
    free = mx.generate(model, PROMPTS, max_new_tokens=12)
    end = int(free.tokens[0, 4])
    ending = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=(end,)))
    options = {"max_new_tokens": 12}
    named, by_default = mx.generate(model, PROMPTS, eos_id=end, **options), mx.generate(ending, PROMPTS, **options)
    assert by_default.lengths[0] == 1 + free.tokens[0].tolist().index(end)
    assert by_default.tokens.tolist() == named.tokens.tolist()
    assert mx.generate(ending, PROMPTS, eos_id=(), **options).tokens.tolist() == free.tokens.tolist()
    alone = mx.generate(ending, PROMPTS[:1], **options)
    said = list(mx.Conversation(ending).reply(PROMPTS[0], **options))
    assert said == free.tokens[0].tolist()[: int(alone.lengths[0])]


@pytest.mark.slow
def test_a_model_comes_with_its_tokenizer(tmp_path):
    path = save_tiny_model(tmp_path / "model")
    model, tokenizer = mx.from_pretrained(path, dtype="bfloat16")
    assert eqx.tree_equal(model, mx.load(path, dtype="bfloat16"))
    assert tokenizer.encode("Hello") == mx.load_tokenizer(path).encode("Hello")
    out = mx.generate(model, "Hello", max_new_tokens=3, tokenizer=tokenizer)
    assert out.tokens.tolist() == mx.generate(model, [tokenizer.encode("Hello")], max_new_tokens=3).tokens.tolist()
    assert len(out.texts) == 1
