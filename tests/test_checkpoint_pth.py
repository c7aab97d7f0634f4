import json
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.checkpoint import assert_same_weights, random_model, tiny, weights

from mistral_eqx.checkpoint import convert, load, mistral, open_checkpoint
from mistral_eqx.checkpoint.names import layer_specs
from mistral_eqx.parallel import Strategy


def to_torch(torch, array):
    """A tensor of torch with the same bits, bfloat16 included."""
    bits = np.ascontiguousarray(array).view({2: np.int16, 4: np.int32}[array.itemsize])
    return torch.from_numpy(bits.copy()).view(getattr(torch, array.dtype.name))


def state(torch, model):
    """The tensors of a release, by Mistral's names."""
    arrays, config = weights(model), model.config
    return {
        spec.name("mistral"): to_torch(torch, arrays[spec.path].reshape(spec.file_shape(config)))
        for spec in layer_specs(config)
    }


def release(folder, config):
    """A folder with the settings of a release, and the weights still missing."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(mistral.write_config(config)))
    return folder


def assert_shards_are_those_of(model, folder):
    """Checks a split of every dimension; of columns too, within a file and across files."""
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2])
    for layout in ("kv_heads@tp hidden@tp vocab@tp", "head_dim@tp hidden@tp vocab@tp", "embed@tp"):
        loaded = load(folder, mesh=mesh, strategy=Strategy(layout))
        assert loaded.strategy.layout == layout
        assert_same_weights(loaded, model)


def test_without_torch_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    folder = release(tmp_path / "release", tiny())
    (folder / "consolidated.00.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"torch, which is not installed; run pip install 'mistral-eqx\[torch\]'"):
        open_checkpoint(folder)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_one_file(dtype, getkey, tmp_path):
    torch = pytest.importorskip("torch")
    model = random_model(tiny(), getkey(), dtype)
    folder = release(tmp_path / "release", model.config)
    tensors = {**state(torch, model), "rope.freqs": torch.ones(8)}
    torch.save(tensors, folder / "consolidated.00.pth")
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.dtype) == ("mistral", np.dtype(dtype))
    assert_same_weights(load(folder), model)
    part = checkpoint.tensors["layers.0.attention.wq.weight"][5:9, 2:4]
    expected = weights(model)["blocks.0.attention.q_proj"].reshape(96, 32)[5:9, 2:4]
    assert part.tobytes() == expected.tobytes()
    convert(folder, tmp_path / "hf", format="hf")
    assert_same_weights(load(tmp_path / "hf"), model)
    assert_shards_are_those_of(model, folder)


@pytest.mark.parity
def test_files_with_tensors_of_their_own(getkey, tmp_path):
    torch = pytest.importorskip("torch")
    model = random_model(tiny(), getkey())
    folder = release(tmp_path / "release", model.config)
    tensors = list(state(torch, model).items())
    torch.save(dict(tensors[:9]), folder / "consolidated.00.pth")
    torch.save(dict(tensors[9:]), folder / "consolidated.01.pth")
    assert_same_weights(load(folder), model)


@pytest.mark.parity
def test_files_of_a_tensor_parallel_run(getkey, tmp_path):
    torch = pytest.importorskip("torch")
    model = random_model(tiny(), getkey())
    folder = release(tmp_path / "release", model.config)
    columns = ("attention.wo.weight", "feed_forward.w2.weight", "tok_embeddings.weight")
    for rank in range(2):
        part = {
            name: tensor if tensor.ndim == 1 else tensor.chunk(2, dim=int(name.endswith(columns)))[rank].clone()
            for name, tensor in state(torch, model).items()
        }
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    assert_same_weights(load(folder), model)
    assert_shards_are_those_of(model, folder)
    wo = open_checkpoint(folder).tensors["layers.0.attention.wo.weight"]
    assert (wo.shape, wo.nbytes) == ((32, 96), 4 * 32 * 96)
    wq = open_checkpoint(folder).tensors["layers.0.attention.wq.weight"]
    assert np.array_equal(wq[40:60], state(torch, model)["layers.0.attention.wq.weight"].numpy()[40:60])
    torch.save({"layers.0.attention.wq.weight": torch.ones(7, 32)}, folder / "consolidated.02.pth")
    with pytest.raises(ValueError, match=r"shards of the tensor 'layers\.0\.attention\.wq\.weight' .* do not make up"):
        load(folder)


@pytest.mark.parity
def test_what_is_no_mapping_of_tensors_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    folder = release(tmp_path / "release", tiny())
    file = folder / "consolidated.00.pth"
    for content in (b"", b"garbage", b"PK\3\4 garbage"):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"consolidated\.00\.pth' cannot be read as weights of torch \(.*\); fetch"
        ):
            load(folder)
    torch.save([torch.ones(2)], file)
    with pytest.raises(ValueError, match=r"does not hold a mapping from names to tensors"):
        load(folder)
    torch.save({"norm.weight": torch.ones(2, dtype=torch.int64)}, file)
    with pytest.raises(ValueError, match=r"tensor 'norm\.weight' of .* has the dtype torch\.int64, which is not supp"):
        load(folder)
    torch.save({"norm.weight": torch.ones(32)}, file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot be read as weights of torch"):
        load(folder)


def _rewritten(path, change):
    """Writes the zip archive anew, each record's bytes, or `None` for no such record, as `change` gives them."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if (changed := change(name.partition("/")[2], content)) is not None:
                archive.writestr(name, changed)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("change", "words"),
    [
        # Torch reads past the end of a record that is too short, into the next one or to the end of the file.
        (lambda name, content: content[:-4] if name == "data/0" else content, "its records differ from its tensors"),
        (lambda name, content: content[:8] if name == "data/1" else content, "its records differ from its tensors"),
        (
            lambda name, content: content + bytes(64) if name == "data/0" else content,
            "its records differ from its tensors",
        ),
        (lambda name, content: None if name == "data/1" else content, "cannot be read as weights of torch"),
        (lambda name, content: None if name == "data.pkl" else content, "cannot be read as weights of torch"),
        (lambda name, content: content[:-9] if name == "data.pkl" else content, "cannot be read as weights of torch"),
        (lambda name, content: b"]q\x00." if name == "data.pkl" else content, "does not hold a mapping"),
        (
            lambda name, content: b"c__builtin__\nexit\n)R." if name == "data.pkl" else content,
            "Weights only load failed",
        ),
        (lambda name, content: b"r\xff\xff\xff\xff." if name == "data.pkl" else content, "cannot be read as weights"),
    ],
)
def test_records_that_are_not_those_of_the_tensors(change, words, tmp_path):
    torch = pytest.importorskip("torch")
    folder = release(tmp_path / "release", tiny())
    file = folder / "consolidated.00.pth"
    torch.save({"one.weight": torch.ones(3, 5), "two.weight": torch.ones(7)}, file)
    _rewritten(file, lambda name, content: content)
    assert {name: tensor[...].sum() for name, tensor in open_checkpoint(folder).tensors.items()} == {
        "one.weight": 15,
        "two.weight": 7,
    }
    _rewritten(file, change)
    with pytest.raises(ValueError, match=rf"consolidated\.00\.pth'.*{words}"):
        open_checkpoint(folder)


@pytest.mark.parity
def test_a_compressed_archive_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    folder = release(tmp_path / "release", tiny())
    file = folder / "consolidated.00.pth"
    torch.save({"one.weight": torch.ones(300)}, file)
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"the record 'consolidated\.00/data\.pkl' is compressed"):
        open_checkpoint(folder)


@pytest.mark.parity
def test_tensors_of_other_kinds_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    folder = release(tmp_path / "release", tiny())
    file = folder / "consolidated.00.pth"
    for wrong in (
        torch.ones(4, 6).T,
        torch.ones(1).expand(10**9, 10**9),
        torch.ones(4, 6)[:, :3],
        torch.eye(3).to_sparse(),
        torch.ones(3, device="meta"),
    ):
        torch.save({"norm.weight": wrong}, file)
        with pytest.raises(
            ValueError, match=r"tensor 'norm\.weight' of '.*' is not a dense contiguous tensor|cannot be read as"
        ):
            open_checkpoint(folder)
    torch.save({3: torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"does not hold a mapping from names to tensors"):
        open_checkpoint(folder)
    # Views of one storage, a parameter and nothing at all are fine.
    both = torch.arange(12.0).reshape(4, 3)
    torch.save({"a": both[:2], "b": both[2:], "c": torch.nn.Parameter(torch.ones(2)), "d": torch.ones(0, 3)}, file)
    tensors = open_checkpoint(folder).tensors
    np.testing.assert_array_equal(tensors["b"][...], both[2:].numpy())
    np.testing.assert_array_equal(tensors["c"][...], [1, 1])
    assert tensors["d"][...].shape == (0, 3)


@pytest.mark.parity
def test_files_of_different_models(getkey, tmp_path):
    torch = pytest.importorskip("torch")
    model, other = (random_model(tiny(), getkey()) for _ in range(2))
    folder = release(tmp_path / "release", model.config)
    for number, one in enumerate((model, other)):
        torch.save(state(torch, one), folder / f"consolidated.{number:02}.pth")
    with pytest.raises(
        ValueError, match=r"'tok_embeddings\.weight' is whole in 'consolidated\.00\.pth' and in a file after"
    ):
        open_checkpoint(folder)
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(ValueError, match=r"holds 'consolidated\.02\.pth' but lacks 'consolidated\.01\.pth'"):
        open_checkpoint(folder)
    (folder / "consolidated.02.pth").unlink()
    assert_same_weights(load(folder), model)
    convert(folder, tmp_path / "safetensors", format="mistral")
    file = tmp_path / "safetensors" / "consolidated.safetensors"
    file.rename(folder / file.name)
    assert_same_weights(load(folder), model)
    torch.save(state(torch, other), folder / "consolidated.00.pth")
    with pytest.raises(
        ValueError, match=r"in 'consolidated\.safetensors' and in 'consolidated\.00\.pth', which differ"
    ):
        open_checkpoint(folder)


class Payload:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return (open, ("/nonexistent/never-written", "w"))


@pytest.mark.parity
def test_code_in_a_pickle_is_never_run(tmp_path):
    torch = pytest.importorskip("torch")
    folder = release(tmp_path / "release", tiny())
    torch.save({"norm.weight": Payload()}, folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"cannot be read as weights of torch \(Weights only load failed"):
        load(folder)


@pytest.mark.parity
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_trap_a_whole_torch_model_in_memory(getkey, tmp_path):
    torch = pytest.importorskip("torch")
    folder = release(tmp_path / "release", tiny(vocab=2**19))
    table = torch.ones(2**19, 32)
    torch.save({"tok_embeddings.weight": table}, folder / "consolidated.00.pth")
    del table
    tensor = open_checkpoint(folder).tensors["tok_embeddings.weight"]
    before, worst = _resident(), 0
    for start in range(0, tensor.shape[0], 2**14):
        assert tensor.rows(start, start + 2**14).all()
        worst = max(worst, _resident())
    # 64 MB were read, 2 MB at a time; what was read does not stay.
    assert worst - before < 16 * 2**20


def _resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
