import json
import shutil

import pytest
from fixtures.cli import assert_refused, run, save_tiny_model

import mistral_eqx as mx
from mistral_eqx.presets import PRESETS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def test_json_tells_everything(tiny):
    result = run("inspect", tiny, "--json")
    assert result.exit_code == 0, result.stderr
    description = json.loads(result.stdout)
    config = mx.load(tiny).config
    assert description["format"] == "hf"
    assert description["path"] == str(tiny)
    assert description["parameters"] == config.parameters
    assert description["config"]["q_per_kv"] == 2
    assert description["config"]["windows"] == [None, None]
    assert description["bytes"] == 4 * config.parameters
    assert description["stored"] == {
        "F32": {"tensors": 21, "numbers": config.parameters, "bytes": 4 * config.parameters}
    }
    assert len(description["tensors"]) == 21
    assert {"name": "model.norm.weight", "shape": [16], "stored": "F32", "bytes": 64} in description["tensors"]


def test_tables_are_for_people_and_are_not_cut_in_a_pipe(tiny):
    result = run("inspect", tiny)
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "model.layers.1.post_attention_layernorm.weight 16 F32 64" in lines
    assert "windows all positions" in lines
    assert f"path: {tiny}" in lines


def test_no_weights_are_read(tiny, monkeypatch):
    from mistral_eqx.checkpoint import LazyTensor

    monkeypatch.setattr(LazyTensor, "__getitem__", lambda *args: pytest.fail("a tensor was read"))
    assert run("inspect", tiny).exit_code == 0


@pytest.mark.parametrize("name", ["[bold][/red]x", "\x1b[2Jx", "\ud800", "", "a\0b", "x" * 10**6, "a\nb"])
def test_names_that_are_no_text(name, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    entries[name] = entries.pop("model.norm.weight")
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    result = run("inspect", folder)
    # It is shown as it is, or escaped and cut, and then refused.
    assert result.exit_code == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert "has no tensor 'model.norm.weight'" in line
    assert len(line) < 1000
    shown = name if name.startswith("[") else ascii(name)[1:-1][:100]
    assert any(shown in line for line in result.stdout.splitlines())
    assert len(result.stdout) < 20_000
    assert result.stdout.replace("\n", "").isprintable()
    tensors = json.loads(run("inspect", folder, "--json").stdout)["tensors"]
    assert name in {tensor["name"] for tensor in tensors}


def test_a_preset_without_weights_has_a_config_and_a_count(tmp_path, monkeypatch):
    description = json.loads(run("inspect", "7b-v0.1", "--json").stdout)
    assert description["preset"] == "7b-v0.1"
    assert description["parameters"] == PRESETS["7b-v0.1"].parameters == 7_241_732_096
    assert "7,241,732,096 (7.24 billion)" in run("inspect", "7b-v0.1").stdout
    assert "all positions in 9 layers, 32768 in 27 layers" in run("inspect", "ministral-8b").stdout


def test_bad_names_are_one_sentence(tmp_path):
    assert_refused(run("inspect", tmp_path / "absent"), str(tmp_path / "absent"))
    assert_refused(run("inspect", tmp_path), str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert_refused(run("inspect", tmp_path / "model.gguf"), "model.gguf")
