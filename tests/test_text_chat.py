import concurrent.futures
import dataclasses
import functools
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures.text import templates, tiny
from hypothesis import given, settings, strategies as st

from mistral_eqx.text import encode_chat, load_tokenizer, render_chat
from mistral_eqx.train import chat


def with_template(folder, template):
    """A small tokenizer with `<|im_start|>` and `<|im_end|>` for the ends of a text."""
    path = tiny.write_gguf(folder / "tiny.gguf", **tiny.byte_level_metadata(chat_template=template))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("chatml"), templates.CHATML)


def test_a_conversation_as_text(chatml):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render_chat(chatml, messages, add_generation_prompt=False) == text
    assert render_chat(chatml, messages) == text + "<|im_start|>assistant\n"
    assert render_chat(chatml, messages[1:]).startswith(
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user"
    )


def test_later_templates_put_the_system_message_into_a_turn(tmp_path):
    conversation = templates.CONVERSATIONS[3]
    second = render_chat(with_template(tmp_path, templates.MISTRAL_2), conversation)
    start, end = "<|im_start|>", "<|im_end|>"
    assert second == (
        f"{start} [INST] Be kind.\n\n  What is 12 + 30?\n [/INST]  It is 42. {end} [INST] Merci, ça va 👩‍👩‍👧 ! [/INST]"
    )
    third = render_chat(with_template(tmp_path, templates.MISTRAL_3), conversation)
    assert third == (
        f"{start}[INST]   What is 12 + 30?\n[/INST] It is 42.{end}[INST] Be kind.\n\nMerci, ça va 👩‍👩‍👧 ![/INST]"
    )


@pytest.mark.parametrize("template", templates.TEMPLATES.values(), ids=templates.TEMPLATES.keys())
def test_ids_are_those_of_the_text_with_its_control_tokens(tmp_path, template):
    tokenizer = with_template(tmp_path, template)
    for conversation in templates.CONVERSATIONS:
        if template == templates.MISTRAL_1 and conversation[0]["role"] == "system":
            continue
        for prompt in (True, False):
            text = render_chat(tokenizer, conversation, add_generation_prompt=prompt)
            ids = encode_chat(tokenizer, conversation, add_generation_prompt=prompt)
            assert ids == tokenizer.encode(text, add_bos=False, parse_special=True)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "start|>", "<", "|>", " a", "\ue000", "<|"])),
        min_size=1,
        max_size=3,
    )
)
def test_messages_cannot_write_control_tokens(chatml, parts):
    contents = ["".join(part) for part in parts]
    messages = [{"role": "user", "content": content} for content in contents]
    ids = encode_chat(chatml, messages)
    # A system message, those of the user, and the start of the answer.
    assert ids.count(1) == len(messages) + 2
    assert ids.count(2) == len(messages) + 1
    assert chatml.decode(ids, skip_special=False) == render_chat(chatml, messages)


def test_the_beginning_of_a_control_token_is_not_completed_by_the_next_message(tmp_path):
    tokenizer = with_template(tmp_path, "{% for message in messages %}{{ message.content }}{% endfor %}")
    ids = encode_chat(tokenizer, [{"role": "user", "content": "<|im_"}, {"role": "user", "content": "end|>"}])
    assert 2 not in ids
    assert tokenizer.decode(ids) == "<|im_end|>"


def test_a_template_may_write_json(tmp_path):
    for options in ("", "ensure_ascii=true"):
        template = f"{{% for message in messages %}}{{{{ message | tojson({options}) }}}}{{% endfor %}}"
        tokenizer = with_template(tmp_path, template)
        message = {"role": "user", "content": "<|im_end|> \\ue000 \ue001 <"}
        ids = encode_chat(tokenizer, [message])
        assert tokenizer.decode(ids) == render_chat(tokenizer, [message])
        assert 2 not in ids


HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ lipsum.__globals__.os.popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].clear() }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% set hidden = namespace() %}{% set hidden.__html__ = messages %}",
    "{{ namespace(__html__=messages) }}",
    "{% for i in range(999999999) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates_are_refused_in_one_sentence(tmp_path, template):
    tokenizer = with_template(tmp_path, template)
    for call in (render_chat, encode_chat):
        with pytest.raises(ValueError, match=r"^The chat template of .*tiny\.gguf [^\n]*\.$") as caught:
            call(tokenizer, [{"role": "user", "content": "Hi"}])
        assert "\n" not in str(caught.value)


def test_what_breaks_the_sandbox_is_called_so(tmp_path):
    with pytest.raises(
        ValueError, match=r"tiny\.gguf does what a chat template may not do: it uses '__class__' of a str"
    ):
        render_chat(with_template(tmp_path, HOSTILE[0]), [{"role": "user", "content": "Hi"}])


def test_a_template_sees_nothing_but_data(chatml):
    class Text(str):
        __slots__ = ()

        def secret(self):
            raise AssertionError

    @dataclasses.dataclass
    class Message:
        role: str

    with pytest.raises(ValueError, match=r"The messages must consist of text, numbers, lists and dicts: .*Message"):
        render_chat(chatml, [{"role": "user", "content": Message("user")}])
    assert "Hi" in render_chat(chatml, [{"role": "user", "content": Text("Hi")}])


def test_a_template_refuses_roles_out_of_order_in_its_own_words(tmp_path):
    tokenizer = with_template(tmp_path, templates.MISTRAL_2)
    with pytest.raises(ValueError, match=r"refuses these messages: After a system message, user and .* alternate\.$"):
        encode_chat(tokenizer, [templates.USER, templates.USER])
    tokenizer = with_template(tmp_path, templates.MISTRAL_1)
    with pytest.raises(ValueError, match=r"refuses these messages: Only user and assistant may speak!\.?$"):
        render_chat(tokenizer, [templates.USER, {"role": "critic", "content": "Bad."}])


def test_wrong_templates_and_messages(tmp_path, chatml):
    with pytest.raises(ValueError, match=r"is not valid jinja2 \(line 2\): .*\.$"):
        render_chat(with_template(tmp_path, "a\n{% if %}"), [templates.USER])
    with pytest.raises(ValueError, match=r"cannot be applied to these messages: .*no attribute 'content'\.$"):
        render_chat(chatml, [{"role": "user"}])
    with pytest.raises(ValueError, match=r"The conversation is empty; give at least one message\."):
        encode_chat(chatml, [])
    with pytest.raises(ValueError, match=r"Each message must be a dict with 'role' and 'content'"):
        encode_chat(chatml, [{"content": "Hi"}])


def test_without_a_template(tmp_path):
    tokenizer = load_tokenizer(tiny.write_gguf(tmp_path / "a.gguf", **tiny.byte_level_metadata(chat_template=None)))
    for call in (render_chat, encode_chat):
        with pytest.raises(ValueError, match=r"a\.gguf has no chat template; give a folder or \.gguf of an instr"):
            call(tokenizer, [templates.USER])


@pytest.fixture(scope="module")
def data():
    return pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer._data_path()


RELEASED = [
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
    "tekken_240911.json",
]


@pytest.mark.parametrize("name", RELEASED)
def test_release_files_have_the_format_of_mistral_common(data, name):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer, reference = load_tokenizer(data / name), MistralTokenizer.from_file(data / name)
    for conversation in templates.CONVERSATIONS[:4]:
        messages = [
            {"role": message["role"], "content": message["content"] + "[/INST]</s>"} for message in conversation
        ]
        ids = encode_chat(tokenizer, messages)
        assert ids == reference.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert ids.count(2) == sum(message["role"] == "assistant" for message in messages)
    assert encode_chat(tokenizer, templates.CONVERSATIONS[4], add_generation_prompt=False)[-1] == 2
    with pytest.raises(ValueError, match="has no chat template; encode_chat gives the ids directly"):
        render_chat(tokenizer, [templates.USER])


def test_a_template_beside_a_release_file_wins(data, tmp_path):
    shutil.copy(data / RELEASED[2], tmp_path / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text(templates.MISTRAL_3)
    tokenizer = load_tokenizer(tmp_path)
    assert render_chat(tokenizer, [{"role": "user", "content": "Hi"}]) == "<s>[INST] Hi[/INST]"
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "b"},
    ]
    # The template writes what mistral-common does.
    assert encode_chat(tokenizer, conversation) == encode_chat(load_tokenizer(data / RELEASED[2]), conversation)


def test_a_release_file_without_its_version_is_known_by_its_control_tokens(data, tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    for name in RELEASED[2:4]:
        (tmp_path / "tokenizer.model").write_bytes((data / name).read_bytes())
        tokenizer = load_tokenizer(tmp_path)
        assert encode_chat(tokenizer, messages) == encode_chat(load_tokenizer(data / name), messages)
    (tmp_path / "tokenizer.model").write_bytes((data / RELEASED[0]).read_bytes())
    with pytest.raises(
        ValueError, match=r"cannot be recognised as one of Mistral's; if it is, rename it to tokenizer\.model\.v1"
    ):
        encode_chat(load_tokenizer(tmp_path), messages)


def test_release_formats_refuse_in_one_sentence(data):
    tokenizer = load_tokenizer(data / RELEASED[2])
    with pytest.raises(ValueError, match=r"^Mistral's format refuses the conversation: [^\n]*\.$"):
        encode_chat(tokenizer, [templates.ASSISTANT])
    with pytest.raises(ValueError, match=r"^Mistral's format refuses the conversation at messages\.0: [^\n]*\.$"):
        encode_chat(tokenizer, [{"role": "robot", "content": "Hi"}])


def test_without_mistral_common_the_extra_is_named(data, monkeypatch):
    tokenizer = load_tokenizer(data / RELEASED[0])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mistral_common" else find(name))
    with pytest.raises(ValueError, match=r"needs the extra `tekken`: pip install 'mistral-eqx\[tekken\]'\."):
        encode_chat(tokenizer, [templates.USER])


# What templates may take.

SPENT = {
    "{% for i in range(99999) %}\n{% for j in range(99999) %}{% endfor %}{% endfor %}": r"2 s of proc.* \(line 2\)",
    "{{ 10 ** (10 ** 9) }}": "2 s of processor time",
    "{{ 'a' * 10**10 }}": r"512 MB of memory \(line 1\)",
    "{% set a = namespace(s='a') %}\n{% for i in range(99) %}{% set a.s = a.s + a.s %}{% endfor %}": "512 MB of memory",
    "{{ strftime_now('%c' * 10**6) }}": "writes more than",
    "{{ 'a' | center(10**9) }}": "512 MB of memory",
    "{{ 'a' | indent(10**9) }}": "512 MB of memory",
    "{{ '%1000000000d' % 1 }}": "512 MB of memory",
    "{{ [1] | tojson(indent=10**9) }}": "512 MB of memory",
    "{{ ('a,' * 10**6) | join('b' * 1000) }}": "512 MB of memory",
    "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}": "writes more than",
    "\n{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": r"has endless recursion, or nests too deeply \(line 2\)",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}": "nests too deeply",
    "{% for i in range(10**12) %}{% endfor %}": "OverflowError",
    "a\n{{ 1 // 0 }}": r"\(line 2\) cannot be applied to these messages: ZeroDivisionError",
}


@pytest.mark.parametrize(("template", "complaint"), SPENT.items())
@pytest.mark.slow
def test_a_template_that_takes_too_much_is_ended(tmp_path, template, complaint):
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(ValueError, match=rf"^The chat template of .*tiny\.gguf[^\n]*{complaint}[^\n]*\.$"):
        render_chat(tokenizer, [templates.USER])
    # The next one is rendered as ever.
    tokenizer.chat_template = "{{ messages[0].role }}"
    assert render_chat(tokenizer, [templates.USER]) == "user"


def test_threads_share_the_process_that_renders(chatml):
    messages = [[{"role": "user", "content": str(number) * 1000}] for number in range(32)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda each: render_chat(chatml, each), messages))
    assert texts == [render_chat(chatml, each) for each in messages]


def test_an_interruption_leaves_no_answer_for_the_next_request(chatml, monkeypatch):
    from mistral_eqx.text import templates as rendering

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rendering.json, "loads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rendering.render("first", {}, "It")
    assert rendering.render("second", {}, "It") == "second"


PROGRAM = """
import os, signal, sys, threading
from mistral_eqx.text import templates
text = templates.render("{{ a }}", {"a": "b"}, "It")
print(templates._process._process.pid, flush=True)
if sys.argv[1] == "fork":
    child = os.fork()
    if not child:
        os._exit(templates.render("{{ a }}", {"a": "c"}, "It") != "c")
    assert os.waitpid(child, 0)[1] == 0 and templates.render("{{ a }}", {"a": "d"}, "It") == "d"
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("way", ["end", "fork", "kill"])
@pytest.mark.slow
def test_no_process_stays_behind(way):
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == (-9 if way == "kill" else 0), done.stderr
    assert done.stderr == ""
    for _ in range(100):
        state = Path(f"/proc/{int(done.stdout)}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {done.stdout} is still there")


# Names of control tokens in messages.


def with_thoughts(folder, template):
    """A vocabulary in which `<think>` and `</think>` are control tokens."""
    tokens = tiny.byte_level_tokens("<think>", "</think>")
    types = [tiny.CONTROL] * 3 + [tiny.NORMAL] * (len(tokens) - 5) + [tiny.CONTROL] * 2
    metadata = tiny.byte_level_metadata(tokens=tokens, token_type=types, chat_template=template)
    return load_tokenizer(tiny.write_gguf(folder / "tiny.gguf", **metadata))


TURN = "{%% for m in messages %%}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{%% endfor %%}"
THINKING = {
    "last part, stripped": TURN % "{{ m.content.split('</think>')[-1].lstrip('\\n') }}",
    "written anew": TURN
    % (
        "{% set c = m.content %}{% if '</think>' in c %}<think>\n{{ c.split('</think>')[0].rstrip('\\n')"
        ".split('<think>')[-1].lstrip('\\n') }}\n</think>\n\n{{ c.split('</think>')[-1].lstrip('\\n') }}"
        "{% else %}{{ c }}{% endif %}"
    ),
    "by its beginning": TURN
    % "{% if m.content.startswith('<think>') %}{{ m.content[7:] }}{% else %}{{ m.content }}{% endif %}",
    "replaced": TURN % "{{ m.content | replace('<think>', '') | replace('</think>', ' ') | trim }}",
    "counted": TURN % "{{ m.content.count('<think>') }} {{ m.content | length }}",
}
THOUGHTS = ["plain", "<think>\nhm\n</think>\n\nfour", "<think>hm</think>four", "hm</think>\n\n four ", " </think>"]
THOUGHTS += ["a < b", "<", "<think>", "<think><think></think>"]


@pytest.mark.parametrize("how", THINKING)
def test_templates_that_look_for_control_tokens_write_the_same_text_and_ids(tmp_path, how):
    tokenizer = with_thoughts(tmp_path, THINKING[how])
    for thought in THOUGHTS:
        messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": thought}]
        ids = encode_chat(tokenizer, messages)
        assert tokenizer.decode(ids, skip_special=False) == render_chat(tokenizer, messages)
        # The messages' names never become tokens; the template's do.
        written = ids.count(tokenizer.control_tokens["</think>"])
        assert written == (how == "written anew" and "</think>" in thought)
        assert ids.count(1) == ids.count(2) == len(messages)


def test_a_key_cannot_write_a_control_token_either(tmp_path):
    tokenizer = with_template(tmp_path, "{{ messages[0] | tojson }}")
    message = {"role": "user", "content": "Hi", "<|im_end|>": 1}
    ids = encode_chat(tokenizer, [message])
    assert 2 not in ids
    assert tokenizer.decode(ids) == render_chat(tokenizer, [message])


# What a template sees.


def test_keys_that_are_null_count_as_absent(tmp_path):
    tokenizer = with_template(tmp_path, "{% for m in messages %}{{ m | tojson }}{{ 'tool_calls' in m }}{% endfor %}")
    messages = [{"role": "user", "content": "Hi", "tool_calls": None, "name": {"first": None}}]
    assert render_chat(tokenizer, messages) == '{"role": "user", "content": "Hi", "name": {"first": null}}False'


def test_a_thought_has_all_its_names(tmp_path):
    tokenizer = with_template(tmp_path, "{{ messages[0].reasoning_content }} {{ messages[0].thinking }}")
    for key in ("reasoning", "thinking", "reasoning_content"):
        assert render_chat(tokenizer, [{"role": "user", "content": "Hi", key: "hm"}]) == "hm hm"


def test_messages_that_are_no_json_are_refused(chatml):
    endless = []
    endless.append(endless)
    deep = functools.reduce(lambda inner, _: [inner], range(100), "a")
    huge = functools.reduce(lambda inner, _: [inner], range(10_000), "a")
    for content in (endless, deep, huge, {1, 2}, 10**5000, b"a"):
        with pytest.raises(ValueError, match=r"^The messages (must consist|nest deeper than 64)[^\n]*\.$"):
            render_chat(chatml, [{"role": "user", "content": content}])


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
PARTS = [IMAGE, {"type": "image", "image": "a.png"}, {"image": "a.png"}, {"type": "input_audio", "input_audio": {}}]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: next(reversed(part)))
def test_images_and_audio_are_refused_in_one_sentence(chatml, tmp_path, part):
    released = load_tokenizer(tiny.write_tekken(tmp_path, "v13"))
    first = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    complaint = rf"^Message 1 has the part '{next(iter(part.values())) if 'type' in part else 'image'}', but only text"
    for messages in ([first, {"role": "user", "content": [*first["content"], part]}], [first, {**first, "images": []}]):
        expected = complaint if messages[1] != {**first, "images": []} else "^Message 1 has the part 'images', but only"
        for call in (
            lambda messages: render_chat(chatml, messages),
            lambda messages: encode_chat(chatml, messages),
            lambda messages: encode_chat(released, messages),
            lambda messages: chat(messages, functools.partial(encode_chat, chatml)),
        ):
            with pytest.raises(ValueError, match=rf"{expected}[^\n]*\.$"):
                call(messages)


def test_variables_come_from_the_files_of_the_tokenizer(tmp_path):
    tiny.byte_level_json(tmp_path)
    template = "{% for t in [bos_token, eos_token, pad_token, unk_token, turn_token] %}[{{ t }}]{% endfor %}"
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": {"turn_token": "<|im_start|>"},
        "chat_template": template,
    }
    tiny.write_json(tmp_path / "tokenizer_config.json", config)
    tiny.write_json(tmp_path / "config.json", {"bos_token_id": 1, "eos_token_id": 0})
    tokenizer = load_tokenizer(tmp_path)
    assert render_chat(tokenizer, [templates.USER]) == "[][<|im_end|>][<|endoftext|>][][<|im_start|>]"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (2, 0))
    # Also in the files that are written of it.
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.template_tokens == tokenizer.template_tokens
    assert render_chat(again, [templates.USER]) == render_chat(tokenizer, [templates.USER])


# The assistant's words.


@pytest.mark.parametrize("answer", ["yes", "\nyes", "\n\nyes", " yes", "  yes", "\n", "", "yes\n", "\U0001f600"])
def test_an_answer_is_encoded_apart_from_its_prompt(tmp_path, answer):
    tokenizer = with_template(tmp_path, templates.CHATML)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    ids, mask = encode_chat(tokenizer, [*talk, *talk], add_generation_prompt=False, assistant_mask=True)
    prompts = [encode_chat(tokenizer, talk[:1]), encode_chat(tokenizer, [*talk, *talk[:1]])]
    said = tokenizer.encode(f"{answer}<|im_end|>\n", parse_special=True, add_bos=False)
    question = prompts[1][len(encode_chat(tokenizer, talk, add_generation_prompt=False)) :]
    assert ids == [*prompts[0], *said, *question, *said]
    expected = [False] * len(prompts[0]) + [True] * len(said)
    assert mask == [*expected, *[False] * len(question), *[True] * len(said)]


def test_words_between_marks_of_generation_are_the_assistants(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}U:{{ m.content }}{% endif %}\n{% endfor %}"
    )
    tokenizer = with_template(tmp_path, template)
    talk = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "the<|im_end|>"}]
    talk += [{"role": "assistant", "content": "<|im_end|>hello"}]
    ids, mask = encode_chat(tokenizer, talk, add_generation_prompt=False, assistant_mask=True)
    assert ids == encode_chat(tokenizer, talk, add_generation_prompt=False)
    learned = [id for id, said in zip(ids, mask, strict=True) if said]
    assert tokenizer.decode(learned, skip_special=False) == "hello<|im_end|><|im_end|>hello<|im_end|>"
    assert (learned.count(2), ids.count(2)) == (2, 2)
    with pytest.raises(ValueError, match="nothing to learn"):
        encode_chat(tokenizer, talk[1:2], assistant_mask=True)
