import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings, strategies as st

from mistral_eqx.checkpoint.reader import DTYPES
from mistral_eqx.checkpoint.safetensors import read_header, write


def write_raw(path, header, data=b""):
    """A file with this header, be it right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_reads_what_the_official_library_writes(tmp_path):
    values = np.random.default_rng(0).normal(size=(7, 3))
    arrays = {name: values.astype(dtype) for name, dtype in DTYPES.items()} | {"row": values[0].astype(np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "file", metadata={"some": "text"})
    tensors = read_header(tmp_path / "file")
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tensors[name].shape == array.shape
        assert tensors[name].dtype == array.dtype
        assert tensors[name].nbytes == array.nbytes
        assert tensors[name][2:5].tobytes() == array[2:5].tobytes()
    assert {tensor.stored for tensor in tensors.values()} == {"F32", "F16", "BF16"}


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), min_size=1, max_size=3)), max_size=5)
)
def test_the_official_library_reads_what_is_written(tmp_path_factory, described):
    path = tmp_path_factory.mktemp("written") / "file"
    arrays = {
        f"tensor {number}": np.random.default_rng(number).normal(size=shape).astype(DTYPES[dtype])
        for number, (dtype, shape) in enumerate(described)
    }
    write(path, [(name, array.shape, array.dtype, iter([array])) for name, array in arrays.items()])
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(arrays)
        for name, array in arrays.items():
            assert list(file.get_slice(name).get_shape()) == list(array.shape)
            if array.dtype != ml_dtypes.bfloat16:
                assert file.get_tensor(name).tobytes() == array.tobytes()
    for name, tensor in read_header(path).items():
        assert tensor[...].tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize(
    ("header", "data", "sentence"),
    [
        ({"a": entry([2, 2], 0, 16)}, b"\0" * 15, r"is truncated: it has \d+ bytes of \d+; fetch it again"),
        ({"a": entry([2, 2], 0, 16)}, b"\0" * 17, r"is damaged: it has \d+ bytes, but its header describes"),
        ({"a": entry([2, 2], 0, 16), "b": entry([2], 12, 20)}, b"\0" * 20, r"puts the tensor 'b' at bytes 12 to 20"),
        ({"a": entry([2, 2], 0, 16), "b": entry([2], 20, 28)}, b"\0" * 28, r"puts the tensor 'b' at bytes 20 to 28"),
        ({"a": entry([2, 2], 0, 12)}, b"\0" * 12, r"puts the tensor 'a' at bytes 0 to 12, which does not fit"),
        ({"a": entry([2, 2], 4, 20)}, b"\0" * 20, r"puts the tensor 'a' at bytes 4 to 20"),
        ({"a": entry([-2, -2], 0, 16)}, b"\0" * 16, r"header cannot be read \('shape' of the tensor 'a' is \[-2, -2\]"),
        (
            {"a": entry([2.0, 2], 0, 16)},
            b"\0" * 16,
            r"header cannot be read \('shape' of the tensor 'a' .* whole",
        ),
        ({"a": entry([True, 4], 0, 16)}, b"\0" * 16, r"header cannot be read \('shape' of the tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4, r"header cannot be read \('data_offsets' of the tensor 'a'"),
        (
            {"a": entry([1], 0, 4, ["F32"])},
            b"\0" * 4,
            r"header cannot be read \('dtype' of the tensor 'a' is",
        ),
        ({"a": entry([1] * 10**5, 0, 4)}, b"\0" * 4, r"the tensor 'a' has 100000 axes"),
        ({"a": entry([10**4000], 0, 4)}, b"\0" * 4, r"puts the tensor 'a' at bytes 0 to 4"),
        (
            {"__metadata__": {"a": 5}, "a": entry([1], 0, 4)},
            b"\0" * 4,
            r"its __metadata__ is .*; its entry 'a'",
        ),
        (b'{"a": {"a": 1, "a": 2}}', b"", r"the key 'a' appears twice"),
        (b"[" * 10**5, b"", r"header cannot be read \(it is not valid JSON \(it nests deeper"),
        (
            b'{"a": [' + b"[]," * (2**21 + 1) + b"[]]}",
            b"",
            r"header cannot be read \(it has more entries than any model",
        ),
        (json.dumps({"a": entry([1], 0, 4)}).encode("utf-16"), b"\0" * 4, r"it is not UTF-8 text"),
        (b"\xef\xbb\xbf{}", b"", r"it is not valid JSON"),
        ({"a" * 10**6: entry([1], 0, 8)}, b"\0" * 8, r"puts the tensor 'a{,90}\.\.\. at bytes 0 to 8"),
        ({"a": 3}, b"", r"header cannot be read"),
        ([1, 2], b"", r"header cannot be read"),
        (b"{not json", b"", r"header cannot be read"),
        (b"\xff\xfe\xfd", b"", r"header cannot be read"),
        (
            {"w": entry([4], 0, 4, "F8_E4M3")},
            b"\0" * 4,
            r"tensor 'w' of .* has the dtype F8_E4M3, which is not supported",
        ),
        ({"w": entry([1], 0, 8, "I64")}, b"\0" * 8, r"tensor 'w' of .* has the dtype I64"),
    ],
)
@pytest.mark.slow
def test_damaged_files_are_refused(tmp_path, header, data, sentence):
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"is empty; fetch it again"),
        (b"\x05\0\0", r"is not a safetensors file"),
        (b"garbage garbage garbage", r"is not a safetensors file: it does not begin with the length of a header"),
        (b"\xff\0\0\0\0\0\0\0{}", r"is truncated: it has 10 bytes of 263"),
    ],
)
def test_other_files_are_refused(tmp_path, content, sentence):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = write_raw(tmp_path / "file", {"a": entry([4, 1], 0, 16)}, b"\0" * 16)
    tensors = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    assert tensors["a"][:3].shape == (3, 1)
    with pytest.raises(ValueError, match=r"is truncated: it ended while it was read"):
        tensors["a"][...]
