import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.checkpoint import assert_same_weights
from fixtures.cli import assert_refused, run, save_tiny_model

import mistral_eqx as mx


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """Adapters that change every logit."""
    model, path = mx.load(tiny), "blocks.0.attention.q_proj"
    *outputs, inputs = model.blocks[0].attention.q_proj.weight.dense().shape
    tuned = mx.lora.adapt(
        model, {path: (jr.normal(jr.key(1), (2, inputs)), jr.normal(jr.key(2), (*outputs, 2)))}, alpha=4.0
    )
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    mx.save_lora(tuned, folder)
    return folder


@pytest.mark.parametrize("format", ["hf", "mistral"])
def test_the_sum_is_written_with_its_tokenizer(tiny, adapter, tmp_path, format):
    result = run("merge", tiny, adapter, tmp_path / "out", "--format", format)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith(f"Wrote {tmp_path / 'out'} (")
    merged = mx.load(tmp_path / "out")
    assert_same_weights(merged, mx.merge_lora(mx.load_lora(mx.load(tiny), adapter)))
    ids = jnp.arange(5)[None]
    assert not np.allclose(merged(ids), mx.load(tiny)(ids))
    assert mx.load_tokenizer(tmp_path / "out").encode("Call me") == mx.load_tokenizer(tiny).encode("Call me")


@pytest.mark.slow
def test_quantized_weights_are_expanded(tiny, adapter, tmp_path):
    small = tmp_path / "small"
    assert run("quantize", tiny, small, "--block-size", 16).exit_code == 0
    result = run("merge", small, adapter, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    expected = mx.merge_lora(mx.load_lora(mx.load(small, dtype="float32"), adapter))
    assert_same_weights(mx.load(tmp_path / "out"), expected)


def test_bad_input_is_one_sentence_and_writes_nothing(tiny, adapter, tmp_path):
    assert_refused(run("merge", tiny, tiny, tmp_path / "out"), "has no 'adapter_config.json'")
    assert_refused(run("merge", tmp_path / "none", adapter, tmp_path / "out"), "none")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert_refused(run("merge", tiny, adapter, tmp_path / "out"), "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_a_gguf_file_needs_is_asked_for(tiny, adapter, tmp_path):
    to_gguf = ("merge", tiny, adapter, tmp_path / "out.gguf", "--format", "gguf")
    assert_refused(run(*to_gguf, "--no-tokenizer"), "--no-tokenizer")
    assert_refused(run(*to_gguf), "no merges")
    assert_refused(run("merge", tiny, adapter, tmp_path / "out", "--type", "Q8_0"), "type", "hf")
    (tmp_path / "out.gguf").write_bytes(b"GGUF")
    assert_refused(run(*to_gguf), "overwrite")


def test_dtype_and_overwrite_are_kept(tiny, adapter, tmp_path):
    assert run("merge", tiny, adapter, tmp_path / "out", "--no-tokenizer").exit_code == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert_refused(run("merge", tiny, adapter, tmp_path / "out"), "--overwrite")
    assert run("merge", tiny, adapter, tmp_path / "out", "--overwrite", "--dtype", "bfloat16").exit_code == 0
    assert mx.load(tmp_path / "out").dtype == jnp.bfloat16
    assert (tmp_path / "out" / "tokenizer.json").exists()
