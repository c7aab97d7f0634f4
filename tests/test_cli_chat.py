import os
import pty
import subprocess
import sys

import jax.random as jr
import pytest
from fixtures.cli import assert_refused, run, save_tiny_model

import mistral_eqx as mx
from mistral_eqx.cli.replies import ShownReply
from mistral_eqx.generation import Conversation
from mistral_eqx.text import encode_chat


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    # The cache of compiled programs is a setting of the whole process: other tests are to run without it.
    monkeypatch.setattr("mistral_eqx.cli.loading._keep_compiled_programs", lambda: None)
    monkeypatch.setenv("MISTRAL_EQX_CACHE", str(tmp_path / "cache"))


def replies(model, turns, *, system=None, max_new_tokens):
    """What the library answers, each turn read from the beginning."""
    tokenizer, weights = mx.load_tokenizer(model), mx.load(model)
    messages = [] if system is None else [{"role": "system", "content": system}]
    texts = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = encode_chat(tokenizer, messages)
        out = mx.generate(weights, [ids], max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_ids, key=jr.key(0))
        texts.append(tokenizer.decode(out.tokens[0, : int(out.lengths[0])].tolist()))
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


@pytest.mark.slow
def test_each_line_of_a_pipe_is_a_turn_of_one_conversation(tiny):
    result = run("chat", "--model", tiny, "-n", 5, input="Hello\n\nAgain\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "".join(text + "\n" for text in replies(tiny, ["Hello", "Again"], max_new_tokens=5))
    assert result.stderr == ""


@pytest.mark.slow
def test_reset_forgets_and_exit_leaves(tiny):
    once = run("chat", "--model", tiny, "-n", 5, "--system", "Be brief", input="Hello\n").stdout
    assert once == replies(tiny, ["Hello"], system="Be brief", max_new_tokens=5)[0] + "\n"
    turns = "Hello\n/reset\nHello\n/exit\nHello\n"
    assert run("chat", "--model", tiny, "-n", 5, "--system", "Be brief", input=turns).stdout == 2 * once


@pytest.mark.slow
def test_the_cache_can_be_quantized(tiny, monkeypatch):
    made, init = [], Conversation.__init__

    def spied(conversation, model, **options):
        made.append(options)
        init(conversation, model, **options)

    monkeypatch.setattr(Conversation, "__init__", spied)
    result = run("chat", "--model", tiny, "-n", 2, "--cache-dtype", "int8", input="Hello\n/reset\nHello\n")
    assert result.exit_code == 0, result.stderr
    assert [options["cache_dtype"] for options in made] == ["int8", "int8"]


@pytest.mark.slow
def test_a_full_context_is_one_sentence(tmp_path):
    small = save_tiny_model(tmp_path / "small", max_positions=64)
    result = run("chat", "--model", small, "-n", 5, input="x" * 100)
    assert_refused(result, "The conversation fills the model's context of 64 tokens", "/reset")
    # A reply gets no longer than the room that is left.
    assert run("chat", "--model", small, "-n", 500, input="Hello").exit_code == 0


def test_a_model_without_a_chat_template_is_refused(tiny, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").unlink()
    assert_refused(run("chat", "--model", tmp_path, input="Hello"), "chat template")


@pytest.mark.parametrize(("option", "value"), [("--top-p", "1.5"), ("--max-new-tokens", "0"), ("--top-k", "-2")])
def test_bad_options_are_refused_by_name(tiny, option, value):
    assert_refused(run("chat", "--model", tiny, option, value, input="Hello"), f"{option} is {value}")


def test_ctrl_c_ends_a_piped_conversation(tiny, monkeypatch):
    def reply(*args, **options):
        yield 10
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "reply", reply)
    result = run("chat", "--model", tiny, input="Hello\nAgain\n")
    assert result.exit_code == 130
    assert result.stdout == mx.load_tokenizer(tiny).decode([10]) + "\n"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_reasoning_and_calls_are_shown(capsys, monkeypatch, on_terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: on_terminal)
    shown = ShownReply()
    call = mx.ToolCall("add", {"a": 1, "b": "é"}, "1")
    for part in (
        mx.Reply("", "so "),
        mx.Reply("", "it is"),
        mx.Reply("yes"),
        mx.Reply("!"),
        mx.Reply("", "", (call, call)),
    ):
        shown.add(part)
    shown.end()
    dim, plain = ("\033[2m", "\033[22m") if on_terminal else ("", "")
    assert capsys.readouterr().out == f'{dim}so it is{plain}\nyes!\nadd(a=1, b="é")\nadd(a=1, b="é")\n'


def test_a_reply_with_reasoning_is_kept_for_the_next_turn(tiny, monkeypatch):
    said = '<think>\nhm\n</think>\n\nyes\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    tokenizer, asked = mx.load_tokenizer(tiny), []

    def reply(conversation, ids, **options):
        asked.append(tokenizer.decode(ids, skip_special=False))
        yield from tokenizer.encode(said, add_bos=False)
        yield tokenizer.control_tokens["<|im_end|>"]

    monkeypatch.setattr(Conversation, "reply", reply)
    result = run("chat", "--model", tiny, input="Hello\nAgain\n")
    assert result.stdout == 2 * "hm\nyes\nf(a=1)\n", result.stderr
    assert asked[1] == asked[0] + "yes\nf(a=1)<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_a_chat_on_a_mesh_says_the_same(tiny):
    turns = "Hi\nAnd you?\n"
    alone = run("chat", "--model", tiny, "-n", 6, input=turns)
    split = run("chat", "--model", tiny, "-n", 6, "--mesh", "tp=2", input=turns)
    assert split.exit_code == 0, split.stderr
    assert split.stdout == alone.stdout
    assert_refused(run("chat", "--model", tiny, "--mesh", "tp=3", input=turns), "2 kv_heads cannot be split over 3")


@pytest.mark.slow
def test_sampling_options_and_stop_strings_reach_the_reply(tiny):
    """One turn is what the library draws of the same text with the same sampler and the first turn's key."""
    tokenizer = mx.load_tokenizer(tiny)
    ids = encode_chat(tokenizer, [{"role": "user", "content": "Hello"}])
    processors = [mx.RepetitionPenalty(1.3), mx.PresencePenalty(0.5), mx.FrequencyPenalty(0.2)]
    sampler = mx.Sampler(temperature=3.0, min_p=0.01, typical_p=0.9, processors=processors)
    common = {"max_new_tokens": 12, "sampler": sampler, "eos_id": tokenizer.eos_ids, "tokenizer": tokenizer}
    keys = jr.fold_in(jr.key(0), 0)
    whole = mx.generate(mx.load(tiny), [ids], key=keys, **common).texts[0]
    options = ("--temperature", 3, "--min-p", 0.01, "--typical-p", 0.9, "--repetition-penalty", 1.3)
    options = (*options, "--presence-penalty", 0.5, "--frequency-penalty", 0.2, "-n", 12)
    assert run("chat", "--model", tiny, *options, input="Hello").stdout == whole + "\n"
    stop = next(character for character in whole[2:] if character.isascii())
    stopped = run("chat", "--model", tiny, *options, "--stop", stop, input="Hello").stdout
    assert stopped == whole.partition(stop)[0] + "\n" != whole + "\n"
    assert_refused(run("chat", "--model", tiny, "--stop", "", input="Hello"), "The stop string ''")


@pytest.mark.skipif(sys.platform != "linux", reason="Other systems have no GNU readline.")
def test_a_pasted_text_is_one_turn():
    # A terminal marks the begin and the end of what is pasted.
    program = "from mistral_eqx.cli.chat import _turns\nfor turn in _turns(True): print([turn], flush=True)"
    try:
        terminal, of_child = pty.openpty()
    except OSError as error:
        pytest.skip(f"There is no terminal here: {error}.")
    ends = {"stdin": of_child, "stdout": of_child, "stderr": of_child}
    environment = os.environ | {"TERM": "xterm"}
    typed = [(b"", b"\x1b[200~one\ntwo\x1b[201~\r"), (b"['one\\ntwo']", b"three\r"), (b"['three']", b"\x04")]
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **ends) as child:
        os.close(of_child)
        for expected, keys in typed:
            shown = b""
            # It is asked for the next turn.
            while not (expected in shown and b"> " in shown[shown.find(expected) :]):
                shown += os.read(terminal, 1000)
            os.write(terminal, keys)
        assert child.wait() == 0
    os.close(terminal)
