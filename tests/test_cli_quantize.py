"""`mistral-eqx quantize`."""

import pytest
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
        (["--scheme", "fp8"], "FP8"),
    ],
)
def test_a_folder_is_written_that_generates(tiny, tmp_path, options, format):
    result = run("quantize", tiny, tmp_path / "small", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr.endswith(" MB).\n")
    small = mx.load(tmp_path / "small", dtype="stored")
    assert formats(small) == [format]
    assert small.dtype == ("bfloat16" if "bfloat16" in options else "float32")
    assert mx.load_tokenizer(tmp_path / "small").encode("Call me") == mx.load_tokenizer(tiny).encode("Call me")


def test_bad_options_are_one_sentence_and_write_nothing(tiny, tmp_path):
    target = tmp_path / "small"
    assert_refused(run("quantize", tiny, target, "--scheme", "nf5"), "nf5")
    assert_refused(run("quantize", tiny, target, "--block-size", "7"), "block_size")
    assert_refused(run("quantize", tiny, target, "--block-size", "48"), "inputs")
    assert_refused(run("quantize", tiny, target, "--search"), "--search", "nf4")
    assert_refused(run("quantize", tiny, target, "--scheme", "fp8", "--block-size", "16"), "--block-size")
    assert not target.exists()
    target.mkdir()
    (target / "mine.txt").touch()
    assert_refused(run("quantize", tiny, target, "--block-size", "16"), "small")
