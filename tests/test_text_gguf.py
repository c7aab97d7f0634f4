import gguf
import numpy as np
import pytest
from fixtures.text import tiny

from mistral_eqx.checkpoint.gguf import read_gguf
from mistral_eqx.errors import InputError
from mistral_eqx.text import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from mistral_eqx.text.pre_tokenizers import PRE_TOKENIZERS


def byte_level(tmp_path, **changes):
    return load_tokenizer(tiny.write_gguf(tmp_path / "tiny.gguf", **tiny.byte_level_metadata(**changes)))


def sentencepiece(tmp_path, **changes):
    return load_tokenizer(tiny.write_gguf(tmp_path / "tiny.gguf", **tiny.sentencepiece_metadata(**changes)))


def test_metadata_is_what_the_gguf_package_reads(tmp_path):
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"test.{kind}", 7 if kind.startswith("u") else -7)
    writer.add_float32("test.float32", 0.5)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "é天")
    writer.add_array("test.strings", ["a", "", "天"])
    writer.add_array("test.floats", [0.5, -1e9])
    writer.add_array("test.bools", [True, False])
    writer.add_tensor("weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    metadata, _ = read_gguf(path)
    fields = {name: field for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}
    assert metadata == {name: field.contents() for name, field in fields.items()}
    assert metadata["test.strings"] == ["a", "", "天"]


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_metadata_cut_short(tmp_path, part):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", **tiny.byte_level_metadata())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=r"tiny.gguf' is truncated within its header; fetch it again\."):
        load_tokenizer(path)


def test_token_that_is_no_text(tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", **tiny.sentencepiece_metadata())
    token = tiny.sentencepiece_metadata()["tokens"][-1].encode()
    content = path.read_bytes()
    path.write_bytes(content.replace(token, b"\xff" * len(token)))
    with pytest.raises(ValueError, match=r"is damaged: its vocabulary has the token .*, which is not UTF-8"):
        load_tokenizer(path)


def test_byte_level_vocabulary(tmp_path):
    tokenizer = byte_level(tmp_path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.vocab == len(tiny.byte_level_tokens()) + 2
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), False)
    assert tokenizer.chat_template == tiny.CHATML
    tokens = tiny.byte_level_tokens("<think>", "  ")
    named = [tokens[id] for id in tokenizer.encode("hello 1230 <|im_end|><think>a  b")]
    assert named[:6] == ["hello", "Ġ", "1", "2", "3", "0"]
    assert named[6:8] == ["Ġ", "<"]
    # The user's own tokens are text to the vocabulary, wherever they stand.
    assert named[-4:] == ["<think>", "a", "  ", "b"]
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [2]
    assert tokenizer.encode("", add_bos=True) == [1]


def test_byte_level_texts_come_back(tmp_path):
    tokenizer = byte_level(tmp_path)
    for text in tiny.TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_beginning_of_text_follows_the_file_and_else_the_kind_of_vocabulary(tmp_path):
    assert not byte_level(tmp_path, add_bos_token=None).adds_bos
    assert byte_level(tmp_path, add_bos_token=None, pre="llama-bpe").adds_bos
    assert byte_level(tmp_path, add_bos_token=None, pre="tekken").adds_bos
    assert not byte_level(tmp_path, pre="tekken").adds_bos
    assert byte_level(tmp_path, add_bos_token=True).encode("a")[0] == 1
    assert sentencepiece(tmp_path).encode("a")[0] == 1
    assert sentencepiece(tmp_path, add_bos_token=False).encode("a")[0] != 1


def test_turns_and_messages_end_a_text_too(tmp_path):
    assert byte_level(tmp_path, eot_token_id=0, eom_token_id=2).eos_ids == (2, 0)


def test_space_prefix_of_a_byte_level_vocabulary(tmp_path):
    tokenizer = byte_level(tmp_path, add_space_prefix=True)
    plain = byte_level(tmp_path)
    assert tokenizer.encode("the") == plain.encode(" the")
    assert tokenizer.encode("\tthe") == plain.encode("\tthe")
    assert tokenizer.encode("<|im_start|>the", parse_special=True) == plain.encode(
        "<|im_start|>the", parse_special=True
    )


def words(pre, text):
    return [text[start:end] for _, (start, end) in PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)]


def test_each_pre_tokenizer_cuts_its_own_words():
    text = "It's IT'S a1234 camelCase\n\n  x /*\n"
    code = ["\n\n ", " x", " /*", "\n"]
    assert words("gpt-2", text) == ["It", "'s", " IT", "'", "S", " a", "1234", " camelCase", *code]
    assert words("smollm", text) == ["It", "'s", " IT", "'", "S", " a", "1", "2", "3", "4", " camelCase", *code]
    code = ["\n\n", " ", " x", " /*\n"]
    assert words("llama-bpe", text) == ["It", "'s", " IT", "'S", " a", "123", "4", " camelCase", *code]
    assert words("qwen2", text) == ["It", "'s", " IT", "'S", " a", "1", "2", "3", "4", " camelCase", *code]
    assert words("tekken", text) == ["It", "'s", " IT", "'S", " a", "1", "2", "3", "4", " camel", "Case", *code]
    code = ["\n\n ", " x", " ", "/*", "\n"]
    assert words("default", text) == ["It", "'", "s", " IT", "'", "S", " a", "123", "4", " camelCase", *code]


def test_trap_digits_of_smollm_are_taken_one_by_one(tmp_path):
    # The merges join 1, 2 and 3; only the cutting keeps them apart.
    tokens = tiny.byte_level_tokens("<think>", "  ")
    assert [tokens[id] for id in byte_level(tmp_path).encode("a 123")] == ["a", "Ġ", "1", "2", "3"]
    assert [tokens[id] for id in byte_level(tmp_path, pre="gpt-2").encode("a 123")] == ["a", "Ġ", "123"]


def test_unknown_pre_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"for the pre-tokenizer 'chameleon' .* these are supported: default, gpt-2, .*tokenizer\.json"
    ):
        byte_level(tmp_path, pre="chameleon")
    with pytest.raises(ValueError, match=r"tiny.gguf has no tokenizer\.ggml\.pre; use the model's folder"):
        byte_level(tmp_path, pre=None)


def test_damaged_byte_level_vocabulary(tmp_path):
    tokens = tiny.byte_level_metadata()["tokens"]
    with pytest.raises(ValueError, match="its vocabulary has the token 'a' twice"):
        byte_level(tmp_path, tokens=["a" if token == "b" else token for token in tokens])
    with pytest.raises(ValueError, match=f"its vocabulary has {len(tokens)} tokens but 3 token_type; fetch"):
        byte_level(tmp_path, token_type=[3, 3, 3])
    with pytest.raises(ValueError, match=r"The merges of .*tiny.gguf do not fit its vocabulary"):
        byte_level(tmp_path, merges=["q zz"])
    with pytest.raises(ValueError, match=r"The merges of .*tiny.gguf do not fit its vocabulary"):
        byte_level(tmp_path, merges=["no-space"])
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.eos_token_id is 999, outside the vocabulary of"):
        byte_level(tmp_path, eos_token_id=999)
    with pytest.raises(ValueError, match=r"has no tokenizer\.ggml\.merges"):
        byte_level(tmp_path, merges=None)
    with pytest.raises(ValueError, match=r"of the kind 'bert' \(tokenizer\.ggml\.model\), but only 'llama' and 'gpt2'"):
        byte_level(tmp_path, model="bert")
    with pytest.raises(ValueError, match=r"has no tokenizer\.ggml\.model"):
        byte_level(tmp_path, model=None)


def test_sentencepiece_vocabulary(tmp_path):
    tokenizer = sentencepiece(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.vocab == len(tiny.PIECES)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), True)
    assert tokenizer.release_file is None
    pieces = [piece for piece, _, _ in tiny.PIECES]
    named = [pieces[id] for id in tokenizer.encode("hello  the </s>[REF]é\n🙂", add_bos=False)]
    assert named[:3] == ["▁hello", "▁", "▁the"]
    assert named[3:6] == ["▁", "<0x3C>", "<0x2F>"]
    assert named[-7:] == ["[REF]", "é", "<0x0A>", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    assert tokenizer.encode("a</s>a", parse_special=True, add_bos=False)[-2:] == [2, pieces.index("a")]


def test_sentencepiece_texts_come_back(tmp_path):
    tokenizer = sentencepiece(tmp_path)
    for text in tiny.TEXTS:
        # Sentencepiece writes a space with the character U+2581, so that one cannot come back.
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


def test_space_prefix_of_a_sentencepiece_vocabulary(tmp_path):
    with_prefix, without = sentencepiece(tmp_path), sentencepiece(tmp_path, add_space_prefix=False)
    assert with_prefix.encode("hello") == without.encode(" hello")
    for tokenizer in (with_prefix, without):
        for text in ("hello", " hello", "  hello", ""):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_gguf_gives_the_ids_of_the_model_file_it_was_made_of(tmp_path):
    data = pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer._data_path()
    original = load_tokenizer(data / "mistral_instruct_tokenizer_240323.model.v3")
    processor = original._processor
    kinds = {
        tiny.UNKNOWN: processor.is_unknown,
        tiny.CONTROL: processor.is_control,
        tiny.UNUSED: processor.is_unused,
        tiny.BYTE: processor.is_byte,
    }
    ids = range(original.vocab)
    types = [next((kind for kind, holds in kinds.items() if holds(id)), tiny.NORMAL) for id in ids]
    tokens, scores = [processor.id_to_piece(id) for id in ids], [processor.get_score(id) for id in ids]
    copy = sentencepiece(tmp_path, tokens=tokens, scores=scores, token_type=types)
    for text in tiny.TEXTS:
        assert copy.encode(text) == original.encode(text)
        assert copy.encode(text, parse_special=True) == original.encode(text, parse_special=True)


def test_damaged_sentencepiece_vocabulary(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.ggml\.scores"):
        sentencepiece(tmp_path, scores=None)
    with pytest.raises(ValueError, match=r"All scores of the vocabulary of .*tiny.gguf are equal"):
        sentencepiece(tmp_path, scores=[-1000.0] * len(tiny.PIECES))
    with pytest.raises(ValueError, match=r"token_type but 1 scores; fetch"):
        sentencepiece(tmp_path, scores=[0.0])
    tokens = ["a" if piece == "b" else piece for piece, _, _ in tiny.PIECES]
    with pytest.raises(
        ValueError, match=r"tiny.gguf is not a sentencepiece model, or it is damaged .*a is already def"
    ):
        sentencepiece(tmp_path, tokens=tokens)


def test_smollm2_gives_the_recorded_ids(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path)
    assert (tokenizer.vocab, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (49152, 1, (2,), False)
    for case in tiny.RECORDED:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("kind", [tiny.CONTROL, tiny.USER_DEFINED, tiny.NORMAL])
@pytest.mark.parametrize(
    "name", ["<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>"]
)
def test_end_tokens_are_known_by_their_text(tmp_path, name, kind):
    """Whatever type a file gives them: they end a text, are no text, and a user cannot write them."""
    pieces = [*tiny.PIECES, (name, -2000.0, kind)]
    tokens, scores, types = map(list, zip(*pieces, strict=True))
    metadata = tiny.sentencepiece_metadata(tokens=tokens, scores=scores, token_type=types)
    level = [token for token in tiny.byte_level_tokens() if token not in tiny.CONTROLS]
    tokens = ["<s>", *level, name]
    types = [tiny.CONTROL, *[tiny.NORMAL] * len(level), kind]
    bytes_of = tiny.byte_level_metadata(
        tokens=tokens, token_type=types, bos_token_id=0, eos_token_id=0, unknown_token_id=None
    )
    for vocabulary in (metadata, bytes_of):
        path = tiny.write_gguf(tmp_path / "tiny.gguf", **vocabulary)
        tokenizer = load_tokenizer(path)
        end = tokenizer.vocab - 1
        assert tokenizer.eos_ids == (vocabulary["eos_token_id"], end)
        assert end not in tokenizer.encode(f"a{name}{name}b")
        assert tokenizer.encode(f"a{name}", parse_special=True)[-1] == end
        assert tokenizer.decode(tokenizer.encode(f"a{name}b", parse_special=True)) == "ab"
        assert tokenizer.decode(tokenizer.encode(f"a{name}b")) == f"a{name}b"
        path.unlink()


def test_a_token_for_unknown_words_ends_nothing(tmp_path):
    assert byte_level(tmp_path, unknown_token_id=0).eos_ids == (2,)
    assert byte_level(tmp_path, unknown_token_id=None).eos_ids == (2, 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bos_token_id", "1"),
        ("bos_token_id", True),
        ("eos_token_id", 99999),
        ("add_bos_token", 1),
        ("add_space_prefix", "no"),
        ("tokens", [1, 2]),
        ("tokens", "abc"),
        ("token_type", [99] * 400),
        ("token_type", "all control"),
        ("chat_template", 5),
        ("model", 5),
        ("scores", [float("nan")] * 400),
        ("merges", [1, 2]),
        ("pre", ["smollm"]),
    ],
)
def test_keys_of_a_wrong_kind_are_refused_by_name(tmp_path, kind, key, value):
    if (key in ("scores",) and kind == "gpt2") or (key in ("merges", "pre") and kind == "llama"):
        pytest.skip("this kind does not read the key")
    metadata = tiny.byte_level_metadata() if kind == "gpt2" else tiny.sentencepiece_metadata()
    count = len(metadata["tokens"])
    if value == "all control":
        value = [tiny.CONTROL] * count
    if isinstance(value, list) and len(value) == 400:
        value = value[:count]
    path = tiny.write_gguf(tmp_path / "tiny.gguf", **{**metadata, key: value})
    with pytest.raises(InputError, match=r"tiny\.gguf.*; (fetch it again|use the model's folder.*)\.$") as caught:
        load_tokenizer(path)
    assert caught.value.file == str(path)
    assert caught.value.key.endswith(key)
