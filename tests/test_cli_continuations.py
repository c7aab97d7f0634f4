"""What commands print goes on where the prompt ends, with a vocabulary whose words begin with a space."""

import json

import pytest
from fixtures.cli import run, save_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import mistral_eqx as mx


CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A random model of 260 tokens; 200 of them are words, two are control tokens, and the rest have no entry."""
    folder = save_tiny_model(tmp_path_factory.mktemp("words"))
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"\u2581w{number}", -1.0) for number in range(197))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def expected(folder, prompts, new):
    """What follows each prompt, by the text of all its ids."""
    tokenizer = mx.load_tokenizer(folder)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    out = mx.generate(mx.load(folder), ids, max_new_tokens=new, eos_id=tokenizer.eos_ids)
    whole = [
        tokenizer.decode([*row, *tokens[:length]])
        for row, tokens, length in zip(ids, out.tokens.tolist(), out.lengths.tolist(), strict=True)
    ]
    return [text.removeprefix(prompt) for prompt, text in zip(prompts, whole, strict=True)]


PROMPTS = ["w1 w2", "w3"]


@pytest.mark.slow
def test_generate_goes_on_with_the_prompt(words, tmp_path):
    texts = expected(words, PROMPTS, 12)
    assert all(text.startswith(" w") for text in texts)
    assert run("generate", PROMPTS[0], "-m", words, "-n", 12).stdout == texts[0] + "\n"
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    for options in ([], ["--logprobs", 3], ["--num-beams", 1]):
        lines = run("generate", "--prompts", tmp_path / "prompts.jsonl", "-m", words, "-n", 12, *options).stdout
        assert [json.loads(line)["text"] for line in lines.splitlines()] == texts
    first_word = texts[0][: texts[0].index(" ", 1)]
    assert run("generate", PROMPTS[0], "-m", words, "-n", 12, "--stop", first_word).stdout == "\n"


@pytest.mark.slow
def test_tokens_without_an_entry_are_shown_as_nothing(words):
    result = run("generate", PROMPTS[0], "-m", words, "-n", 4, "--logprobs", 260)
    assert result.exit_code == 0, result.stderr
    assert '"" ' in result.stdout


@pytest.mark.slow
def test_a_reply_goes_on_with_the_template_unless_a_control_token_ends_it(words):
    (text,) = expected(words, ["w5"], 12)
    ids = mx.encode_chat(mx.load_tokenizer(words), [{"role": "user", "content": "w5"}])
    assert run("chat", "-m", words, "-n", 12, input="w5").stdout == text + "\n"
    config = words / "tokenizer_config.json"
    before = config.read_text()
    config.write_text(before.replace(CHAT, CHAT + "<s>"))
    try:
        reply = run("chat", "-m", words, "-n", 12, input="w5").stdout
        out = mx.generate(mx.load(words), [[*ids, 1]], max_new_tokens=12, eos_id=2)
    finally:
        config.write_text(before)
    assert reply == mx.load_tokenizer(words).decode(out.tokens[0, : int(out.lengths[0])]) + "\n"
    assert not reply.startswith(" ")
