import base64
import importlib.util
import json
import sys

import pytest
from fixtures.text import tiny
from hypothesis import given, settings, strategies as st

from mistral_eqx.text import Detokenizer, TekkenTokenizer, encode_chat, load_tokenizer
from mistral_eqx.text.pre_tokenizers import PRE_TOKENIZERS


@pytest.fixture(scope="module")
def data():
    return pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer._data_path()


@pytest.mark.parametrize("name", [pytest.param("tekken_240718.json", marks=pytest.mark.slow), "tekken_240911.json"])
def test_released_files_give_the_ids_of_mistral_common(data, name):
    tokenizer = load_tokenizer(data / name)
    assert isinstance(tokenizer, TekkenTokenizer)
    reference = pytest.importorskip("mistral_common.tokens.tokenizers.tekken").Tekkenizer.from_file(data / name)
    assert (tokenizer.vocab, tokenizer.bos_id, tokenizer.eos_ids) == (131_072, 1, (2,))
    assert tokenizer.special_ids == reference.special_ids
    for text in tiny.TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, bos=True, eos=False)
        assert tokenizer.encode(text, add_bos=False) == ids[1:]
        assert tokenizer.decode(ids) == reference.decode(ids) == text
    # Trap: ids beyond 16 bits.
    ids = tokenizer.encode("你好世界", add_bos=False)
    assert max(ids) > 65_535
    assert tokenizer.decode(ids) == "你好世界"
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == "你好世界"
    assert tokenizer.encode("[INST]a[/INST]", parse_special=True) == [1, 3, *tokenizer.encode("a", add_bos=False), 4]
    assert tokenizer.decode([1, 3, 4], skip_special=False) == "<s>[INST][/INST]"


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "tekken.json"
    for content in ("{", "{}", "[]", json.dumps({"config": {"version": "v99"}, "vocab": []})):
        path.write_text(content)
        with pytest.raises(
            ValueError, match=r"tekken\.json is not a tekken\.json, or it is damaged \(.*\); fetch it again"
        ):
            load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def released(data):
    """A published vocabulary, and mistral-common's reader of it."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = data / "tekken_240911.json"
    return load_tokenizer(path), Tekkenizer.from_file(path)


# Where the pattern of tekken cuts a text, and runs that merge in more than one way.
PIECES = [*"aA1_\u00df\u5929\u0627\u093c\u01c5\u02b0\u00bd\u00b2\u00e9 \t\n\u00a0\u3000\x00"]
PIECES += ["aa", "e\u0301", "'s", "'S", "//", "--", "  ", "\r\n", "[INST]", "</s>", "\U0001f469\u200d\U0001f680"]
TEXT = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from(PIECES), max_size=24).map("".join),
    st.builds(lambda piece, times, rest: piece * times + rest, st.sampled_from(PIECES), st.integers(1, 90), st.text()),
)


@settings(deadline=None, max_examples=500)
@given(text=TEXT)
def test_any_text_has_the_ids_of_mistral_common(released, text):
    ours, theirs = released
    ids = ours.encode(text, add_bos=False)
    assert ids == theirs.encode(text, bos=False, eos=False)
    assert ours.decode(ids) == text


def test_a_default_install_reads_tekken_and_names_the_extra_for_conversations(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mistral_common" else find(name))
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    tokenizer = load_tokenizer(tiny.write_tekken(tmp_path, "v13"))
    assert tokenizer.decode(tokenizer.encode("Hi \u5929")) == "Hi \u5929"
    with pytest.raises(ValueError, match=r"needs the extra `tekken`: pip install 'mistral-eqx\[tekken\]'\.$"):
        encode_chat(tokenizer, [{"role": "user", "content": "Hi"}])


def test_conversations_of_an_unknown_version_are_refused(tmp_path, data):
    tokenizer = load_tokenizer(tiny.write_tekken(tmp_path, "v99"))
    with pytest.raises(ValueError, match=r"^mistral-common cannot read .*tekken\.json \(.*v99[^\n]*\.$"):
        encode_chat(tokenizer, [{"role": "user", "content": "Hi"}])


def test_it_is_written_to_gguf(tmp_path):
    metadata = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in small_with_merges(tmp_path).gguf_metadata().items()
        if key.startswith("tokenizer.ggml.") and key != "tokenizer.ggml.model"
    }
    ours = load_tokenizer(tmp_path / "tekken.json")
    again = load_tokenizer(tiny.write_gguf(tmp_path / "tiny.gguf", model="gpt2", **metadata))
    assert metadata["pre"] == "tekken"
    assert (again.vocab, again.bos_id, again.eos_ids, again.adds_bos) == (ours.vocab, 1, (2,), True)
    assert again.control_tokens == ours.control_tokens
    for text in [*tiny.TEXTS, "hello", "[INST]"]:
        assert again.encode(text, parse_special=True) == ours.encode(text, parse_special=True)


def small_with_merges(folder):
    """A `tekken.json` with a few merges, and the published pattern."""
    content = small_tekken()
    words = [b"he", b"ll", b"hell", b"hello", b"lo", b" t"]
    content["vocab"] += [
        {"rank": 256 + at, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode()}
        for at, word in enumerate(words)
    ]
    content["config"] |= {"default_vocab_size": 261 + len(words), "pattern": PRE_TOKENIZERS["tekken"].patterns[0]}
    return load_tokenizer(tiny.write_json(folder / "tekken.json", content))


def small_tekken():
    """The least content of a `tekken.json`: all bytes, and control tokens."""
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    return {
        "config": {
            "pattern": r"[^\s]+|\s+",
            "num_vocab_tokens": 256,
            "default_vocab_size": 256 + len(names),
            "default_num_special_tokens": len(names),
            "version": "v3",
        },
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
            for byte in range(256)
        ],
        "special_tokens": [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)],
    }


def test_a_small_file_is_read(tmp_path):
    tiny.write_json(tmp_path / "tekken.json", small_tekken())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a\u00e9") == [1, *(byte + 5 for byte in "a\u00e9".encode())]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("default_num_special_tokens", 2**62),
        ("default_num_special_tokens", "5"),
        ("default_vocab_size", 2**62),
        ("default_vocab_size", -1),
        ("pattern", "(("),
        ("pattern", "x"),
        ("pattern", None),
        ("special_tokens", []),
        ("special_tokens", None),
        ("special_tokens", 5),
        ("ranks", 99),
        ("name", 5),
        ("name", ""),
        ("name", "\ud800"),
        ("vocab", {}),
        ("twice", "AQ=="),
        ("bytes", "no base 64"),
        ("config", []),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, key, value):
    content = small_tekken()
    if key == "special_tokens" and value is None:
        content["config"]["version"] = "v11"
    if key in ("twice", "bytes"):
        content["vocab"][-1]["token_bytes"] = value
    elif key == "name":
        content["special_tokens"][3]["token_str"] = value
    elif key == "ranks":
        content["special_tokens"][3]["rank"] = value
    else:
        (content["config"] if key in content["config"] else content)[key] = value
    tiny.write_json(tmp_path / "tekken.json", content)
    with pytest.raises(
        ValueError, match=r"tekken\.json is not a tekken\.json, or it is damaged \(.*\); fetch it again\.$"
    ):
        load_tokenizer(tmp_path)
