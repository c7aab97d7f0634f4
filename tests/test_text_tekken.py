import base64
import importlib.util
import json

import pytest
from fixtures.text import tiny

from mistral_eqx.text import Detokenizer, TekkenTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def data():
    return pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer._data_path()


@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
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


def test_damaged_files_are_refused(tmp_path, data):
    path = tmp_path / "tekken.json"
    for content in ("{", "{}", json.dumps({"config": {"version": "v99"}, "vocab": []})):
        path.write_text(content)
        with pytest.raises(
            ValueError, match=r"tekken\.json is not a tekken\.json, or it is damaged \(.*\); fetch it again"
        ):
            load_tokenizer(tmp_path)


def test_without_mistral_common_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "tekken.json").write_text("{}")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mistral_common" else find(name))
    with pytest.raises(ValueError, match=r"needs the extra `tekken`: pip install 'mistral-eqx\[tekken\]'\."):
        load_tokenizer(tmp_path)


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
    pytest.importorskip("mistral_common")
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
        ("version", "v99"),
        ("special_tokens", []),
        ("special_tokens", 5),
        ("ranks", 99),
        ("vocab", {}),
        ("config", []),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, key, value):
    pytest.importorskip("mistral_common")
    content = small_tekken()
    if key == "ranks":
        content["special_tokens"][3]["rank"] = value
    else:
        (content["config"] if key in content["config"] else content)[key] = value
    tiny.write_json(tmp_path / "tekken.json", content)
    with pytest.raises(
        ValueError, match=r"tekken\.json is not a tekken\.json, or it is damaged \(.*\); fetch it again\.$"
    ):
        load_tokenizer(tmp_path)
