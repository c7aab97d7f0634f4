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
            ValueError, match=r"tekken\.json is no tekken\.json, or it is damaged \(.*\); fetch it again"
        ):
            load_tokenizer(tmp_path)


def test_without_mistral_common_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "tekken.json").write_text("{}")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mistral_common" else find(name))
    with pytest.raises(ValueError, match=r"takes the extra `tekken`: pip install 'mistral-eqx\[tekken\]'\."):
        load_tokenizer(tmp_path)
