"""The commands on the pages."""

import re
import shlex
from pathlib import Path

import equinox as eqx
import jax
import pytest
import typer
from fixtures.cli import run

from mistral_eqx.cli import app


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.toml"))]


def commands(page):
    """The arguments of each `mistral-eqx` on a page: in blocks of code, and in the comments of a recipe."""
    text = page.read_text()
    # Every second part is code, and begins with the name of its language.
    parts = re.split(r"^```", text, flags=re.MULTILINE)[1::2]
    for block in [text] if page.suffix == ".toml" else [part for part in parts if re.match(r"(bash|sh)?\n", part)]:
        for line in block.replace("\\\n", " ").splitlines():
            for found in re.findall(r"(?<![\w'/])mistral-eqx (.*)", line):
                words = shlex.split(re.sub(r"\$\w+", "0", found), comments=True)
                ends = [number for number, word in enumerate(words) if word in ("|", ">", "&&", "&")]
                yield words[: ends[0]] if ends else words


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


def test_the_pages_have_commands_of_every_kind():
    assert len(COMMANDS) > 25
    kinds = {"generate", "chat", "convert", "merge", "plan", "quantize", "train", "evaluate", "serve"}
    assert {words[0] for _, words in COMMANDS} == kinds


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else None)
def test_the_options_of_a_command_exist(page, words):
    command = typer.main.get_command(app)
    name, *rest = words
    while hasattr(command, "commands"):
        command = command.commands[name]
        if hasattr(command, "commands"):
            name, *rest = rest
    # Parses and checks each option, and runs nothing.
    command.make_context(name, rest)


@pytest.mark.slow
def test_the_page_on_changing_the_model(capsys):
    names = {}
    with jax.numpy_rank_promotion("allow"):
        for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs/changing.md").read_text(), flags=re.DOTALL):
            exec(compile(snippet, "changing.md", "exec"), names)
    rounded, split, other = map(float, capsys.readouterr().out.split())
    # 1 of 254 steps at most for each weight, of which some layers add up; sharding changes only the order of sums.
    assert 1e-4 < rounded < 0.05
    assert max(split, other) < 1e-5
    assert names["out"].tokens.shape == (2, 8)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(eqx.filter(names["tuned"].blocks, eqx.is_array))} == {
        "int8",
        "float32",
    }


@pytest.mark.slow
def test_a_plan_for_this_machine():
    (words,) = [words for _, words in COMMANDS if words[:2] == ["plan", "gpt-mini"]]
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert "gpt-mini" in result.stdout
