"""The benchmarks' own contenders, on a model that fits in a test."""

from pathlib import Path

import pytest
from fixtures.checkpoint import random_model, tiny

import mistral_eqx as mx


@pytest.mark.slow
def test_the_gathered_cache_finds_the_same_beams(getkey, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import beam
    from rounds import Weights

    mx.save(random_model(tiny(), getkey()), tmp_path / "model")
    prompts = [[1, 5, 9, 4], [7, 3]]
    task = beam.Task(Weights(tmp_path / "model", tmp_path / "model"), [(prompts, 6)], 1)
    found, expected = (start(task, "float32")(prompts, 6) for start in (beam.start_gathered, beam.start_mistral_eqx))
    assert found == expected
