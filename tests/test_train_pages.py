"""The pages on training and the example, run as they stand."""

import re
import runpy
from pathlib import Path

import mistral_eqx as mx


ROOT = Path(__file__).parents[1]


def _snippets(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def test_the_page_on_training(capsys):
    (snippet,) = _snippets("training.md")
    names = {}
    exec(compile(snippet, "training.md", "exec"), names)
    assert isinstance(names["model"], mx.Mistral)
    loss, norm = map(float, capsys.readouterr().out.split())
    # Before it has learned anything, a model holds all 256 bytes alike.
    assert 5 < loss < 6
    assert norm > 0


def test_the_page_on_objectives():
    snippet, conversation = _snippets("objectives.md")
    names = {}
    exec(compile(snippet, "objectives.md", "exec"), names)
    assert names["batch"].inputs.shape[1] == 128
    assert "mx.encode_chat" in conversation


def test_sorting_is_learned(capsys):
    """A tenth of the example's steps: it has begun to sort."""
    runpy.run_path(str(ROOT / "examples/train_sort.py"))["main"](60)
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.6 * losses[0]
    assert re.search(r"\d+ of \d+ held-out sequences are sorted", printed)
