import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures.checkpoint import assert_same_weights, random_model, tiny, write_gguf

from mistral_eqx import InputError, interrupts
from mistral_eqx.checkpoint import convert, load, locate, open_checkpoint, save, staging
from mistral_eqx.checkpoint.finite import all_finite
from mistral_eqx.checkpoint.reader import DTYPES
from mistral_eqx.checkpoint.staging import staged
from mistral_eqx.documents import shown
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


@pytest.mark.parametrize("size", ["", "5 parsecs", "-1GB", "0", "GB", "1e3", "0.5", "9" * 31 + "GB", "\u0665KB"])
def test_sizes_that_cannot_be_read(size, getkey, tmp_path):
    with pytest.raises(
        ValueError, match=rf"The size {shown(size)} cannot be read; give bytes, or a number with a unit"
    ):
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
    assert listing(tmp_path) == ["hf", "out"]


def write_old(target):
    with staged(target, overwrite=True) as folder:
        (folder / "config.json").write_text("old")


def write_new(target):
    with staged(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        (folder / "more").write_text("of the new one")


@pytest.fixture(params=["exchange", "renames"])
def way(request, monkeypatch):
    """Both ways to replace a folder: in one step, and in two where the system has none."""
    if request.param == "renames":
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    return request.param


def test_a_folder_is_replaced(way, tmp_path):
    write_old(tmp_path / "out")
    write_new(tmp_path / "out")
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["config.json", "more"]
    write_old(tmp_path / "out")
    assert listing(tmp_path / "out") == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_what_cannot_be_moved_leaves_the_old_one(way, tmp_path, monkeypatch):
    write_old(tmp_path / "out")

    def refuse(self, target):
        raise OSError(errno.EIO, "Input/output error", str(self))

    moved = os.rename

    def refuse_new(self, target):
        refuse(self, target) if self.name == "new" else moved(self, target)

    monkeypatch.setattr("pathlib.Path.rename", refuse_new)
    if way == "exchange":
        monkeypatch.setattr(staging, "exchange", refuse)
    with pytest.raises(InputError, match=r"out' cannot be written: Input/output error; fix that, or give another"):
        write_new(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert listing(tmp_path) == ["out"]


class Killed(BaseException):
    pass


def test_the_next_start_puts_back_what_a_kill_between_two_renames_took_away(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    moved = os.rename

    def kill(self, target):
        if self.name == "new":
            raise Killed
        moved(self, target)

    for again in (locate, write_new):
        write_old(tmp_path / "out")
        with monkeypatch.context() as patches:
            patches.setattr("pathlib.Path.rename", kill)
            # A process that is killed removes nothing.
            patches.setattr(staging, "_remove", lambda hidden: None)
            with pytest.raises(Killed):
                write_new(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        again(tmp_path / "out")
        assert (tmp_path / "out" / "config.json").read_text() == ("old" if again is locate else "new")
        assert listing(tmp_path) == ["out"]


def test_only_what_dead_processes_left_behind_is_removed(tmp_path):
    mine = tmp_path / ".out.partial-0123abcd"
    mine.mkdir()
    (mine / "thesis.txt").write_text("words")
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text("the first")
        # The first one lives; and another name is another target.
        write_new(tmp_path / "out")
        write_old(tmp_path / "out.partial")
        assert (folder / "config.json").read_text() == "the first"
        (tmp_path / "out" / "config.json").unlink()
        (tmp_path / "out" / "more").unlink()
    assert (tmp_path / "out" / "config.json").read_text() == "the first"
    assert listing(tmp_path) == [mine.name, "out", "out.partial"]
    (tmp_path / ".out.partial-00000000").mkdir()
    write_new(tmp_path / "out")
    assert listing(tmp_path) == [mine.name, "out", "out.partial"]
    assert (mine / "thesis.txt").read_text() == "words"


def test_what_comes_there_in_the_last_moment_is_not_lost(tmp_path, monkeypatch):
    write_old(tmp_path / "out")
    swap = staging.exchange

    def swap_late(first, second):
        monkeypatch.setattr(staging, "exchange", swap)
        (second / "config.json").unlink()
        (second / "thesis.txt").write_text("words")
        return swap(first, second)

    monkeypatch.setattr(staging, "exchange", swap_late)
    with pytest.raises(InputError, match="holds other files than a checkpoint"):
        write_new(tmp_path / "out")
    assert listing(tmp_path / "out") == ["thesis.txt"]
    with staged(tmp_path / "unasked") as folder:
        (folder / "config.json").write_text("new")
        write_old(tmp_path / "unasked")
        with pytest.raises(InputError, match=r"is not empty; give another path, or allow it to be replaced"):
            staging._move(folder.parent, tmp_path / "unasked", False, "checkpoint")
        (tmp_path / "unasked" / "config.json").unlink()
    assert (tmp_path / "unasked" / "config.json").read_text() == "new"


def test_of_two_that_write_one_target_one_is_there_as_a_whole(way, tmp_path, monkeypatch):
    # Within one process they would wait for each other.
    monkeypatch.setattr(interrupts, "held", contextlib.nullcontext)
    write_old(tmp_path / "out")

    def several(write):
        for _ in range(30):
            write(tmp_path / "out")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(several, write) for write in (write_old, write_new)]:
            done.result()
    assert listing(tmp_path) == ["out"]
    text = (tmp_path / "out" / "config.json").read_text()
    assert listing(tmp_path / "out") == {"old": ["config.json"], "new": ["config.json", "more"]}[text]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of Unix")
@pytest.mark.parametrize(("limit", "file"), [(10, "config.json"), (20_000, "model.safetensors")])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(getkey, tmp_path, limit, file):
    import resource

    model = random_model(tiny(), getkey())
    save(model, tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for target in ("out", "new"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(InputError) as caught:
                save(random_model(tiny(), getkey()), tmp_path / target, overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(caught.value).startswith(
            f"{str(tmp_path / target / file)!r} cannot be written: File too large; free"
        )
        assert caught.value.file == str(tmp_path / target / file)
    assert listing(tmp_path) == ["out"]
    assert_same_weights(load(tmp_path / "out"), model)


@pytest.mark.parametrize("path", ["file/out", "a" * 300, "nul\0byte", "~nobody-of-that-name/out", "/proc/out"])
def test_a_place_that_cannot_be_written(getkey, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(random_model(tiny(), getkey()), path)
    assert listing(tmp_path) == ["file"]


def test_folders_above_are_made_and_taken_away_with_what_failed(tmp_path):
    with pytest.raises(Killed), staged(tmp_path / "a" / "b" / "out"):
        raise Killed
    assert listing(tmp_path) == []
    write_new(tmp_path / "a" / "b" / "out")
    assert listing(tmp_path / "a" / "b") == ["out"]


NAME = "model.layers.1.post_attention_layernorm.weight"


def with_norm(model, number):
    place = lambda model: model.blocks[1].feed_forward_norm.weight  # noqa: E731
    return eqx.tree_at(place, model, place(model).at[3].set(number))


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite_are_saved_only_on_request(getkey, tmp_path, dtype, number):
    model = with_norm(random_model(tiny(), getkey(), jnp.dtype(dtype)), number)
    with pytest.raises(InputError, match=rf"{NAME}.* NaN or infinity, so nothing was saved; .*allow_nonfinite=True"):
        save(model, tmp_path / "out")
    assert listing(tmp_path) == []
    save(model, tmp_path / "out", allow_nonfinite=True)
    assert_same_weights(load(tmp_path / "out"), model)
    with pytest.raises(
        InputError, match=rf"{NAME}.*out' holds NaN or infinity.*; fetch it again, or .*allow_nonfinite"
    ):
        convert(tmp_path / "out", tmp_path / "again", format="mistral")
    assert listing(tmp_path) == ["out"]
    convert(tmp_path / "out", tmp_path / "again", format="mistral", allow_nonfinite=True)
    assert_same_weights(load(tmp_path / "again"), model)


def test_a_number_that_the_dtype_cannot_hold_is_not_written(getkey, tmp_path):
    model = with_norm(random_model(tiny(), getkey()), 65520.0)
    save(model, tmp_path / "out")
    with pytest.raises(InputError, match=rf"{NAME}.* has numbers that float16 cannot hold, .*; choose another dtype"):
        convert(tmp_path / "out", tmp_path / "half", format="hf", dtype="float16")
    assert listing(tmp_path) == ["out"]
    convert(tmp_path / "out", tmp_path / "half", format="hf", dtype="bfloat16")
    # Just below, float16 rounds to its largest number.
    save(with_norm(model, 65519.0), tmp_path / "below")
    convert(tmp_path / "below", tmp_path / "half", format="hf", dtype="float16", overwrite=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.slow
def test_every_number_is_finite_or_not_as_numpy_has_it(dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = bits.view(dtype) if dtype.itemsize == 2 else (bits.astype(np.uint32) << 16).view(dtype)
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(numbers.astype(np.float64))
    assert [all_finite(numbers[at : at + 1]) for at in range(2**16)] == expected.tolist()
    assert all_finite(numbers[expected].reshape(2, -1))
    assert not all_finite(numbers.reshape(4, -1))
    assert all_finite(numbers[:0])


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
    with pytest.raises(ValueError, match=r"no dense weight 'blocks\.1\.feed_forward\.up_proj'.* merge"):
        save(eqx.tree_at(place, model, half), tmp_path / "out")
    wrong = eqx.tree_at(lambda model: place(model).value, model, jnp.zeros((63, 32)))
    with pytest.raises(ValueError, match=r"up_proj' is float32 of shape \(63, 32\), but .* \(64, 32\)"):
        save(wrong, tmp_path / "out")
    tied = dataclasses.replace(model, config=tiny(tied=True))
    with pytest.raises(ValueError, match=r"has a weight 'head', which a checkpoint cannot store"):
        save(tied, tmp_path / "out")
    assert listing(tmp_path) == []


def test_windows_of_several_sizes_need_mistrals_layout(getkey, tmp_path):
    model = random_model(tiny(windows=(4, 9)), getkey())
    with pytest.raises(ValueError, match=r"windows of 4 and 9 positions, but config\.json can hold only one"):
        save(model, tmp_path / "hf")
    assert listing(tmp_path) == []
    save(model, tmp_path / "mistral", format="mistral")
    assert load(tmp_path / "mistral").config == model.config
