"""The pages on training and the examples, run as they stand."""

import csv
import json
import re
import runpy
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import mistral_eqx as mx


ROOT = Path(__file__).parents[1]


def _snippets(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_page_on_training(capsys):
    (snippet,) = _snippets("training.md")
    names = {}
    exec(compile(snippet, "training.md", "exec"), names)
    assert isinstance(names["model"], mx.Mistral)
    loss, norm = map(float, capsys.readouterr().out.split())
    # Before it has learned anything, a model holds all 256 bytes alike.
    assert 5 < loss < 6
    assert norm > 0


@pytest.mark.slow
def test_the_page_on_pipelines():
    snippet, _ = _snippets("pipelines.md")
    names = {}
    exec(compile(snippet, "pipelines.md", "exec"), names)
    assert names["logits"].shape == (2, 64, 256)
    assert bool(names["metrics"].finite)


@pytest.mark.slow
def test_the_page_on_pipelines_of_several_hosts(tmp_path):
    _, snippet = _snippets("pipelines.md")
    # On one host, for a few steps.
    smaller = {"pp=4,tp=4": "pp=2,tp=2", "/models": str(tmp_path), "/shared": str(tmp_path)}
    smaller |= {"accumulate=8": "accumulate=2", "steps=1000": "steps=2"}
    for word, other in smaller.items():
        assert word in snippet
        snippet = snippet.replace(word, other)
    model = mx.Mistral.init(mx.PRESETS["gpt-micro"], key=jax.random.key(0))
    mx.save(model, tmp_path / "7b")
    batch = mx.train.one_a_row([mx.train.causal([1, 2, 3])] * 4, seq=8)
    exec(compile(snippet, "pipelines.md", "exec"), {"mx": mx, "batches": [batch] * 2})
    assert mx.load(tmp_path / "out").config == model.config


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


@pytest.mark.slow
def test_the_page_on_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, patience, best = _snippets("trainer.md")
    names = {}
    exec(compile(run, "trainer.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    # The second call goes on from the first one's last step.
    assert [line.split(":")[0] for line in lines] == ["step 20", "step 40"]
    before, after = (float(line.split()[-1]) for line in lines)
    assert after < before
    with (tmp_path / "runs/sort/training.csv").open() as file:
        assert [int(line["step"]) for line in csv.DictReader(file)] == [1, 10, 20, 30, 40]
    exec(compile(best, "trainer.md", "exec"), names)
    np.testing.assert_array_equal(names["best"].norm.weight, names["model"].norm.weight)
    exec(compile(patience, "trainer.md", "exec"), names)
    first, second = names["Patience"](1.0), names["Patience"](1.0)
    run = types.SimpleNamespace(stop=False)
    for norm in (2.0, 0.5, 2.0, 2.0):
        first.on_log(run, {"gradient_norm": norm})
    assert not run.stop
    second.set_state(first.get_state())
    second.on_log(run, {"gradient_norm": 2.0})
    assert run.stop


@pytest.fixture
def example(capsys):
    """Runs an example and gives what it printed, and the losses among that."""

    def run(name, *arguments):
        runpy.run_path(str(ROOT / "examples" / name))["main"](*arguments)
        printed = capsys.readouterr().out
        return printed, [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", printed, flags=re.MULTILINE)]

    return run


@pytest.mark.slow
def test_sorting_is_learned(example):
    """A few of the example's steps: it has begun to sort."""
    printed, losses = example("train_sort.py", 60)
    assert losses[-1] < 0.6 * losses[0]
    assert re.search(r"\d+ of \d+ held-out sequences are sorted", printed)


@pytest.mark.slow
def test_adding_is_learned(example):
    """A few of the example's steps: it has begun to learn which digits there are."""
    printed, losses = example("train_adder.py", 30, 32)
    assert losses[-1] < losses[0]
    assert re.search(r"\d+ of 1000 held-out sums are right", printed)
    assert len(re.findall(r"^\d\d \+ \d\d = \d{3}$", printed, flags=re.MULTILINE)) == 5


@pytest.mark.slow
def test_characters_are_learned_and_the_run_goes_on(example, tmp_path):
    printed, losses = example("train_characters.py", tmp_path / "run", 6, 4, 16)
    assert losses[-1] < losses[0]
    # The model speaks before the first step and after the last one.
    assert printed.count("Call me ") == 2
    assert printed.count("held out: loss") == 1
    with (tmp_path / "run/training.csv").open() as file:
        assert [int(line["step"]) for line in csv.DictReader(file)] == [1, 6]
    assert (tmp_path / "run/6").is_dir()
    printed, losses = example("train_characters.py", tmp_path / "run", 6, 4, 16)
    assert losses == []


@pytest.mark.slow
def test_a_sharded_run_goes_on_on_another_mesh(example):
    printed, losses = example("pretrain_sharded.py", 10, 16, 16)
    first, second = re.findall(
        r"^(\S+), ZeRO (\d), from step (\d+): ([\d.]+) MB of state a device$", printed, flags=re.MULTILINE
    )
    assert first[:3] == ("dp=4,tp=2", "3", "0")
    assert second[:3] == ("dp=2,tp=4", "1", "5")
    # Each holds 1/8 of all that is split, against 1/4 of the weights and 1/8 of the moments.
    assert float(first[3]) < float(second[3])
    assert losses[-1] < losses[0]
    assert len(re.findall(r"^['\"].*['\"]$", printed, flags=re.MULTILINE)) == 2
