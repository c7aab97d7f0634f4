import json

import pytest
from fixtures.text import tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from mistral_eqx.text import HuggingFaceTokenizer, load_tokenizer


def test_byte_level_ids_are_those_of_the_library(tmp_path):
    reference = tiny.byte_level_json(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.vocab == reference.get_vocab_size()
    for text in tiny.TEXTS:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, parse_special=True) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)
        assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_ids_are_those_of_the_library(tmp_path, scheme):
    reference = tiny.metaspace_json(tmp_path, scheme)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    texts = [*tiny.TEXTS, "a</s>hello", "<s>a</s> hello [INST]a", "[REF]hello<s>", "hello</s>"]
    for text in texts:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, parse_special=True) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)
        assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids, skip_special_tokens=False)
        assert not set(tokenizer.encode(text)) & tokenizer.special_ids


def test_white_space_that_a_control_token_swallows(tmp_path):
    reference = tiny.byte_level_json(tmp_path)
    reference.add_special_tokens(
        [
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<word>", single_word=True, normalized=False),
        ]
    )
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("a <right> \n b", "a <left> \n b", "a  <left><right>  b", "a<word>b <word> b", "<word>"):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, parse_special=True) == ids


def test_truncation_and_padding_of_the_file_are_not_kept(tmp_path):
    reference = tiny.byte_level_json(tmp_path)
    reference.enable_truncation(4)
    reference.enable_padding(length=16)
    reference.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("xyz" * 10)) == 30


def test_beginning_and_end_of_text(tmp_path):
    reference = tiny.byte_level_json(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (None, (), False)

    tiny.write_json(tmp_path / "config.json", {"bos_token_id": 1, "eos_token_id": 0})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (0,), False)

    tiny.write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 0]})
    tiny.write_json(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}})
    assert load_tokenizer(tmp_path).eos_ids == (0, 2)

    tiny.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>", "add_bos_token": True})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.encode("a")[0]) == ((2, 0), 1)

    (tmp_path / "tokenizer_config.json").unlink()
    reference.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    reference.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a") == [1, *load_tokenizer(tmp_path).encode("a", add_bos=False)]


def test_chat_template_in_all_its_places(tmp_path):
    tiny.byte_level_json(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    assert load_tokenizer(tmp_path).chat_template is None
    tiny.write_json(tmp_path / "chat_template.json", {"chat_template": "one"})
    assert load_tokenizer(tmp_path).chat_template == "one"
    tiny.write_json(config, {"chat_template": "two"})
    assert load_tokenizer(tmp_path).chat_template == "two"
    named = [{"name": "tool_use", "template": "three"}, {"name": "default", "template": "four"}]
    tiny.write_json(config, {"chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == "four"
    tiny.write_json(config, {"chat_template": named[:1]})
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("five\n")
    assert load_tokenizer(tmp_path).chat_template == "five\n"


def test_trap_words_are_cut_like_in_the_tekken_file_beside(tmp_path):
    reference = tiny.byte_level_json(tmp_path)
    assert len(load_tokenizer(tmp_path).encode("123")) == 1
    pattern = json.dumps({"config": {"pattern": r"\p{N}|\P{N}+"}})
    (tmp_path / "tekken.json").write_text(pattern)
    assert len(load_tokenizer(tmp_path).encode("123")) == 3
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}|\P{N}+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    for text in tiny.TEXTS:
        assert load_tokenizer(tmp_path).encode(text, parse_special=True) == reference.encode(text).ids


def test_trap_16_bit_token_ids_overflow_large_vocabularies(tmp_path):
    reference = tiny.byte_level_json(tmp_path)
    content = json.loads(reference.to_str())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 131_071, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 131_071
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab == 131_072
    assert tokenizer.encode("a<far>", parse_special=True)[-1] == 131_071
    assert tokenizer.decode([131_071], skip_special=False) == "<far>"
    # An id between that no token has is no text.
    assert tokenizer.decode([70_000]) == ""


def test_an_unknown_decoder_is_refused_by_name(tmp_path):
    reference = tiny.byte_level_json(tmp_path)
    reference.decoder = decoders.WordPiece()
    reference.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"The decoder WordPiece of .*tokenizer\.json is not one that"):
        load_tokenizer(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    tiny.byte_level_json(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    for wrong in (content[:1000], "{}", "[1, 2]", "\0"):
        (tmp_path / "tokenizer.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json, or it is damaged"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"add_bos_token": ')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json' is not valid JSON"):
        load_tokenizer(tmp_path)
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json' must hold a JSON object, not a list"):
        load_tokenizer(tmp_path)
    config.write_text('{"added_tokens_decoder": []}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json' has 'added_tokens_decoder': \[\], which must"):
        load_tokenizer(tmp_path)
    config.write_text('{"bos_token": "<s>"}')
    with pytest.raises(ValueError, match=r"name the token '<s>', which tokenizer\.json does not have"):
        load_tokenizer(tmp_path)
    for added in ({"3": {"content": "<new>"}}, {"7": {"content": "<|im_end|>"}}):
        tiny.write_json(config, {"added_tokens_decoder": added})
        with pytest.raises(ValueError, match=r"give the token '<.*>' the id \d, and tokenizer\.json does not"):
            load_tokenizer(tmp_path)
    tiny.write_json(config, {"added_tokens_decoder": {"2": {"content": "<|im_end|>"}}})
    assert load_tokenizer(tmp_path).vocab


def test_the_given_file_is_read(tmp_path):
    reference = tiny.byte_level_json(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "my_tokenizer.json")
    assert isinstance(reference, Tokenizer)
    assert load_tokenizer(tmp_path / "my_tokenizer.json").encode("hello") == reference.encode("hello").ids


def test_a_token_that_only_the_settings_have_is_added(tmp_path):
    reference = tiny.byte_level_json(tmp_path)
    vocab = reference.get_vocab_size()
    tiny.write_json(tmp_path / "added_tokens.json", {"<last>": vocab + 1, "<end>": vocab})
    tiny.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<end>"})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab, tokenizer.eos_ids) == (vocab + 2, (vocab,))
    (a,) = tokenizer.encode("a")
    assert tokenizer.encode("a<last>", parse_special=True) == tokenizer.encode("a<last>") == [a, vocab + 1]
    assert tokenizer.encode("a<end>", parse_special=True) == [a, vocab]
    assert vocab not in tokenizer.encode("a<end>")
    assert tokenizer.decode([a, vocab + 1, vocab]) == "a<last>"
    tiny.write_json(tmp_path / "added_tokens.json", {"<far>": vocab + 1})
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=rf"give the token '<far>' the id {vocab + 1}, and tokenizer\.json does not"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "<own>"},
        {"added_tokens_decoder": {"ID": {"content": "<own>", "special": True}}},
        {"extra_special_tokens": ["<own>"]},
        {"pad_token": {"content": "<own>"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_token_is_special_if_one_of_the_files_says_so(tmp_path, settings):
    reference = tiny.byte_level_json(tmp_path)
    reference.add_tokens([AddedToken("<own>", normalized=False)])
    reference.save(str(tmp_path / "tokenizer.json"))
    own = reference.token_to_id("<own>")
    assert load_tokenizer(tmp_path).encode("a<own>")[-1] == own
    settings = json.loads(json.dumps(settings).replace("ID", str(own)))
    tiny.write_json(tmp_path / "tokenizer_config.json", settings)
    tokenizer = load_tokenizer(tmp_path)
    assert own not in tokenizer.encode("a<own>")
    assert tokenizer.encode("a<own>", parse_special=True)[-1] == own
    assert tokenizer.decode(tokenizer.encode("a<own>", parse_special=True)) == "a"


def test_an_end_token_that_is_a_word_is_no_text_but_is_read(tmp_path):
    tiny.byte_level_json(tmp_path)
    (newline,) = load_tokenizer(tmp_path).encode("\n")
    tiny.write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, newline]})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a\n")[-1] == newline
    assert tokenizer.decode(tokenizer.encode("a\n")) == "a"


def test_control_tokens_among_the_words_of_a_model_are_text(tmp_path):
    """A unigram model finds the names of its control tokens in a text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in "\u2581a</s>")]
    reference = Tokenizer(models.Unigram(pieces, unk_id=0))
    reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    reference.decoder = decoders.Metaspace(prepend_scheme="first")
    reference.add_special_tokens(["</s>"])
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert 1 not in tokenizer.encode("a</s></s>a")
    assert tokenizer.decode(tokenizer.encode("a</s></s>a")) == "a</s></s>a"
    assert tokenizer.encode("a</s>", parse_special=True)[-1] == 1


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize(
    ("step", "starts"),
    [
        (processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]), True),
        (processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]), False),
        (processors.ByteLevel(), False),
    ],
    ids=["template", "end", "bytes"],
)
def test_the_last_step_of_the_file_says_what_starts_a_text(tmp_path, step, starts, add_bos):
    reference = tiny.byte_level_json(tmp_path)
    reference.post_processor = step
    reference.save(str(tmp_path / "tokenizer.json"))
    tiny.write_json(
        tmp_path / "tokenizer_config.json", {"bos_token": "<|endoftext|>" if not starts else "<|im_start|>"}
    )
    if add_bos is not None:
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        tiny.write_json(tmp_path / "tokenizer_config.json", {**settings, "add_bos_token": add_bos})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.adds_bos == starts
    assert (tokenizer.encode("a")[0] == 1) == starts
    tokenizer.save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").encode("a") == tokenizer.encode("a")


NORMALIZERS = {
    "prepend": {"type": "Prepend", "prepend": ""},
    "replace": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"},
    "no table": {"type": "Precompiled", "precompiled_charsmap": ""},
    "short table": {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    "table within": {
        "type": "Sequence",
        "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "/////w=="}],
    },
}
CUTS = {"slow": "(a+)+$", "wrong": "(("}


@pytest.mark.parametrize("case", [*NORMALIZERS, *CUTS])
def test_what_makes_the_library_panic_is_one_sentence(tmp_path, case):
    tiny.byte_level_json(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    if case in NORMALIZERS:
        content["normalizer"] = NORMALIZERS[case]
    else:
        cut = {"type": "Split", "pattern": {"Regex": CUTS[case]}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = cut
    tiny.write_json(tmp_path / "tokenizer.json", content)
    with pytest.raises(ValueError, match=r"tokenizer\.json .*\(.*\); fetch it again\.$") as caught:
        load_tokenizer(tmp_path).encode("a" * 60 + "b")
    assert "\n" not in str(caught.value)


def test_the_tekken_file_beside_is_checked(tmp_path):
    tiny.byte_level_json(tmp_path)
    for content in ('{"config": []}', '{"config": {"pattern": 5}}', '{"config": {"pattern": "(("}}', "[", "[" * 10**5):
        (tmp_path / "tekken.json").write_text(content)
        with pytest.raises(ValueError, match=r"tekken\.json.*; fetch it again\.$"):
            load_tokenizer(tmp_path)
