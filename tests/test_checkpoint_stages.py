"""A model with stacked blocks is read straight into the stages of a pipeline, and written from them."""

import dataclasses
import filecmp
import math

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.checkpoint import counted_reads, random_model, tiny, weights, write_gguf
from fixtures.generation import refused
from jax.sharding import NamedSharding
from test_checkpoint_sharded import PlacementOf

import mistral_eqx as mx
from mistral_eqx.checkpoint import load, load_stacked, open_checkpoint, save
from mistral_eqx.checkpoint.loading import _stacked
from mistral_eqx.checkpoint.names import layer_specs
from mistral_eqx.checkpoint.source import sources
from mistral_eqx.checkpoint.writing import _Entry
from mistral_eqx.nn import stack
from mistral_eqx.parallel import specs


CONFIG = tiny(embed=32, hidden=64, kv_heads=4, q_per_kv=1, head_dim=16, layers=4, windows=(3, None) * 2)
ALIKE = dataclasses.replace(CONFIG, windows=(None,) * 4, tied=True)
STAGES = mx.HEADS + "layers@pp"


@pytest.mark.parametrize(
    ("format", "config", "strategy", "chunks", "layers"),
    [
        ("hf", CONFIG, STAGES, 1, ((0, 2), (1, 3))),
        ("mistral", ALIKE, mx.Strategy("layers@pp hidden@tp"), 2, ((0, 1), (2, 3))),
    ],
)
def test_the_stack_has_the_weights_of_the_files_and_the_files_those_of_the_stack(
    format, config, strategy, chunks, layers, getkey, tmp_path
):
    """`layers` are those of each entry of the pattern, counted by hand."""
    model, mesh, reports = random_model(config, getkey()), mx.make_mesh("pp=2,tp=2"), []
    save(model, tmp_path / "model", format=format)
    with counted_reads() as seen:
        options = {"mesh": mesh, "strategy": strategy, "chunks": chunks}
        loaded = load_stacked(tmp_path / "model", progress=lambda *report: reports.append(report), **options)
    # What two devices hold is read once.
    size = 4 * config.parameters
    assert sum(nbytes for _, nbytes in seen) == size
    assert reports[-1] == (size, size)
    assert (loaded.chunks, loaded.mesh, loaded.strategy) == (chunks, mesh, strategy)
    whole = weights(model)
    for path, array in weights(loaded).items():
        field, own = path.split(".", 1)
        number, _, name = own.partition(".")
        if field == "pattern":
            np.testing.assert_array_equal(array, [whole[f"blocks.{layer}.{name}"] for layer in layers[int(number)]])
        else:
            np.testing.assert_array_equal(array, whole[own])
    arrays = eqx.filter(loaded, eqx.is_array)
    for array, spec in zip(jax.tree.leaves(arrays), jax.tree.leaves(specs(arrays, strategy)), strict=True):
        assert array.sharding == NamedSharding(mesh, spec)
    save(loaded, tmp_path / "again", format=format)
    names = sorted(file.name for file in (tmp_path / "model").iterdir())
    assert filecmp.cmpfiles(tmp_path / "model", tmp_path / "again", names, shallow=False) == (names, [], [])


def test_a_layer_leaves_its_stack_on_an_accelerator(monkeypatch):
    """One program for all layers, as if this were not the memory of the host."""
    stacked = jnp.arange(6.0).reshape(3, 2)
    monkeypatch.setattr(type(stacked), "platform", lambda array: "gpu")
    assert [_Entry(stacked, layer).copy_to_host().tolist() for layer in (2, 0)] == [[4.0, 5.0], [0.0, 1.0]]


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_device_reads_its_shards_of_the_layers_of_its_stage(chunks, getkey, tmp_path):
    save(random_model(ALIKE, getkey()), tmp_path / "model")
    checkpoint, mesh = open_checkpoint(tmp_path / "model"), mx.make_mesh("pp=2,tp=2")
    skeleton = eqx.filter_eval_shape(
        lambda key: stack(mx.Mistral.init(ALIKE, key=key, strategy=STAGES), chunks), getkey()
    )
    share = {
        spec.path: math.prod(NamedSharding(mesh, STAGES.spec(spec.dims)).shard_shape(spec.shape(ALIKE)))
        for spec in layer_specs(ALIKE)
    }
    of_layer = sum(count for path, count in share.items() if path.startswith("blocks.0."))
    of_all = share["embedding"] + share["norm"]
    for device in range(mesh.size):
        placement = PlacementOf(mesh, STAGES, device)
        with counted_reads() as seen:
            for source in _stacked(sources(checkpoint), skeleton):
                shards = placement.shards(source.spec.dims, source.shape)
                source.read(checkpoint.dtype, shards)
        assert sum(nbytes for _, nbytes in seen) == 4 * (of_all + 2 * of_layer)


def test_numbers_in_blocks_are_expanded(getkey, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model(ALIKE, getkey()), gguf.GGMLQuantizationType.Q8_0)
    loaded = load_stacked(path, mesh=mx.make_mesh("pp=2,tp=2"), strategy=STAGES, dtype="bfloat16")
    whole, stacked = weights(load(path, dtype="bfloat16")), weights(loaded)
    for name in ("attention.o_proj", "feed_forward.up_proj", "attention_norm"):
        array = stacked[f"pattern.0.{name}"]
        assert array.tobytes() == b"".join(whole[f"blocks.{layer}.{name}"].tobytes() for layer in range(4))


def test_what_is_not_read_into_stages_is_refused(getkey, tmp_path):
    model, mesh = random_model(CONFIG, getkey()), mx.make_mesh("pp=2,tp=2")
    save(model, tmp_path / "model")
    with counted_reads() as seen:
        with refused("splits 'layers'", "mistral_eqx.load_stacked"):
            load(tmp_path / "model", mesh=mesh, strategy=STAGES)
        with refused("windows differ"):
            load_stacked(tmp_path / "model", mesh=mx.make_mesh("pp=4"), strategy=mx.Strategy("layers@pp"))
        with refused("4 layers", "3 chunks", "fewer chunks"):
            load_stacked(tmp_path / "model", mesh=mesh, strategy=STAGES, chunks=3)
    # The first and the last row of tensors that two processes would compare is not read by one.
    assert seen == []
    quantized = stack(mx.quantize(model, mx.NF4(32)))
    with refused("quantized", "mistral_eqx.nn.unstack"):
        save(quantized, tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()
