import dataclasses
import importlib.util
import shutil

import pytest
from fixtures.text import templates, tiny
from hypothesis import given, settings, strategies as st

from mistral_eqx.text import encode_chat, load_tokenizer, render_chat


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
    with pytest.raises(ValueError, match=r"tiny\.gguf does what no chat template may do: it uses '__class__' of a str"):
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
    with pytest.raises(ValueError, match=r"is no valid jinja2 \(line 2\): .*\.$"):
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
        ValueError, match=r"does not tell whether it is one of Mistral's; if so, rename it to tokenizer\.model\.v1"
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
    with pytest.raises(ValueError, match=r"takes the extra `tekken`: pip install 'mistral-eqx\[tekken\]'\."):
        encode_chat(tokenizer, [templates.USER])
