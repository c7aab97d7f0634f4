"""The benchmarks' own contenders, on a model that fits in a test."""

import argparse
import dataclasses
import math
import operator
from pathlib import Path

import gguf
import pytest
from fixtures.checkpoint import random_model, tiny
from fixtures.text import tiny as vocabularies

import mistral_eqx as mx
from mistral_eqx.planning import CHIPS, smallest


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


@pytest.mark.slow
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


@pytest.fixture
def random_file(tmp_path, monkeypatch):
    """A function that writes a small model of random blocks in a type, with the benchmarks' own code."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import random_gguf

    tokenizer = mx.load_tokenizer(
        vocabularies.write_gguf(tmp_path / "words.gguf", **vocabularies.byte_level_metadata())
    )
    config = tiny(embed=256, hidden=256, head_dim=64, q_per_kv=2, vocab=tokenizer.vocab, tied=True)

    def write(type):
        path = tmp_path / f"{type}.gguf"
        random_gguf.write_random(path, config, type, tokenizer)
        return path

    return write


IDS = [1, 5, 9, 4, 7, 3, 8, 6]


def small_task(file):
    import peers
    from rounds import Weights

    return peers.Task(Weights(file, file.parent), IDS, IDS[:3], 4, 1, amx=False)


@pytest.mark.parametrize("type", ["Q4_1", "Q4_K", "Q8_0", "BF16"])
def test_a_random_file_has_its_types_and_no_equal_rows(type, random_file):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(random_file(type)).tensors}
    assert "output.weight" not in tensors
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == type
    assert tensors["token_embd.weight"].tensor_type.name == ("BF16" if type == "BF16" else "Q8_0")
    rows = tensors["blk.1.ffn_up.weight"].data
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_a_large_file_is_measured_from_loading_to_its_first_token(random_file):
    import first_token

    found = first_token.measure("mistral_eqx", small_task(random_file("Q4_1")))
    assert 0 < found["load_seconds"] < found["again_seconds"] < found["first_seconds"]


def report(measured, **more):
    from rounds import make_report

    arguments = argparse.Namespace(rounds=1, repetitions=1, new_tokens=4, layers=2, amx=True, **more)
    return make_report(arguments, measured, [0.0])


def test_the_share_of_the_bandwidth_is_of_the_bytes_read(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import bandwidth

    assert min(bandwidth.measure_memory(2**20, 2)["bandwidth"]) > 0
    measured = {"memory": [{"bandwidth": [16e9, 20e9]}], "Q8_0, mistral_eqx": [{"decode": [5.0]}]}
    more = {"weight_bytes": {"Q8_0": 2 * 10**9}, "read_bytes": 2**31}
    shown = bandwidth.markdown(report(measured, **more, left_out={"llama.cpp": "llama_cpp"}))
    assert "| Q8_0 | 2.00 | 5.00 (5.00 to 5.00) | 10.0 | 50 % |  |  |  |  |" in shown
    assert "llama_cpp is not installed." in " ".join(shown.split())
    measured["Q8_0, llama.cpp"] = [{"decode": [4.0]}]
    assert "| 8.0 | 40 % | 1.25 |" in bandwidth.markdown(report(measured, **more, left_out={}))


def test_experts_are_compared_with_dense_layers(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import experts

    measured = {"Q4_1, experts": [{"decode": [8.0]}], "Q4_1, dense": [{"decode": [10.0]}]}
    measured["mistral_eqx float32"] = [{"seconds": [3.0]}]
    more = {"only": ["Q4_1"], "embed": 512, "hidden": 512, "prompt_tokens": 512}
    left_out = {"llama.cpp": "llama_cpp", "transformers float32": "torch"}
    shown = experts.markdown(report(measured, **more, left_out=left_out))
    assert "| Q4_1 | 8.00 (8.00 to 8.00) | 10.00 (10.00 to 10.00) | 1.25 |  |  |" in shown
    assert "| mistral_eqx float32 | 3.00 (3.00 to 3.00) |  |" in shown
    measured["Q4_1, llama.cpp"] = [{"decode": [4.0]}]
    measured["transformers float32"] = [{"seconds": [6.0]}]
    shown = experts.markdown(report(measured, **more, left_out={}))
    assert "| 1.25 | 4.00 (4.00 to 4.00) | 2.00 |" in shown
    assert "| mistral_eqx float32 | 3.00 (3.00 to 3.00) | 0.50 |" in shown


@pytest.mark.slow
def test_a_type_is_measured_with_and_without_a_prefill(random_file):
    import peers

    task = small_task(random_file("Q4_1"))
    plain = peers.start_mistral_eqx(task, None, False)(IDS, 4)
    assert peers.start_after_prefill(task)(IDS, 4) == plain
    assert len(peers.measure_after_prefill(peers.start_after_prefill, task)["decode"]) == task.repetitions


@pytest.mark.long
def test_all_of_a_type_is_one_row(random_file):
    import packed

    task, prompts = small_task(random_file("Q8_0")), [IDS[:3], IDS[3:6]]
    found = packed.of_batches("float32", task, prompts, "float32") | packed.of_batches("Q8_0", task, prompts, None)
    found |= packed.of_streams("Q8_0", task, IDS * 2, llama_cpp=False)
    measured = {name: [operator.call(*arguments)] for name, arguments in found.items()}
    more = {"only": ["Q8_0"], "context_tokens": 16, "prompt_tokens": 8}
    lines = packed.markdown(report(measured, **more, left_out={})).split("\n")
    assert lines[2].startswith("| Q8_0 |")
    assert lines[0].count("|") == lines[2].count("|")
    measured["Q8_0, llama.cpp"] = measured["Q8_0, mistral_eqx"]
    measured["Q8_0, llama.cpp, context"] = measured["Q8_0, mistral_eqx, context"]
    lines = packed.markdown(report(measured, **more, left_out={})).split("\n")
    assert lines[2].count("| 1.00 |") == 3
    assert lines[2].endswith("| 4 of 4 |")


@pytest.mark.parity
def test_llama_cpp_continues_what_it_has_read(random_file):
    pytest.importorskip("llama_cpp")
    import peers

    task = small_task(random_file("Q8_0"))
    anew, kept = (peers.start_llama_cpp(task, reads_again=again) for again in (True, False))
    assert [kept(IDS, 4) for _ in range(3)] == [anew(IDS, 4)] * 3


def test_the_least_times_of_the_family_follow_from_weights_and_exchanges(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import family

    config = dataclasses.replace(mx.PRESETS["7b-v0.3"], layers=2, windows=(None, None))
    chip = CHIPS["v5p"]
    held = smallest(config, chip, batch=1, kv_seq=32_768)
    prompt, token = family.times(config, held)
    # One chip exchanges nothing: it reads all but the embedding, and keys and values, for each token.
    assert held.devices == 1
    head = config.vocab * config.embed
    entries = config.matrix_entries(0) + head  # without norms
    read = entries / (entries + head)
    assert token == pytest.approx((held.weights * read + held.cache) / chip.hbm_bandwidth)
    # Token i of a prompt attends to i others; each pair is two products of 32 heads.
    pairs = 512 * 513 // 2 * 2 * 32 * 128 * config.layers
    assert prompt == pytest.approx(2 * (512 * (entries - head) + head + pairs) / chip.flops)
    small = dataclasses.replace(chip, hbm_bytes=int(held.total))
    split = smallest(config, small, batch=1, kv_seq=32_768)
    # Half of the weights on each, and two sums a layer, one after the embedding and two of the choice, over two hops.
    assert split.devices == 2
    halved = (split.weights * read + held.cache / 2) / chip.hbm_bandwidth
    exchanged = (5 * 2 * config.embed + 8) / chip.link_bandwidth + 7 * 2e-6
    assert family.times(config, split)[1] == pytest.approx(halved + exchanged)
    lines = list(family.rows(("gpt-micro",)))
    assert [line[0][:2] for line in lines] == [["`gpt-micro`", "bfloat16"], ["", "FP8"], ["", "NF4/64"]]
