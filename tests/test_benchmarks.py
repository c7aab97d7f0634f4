"""The benchmarks' own contenders, on a model that fits in a test."""

import math
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


def test_a_format_is_measured_by_its_distance_from_float32(getkey, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import quantization

    model = random_model(tiny(layers=1, windows=(None,)), getkey())
    mx.save(model, tmp_path / "model")
    ids = [1, 5, 9, 4, 7, 3, 8, 6, 2, 11, 40, 79]
    task = quantization.Task(tmp_path / "model", [1, 5, 9], 4, 1, ids, [], tmp_path / "float32.npy")
    quantization.save_reference(task)
    small = quantization.Format({"*": mx.GGUF("Q8_0")}, cache_dtype="int8")
    found = {
        name: quantization.measure(format, task)
        for name, format in (("float32", quantization.Format()), ("Q8_0", small))
    }
    # Two compiled programs add up float32 in another order.
    expected = math.exp(-float(mx.score(model, [ids]).log_probs.sum()) / (len(ids) - 1))
    assert found["float32"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["float32"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["Q8_0"]["kl"] > 1e-6
    assert found["float32"]["bits_a_weight"] == 32
    # A block of 32 numbers has 34 bytes; the norms stay in float32.
    assert 8.5 < found["Q8_0"]["bits_a_weight"] < 9
    assert {(one["tokens_in"], one["tokens_out"]) for one in found.values()} == {(3, 4)}
    quantization.draw({"measured": {name: [one] for name, one in found.items()}}, tmp_path)
    assert {file.name for file in tmp_path.glob("*.png")} == {"quantization_kl.png", "quantization_speed.png"}
