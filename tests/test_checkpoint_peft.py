"""Folders of adapters: what is written is read again, and what cannot be read is named."""

import json

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from generation_fixtures import refused
from lora_fixtures import CONFIG, adapted, adapters
from model_fixtures import small_model
from safetensors.numpy import load_file, save_file

import mistral_eqx as mx
from mistral_eqx.checkpoint import peft


MODEL = small_model(config=CONFIG)


@pytest.fixture
def folder(tmp_path):
    mx.save_lora(adapted(MODEL), tmp_path / "adapters")
    return tmp_path / "adapters"


@pytest.fixture
def changed(folder):
    """Writes a folder anew, with other settings or other tensors."""

    def changed(settings=(), tensors=lambda tensors: tensors):
        path = folder / peft.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(settings)))
        save_file(tensors(load_file(folder / peft.WEIGHTS)), folder / peft.WEIGHTS)
        return folder

    return changed


def _equal(found, expected):
    for one, other in zip(adapters(found), adapters(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_written_is_read(folder):
    found, expected = mx.load_lora(MODEL, folder), adapted(MODEL)
    _equal(found, expected)
    (first, other) = (model.blocks[0].attention.q_proj.weight for model in (found, expected))
    assert (first.alpha, first.use_rslora, first.rank) == (other.alpha, other.use_rslora, other.rank)
    assert mx.load_lora(MODEL, folder, dtype=jnp.bfloat16).blocks[0].attention.q_proj.weight.a.value.dtype == "bfloat16"


def test_names_and_order_are_those_of_peft(folder):
    tensors = load_file(folder / peft.WEIGHTS)
    assert len(tensors) == 2 * 7 * CONFIG.layers
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    # Hugging Face has the first entries of a head's pairs before the second ones.
    ours = np.asarray(adapted(MODEL).blocks[1].attention.k_proj.weight.b.value)
    theirs = np.concatenate([ours[:, ::2], ours[:, 1::2]], axis=1).reshape(tensors[name].shape)
    np.testing.assert_array_equal(tensors[name], theirs)


def test_to_and_from_a_mesh(folder, tmp_path):
    split = mx.shard(MODEL, mx.make_mesh({"tp": 2}), mx.HEADS)
    model = mx.load_lora(split, folder)
    _equal(model, adapted(MODEL))
    b = model.blocks[0].attention.q_proj.weight.b.value
    assert b.sharding.shard_shape(b.shape) != b.shape
    mx.save_lora(model, tmp_path / "again")
    for name, tensor in load_file(folder / peft.WEIGHTS).items():
        np.testing.assert_array_equal(tensor, load_file(tmp_path / "again" / peft.WEIGHTS)[name])


def test_nothing_is_half_written(folder, monkeypatch, tmp_path):
    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    before = (folder / peft.WEIGHTS).read_bytes()
    monkeypatch.setattr(peft.safetensors, "write", full)
    with pytest.raises(OSError, match="No space"):
        mx.save_lora(adapted(MODEL), folder, overwrite=True)
    assert (folder / peft.WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


def test_what_stands_there_is_not_lost(folder, tmp_path):
    with refused("not empty", "overwrite"):
        mx.save_lora(adapted(MODEL), folder)
    mx.save_lora(adapted(MODEL, rank=2), folder, overwrite=True)
    assert mx.load_lora(MODEL, folder).blocks[0].attention.q_proj.weight.rank == 2
    # A model whose folder has adapters too.
    mx.save(MODEL, tmp_path / "model")
    (tmp_path / "model" / peft.CONFIG).write_text("{}")
    with refused("would be lost"):
        mx.save_lora(adapted(MODEL), tmp_path / "model", overwrite=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, ["'IA3'", "'LORA'"]),
        ({"bias": "all"}, ["biases", "'all'"]),
        ({"use_dora": True}, ["'use_dora'"]),
        ({"rank_pattern": {"q_proj": 4}}, ["'rank_pattern'"]),
        ({"alpha_pattern": {"q_proj": 4}}, ["'alpha_pattern'"]),
        ({"modules_to_save": ["lm_head"]}, ["'modules_to_save'"]),
        ({"init_lora_weights": "pissa"}, ["'pissa'"]),
        ({"r": "many"}, ["'r'", "'many'"]),
        ({"r": 5}, ["shape", "(5,"]),
    ],
)
def test_settings_that_are_refused(changed, settings, words):
    with refused(*words):
        mx.load_lora(MODEL, changed(settings))


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lambda tensors: {name: x for name, x in tensors.items() if name != NAME}, ["lacks", NAME]),
        (lambda tensors: tensors | {"base_model.model.lm_head.lora_A.other": np.zeros(1, np.float32)}, ["no place"]),
        (lambda tensors: {}, ["no adapters"]),
    ],
)
def test_tensors_that_are_refused(changed, tensors, words):
    with refused(*words):
        mx.load_lora(MODEL, changed(tensors=tensors))


def test_adapters_that_a_folder_cannot_tell(tmp_path):
    twice = mx.apply_lora(adapted(MODEL), rank=3, alpha=5.0, key=jr.key(0))
    mixed = mx.apply_lora(adapted(MODEL, targets=("k_proj",)), rank=2, alpha=5.0, key=jr.key(0))
    table = mx.apply_lora(MODEL, rank=3, alpha=5.0, targets=("embedding",), key=jr.key(0))
    for model, words in (
        (MODEL, ["no adapters"]),
        (twice, ["two adapters"]),
        (mixed, ["differ in rank"]),
        (table, ["embedding"]),
    ):
        with refused(*words):
            mx.save_lora(model, tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()
    with refused("adapter_config.json"):
        mx.load_lora(MODEL, tmp_path)


def test_adapters_that_are_not_finite_are_saved_only_on_request(tmp_path):
    model = adapted(MODEL)
    place = lambda model: model.blocks[2].attention.v_proj.weight.b.value  # noqa: E731
    broken = eqx.tree_at(place, model, place(model).at[0, 0, 0].set(jnp.inf))
    name = r"'base_model\.model\.model\.layers\.2\.self_attn\.v_proj\.lora_B\.weight'"
    with pytest.raises(mx.InputError, match=rf"{name} holds NaN or infinity.*\(allow_nonfinite=True\)\."):
        mx.save_lora(broken, tmp_path / "adapters")
    with pytest.raises(mx.InputError, match=r"'model\.layers\.2\.self_attn\.v_proj\.weight'.* holds NaN or infinity"):
        mx.save(mx.merge_lora(broken), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    mx.save_lora(broken, tmp_path / "adapters", allow_nonfinite=True)
    _equal(mx.load_lora(MODEL, tmp_path / "adapters"), broken)
