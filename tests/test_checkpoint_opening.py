import json
import shutil

import pytest
from checkpoint_fixtures import edit_json, random_model, tiny, write_gguf

from mistral_eqx.checkpoint import open_checkpoint, save


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


def test_a_folder_with_both_layouts(hf, mistral):
    for file in mistral.iterdir():
        shutil.copy(file, hf)
    assert open_checkpoint(hf).format == "hf"
    for file in hf.glob("model*"):
        file.unlink()
    assert open_checkpoint(hf).format == "mistral"


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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_settings_that_are_no_json_object(hf, mistral, content):
    for file in (hf / "config.json", mistral / "params.json", hf / "model.safetensors.index.json"):
        original = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"'.*{file.name}' (is not JSON|must hold a JSON object)"):
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
