"""Models that are split into several GGUF files, as the package gguf writes them."""

import shutil

import gguf
import pytest
from fixtures.checkpoint import assert_same_weights, random_model, tiny, write_gguf
from fixtures.generation import refused

import mistral_eqx as mx


@pytest.fixture
def whole(getkey, tmp_path):
    return write_gguf(
        tmp_path / "whole.gguf", random_model(tiny(head_dim=32), getkey()), gguf.GGMLQuantizationType.Q8_0
    )


@pytest.fixture
def shards(whole, tmp_path):
    """The files of the same model, eight tensors each."""
    reader = gguf.GGUFReader(whole)
    (tmp_path / "split").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "split/model.gguf", "llama", split_max_tensors=8)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted((tmp_path / "split").iterdir())
    assert [file.name for file in files] == [f"model-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    return files


@pytest.mark.parametrize("dtype", ["float32", pytest.param(None, marks=pytest.mark.slow)])
def test_a_split_model_is_that_of_one_file(dtype, whole, shards):
    expected = mx.dequantize(mx.load(whole, dtype=dtype))
    for path in (*shards, shards[0].parent):
        assert_same_weights(mx.dequantize(mx.load(path, dtype=dtype)), expected)


def test_what_does_not_belong_together_is_refused(shards, tmp_path):
    first, second, third = shards
    other = tmp_path / "other.gguf"
    shutil.copy(first, other)
    with refused("one of 3 files", "00001-of-00003"):
        mx.load(other)
    second.rename(tmp_path / "second.gguf")
    with refused(second.name, "not beside it"):
        mx.load(first)
    shutil.copy(third, second)
    with refused(second.name, "does not belong"):
        mx.load(third)
