import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import safetensors.numpy
from checkpoint_fixtures import assert_same_weights, random_model, tiny, write_gguf

from mistral_eqx.checkpoint import convert, load, open_checkpoint, save
from mistral_eqx.nn import DenseWeight


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("format", ["hf", "mistral"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "changes", [{}, {"tied": True}, {"windows": (None, 9)}, {"q_per_kv": 1, "kv_heads": 4}], ids=str
)
def test_load_then_save_gives_every_tensor_bit_for_bit(format, dtype, changes, getkey, tmp_path):
    model = random_model(tiny(**changes), getkey(), dtype)
    save(model, tmp_path / "first", format=format)
    loaded = load(tmp_path / "first")
    assert_same_weights(loaded, model)
    assert loaded.config == model.config
    save(loaded, tmp_path / "second", format=format)
    for file in ("first", "second"):
        assert listing(tmp_path / file) == listing(tmp_path / "first")
    for name in listing(tmp_path / "first"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_trap_convert_back_left_as_a_stub(getkey, tmp_path):
    model = random_model(tiny(), getkey(), jnp.bfloat16)
    save(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mistral", format="mistral", max_shard_size=9000)
    convert(tmp_path / "mistral", tmp_path / "back", format="hf")
    for name in listing(tmp_path / "hf"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    assert_same_weights(load(tmp_path / "mistral"), model)


def test_a_conversion_out_of_gguf(getkey, tmp_path):
    model = random_model(tiny(), getkey())
    path = write_gguf(tmp_path / "model.gguf", model)
    for format in ("hf", "mistral"):
        convert(path, tmp_path / format, format=format, dtype="bfloat16")
        assert_same_weights(load(tmp_path / format), load(path, dtype="bfloat16"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_hold_at_most_their_size(getkey, tmp_path):
    model = random_model(tiny(), getkey())
    limit = 30_000
    for format, stem in (("hf", "model"), ("mistral", "consolidated")):
        folder = tmp_path / format
        save(model, folder, format=format, max_shard_size=limit)
        files = sorted(folder.glob("*.safetensors"))
        count = len(files)
        assert count > 2
        assert [file.name for file in files] == [
            f"{stem}-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)
        ]
        index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())
        placed = {name: file.name for file in files for name in safetensors.numpy.load_file(file)}
        assert index["weight_map"] == placed
        sizes = [sum(array.nbytes for array in safetensors.numpy.load_file(file).values()) for file in files]
        assert max(sizes) <= limit
        assert index["metadata"]["total_size"] == sum(sizes) == 4 * model.config.parameters
        assert_same_weights(load(folder), model)


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(getkey, tmp_path):
    model = random_model(tiny(), getkey())
    save(model, tmp_path / "hf", max_shard_size=1)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 3 + 9 * 2
    assert_same_weights(load(tmp_path / "hf"), model)


@pytest.mark.parametrize("size", ["", "5 parsecs", "-1GB", "0", "GB", "1e3"])
def test_sizes_that_cannot_be_read(size, getkey, tmp_path):
    with pytest.raises(ValueError, match=rf"The size {size!r} cannot be read; give bytes, or a number with a unit"):
        save(random_model(tiny(), getkey()), tmp_path / "out", max_shard_size=size)
    assert listing(tmp_path) == []


def test_an_unknown_format(getkey, tmp_path):
    model = random_model(tiny(), getkey())
    with pytest.raises((ValueError, TypeError)):
        save(model, tmp_path / "out", format="gguf")  # pyright: ignore[reportArgumentType]
    assert listing(tmp_path) == []


def test_more_files_appear_with_the_conversion(getkey, tmp_path):
    save(random_model(tiny(), getkey()), tmp_path / "hf")

    def add(folder):
        assert not (tmp_path / "out").exists()
        (folder / "more.txt").write_text("more")

    convert(tmp_path / "hf", tmp_path / "out", format="mistral", finish=add)
    assert listing(tmp_path / "out") == ["consolidated.safetensors", "more.txt", "params.json"]


def test_conversion_reports_every_byte(getkey, tmp_path):
    save(random_model(tiny(), getkey()), tmp_path / "hf")
    seen = []
    convert(tmp_path / "hf", tmp_path / "out", format="mistral", progress=lambda *report: seen.append(report))
    size = sum(tensor.nbytes for tensor in open_checkpoint(tmp_path / "hf").tensors.values())
    assert len(seen) == 3 + 9 * 2
    assert seen[-1] == (size, size)


def test_what_stands_there_is_not_replaced_unasked(getkey, tmp_path):
    first, second = random_model(tiny(), getkey()), random_model(tiny(layers=1, windows=(None,)), getkey())
    (tmp_path / "out").mkdir()
    save(first, tmp_path / "out", max_shard_size="20KB")
    with pytest.raises(ValueError, match=r"The folder '.*out' is not empty; give another path, or allow"):
        save(second, tmp_path / "out")
    assert_same_weights(load(tmp_path / "out"), first)
    save(second, tmp_path / "out", overwrite=True)
    assert_same_weights(load(tmp_path / "out"), second)
    assert listing(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert listing(tmp_path) == ["out"]
    # A checkpoint can be converted onto itself.
    convert(tmp_path / "out", tmp_path / "out", format="mistral", overwrite=True)
    assert_same_weights(load(tmp_path / "out"), second)


def test_other_files_are_never_replaced(getkey, tmp_path):
    model = random_model(tiny(), getkey())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(ValueError, match=r"holds other files than a checkpoint, which would be lost"):
        save(model, tmp_path / "thesis", overwrite=True)
    with pytest.raises(ValueError, match=r"chapter\.txt' is a file, but a checkpoint is written as a folder"):
        save(model, tmp_path / "thesis" / "chapter.txt", overwrite=True)
    assert listing(tmp_path / "thesis") == ["chapter.txt"]


def test_nothing_is_half_written_after_an_error(getkey, tmp_path):
    model = random_model(tiny(), getkey())
    path = write_gguf(tmp_path / "model.gguf", model)
    save(model, tmp_path / "out")

    def fail(done, total):
        raise KeyboardInterrupt

    for target in ("new", "out"):
        with pytest.raises(KeyboardInterrupt):
            convert(path, tmp_path / target, format="mistral", overwrite=True, progress=fail)
    assert listing(tmp_path) == ["model.gguf", "out"]
    assert_same_weights(load(tmp_path / "out"), model)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_nothing_is_half_written_after_a_kill(getkey, tmp_path):
    save(random_model(tiny(), getkey()), tmp_path / "hf")
    program = textwrap.dedent("""
        import os, signal, sys
        from mistral_eqx.checkpoint import convert
        kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if 2 * done > total else None
        convert(sys.argv[1], sys.argv[2], format="mistral", max_shard_size=9000, progress=kill)
    """)
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "hf", tmp_path / "out"], env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert any(name.startswith(".out.partial-") for name in listing(tmp_path))
    convert(tmp_path / "hf", tmp_path / "out", format="mistral")
    load(tmp_path / "out")


def test_a_model_that_is_not_dense_is_refused_by_name(getkey, tmp_path):
    class Halved(DenseWeight.__base__):
        low: jax.Array
        high: jax.Array

        def contract(self, x, in_dims, out_dims):
            raise NotImplementedError

        def rows(self, ids):
            raise NotImplementedError

        @property
        def row_count(self):
            raise NotImplementedError

        def dense(self):
            raise NotImplementedError

        def dims(self, in_dims, out_dims):
            raise NotImplementedError

    model = random_model(tiny(), getkey())
    place = lambda model: model.blocks[1].feed_forward.up_proj.weight  # noqa: E731
    half = Halved(jnp.zeros((32, 32)), jnp.zeros((32, 32)))
    with pytest.raises(ValueError, match=r"no dense weight 'blocks\.1\.feed_forward\.up_proj\.weight\.value'.* merge"):
        save(eqx.tree_at(place, model, half), tmp_path / "out")
    wrong = eqx.tree_at(lambda model: place(model).value, model, jnp.zeros((63, 32)))
    with pytest.raises(ValueError, match=r"up_proj\.weight\.value' is float32 of shape \(63, 32\), but .* \(64, 32\)"):
        save(wrong, tmp_path / "out")
    tied = dataclasses.replace(model, config=tiny(tied=True))
    with pytest.raises(ValueError, match=r"has a weight 'head\.weight\.value', for which a checkpoint has no place"):
        save(tied, tmp_path / "out")
    assert listing(tmp_path) == []


def test_windows_of_several_sizes_need_mistrals_layout(getkey, tmp_path):
    model = random_model(tiny(windows=(4, 9)), getkey())
    with pytest.raises(ValueError, match=r"windows of 4 and 9 positions, but config\.json has a place for one"):
        save(model, tmp_path / "hf")
    assert listing(tmp_path) == []
    save(model, tmp_path / "mistral", format="mistral")
    assert load(tmp_path / "mistral").config == model.config
