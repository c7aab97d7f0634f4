"""Tokens on disk are those of the texts, are made once, and are there as a whole or not at all."""

import numpy as np
import pytest
from fixtures.generation import refused
from hypothesis import given, settings, strategies as st

from mistral_eqx.train import cut, data


TEXTS = ["to be", "", "or", "not", "x"]


class Bytes:
    """A tokenizer that counts its calls."""

    def __init__(self, shift=0):
        self.shift, self.calls = shift, 0

    def __call__(self, text):
        self.calls += 1
        return [byte + self.shift for byte in text.encode()]


def expected(texts, end_id=None):
    return [[*text.encode()] + ([] if end_id is None else [end_id]) for text in texts]


def found(tokens):
    return [tokens[index].tolist() for index in reversed(range(len(tokens)))][::-1]


def test_tokens_are_those_of_the_texts(tmp_path):
    said = []
    tokens = data.tokenise(TEXTS, Bytes(), tmp_path / "made/here", vocab=256, progress=lambda *done: said.append(done))
    assert found(tokens) == expected(TEXTS)
    assert said == [(done, 5) for done in range(1, 6)]
    assert tokens.lengths.tolist() == [5, 0, 2, 3, 1]
    assert (tokens[0].dtype, tokens.ids.dtype, tokens.vocab) == (np.int32, np.uint8, 256)
    # Mapped, not read in, but for what is asked for.
    assert isinstance(tokens.ids, np.memmap)
    assert type(tokens[0]) is np.ndarray
    ended = data.tokenise(TEXTS, Bytes(), tmp_path, vocab=257, end_id=256)
    assert found(ended) == expected(TEXTS, 256)
    assert found(data.Tokens(ended.folder)) == expected(TEXTS, 256)


def test_what_was_made_is_taken_again_unless_something_differs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("to be or not")

    def calls(source, encode, **how):
        tokens = data.tokenise(source, encode, tmp_path / "cache", **{"vocab": 256, **how})
        assert found(tokens) == [[*encode(text)] + ([how["end_id"]] if "end_id" in how else []) for text in source]
        return tokens.folder

    texts = data.TextFile(path, " ")
    folder = calls(texts, Bytes())
    counting = Bytes()
    assert data.tokenise(data.TextFile(path, " "), counting, tmp_path / "cache", vocab=256).folder == folder
    # It looked at no more than what tells tokenizers apart.
    assert counting.calls == len(texts)
    folders = {
        folder,
        calls(texts, Bytes(1)),
        calls(texts, Bytes(), vocab=300),
        calls(texts, Bytes(), end_id=7),
        calls(data.TextFile(path), Bytes()),
        calls(["to be", "or"], Bytes()),
        calls(["to be", "oR"], Bytes()),
    }
    path.write_text("to be or not to be")
    folders.add(calls(data.TextFile(path, " "), Bytes()))
    assert len(folders) == 8
    # All stay, and nothing else is left.
    assert {*(tmp_path / "cache").iterdir()} == folders


def test_a_long_text_is_not_encoded_to_tell_the_tokenizer(tmp_path):
    asked = []

    def encode(text):
        asked.append(len(text))
        return [1]

    for _ in range(2):
        data.tokenise(["a" * 5000] * 40, encode, tmp_path, vocab=2)
    assert asked == [1000] * 16 + [5000] * 40 + [1000] * 16


def test_what_is_interrupted_is_not_there(tmp_path):
    def encode(text):
        if text == "not":
            raise KeyboardInterrupt
        return [1]

    # It stands behind those by which the tokenizer is known.
    texts = ["a"] * 31 + ["not"] + ["a"] * 100
    with pytest.raises(KeyboardInterrupt):
        data.tokenise(texts, encode, tmp_path / "cache", vocab=2)
    assert [*(tmp_path / "cache").iterdir()] == []
    assert len(data.tokenise(texts, lambda text: [1], tmp_path / "cache", vocab=2)) == 132


def test_two_that_make_the_same_at_once_both_have_it(tmp_path):
    made = []

    def encode(text):
        # Another process starts and ends while this one is at its second text.
        if text == "or" and len(made) < 1 and list(tmp_path.iterdir()):
            made.append(None)
            made.append(data.tokenise(TEXTS, Bytes(), tmp_path, vocab=256))
        return [*text.encode()]

    tokens = data.tokenise(TEXTS, encode, tmp_path, vocab=256)
    assert tokens.folder == made[1].folder
    assert found(tokens) == expected(TEXTS)
    assert [*tmp_path.iterdir()] == [tokens.folder]


def test_trap_16_bit_token_ids_overflow_large_vocabularies(tmp_path):
    ids = [0, 65535, 65536, 70000, 131071]
    tokens = data.tokenise(["a"], lambda text: ids, tmp_path, vocab=131072)
    assert tokens[0].tolist() == ids
    # What fits into two bytes takes no more, to the last id.
    small = data.tokenise(["a"], lambda text: [0, 65535], tmp_path, vocab=65536)
    assert small.ids.dtype == np.uint16
    assert small[0].tolist() == [0, 65535]
    assert data.tokenise(["a"], lambda text: [65536], tmp_path, vocab=65537)[0].tolist() == [65536]


def test_wrong_input_is_refused(tmp_path):
    with refused("no texts"):
        data.tokenise([], Bytes(), tmp_path, vocab=256)
    with refused("All of 2 texts are empty"):
        data.tokenise(["", ""], Bytes(), tmp_path, vocab=256)
    with refused("Document 2", "id 114", "vocabulary of 114"):
        data.tokenise(["be", "no", "or"], Bytes(), tmp_path, vocab=114)
    with refused("Document 0", "id -1"):
        data.tokenise(["a"], lambda text: [-1], tmp_path, vocab=114)
    with refused("end token 256"):
        data.tokenise(["a"], Bytes(), tmp_path, vocab=256, end_id=256)
    with refused("holds no tokens"):
        data.Tokens(tmp_path)
    # Nothing was left behind.
    assert [*tmp_path.iterdir()] == []


def test_damaged_tokens_are_refused(tmp_path):
    folder = data.tokenise(TEXTS, Bytes(), tmp_path, vocab=256).folder
    (folder / "ids.bin").write_bytes(b"to be")
    with refused("cut off", "tokenise again"):
        data.tokenise(TEXTS, Bytes(), tmp_path, vocab=256)
    (folder / "about.json").write_text("{")
    with refused("no tokens", "tokenise again"):
        data.Tokens(folder)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(lambda lengths: max(lengths) > 1), st.integers(1, 9))
def test_pieces_are_those_of_cut(tmp_path_factory, lengths, seq):
    texts = [[100 * number + place for place in range(length)] for number, length in enumerate(lengths)]
    tokens = data.tokenise(texts, list, tmp_path_factory.mktemp("tokens"), vocab=1000)
    pieces = data.Pieces(tokens, seq)
    expected = [piece.tolist() for text in texts if len(text) > 1 for piece in cut(text, seq)]
    assert found(pieces) == expected
    targets = [token for piece in pieces for token in piece[1:]]
    assert targets == [token for text in texts for token in text[1:]]


def test_documents_without_targets_are_refused(tmp_path):
    tokens = data.tokenise(["a", "b", ""], Bytes(), tmp_path, vocab=256)
    with refused("None of 3 documents has two tokens"):
        data.Pieces(tokens, 4)
    with refused("seq is 0"):
        data.Pieces(tokens, 0)
