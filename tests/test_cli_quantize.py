"""`mistral-eqx quantize`."""

import gguf
import numpy as np
import pytest
from fixtures.checkpoint import assert_same_weights, random_model, tiny as tiny_config, write_gguf
from fixtures.cli import assert_refused, run, save_tiny_model

import mistral_eqx as mx
from mistral_eqx.quant import formats


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(
    ("options", "format"),
    [
        (["--block-size", "16"], "NF4/16"),
        (["--scheme", "int4", "--block-size", "16", "--search"], "INT4/16"),
        (["--scheme", "int8", "--dtype", "bfloat16"], "INT8"),
        (["--scheme", "fp8", "--search"], "FP8"),
    ],
)
def test_a_folder_is_written_that_generates(tiny, tmp_path, options, format):
    result = run("quantize", tiny, tmp_path / "small", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr.endswith(" MB).\n")
    small = mx.load(tmp_path / "small")
    assert formats(small) == [format]
    assert small.dtype == ("bfloat16" if "bfloat16" in options else "float32")
    assert mx.load_tokenizer(tmp_path / "small").encode("Call me") == mx.load_tokenizer(tiny).encode("Call me")


def test_the_blocks_of_a_file_are_expanded_first(tmp_path, getkey):
    source = write_gguf(tmp_path / "model.gguf", random_model(tiny_config(), getkey()), gguf.GGMLQuantizationType.Q8_0)
    result = run("quantize", source, tmp_path / "small", "--block-size", 16, "--no-tokenizer")
    assert result.exit_code == 0, result.stderr
    small = mx.load(tmp_path / "small")
    assert formats(small) == ["NF4/16"]
    assert_same_weights(small, mx.quantize(mx.load(source, dtype="float32"), mx.NF4(16)))


@pytest.mark.parametrize("scheme", [pytest.param("gptq", marks=pytest.mark.slow), "awq"])
def test_a_text_calibrates(scheme, tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. " * 40)
    arguments = ["--scheme", scheme, "--block-size", "16", "--calibration", text]
    result = run("quantize", tiny, tmp_path / "small", *arguments)
    assert result.exit_code == 0, result.stderr
    model, tokenizer = mx.from_pretrained(tiny)
    # The context has 256 tokens.
    ids = np.array(tokenizer.encode(text.read_text())[:512]).reshape(2, 256)
    expected = mx.quantize(model, {"gptq": mx.GPTQ, "awq": mx.AWQ}[scheme](group_size=16), calibration=ids)
    small = mx.load(tmp_path / "small")
    assert formats(small) == ["INT4/16"]
    assert_same_weights(mx.dequantize(small), mx.dequantize(expected))


def test_bad_options_are_one_sentence_and_write_nothing(tiny, tmp_path):
    target = tmp_path / "small"
    assert_refused(run("quantize", tiny, target, "--scheme", "nf5"), "nf5")
    assert_refused(run("quantize", tiny, target, "--block-size", "7"), "block_size")
    assert_refused(run("quantize", tiny, target, "--block-size", "48"), "inputs")
    assert_refused(run("quantize", tiny, target, "--search"), "--search", "nf4")
    assert_refused(run("quantize", tiny, target, "--scheme", "fp8", "--block-size", "16"), "--block-size")
    text = tmp_path / "text.txt"
    text.write_text("Call me.")
    assert_refused(run("quantize", tiny, target, "--scheme", "gptq"), "gptq", "--calibration")
    assert_refused(run("quantize", tiny, target, "--calibration", text), "nf4", "--calibration")
    assert_refused(run("quantize", tiny, target, "--scheme", "awq", "--calibration", text), "9 tokens", "32 are needed")
    assert_refused(run("quantize", tiny, target, "--scheme", "awq", "--calibration", tmp_path / "none"), "none")
    text.write_bytes(b"\xff\xfe")
    assert_refused(run("quantize", tiny, target, "--scheme", "awq", "--calibration", text), "UTF-8")
    assert not target.exists()
    target.mkdir()
    (target / "mine.txt").touch()
    assert_refused(run("quantize", tiny, target, "--block-size", "16"), "small")
