"""A checkpoint is read straight into the parts that a process's devices hold, and nothing else is read."""

import dataclasses
import math
import tracemalloc

import equinox as eqx
import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
from fixtures.checkpoint import (
    assert_same_weights,
    counted_reads,
    random_model,
    tiny,
    weights,
    write_gguf,
)
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import NamedSharding

import mistral_eqx as mx
from mistral_eqx.checkpoint import load, open_checkpoint, reader, save
from mistral_eqx.checkpoint.names import layer_specs
from mistral_eqx.checkpoint.placement import Placement
from mistral_eqx.checkpoint.reader import DTYPES
from mistral_eqx.checkpoint.source import sources


# Every dimension can be cut in four, and rows of 64 hold two blocks of the quantised types.
CONFIG = tiny(vocab=96, embed=64, hidden=128, kv_heads=4, q_per_kv=2, head_dim=16)
FOUR, TWO_BY_TWO = (("tp",), (4,)), (("kv", "rep"), (2, 2))
LAYOUTS = [
    pytest.param("kv_heads@tp hidden@tp vocab@tp", *FOUR, id="heads"),
    pytest.param("head_dim@tp hidden@tp vocab@tp", *FOUR, id="head_dim"),
    pytest.param("kv_heads@kv q_per_kv@rep hidden@kv,rep vocab@kv,rep", *TWO_BY_TWO, id="kv_replicated"),
    pytest.param("kv_heads@kv head_dim@rep hidden@kv,rep vocab@kv,rep", *TWO_BY_TWO, id="heads_x_head_dim"),
    pytest.param("embed@tp", *FOUR, id="embed"),
    pytest.param("", *FOUR, id="replicated"),
]
FORMATS = ["hf", "mistral", "gguf"]


def mesh_of(names, sizes):
    return jax.make_mesh(sizes, names, devices=jax.devices()[: math.prod(sizes)])


def written(format, model, folder):
    path = folder / "model"
    _ = write_gguf(path, model) if format == "gguf" else save(model, path, format=format)
    return path


@dataclasses.dataclass(frozen=True)
class PlacementOf(Placement):
    """The shard of one device, as if it were the only device of this process."""

    device: int = 0

    def shards(self, dims, shape):
        sharding = NamedSharding(self.mesh, self.strategy.spec(dims))
        return [sharding.devices_indices_map(shape)[self.mesh.devices.flat[self.device]]]


def read_as(placement, checkpoint):
    """Reads what a process with this placement reads, and how many bytes that is."""
    read = 0
    for source in sources(checkpoint, placement):
        parts = placement.shards(source.spec.dims, source.spec.shape(source.config))
        read += sum(part.nbytes for part in source.read(checkpoint.dtype, parts))
    return read


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("layout", "names", "sizes"), LAYOUTS)
def test_shards_are_those_of_the_whole_model(format, layout, names, sizes, getkey, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 3000)
    model = random_model(CONFIG, getkey())
    path, mesh, strategy = written(format, model, tmp_path), mesh_of(names, sizes), mx.Strategy(layout)
    loaded = load(path, mesh=mesh, strategy=strategy)
    assert_same_weights(loaded, model)
    expected = mx.shard(load(path), mesh, strategy)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    assert (loaded.mesh, loaded.strategy) == (expected.mesh, strategy)
    for found, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        if eqx.is_array(found):
            assert found.sharding == wanted.sharding
            for part, other in zip(found.addressable_shards, wanted.addressable_shards, strict=True):
                assert (part.device, part.index) == (other.device, other.index)
                assert np.asarray(part.data).tobytes() == np.asarray(other.data).tobytes()
        else:
            assert found == wanted


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("layout", "names", "sizes"), LAYOUTS)
def test_a_device_reads_the_bytes_of_its_slices(format, layout, names, sizes, getkey, tmp_path):
    model = random_model(CONFIG, getkey())
    checkpoint = open_checkpoint(written(format, model, tmp_path))
    mesh, strategy = mesh_of(names, sizes), mx.Strategy(layout)
    for device in range(mesh.size):
        placement = PlacementOf(mesh, strategy, device)
        with counted_reads() as seen:
            held = read_as(placement, checkpoint)
        slices = [
            NamedSharding(mesh, strategy.spec(spec.dims)).shard_shape(spec.shape(CONFIG))
            for spec in layer_specs(CONFIG)
        ]
        assert sum(nbytes for _, nbytes in seen) == held == 4 * sum(map(math.prod, slices))


@pytest.mark.parametrize(("layout", "names", "sizes"), LAYOUTS)
def test_a_process_reads_replicas_once(layout, names, sizes, getkey, tmp_path):
    path = written("hf", random_model(CONFIG, getkey()), tmp_path)
    reports = []
    with counted_reads() as seen:
        load(
            path,
            mesh=mesh_of(names, sizes),
            strategy=mx.Strategy(layout),
            progress=lambda *report: reports.append(report),
        )
    size = 4 * CONFIG.parameters
    assert sum(nbytes for _, nbytes in seen) == size
    assert reports[-1] == (size, size)
    assert len(reports) == len(list(layer_specs(CONFIG)))
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
@pytest.mark.parametrize(("layout", "names", "sizes"), LAYOUTS)
@pytest.mark.slow
def test_shards_of_quantised_blocks(kind, layout, names, sizes, getkey, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model(CONFIG, getkey()), kind)
    whole = load(path, dtype="bfloat16")
    mesh, strategy = mesh_of(names, sizes), mx.Strategy(layout)
    loaded = load(path, dtype="bfloat16", mesh=mesh, strategy=strategy)
    assert_same_weights(loaded, whole)
    checkpoint = open_checkpoint(path)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    for source in sources(checkpoint):
        [index] = PlacementOf(mesh, strategy).shards(source.spec.dims, source.spec.shape(CONFIG))
        order, columns, _ = source.locate(index)
        with counted_reads() as seen:
            source.read(DTYPES["float32"], [index])
        read = sum(nbytes for _, nbytes in seen)
        if len(source.tensor.shape) == 1:
            assert read == 4 * len(order)
        else:
            # A block that is cut is read, but once, and no other.
            blocks = source.tensor.shape[1] // block if columns is None else len(set((columns // block).tolist()))
            assert read == len(order) * blocks * block_bytes


@pytest.fixture(scope="module")
def every_format(tmp_path_factory):
    model = random_model(CONFIG, jax.random.key(3))
    paths = {format: written(format, model, tmp_path_factory.mktemp(format)) for format in FORMATS}
    return weights(model), {format: sources(open_checkpoint(path)) for format, path in paths.items()}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_box_of_any_tensor(every_format, data):
    arrays, found = every_format
    source = data.draw(st.sampled_from(found[data.draw(st.sampled_from(FORMATS))]))
    expected = arrays[source.spec.path]
    index = []
    for size in expected.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size)), data.draw(st.integers(1, 3))))
    with counted_reads() as seen:
        [part] = source.read(DTYPES["float32"], [tuple(index)])
    assert np.array_equal(part, expected[tuple(index)])
    assert sum(nbytes for _, nbytes in seen) == part.nbytes


def test_a_part_is_cast_and_checked_on_the_way(getkey, tmp_path):
    model = random_model(CONFIG, getkey())
    save(model, tmp_path / "hf")
    mesh = mesh_of(*FOUR)
    loaded = load(tmp_path / "hf", dtype="bfloat16", check=True, mesh=mesh, strategy=mx.HEADS)
    assert_same_weights(loaded, load(tmp_path / "hf", dtype="bfloat16"))
    tensors = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][17, 70] = np.nan
    safetensors.numpy.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    load(tmp_path / "hf", mesh=mesh, strategy=mx.HEADS)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' holds NaN or infinity"):
        load(tmp_path / "hf", check=True, mesh=mesh, strategy=mx.HEADS)


def test_what_cannot_be_split_is_refused_before_a_weight_is_read(getkey, tmp_path):
    save(random_model(tiny(), getkey()), tmp_path / "hf")
    with counted_reads() as seen:
        with pytest.raises(ValueError, match=r"2 kv_heads cannot be split over 4 devices; use KV_REPLICATED or HEAD_D"):
            load(tmp_path / "hf", mesh=mesh_of(*FOUR), strategy=mx.HEADS)
        with pytest.raises(ValueError, match=r"axis 'tp', but the mesh has 'kv' \(2\), 'rep' \(2\)"):
            load(tmp_path / "hf", mesh=mesh_of(*TWO_BY_TWO), strategy=mx.HEADS)
        with pytest.raises(ValueError, match=r"'kv_heads@tp .*' splits a model over a mesh, but none is given; ma"):
            load(tmp_path / "hf", strategy=mx.HEADS)
    assert seen == []


def test_a_table_that_is_stored_twice_is_compared_where_it_is_read(getkey, tmp_path):
    config = dataclasses.replace(CONFIG, tied=True)
    model = random_model(config, getkey())
    save(model, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, file)
    mesh = mesh_of(*FOUR)
    assert_same_weights(load(tmp_path / "hf", mesh=mesh, strategy=mx.HEADS), model)
    table = 4 * config.vocab * config.embed
    for strategy, part in ((mx.HEADS, table // 4), (mx.Strategy("embed@tp"), table // 4), (mx.SINGLE, table)):
        with counted_reads() as seen:
            sources(open_checkpoint(tmp_path / "hf"), PlacementOf(mesh, strategy))
        assert sum(nbytes for _, nbytes in seen) == 2 * part
    tensors["lm_head.weight"][-1, -1] += 1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"'lm_head\.weight' and 'model\.embed_tokens\.weight' differ"):
        load(tmp_path / "hf", mesh=mesh, strategy=mx.HEADS)


@pytest.mark.parametrize("format", ["hf", "mistral"])
@pytest.mark.parametrize(("layout", "names", "sizes"), LAYOUTS)
def test_a_model_on_several_devices_is_saved_as_on_one(format, layout, names, sizes, getkey, tmp_path):
    save(random_model(CONFIG, getkey(), "bfloat16"), tmp_path / "one", format=format)
    loaded = load(tmp_path / "one", mesh=mesh_of(names, sizes), strategy=mx.Strategy(layout))
    save(loaded, tmp_path / "several", format=format)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "several" / file.name).read_bytes()


def test_a_quarter_of_a_tensor_is_the_most_that_saving_holds(getkey, tmp_path):
    config = tiny(vocab=2**14, embed=256, hidden=512, kv_heads=4)
    save(random_model(config, getkey()), tmp_path / "one")
    model = load(tmp_path / "one", mesh=mesh_of(*FOUR), strategy=mx.HEADS)
    save(model, tmp_path / "several")
    tracemalloc.start()
    save(model, tmp_path / "several", overwrite=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # What is looked at for NaN is no more than the shard of a device, and the rest of what is made here is small.
    assert peak < config.vocab * config.embed + 2**20 < 4 * config.vocab * config.embed
