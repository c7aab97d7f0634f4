import threading
import time
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from fixtures.checkpoint import assert_same_weights, random_model, tiny, weights, write_gguf
from hypothesis import given, strategies as st

from mistral_eqx import checkpoint
from mistral_eqx.checkpoint import open_checkpoint, reader, safetensors
from mistral_eqx.checkpoint.ranges import read_ranges
from mistral_eqx.checkpoint.reader import DTYPES, LazyTensor, read_columns, read_rows
from mistral_eqx.checkpoint.safetensors import PlainTensor
from mistral_eqx.checkpoint.source import sources


class Listed(LazyTensor):
    """A tensor whose reads are listed."""

    def __init__(self, array):
        super().__init__("listed", array.shape, array.dtype, "F32", array.nbytes)
        self.array = array
        self.reads = []

    def rows(self, start, stop, columns=None):
        assert 0 <= start <= stop <= self.shape[0]
        self.reads.append((start, stop))
        block = self.array[start:stop]
        return block.copy() if columns is None else block[:, columns]


INDICES = [
    ...,
    slice(None),
    slice(2, 5),
    slice(5, 2),
    slice(None, None, 3),
    slice(6, 1, -2),
    3,
    -1,
    (slice(1, 4), slice(2, None)),
    (2, slice(None, 3)),
    (-2, 1),
    (..., 1),
    (slice(2, 4), ...),
    (),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices_are_those_of_numpy(index):
    tensor = Listed(np.arange(8 * 5, dtype=np.float32).reshape(8, 5))
    part = tensor[index]
    assert np.array_equal(part, tensor.array[index])
    assert not np.shares_memory(part, tensor.array)


def test_only_the_rows_asked_for_are_read():
    tensor = Listed(np.zeros((1000, 3), np.float32))
    tensor[10:14]
    tensor[7]
    tensor[20:10:-5, 1]
    assert tensor.reads == [(10, 14), (7, 8), (15, 21)]
    with pytest.raises(IndexError):
        tensor[1000]


@given(st.data())
def test_rows_and_sets_of_columns_are_read_in_any_order(data):
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    tensor = Listed(np.random.default_rng(0).normal(size=(height, width)).astype(np.float32))
    picked = data.draw(st.lists(st.integers(0, height - 1), unique=True, min_size=1))
    some = st.lists(st.integers(0, width - 1), unique=True, min_size=1)
    sets = [np.array(columns) for columns in data.draw(st.lists(some, min_size=1, max_size=3))]
    found = read_columns(tensor, DTYPES["bfloat16"], sets, rows=np.array(picked))
    for part, columns in zip(found, sets, strict=True):
        assert np.array_equal(part, tensor.array[picked][:, columns].astype(ml_dtypes.bfloat16))
    assert np.array_equal(read_rows(tensor, tensor.dtype, rows=np.array(picked)), tensor.array[picked])
    each_twice = sorted([*picked, *picked])
    assert sorted(row for start, stop in tensor.reads for row in range(start, stop)) == each_twice


def test_a_result_begins_where_a_device_can_use_it(monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 64)
    found = read_rows(Listed(np.arange(60, dtype=np.float32).reshape(20, 3)), DTYPES["float32"])
    assert found.ctypes.data % 64 == 0
    array = jax.device_put(found)
    assert array.unsafe_buffer_pointer() == found.ctypes.data


def test_rows_that_stay_as_they_are_are_read_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 64)
    numbers = np.arange(60, dtype=np.float32).reshape(20, 3)
    numbers.tofile(tmp_path / "numbers")
    tensor = PlainTensor("numbers", numbers.shape, numbers.dtype, "F32", tmp_path / "numbers", 0)
    monkeypatch.setattr(tensor, "rows", None)
    assert np.array_equal(read_rows(tensor, numbers.dtype, rows=np.arange(4, 17)), numbers[4:17])


@pytest.mark.parametrize("format", ["hf", "mistral", "gguf"])
def test_part_of_a_tensor_is_read_as_a_shard_asks_for_it(format, getkey, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 300)
    model = random_model(tiny(), getkey())
    path = tmp_path / "model"
    _ = write_gguf(path, model) if format == "gguf" else checkpoint.save(model, path, format=format)
    arrays = weights(model)
    for source in sources(open_checkpoint(path)):
        expected = arrays[source.spec.path]
        assert np.array_equal(source.read(DTYPES["float32"])[0], expected)
        for axis, size in enumerate(expected.shape):
            parts = [
                tuple(part if axis == place else slice(None) for place in range(expected.ndim))
                for part in (slice(0, size // 2), slice(size // 2, size), slice(1, None, 2))
            ]
            for part, found in zip(parts, source.read(DTYPES["float32"], parts), strict=True):
                assert np.array_equal(found, expected[part])


def test_check_names_the_tensor_and_the_rows():
    values = np.zeros((9, 2), np.float32)
    values[5, 1] = np.nan
    read_rows(Listed(values), DTYPES["float32"])
    with pytest.raises(ValueError, match=r"'listed' holds NaN or infinity among its rows 0 to 8"):
        read_rows(Listed(values), DTYPES["float32"], check=True)
    with pytest.raises(ValueError, match=r"NaN or infinity .* \(as float16\)"):
        read_rows(Listed(np.full((2, 2), 1e5, np.float32)), DTYPES["float16"], check=True)


@pytest.mark.slow
def test_trap_a_whole_torch_model_in_memory(getkey, tmp_path, monkeypatch):
    """Reads hold no more than their chunks beside the model, and a conversion or a save one."""
    chunk = 2**16
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    monkeypatch.setattr("mistral_eqx.checkpoint.writing.CHUNK_BYTES", chunk)
    config = tiny(vocab=4096, embed=256, hidden=1024, head_dim=32)
    model = random_model(config, getkey())
    size = 4 * config.parameters
    largest = 4 * config.vocab * config.embed
    longest_read = 0
    original = reader.LazyTensor.rows_per_chunk.fget

    def spied(tensor):
        nonlocal longest_read
        rows = original(tensor)
        longest_read = max(longest_read, rows * tensor.nbytes // tensor.shape[0])
        return rows

    monkeypatch.setattr(LazyTensor, "rows_per_chunk", property(spied))
    slack = 2**20
    checkpoint.save(model, tmp_path / "hf")
    del model
    _peak(lambda: checkpoint.load(tmp_path / "hf", dtype="bfloat16"))  # what is imported and traced once
    assert _peak(lambda: checkpoint.load(tmp_path / "hf")) < size + 4 * chunk + slack < size + largest
    # Each read has a chunk, and the same cast; small tensors are read together.
    together = reader.READS * reader.READS_WITH_COPY * 3 * chunk // 2
    assert _peak(lambda: checkpoint.load(tmp_path / "hf", dtype="bfloat16")) < size // 2 + together + slack
    assert (
        _peak(lambda: checkpoint.convert(tmp_path / "hf", tmp_path / "mistral", format="mistral")) < 4 * chunk + slack
    )
    model = checkpoint.load(tmp_path / "mistral")
    assert _peak(lambda: checkpoint.save(model, tmp_path / "again")) < 4 * chunk + slack
    assert 0 < longest_read <= chunk


def test_slow_storage_has_several_reads_in_flight(getkey, tmp_path, monkeypatch):
    """A network disk answers each read late: ranges of a large tensor wait together, and so do small tensors."""
    checkpoint.save(random_model(tiny(layers=4, windows=(None,) * 4), getkey()), tmp_path / "hf")
    change, flying, most, reads = threading.Condition(), 0, 0, reader.READS

    def slow(path, ranges, into):
        nonlocal flying, most
        with change:
            flying += 1
            most = max(most, flying)
            change.notify_all()
            # Until there are as many as there should be, however late a thread comes.
            change.wait_for(lambda: most >= reads, timeout=5)
        time.sleep(0.01)
        with change:
            flying -= 1
        read_ranges(path, ranges, into)

    monkeypatch.setattr(safetensors, "read_ranges", slow)
    assert_same_weights(checkpoint.load(tmp_path / "hf"), checkpoint.load(tmp_path / "hf", check=True))
    assert most == reads
    table = open_checkpoint(tmp_path / "hf").tensors["model.embed_tokens.weight"]
    monkeypatch.setattr(reader, "CHUNK_BYTES", table.nbytes // 16)
    for dtype, wanted in ((DTYPES["float32"], reader.READS), (DTYPES["bfloat16"], reader.READS_WITH_COPY)):
        most, reads = 0, wanted
        read_rows(table, dtype)
        assert most == reads


def _peak(call):
    """The bytes that were allocated at the worst moment, on top of those before."""
    tracemalloc.start()
    try:
        result = call()
        _, peak = tracemalloc.get_traced_memory()
        del result
    finally:
        tracemalloc.stop()
    return peak
