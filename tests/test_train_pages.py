"""The pages on training and the example, run as they stand."""

import json
import re
import runpy
import types
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


def test_the_page_on_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    books = [{"text": "To be, or not to be, that is the question. " * number} for number in range(1, 8)]
    (tmp_path / "books.jsonl").write_text("\n".join(map(json.dumps, books)))
    tokenizer = types.SimpleNamespace(encode=lambda text: [*text.encode()], vocab=257, eos_ids=(256,))
    names = {"tokenizer": tokenizer}
    files, resumed, objectives, conversations, sets = _snippets("data.md")
    for snippet in (files, resumed, objectives):
        exec(compile(snippet, "data.md", "exec"), names)
    assert names["batch"].inputs.shape == (4, 32)
    assert next(iter(names["packed"])).inputs.shape == (2, 64)
    assert (next(iter(names["masked"])).inputs == 3).any()
    told = sum(batch.weights.sum() for batch in names["evaluated"])
    assert told == sum(len(book["text"]) for book in books)
    exec(compile(sets, "data.md", "exec"), names)
    assert next(iter(names["batches"])).inputs.shape == (64, 6)
    assert "mx.encode_chat" in conversations


def test_sorting_is_learned(capsys):
    """A tenth of the example's steps: it has begun to sort."""
    runpy.run_path(str(ROOT / "examples/train_sort.py"))["main"](60)
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.6 * losses[0]
    assert re.search(r"\d+ of \d+ held-out sequences are sorted", printed)
