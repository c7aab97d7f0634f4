import contextlib
import os
import tracemalloc

import gguf
import numpy as np
import pytest
from fixtures.checkpoint import assert_same_weights, random_model, tiny, write_gguf
from hypothesis import HealthCheck, given, settings, strategies as st

from mistral_eqx.checkpoint import load, open_checkpoint, save
from mistral_eqx.checkpoint.gguf import QuantisedTensor, read_gguf


Kind = gguf.GGMLQuantizationType


def dequantisable():
    """Every type that the gguf package turns into numbers."""
    for kind in Kind:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        yield kind


@pytest.mark.parametrize("kind", list(dequantisable()), ids=lambda kind: kind.name)
def test_every_type_that_the_package_dequantises(kind, tmp_path):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = 512 // block
    raw = np.random.default_rng(0).integers(0, 256, size=(6, blocks * block_bytes), dtype=np.uint8)
    # Without bit 14 no half or float among them is infinite or NaN; other bits just become other numbers.
    raw &= 0b1011_1111
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("some.key", 7)
    writer.add_tensor("before", np.ones(5, np.float32))
    writer.add_tensor("quantised", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = read_gguf(path)
    assert metadata == {"general.architecture": "llama", "some.key": 7}
    tensor = tensors["quantised"]
    assert (tensor.shape, tensor.stored, tensor.nbytes) == ((6, 512), kind.name, raw.nbytes)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind).reshape(6, 512)
        found = tensor[...].astype(np.float32)
        part = tensor[2:5, 3:9].astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(part, expected[2:5, 3:9])
    columns = np.concatenate([np.arange(3, 9), np.arange(250, 300), np.arange(301, 512, 3)])
    with np.errstate(all="ignore"):
        for some in (columns, np.arange(256, 512), columns[:1]):
            np.testing.assert_array_equal(tensor.rows(1, 5, some).astype(np.float32), expected[1:5, some])
        assert tensor.rows(2, 2, columns).shape == (0, len(columns))
    np.testing.assert_array_equal(tensors["before"][1:3], np.ones(2))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_metadata_is_read_as_it_was_written(tmp_path_factory, data):
    text = st.text(max_size=8)
    number = st.integers(-(2**31), 2**31 - 1)
    value = st.one_of(
        text, number, st.booleans(), st.lists(text, min_size=1, max_size=5), st.lists(number, min_size=1, max_size=5)
    )
    wanted = data.draw(st.dictionaries(st.text("abc.", min_size=1), value, max_size=6))
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, content in wanted.items():
        writer.add_key_value(key, content, gguf.GGUFValueType.get_type(content))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata, tensors = read_gguf(path)
    assert metadata == {"general.architecture": "llama", **wanted}
    assert tensors == {}


def test_every_scalar_type_is_read(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in gguf.GGUFValueType:
        if kind not in (gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY):
            writer.add_key_value(kind.name, 1, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata, _ = read_gguf(path)
    del metadata["general.architecture"]
    assert len(metadata) == 11
    assert set(metadata.values()) == {1}


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_float32(tied, getkey, tmp_path):
    model = random_model(tiny(tied=tied), getkey())
    path = write_gguf(tmp_path / "model.gguf", model)
    assert open_checkpoint(path).config == model.config
    assert_same_weights(load(path), model)


def test_quantised_weights_are_float32_and_halves_stay_halves(getkey, tmp_path):
    model = random_model(tiny(), getkey())
    quantised = open_checkpoint(write_gguf(tmp_path / "q8.gguf", model, Kind.Q8_0))
    assert quantised.dtype == np.float32
    halves = open_checkpoint(write_gguf(tmp_path / "half.gguf", model, Kind.F16))
    assert halves.dtype == np.float16
    brains = open_checkpoint(write_gguf(tmp_path / "brain.gguf", model, Kind.BF16))
    assert brains.dtype.name == "bfloat16"
    table = np.asarray(model.embedding.weight.value)
    expanded = load(quantised.path, dtype="float32")
    np.testing.assert_allclose(expanded.embedding.weight.value, table, atol=0.03)
    np.testing.assert_array_equal(load(halves.path).embedding.weight.value, table.astype(np.float16))
    assert load(brains.path).dtype == np.dtype("bfloat16")
    # The same model out of its dequantised weights.
    save(expanded, tmp_path / "hf")
    assert_same_weights(load(tmp_path / "hf"), expanded)


def test_a_quantised_vector_is_sliced(tmp_path):
    raw = gguf.quants.quantize(np.arange(64, dtype=np.float32)[None], Kind.Q8_0)
    path = tmp_path / "raw"
    path.write_bytes(raw.tobytes())
    tensor = QuantisedTensor("vector", (64,), Kind.Q8_0, raw.nbytes, path, 0)
    np.testing.assert_array_equal(tensor[10:20], gguf.quants.dequantize(raw, Kind.Q8_0)[0, 10:20])


def test_every_truncation_is_refused(getkey, tmp_path):
    content = write_gguf(tmp_path / "whole.gguf", random_model(tiny(layers=1, windows=(None,)), getkey())).read_bytes()
    path = tmp_path / "model.gguf"
    lengths = [*range(1, 600, 7), *range(600, len(content), 4999), len(content) - 1]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model\.gguf' is (truncated|not a GGUF file)"):
            open_checkpoint(path)


@given(st.data())
def test_garbage_never_ends_in_another_error(tmp_path_factory, data):
    content = bytearray(_small_file(tmp_path_factory))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("garbage") / "model.gguf"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        read_gguf(path)


def _small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("names", ["one", "two"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("vector", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _u32(number):
    return number.to_bytes(4, "little")


def _u64(number):
    return number.to_bytes(8, "little")


def _text(text):
    return _u64(len(text)) + text


def _file(tensors, *, keys=(), count=None, data=b"", alignment=32):
    """A file with these tensors, as name, shape, kind and offset, and these keys; right or wrong."""
    header = b"GGUF" + _u32(3) + _u64(len(tensors) if count is None else count) + _u64(len(keys)) + b"".join(keys)
    for name, shape, kind, offset in tensors:
        axes = b"".join(map(_u64, reversed(shape)))
        header += _text(name) + _u32(len(shape)) + axes + _u32(kind) + _u64(offset)
    return header + bytes(-len(header) % alignment) + data


ALIGNMENT = _text(b"general.alignment")
TWO = [(b"one", (3, 8), 0, 0), (b"two", (3,), 0, 96)]
DATA = np.arange(27, dtype=np.float32).tobytes()


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("keys", [[], [ALIGNMENT + _u32(4) + _u32(32)]])
def test_what_writers_write_is_read(keys, padding, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(_file(TWO, keys=keys, data=DATA + bytes(padding)))
    _, tensors = read_gguf(path)
    np.testing.assert_array_equal(tensors["one"][...], np.arange(24).reshape(3, 8))
    np.testing.assert_array_equal(tensors["two"][...], [24, 25, 26])
    if padding:  # which the format's own reader needs
        for tensor in gguf.GGUFReader(path).tensors:
            np.testing.assert_array_equal(tensors[tensor.name][...], tensor.data)


def _nested(levels):
    return _text(b"x") + _u32(9) + (_u32(9) + _u64(1)) * levels + _u32(0) + _u64(0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            _file([TWO[0], (b"two", (3,), 0, 0)], data=DATA + bytes(20)),
            r"puts the tensor 'two' at offset 0, which",
        ),
        (_file([TWO[0], (b"two", (3,), 0, 92)], data=DATA + bytes(20)), r"puts the tensor 'two' at offset 92"),
        (_file([TWO[0], (b"two", (3,), 0, 128)], data=DATA + bytes(64)), r"puts the tensor 'two' at offset 128"),
        (_file([(b"one", (3, 8), 0, 32), TWO[1]], data=DATA + bytes(64)), r"puts the tensor 'one' at offset 32"),
        (_file(TWO[::-1], data=DATA + bytes(20)), r"puts the tensor 'two' at offset 96"),
        (_file(TWO, count=1, data=DATA + bytes(20)), r"its last tensor ends at"),
        (_file(TWO, data=DATA + bytes(21)), r"has \d+ bytes, but its last tensor ends at"),
        (_file(TWO, data=DATA[:-1]), r"is truncated: it has \d+ bytes, but the tensor 'two' ends at"),
        (_file([TWO[0], TWO[0]], data=DATA), r"it holds two tensors 'one'"),
        (_file([(b"\xff", (3, 8), 0, 0)], data=DATA), r"name of tensor number 0 is not UTF-8 text"),
        (_file([(b"x" * 10**6, (2**40,), 0, 0)]), r"but the tensor 'x{,90}\.\.\. ends at"),
        (_file([(b"one", (2**63, 2**63), 0, 0)]), r"but the tensor 'one' ends at"),
        (_file([(b"one", (1,) * 9, 0, 0)], data=DATA), r"its tensor 'one' has 9 axes"),
        (_file([], keys=[_text(b"a") + _u32(4) + _u32(1)] * 2), r"it has the key 'a' twice"),
        (_file([], keys=[_text(b"\xff") + _u32(4) + _u32(1)]), r"key number 0 is not UTF-8 text"),
        (_file([], keys=[_text(b"a") + _u32(77)]), r"the value of its key 'a' has the unknown type 77"),
        (
            _file([], keys=[_text(b"a") + _u32(9) + _u32(77) + _u64(0)]),
            r"the array of its key 'a' has entries of",
        ),
        (_file([], keys=[_nested(100)]), r"the arrays of its key 'x' nest deeper than"),
        (_file([], keys=[ALIGNMENT + _u32(4) + _u32(0)]), r"its general\.alignment is 0, and not a power of two"),
        (_file([], keys=[ALIGNMENT + _u32(4) + _u32(24)]), r"its general\.alignment is 24"),
        (_file([], keys=[ALIGNMENT + _u32(10) + _u64(32)]), r"its general\.alignment is 32"),
    ],
)
def test_what_cannot_be_true_is_refused(content, sentence, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.gguf.*{sentence}") as caught:
        read_gguf(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (_file([], count=2**40), 2**33),
        (_file([], keys=[_text(b"a") + _u32(9) + _u32(0) + _u64(2**31)]), 2**32),
        (_file([], keys=[_text(b"a") + _u32(9) + _u32(8) + _u64(2**26)]), 2**30),
        (_file([], keys=[_text(b"a") + _u32(8) + _u64(2**30)]), 2**31),
        (_file([], keys=[_text(b"a") + _u32(9) + _u32(0) + _u64(2**63)]), 2**12),
    ],
)
def test_counts_are_not_believed(content, size, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    os.truncate(path, size)  # the rest takes no room on the disk
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"model\.gguf' is (damaged|truncated)"):
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()


def test_a_file_without_weights_is_no_checkpoint(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(_file([]))
    with pytest.raises(ValueError, match=r"model\.gguf' holds no tensors"):
        open_checkpoint(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.gguf' is empty"):
        open_checkpoint(path)
    path.write_bytes(b"PK\3\4 something else")
    with pytest.raises(ValueError, match=r"is not a GGUF file: it does not begin with the letters GGUF"):
        open_checkpoint(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(64))
    with pytest.raises(ValueError, match=r"is GGUF of version 1; supported are 2 and 3"):
        open_checkpoint(path)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(64))
    with pytest.raises(ValueError, match=r"is GGUF of version 50331648"):
        open_checkpoint(path)


def test_what_is_not_supported_is_refused_by_name(getkey, tmp_path):
    model = random_model(tiny(), getkey())
    path = write_gguf(tmp_path / "a.gguf", model, metadata=[("llama.expert_count", 8)])
    with pytest.raises(ValueError, match=r"only one of the number of experts and llama\.expert_used_count"):
        open_checkpoint(path)
    path = write_gguf(tmp_path / "b.gguf", model, tensors=[("rope_freqs.weight", np.arange(1, 9, dtype=np.float32))])
    with pytest.raises(ValueError, match=r"'rope_freqs\.weight', which divides the angles .* otherwise than Llama 3"):
        load(path)
    path = write_gguf(tmp_path / "d.gguf", model, tensors=[("numbers", np.ones(8, np.int32))])
    with pytest.raises(ValueError, match=r"tensor 'numbers' of .* has the element type I32, which the gguf package"):
        load(path)


def test_trap_biases_silently_missing(getkey, tmp_path):
    model = random_model(tiny(), getkey())
    path = write_gguf(tmp_path / "a.gguf", model, tensors=[("blk.0.attn_q.bias", np.ones(8, np.float32))])
    with pytest.raises(ValueError, match=r"has a tensor 'blk\.0\.attn_q\.bias', which a model"):
        load(path)
