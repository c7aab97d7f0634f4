import json
import os
import shutil
import unittest.mock

import equinox as eqx
import pytest
from fixtures.checkpoint import assert_same_weights, edit_json, random_model, tiny, write_gguf

from mistral_eqx.checkpoint import convert, load, open_checkpoint, save
from mistral_eqx.checkpoint.names import layer_specs


@pytest.fixture
def hf(getkey, tmp_path):
    """A folder of Hugging Face with several files of weights."""
    save(random_model(tiny(), getkey()), tmp_path / "hf", max_shard_size="20KB")
    return tmp_path / "hf"


@pytest.fixture
def mistral(getkey, tmp_path):
    """A folder as Mistral releases it, with several files of weights."""
    save(random_model(tiny(), getkey()), tmp_path / "mistral", format="mistral", max_shard_size="20KB")
    return tmp_path / "mistral"


def test_folders_and_files_are_told_apart(hf, mistral, getkey, tmp_path):
    for path, format in ((hf, "hf"), (mistral, "mistral")):
        checkpoint = open_checkpoint(path)
        assert checkpoint.format == format
        assert checkpoint.config == tiny()
        assert checkpoint.dtype.name == "float32"
        assert open_checkpoint(str(path)).tensors.keys() == checkpoint.tensors.keys()
    assert open_checkpoint(hf).metadata["model_type"] == "mistral"
    assert open_checkpoint(mistral).metadata["n_heads"] == 6
    (tmp_path / "gguf").mkdir()
    path = write_gguf(tmp_path / "gguf" / "only.gguf", random_model(tiny(), getkey()))
    assert open_checkpoint(path).format == open_checkpoint(path.parent).format == "gguf"
    # The name does not matter, the content does.
    assert open_checkpoint(path.rename(path.with_name("model"))).format == "gguf"


def test_a_folder_with_both_layouts(hf, tmp_path):
    convert(hf, tmp_path / "release", format="mistral")
    for file in (tmp_path / "release").iterdir():
        shutil.copy(file, hf)
    assert open_checkpoint(hf).format == "hf"
    for file in hf.glob("model*"):
        file.unlink()
    assert open_checkpoint(hf).format == "mistral"


def _with_a_single_file(folder, model):
    save(model, folder.parent / "single")
    shutil.copy(folder.parent / "single" / "model.safetensors", folder)


def _with_stale_shards(folder, model):
    save(model, folder.parent / "stale", max_shard_size="90KB")
    (shard, *_) = (folder.parent / "stale").glob("model-00001-of-*.safetensors")
    shutil.copy(shard, folder)


def _with_a_release(folder, model):
    save(model, folder.parent / "release", format="mistral")
    for file in (folder.parent / "release").iterdir():
        shutil.copy(file, folder)


def _with_a_gguf(folder, model):
    write_gguf(folder / "other.gguf", model)


@pytest.mark.parametrize("add", [_with_a_single_file, _with_stale_shards, _with_a_release, _with_a_gguf])
def test_weights_that_a_folder_holds_twice_must_be_the_same(add, getkey, tmp_path):
    model = random_model(tiny(), getkey())
    save(model, tmp_path / "hf", max_shard_size="20KB")
    add(tmp_path / "hf", model)
    assert_same_weights(load(tmp_path / "hf"), model)
    for folder in tmp_path.iterdir():
        if folder.name != "hf":
            shutil.rmtree(folder)
    table = model.embedding.weight.value
    other = eqx.tree_at(lambda model: model.embedding.weight.value, model, table.at[7, 3].add(1e-3))
    add(tmp_path / "hf", other)
    with pytest.raises(ValueError, match=r"holds weights in '.*index\.json' and in '.*', which differ"):
        load(tmp_path / "hf")


def test_a_single_file_that_replaced_its_shards_is_read(hf, getkey):
    model = random_model(tiny(), getkey())
    for file in hf.glob("model-*"):
        file.unlink()
    _with_a_single_file(hf, model)
    assert_same_weights(load(hf), model)


def test_shards_without_their_index(hf):
    (hf / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"but has only 'model-00001-of-.*', a shard without that index"):
        open_checkpoint(hf)


def test_a_folder_with_adapters_and_a_model(hf):
    (hf / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds adapters \('adapter_config\.json'\) beside a model; .* load_lora"):
        open_checkpoint(hf)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file or folder '.*nowhere'; give the path of a checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"The folder '.*' is empty; give a folder with a model's config and weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has neither a config\.json nor a params\.json nor a \.gguf file"):
        open_checkpoint(tmp_path)
    for name in ("model.safetensors", "config.json", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(ValueError, match=r"is a single file of a checkpoint; give the folder that holds it"):
            open_checkpoint(tmp_path / name)


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds 2 \.gguf files; give the path of one of them"):
        open_checkpoint(tmp_path)


def test_a_config_without_weights(hf, mistral):
    for file in (*hf.glob("model*"), *mistral.glob("consolidated*")):
        file.unlink()
    with pytest.raises(ValueError, match=r"should hold its weights in 'model\.safetensors' .* but has neither of them"):
        open_checkpoint(hf)
    (hf / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"but has only 'pytorch_model\.bin', a pickle, which is not read"):
        open_checkpoint(hf)
    with pytest.raises(ValueError, match=r"has a params\.json but no weights 'consolidated\.safetensors'"):
        open_checkpoint(mistral)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_settings_that_are_no_json_object(hf, mistral, content):
    for file in (hf / "config.json", mistral / "params.json", hf / "model.safetensors.index.json"):
        original = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"'.*{file.name}' (is not valid JSON|is not UTF-8|must hold a)"):
            open_checkpoint(file.parent)
        file.write_bytes(original)


def test_an_index_that_names_an_absent_shard(hf, mistral):
    for folder, index in ((hf, "model.safetensors.index.json"), (mistral, "consolidated.safetensors.index.json")):
        (absent,) = folder.glob("*-00002-of-*")
        absent.unlink()
        with pytest.raises(
            ValueError, match=rf"'.*{index}' names the file '{absent.name}', which is not in its folder"
        ):
            open_checkpoint(folder)
    # Without the index, the numbers in the names still tell.
    (mistral / "consolidated.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=rf"lacks '{absent.name}', one of \d+ files; fetch it too"):
        open_checkpoint(mistral)


def test_an_index_cannot_lead_out_of_its_folder(hf, tmp_path):
    (file, *_) = sorted(hf.glob("model-*"))
    shutil.copy(file, tmp_path / "outside.safetensors")
    index = hf / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=dict.fromkeys(placed, "../outside.safetensors"))
    with pytest.raises(ValueError, match=r"names the file '\.\./outside\.safetensors', which is not in its folder"):
        open_checkpoint(hf)


def test_an_index_that_says_something_else(hf):
    index = hf / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    first = next(iter(placed.values()))
    edit_json(index, weight_map={**placed, "another.weight": first})
    with pytest.raises(ValueError, match=rf"says that '{first}' holds the tensor 'another\.weight', but it does not"):
        open_checkpoint(hf)
    for wrong in (None, {"a": 3}, ["a"]):
        edit_json(index, weight_map=wrong)
        with pytest.raises(ValueError, match=r"has no weight_map from tensors to files"):
            open_checkpoint(hf)
    edit_json(index, weight_map={})
    with pytest.raises(ValueError, match=r"index\.json' has an empty weight_map"):
        open_checkpoint(hf)
    other = next(name for name in placed.values() if name != placed["model.norm.weight"])
    edit_json(index, weight_map={**placed, "model.norm.weight": other})
    with pytest.raises(ValueError, match=rf"says that '{other}' holds the tensor 'model\.norm\.weight', but it"):
        open_checkpoint(hf)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "..", "", "config.json", "a" * 5000 + ".safetensors", "a\0b.safetensors"]
)
def test_an_index_that_names_what_is_no_shard(hf, name):
    index = hf / "model.safetensors.index.json"
    edit_json(index, weight_map={"model.norm.weight": name})
    with pytest.raises(ValueError, match=r"index\.json' names the file '.{,90}, which is not in its folder") as caught:
        open_checkpoint(hf)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "model-00001-of-*"])
def test_what_is_no_file_is_not_opened(hf, file):
    (path,) = hf.glob(file)
    path.unlink()
    os.mkfifo(path)  # which would block whoever opens it
    with pytest.raises(ValueError, match=r"' is a pipe, not a file|names the file '.*', which is not in its folder"):
        open_checkpoint(hf)


def test_layers_are_not_counted_out(hf):
    edit_json(hf / "config.json", num_hidden_layers=9999)
    with (
        unittest.mock.patch("mistral_eqx.checkpoint.source.layer_specs", side_effect=layer_specs) as counted,
        pytest.raises(ValueError, match=r"has no tensor 'model\.layers\.2\.input_layernorm\.weight'"),
    ):
        load(hf)
    assert counted.call_count == 1


@pytest.mark.parametrize("format", ["hf", "mistral", "gguf"])
def test_a_stale_number_of_tokens_is_named(format, getkey, tmp_path):
    model = random_model(tiny(), getkey())
    if format == "gguf":
        path = write_gguf(tmp_path / "model.gguf", model, metadata=[("llama.vocab_size", 70)])
        key = r"llama\.vocab_size"
    else:
        path, key = tmp_path / "model", "vocab_size"
        save(model, path, format=format)
        edit_json(path / {"hf": "config.json", "mistral": "params.json"}[format], vocab_size=70)
    with pytest.raises(ValueError, match=rf"hold 80 tokens and the config's '{key}' is 70: set '{key}' to 80"):
        load(path)


def test_several_files_of_mistral_without_an_index(mistral):
    tensors = open_checkpoint(mistral).tensors.keys()
    (mistral / "consolidated.safetensors.index.json").unlink()
    assert open_checkpoint(mistral).tensors.keys() == tensors
    shutil.copy(next(mistral.glob("*-00001-of-*")), mistral / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"holds the tensor '.*', which another file of that folder holds too"):
        open_checkpoint(mistral)


def test_unsupported_architectures_are_refused_before_the_weights_are_looked_at(hf):
    for file in hf.glob("model*"):
        file.unlink()
    edit_json(hf / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    with pytest.raises(ValueError, match=r"model_type 'qwen2', which is not supported"):
        open_checkpoint(hf)
