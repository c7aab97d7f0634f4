"""The examples and the page on generation, run as they stand on a model that fits in a test."""

import re
import runpy
from pathlib import Path

import pytest
from cli_fixtures import save_tiny_model

import mistral_eqx as mx


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", max_positions=1024)


@pytest.fixture
def run(tiny, capsys):
    """Runs an example and gives what it printed."""

    def run(name):
        example = runpy.run_path(str(ROOT / "examples" / name))
        assert example["__doc__"]
        example["main"](str(tiny))
        return capsys.readouterr().out

    return run


def continued(path, ids, new):
    """The greedy continuation as text."""
    tokenizer = mx.load_tokenizer(path)
    out = mx.generate(mx.load(path), [ids], max_new_tokens=new, eos_id=tokenizer.eos_ids)
    return tokenizer.decode(out.tokens[0, : out.lengths[0]])


def test_generate_and_stream_print_the_same(run, tiny):
    prompt = mx.load_tokenizer(tiny).encode("The capital of France is")
    expected = continued(tiny, prompt, 32)
    assert len(expected) > 5
    assert run("generate.py") == run("stream.py") == expected + "\n"


def test_sample_prints_a_line_for_each_seed(run):
    lines = [line.split(": ", 1)[1] for line in run("sample.py").splitlines() if "seed" in line]
    assert len(lines) == len(set(lines)) == 9


def test_chat_remembers(run, tiny):
    printed = run("chat.py")
    tokenizer, messages = mx.load_tokenizer(tiny), []
    expected = ""
    for question in ("Name a city in Italy.", "And one in Spain?"):
        messages.append({"role": "user", "content": question})
        answer = continued(tiny, mx.encode_chat(tokenizer, messages), 48)
        messages.append({"role": "assistant", "content": answer})
        expected += f"> {question}\n{answer}\n"
    assert printed == expected


def test_the_page_on_generation(tiny, capsys):
    *snippets, settings = re.findall(r"```python\n(.*?)```", (ROOT / "docs/generation.md").read_text(), flags=re.DOTALL)
    # The last one would be a setting of the whole process: other tests are to run without it.
    assert "jax.config" in settings
    names = {}
    for snippet in snippets:
        exec(compile(snippet.replace('"smollm2-135m"', repr(str(tiny))), "generation.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) >= 3
    assert len(names["answer"]) > 5
