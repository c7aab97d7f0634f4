"""Folders of adapters: what is written is read again, and what cannot be read is named."""

import dataclasses
import json

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.lora import CONFIG, adapted, adapters
from fixtures.model import small_model
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
        ({"modules_to_save": ["lm_head"]}, ["'modules_to_save'", "lacks the tensor 'base_model.model.lm_head.weight'"]),
        ({"modules_to_save": ["score"]}, ["'modules_to_save'", "'score'"]),
        ({"modules_to_save": "lm_head"}, ["'modules_to_save'", "'lm_head'"]),
        ({"init_lora_weights": "pissa"}, ["'pissa'"]),
        ({"r": "many"}, ["'r'", "'many'"]),
        ({"r": 5}, ["shape", "(5,"]),
        ({"r": True}, ["'r'", "True"]),
        ({"r": 0}, ["'r'", "at least 1"]),
        ({"lora_alpha": 0}, ["'lora_alpha'", "greater than 0"]),
        ({"lora_alpha": -1.5}, ["'lora_alpha'", "-1.5"]),
        ({"lora_alpha": True}, ["'lora_alpha'", "True"]),
        ({"lora_alpha": 10**400}, ["'lora_alpha'", "finite"]),
        ({"lora_alpha": float("nan")}, ["adapter_config.json", "NaN is not a JSON number"]),
        ({"lora_dropout": 1}, ["'lora_dropout'", "less than 1"]),
        ({"use_rslora": "x"}, ["'use_rslora'", "'x'", "true or false"]),
        ({"use_rslora": 1}, ["'use_rslora'", "true or false"]),
        ({"init_lora_weights": 0}, ["'init_lora_weights'", "is 0"]),
        ({"rank_pattern": 0}, ["'rank_pattern'"]),
        ({"target_modules": 5}, ["'target_modules'", "is 5"]),
        ({"target_modules": [1]}, ["'target_modules'", "its entry 0"]),
        ({"target_modules": ["q_proj"]}, ["'target_modules'", "layers.0.self_attn.k_proj"]),
        ({"target_modules": "x"}, ["'target_modules'", "'x'"]),
        ({"base_model_name_or_path": 5}, ["'base_model_name_or_path'", "is 5"]),
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
        (
            lambda tensors: tensors | {"base_model.model.lm_head.lora_A.other": np.zeros(1, np.float32)},
            ["base_model.model.lm_head.lora_A.other", "the model does not have"],
        ),
        (lambda tensors: {}, ["no adapters"]),
    ],
)
def test_tensors_that_are_refused(changed, tensors, words):
    with refused(*words):
        mx.load_lora(MODEL, changed(tensors=tensors))


HEAD = "base_model.model.lm_head"
TABLE = np.random.default_rng(0).normal(size=(CONFIG.vocab, CONFIG.embed)).astype(np.float32)


@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.(q|k|v|o|gate|up|down)_proj"])
def test_targets_that_fit(changed, targets):
    _equal(mx.load_lora(MODEL, changed({"target_modules": targets})), adapted(MODEL))


@pytest.mark.parametrize(("name", "path"), [(HEAD, "head"), ("base_model.model.model.embed_tokens", "embedding")])
def test_tables_that_were_trained_as_a_whole(changed, name, path, tmp_path):
    module = name.rsplit(".", 1)[-1]
    folder = changed({"modules_to_save": [module]}, lambda tensors: tensors | {f"{name}.weight": TABLE})
    model = mx.load_lora(MODEL, folder)
    np.testing.assert_array_equal(getattr(mx.merge_lora(model), path).weight.value, TABLE)
    _equal(mx.load_lora(MODEL, folder), adapted(MODEL))
    # The other table is the model's.
    other = "head" if path == "embedding" else "embedding"
    np.testing.assert_array_equal(getattr(model, other).weight.value, getattr(MODEL, other).weight.value)
    with refused(path, "trained as a whole"):
        mx.save_lora(model, tmp_path / "again")
    with refused(f"{name}.weight", "(65,"):
        mx.load_lora(
            MODEL, changed({}, lambda tensors: tensors | {f"{name}.weight": np.resize(TABLE, (65, CONFIG.embed))})
        )


@pytest.mark.parametrize("own", [True, False])
def test_the_table_under_an_adapter_of_its_own(own, tmp_path):
    """Where `lm_head` is a target, PEFT saves the head itself too, and the embedding table."""
    targets = ("q_proj", "head")
    mx.save_lora(adapted(MODEL, targets=targets), tmp_path / "adapters")
    weights = tmp_path / "adapters" / peft.WEIGHTS
    head = np.asarray(MODEL.head.weight.value) if own else TABLE
    embedding = np.asarray(MODEL.embedding.weight.value)
    more = {f"{HEAD}.base_layer.weight": head, "base_model.model.model.embed_tokens.weight": embedding}
    save_file(load_file(weights) | more, weights)
    model = mx.load_lora(MODEL, tmp_path / "adapters")
    _equal(model, adapted(MODEL, targets=targets))
    np.testing.assert_array_equal(model.head.weight.base.dense(), head)
    if own:  # nothing was trained but adapters
        mx.save_lora(model, tmp_path / "again")
    else:
        with refused("head", "trained as a whole"):
            mx.save_lora(model, tmp_path / "again")


def test_tables_of_a_tied_model(tmp_path):
    config = dataclasses.replace(CONFIG, tied=True)
    tied = small_model(config=config)
    mx.save_lora(adapted(tied), tmp_path / "adapters")
    weights = tmp_path / "adapters" / peft.WEIGHTS
    embed = "base_model.model.model.embed_tokens.weight"
    plain = load_file(weights)
    save_file(plain | {embed: TABLE, f"{HEAD}.weight": TABLE}, weights)
    np.testing.assert_array_equal(
        mx.merge_lora(mx.load_lora(tied, tmp_path / "adapters")).embedding.weight.value, TABLE
    )
    for tables in ({f"{HEAD}.weight": TABLE}, {embed: TABLE, f"{HEAD}.weight": TABLE + 1}):
        save_file(plain | tables, weights)
        with refused("lm_head.weight", "the head is the embedding table"):
            mx.load_lora(tied, tmp_path / "adapters")


@pytest.mark.parity
def test_a_pickle_beside_the_weights(folder):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in load_file(folder / peft.WEIGHTS).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    _equal(mx.load_lora(MODEL, folder), adapted(MODEL))
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / "adapter_model.bin")
    with refused("'adapter_model.safetensors' and in 'adapter_model.bin'", "differ"):
        mx.load_lora(MODEL, folder)


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
