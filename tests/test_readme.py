"""The README's tour, run as it stands."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from fixtures.model import relative_error

import mistral_eqx as mx


README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tour_runs(smollm2_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPETS) == 8
    names = {}
    printed = []
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    call, batch, stream, answers, training, run, split, _ = printed
    assert call == " Paris\n"
    assert len(batch.splitlines()) == 2
    assert len(stream) > 20
    out = mx.generate(names["model"], "11 + 11 =", max_new_tokens=4, tokenizer=names["tokenizer"])
    assert answers.endswith(f"\n{out.texts[0]}\n")
    before, after = map(float, training.split("->"))
    assert after < before
    assert re.fullmatch(r"\[\[\d \d \d \d\]\]\n", run)
    # After so few steps it sorts most problems that it has seen; one of 24 comes out sorted by chance.
    problems = names["problems"]
    out = mx.generate(names["sorter"], problems.prompts, max_new_tokens=4)
    assert (out.tokens == problems.answers).all(axis=1).mean() > 0.5
    assert (tmp_path / "out/sort/300").is_dir()
    assert relative_error(names["logits"], names["model"](names["ids"])) < 1e-5
    assert split == "['heads', 'sequence_parallel', 'kv_replicated', 'heads_x_kv_seq']\n"
    saved, loaded = (names[name].blocks[0].attention_norm.weight for name in ("trained", "again"))
    assert loaded.dtype == jnp.bfloat16
    assert (saved.astype(jnp.bfloat16) == loaded).all()
