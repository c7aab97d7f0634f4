"""What the small files beside a vocabulary say, and what is refused in them."""

import json
import os

import pytest
from fixtures.text import tiny

from mistral_eqx.text import load_tokenizer
from mistral_eqx.text.settings import read_settings


def test_a_folder_without_settings_says_nothing(tmp_path):
    settings = read_settings(tmp_path)
    assert (settings.bos_token, settings.eos_ids, settings.add_bos, settings.template_tokens) == (None, (), None, None)
    assert (settings.added_tokens, settings.special_tokens) == ({}, frozenset())


def test_which_tokens_are_special_and_which_a_template_sees(tmp_path):
    decoder = {"5": {"content": "<think>", "special": True}, "6": {"content": "<tool>", "special": False}}
    config = {
        "bos_token": None,
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "pad_token": "<pad>",
        "image_token": "<image>",
        "add_bos_token": False,
        "extra_special_tokens": {"turn_token": "<turn>"},
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "added_tokens_decoder": decoder,
    }
    tiny.write_json(tmp_path / "tokenizer_config.json", config)
    tiny.write_json(tmp_path / "special_tokens_map.json", {"unk_token": "<unk>"})
    tiny.write_json(tmp_path / "config.json", {"bos_token_id": 1, "eos_token_id": 2})
    tiny.write_json(tmp_path / "added_tokens.json", {"<new>": 7})
    settings = read_settings(tmp_path)
    seen = {"eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>", "turn_token": "<turn>"}
    assert settings.template_tokens == seen
    assert settings.added_tokens == {"<think>": 5, "<tool>": 6, "<new>": 7}
    assert settings.special_tokens == {"</s>", "<pad>", "<image>", "<turn>", "<a>", "<b>", "<think>", "<unk>"}
    # The tokenizer's own files say that nothing starts a text.
    assert (settings.bos_id, settings.eos_ids) == (None, (2,))
    # Without a list of tokens the older file counts too.
    del config["added_tokens_decoder"]
    tiny.write_json(tmp_path / "tokenizer_config.json", config)
    assert read_settings(tmp_path).template_tokens == {**seen, "unk_token": "<unk>"}


def test_templates_have_names(tmp_path):
    listed = [{"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "documents"}]
    tiny.write_json(tmp_path / "tokenizer_config.json", {"chat_template": listed})
    settings = read_settings(tmp_path)
    assert (settings.chat_template, settings.tool_template) == (None, "tools")
    # A file has precedence over the list, as in transformers, and has its own file for tools.
    (tmp_path / "chat_template.jinja").write_text("plain")
    settings = read_settings(tmp_path)
    assert (settings.chat_template, settings.tool_template) == ("plain", None)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    settings = read_settings(tmp_path)
    assert (settings.chat_template, settings.tool_template) == ("plain", "more")


TOKENS = [5, 1.5, ["a"], {"a": 1}, {"content": 5}, {"content": None}, {"content": "a", "special": "false"}, True]
WRONG = [
    *(("tokenizer_config.json", key, value) for key in ("bos_token", "eos_token", "pad_token") for value in TOKENS),
    *(("special_tokens_map.json", "unk_token", value) for value in TOKENS),
    *(("tokenizer_config.json", "add_bos_token", value) for value in (5, "false", [], {}, 0)),
    *(
        ("tokenizer_config.json", "chat_template", value)
        for value in (5, 1.5, True, [5], [{"name": "x"}], [{"name": "default", "template": 5}], {"default": 5})
    ),
    ("chat_template.json", "chat_template", 5),
    *(
        ("tokenizer_config.json", "added_tokens_decoder", value)
        for value in (
            5,
            [1],
            {"x": {"content": "<a>"}},
            {"-1": {"content": "a"}},
            {"5": 5},
            {"5": "<a>"},
            {"0": {"content": ["a"]}},
            {str(10**30): {"content": "a"}},
            {"0": {"content": "a", "special": "false"}},
            {"0": {"content": "a", "lstrip": 0}},
        )
    ),
    *(("tokenizer_config.json", "additional_special_tokens", value) for value in ("<a>", [5], 5, True)),
    *(("tokenizer_config.json", "extra_special_tokens", value) for value in ("<a>", {"turn_token": 5})),
    *(("added_tokens.json", "<a>", value) for value in ("0", -1, None, 0.0, True, 2**40)),
    *(("config.json", "bos_token_id", value) for value in (-1, 2**40, "1", 1.5, [1], True)),
    *(
        (file, "eos_token_id", value)
        for file in ("config.json", "generation_config.json")
        for value in (-7, 10**30, "x", 2.5, [[2]], {"a": 1}, [2, None], True)
    ),
]


@pytest.mark.parametrize(("file", "key", "value"), WRONG)
def test_a_value_of_a_wrong_type_is_refused_with_its_file_and_key(tmp_path, file, key, value):
    tiny.write_json(tmp_path / file, {key: value})
    with pytest.raises(ValueError, match=rf"^'.*{file}' has '{key}.*, which must be .*; correct [^\n]*\.$") as caught:
        read_settings(tmp_path)
    assert caught.value.file == str(tmp_path / file)
    assert caught.value.key.startswith(key)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json", "chat_template.jinja")


@pytest.mark.parametrize("file", [*FILES, "generation_config.json", "chat_template.json"])
def test_what_is_no_file_or_no_text_is_refused_by_name(tmp_path, file):
    path = tmp_path / file

    def refused():
        with pytest.raises(ValueError, match=file) as caught:
            read_settings(tmp_path)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        return str(caught.value)

    path.mkdir()
    assert "is a folder" in refused()
    os.mkfifo(path)
    assert "is a pipe" in refused()
    path.symlink_to("nowhere")
    assert "cannot be read" in refused()
    path.symlink_to(path)
    assert "cannot be read" in refused()
    path.write_bytes(b"\xff{}")
    assert "is not UTF-8" in refused()
    with path.open("wb") as sparse:
        sparse.truncate(2**33)
    assert "is larger than" in refused()
    if path.suffix == ".json":
        for wrong in ("[" * 100_000, '{"a": NaN}', "{", "null", "[]"):
            path.write_text(wrong)
            assert "JSON" in refused()


def test_a_template_sees_the_tokens_of_the_class_where_the_settings_leave_them_out(tmp_path):
    tiny.write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "</i>"})
    assert read_settings(tmp_path).template_tokens == {"bos_token": "<s>", "eos_token": "</i>", "unk_token": "<unk>"}


def test_a_flag_that_is_text_does_not_count_as_true(tmp_path):
    tiny.byte_level_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "add_bos_token": "false"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json' has 'add_bos_token': 'false', which must be true"):
        load_tokenizer(tmp_path)
