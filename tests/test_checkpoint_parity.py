"""Checkpoints against transformers: what it writes is loaded, what is saved it loads, and the logits agree."""

import copy

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.checkpoint import assert_same_weights, random_model, tiny, weights

from mistral_eqx.checkpoint import convert, hf, load, save
from mistral_eqx.checkpoint.names import layer_specs


pytestmark = pytest.mark.parity

VARIANTS = {
    "three queries a head": {},
    "one query a head": {"kv_heads": 4, "q_per_kv": 1, "head_dim": 8},
    "four queries a head": {"kv_heads": 1, "q_per_kv": 4},
    "tied": {"tied": True},
    "window": {"windows": (7, 7)},
    "alternating windows": {"windows": (None, 7)},
    "other constants": {"rope_theta": 1e6, "norm_eps": 1e-3, "eos_ids": (2, 3), "bos_id": None},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request, getkey):
    return random_model(tiny(**request.param), getkey())


def assert_same_logits(theirs, model):
    """Compares at every position, relative to the largest logit; theirs in float64, which errs less than ours."""
    import torch

    ids = np.random.default_rng(0).integers(0, model.config.vocab, size=(2, 40))
    with torch.no_grad():
        expected = copy.deepcopy(theirs).double()(torch.from_numpy(ids)).logits.numpy()
    found = eqx.filter_jit(model)(jnp.asarray(ids, jnp.int32))
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def from_pretrained(path, dtype="float32"):
    """The model of transformers with nothing missing and nothing left over."""
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return theirs


def test_transformers_loads_what_is_saved(model, tmp_path):
    save(model, tmp_path / "hf", max_shard_size="20KB")
    theirs = from_pretrained(tmp_path / "hf")
    assert theirs.dtype.itemsize == 4
    assert theirs.generation_config.eos_token_id == (hf.write_config(model.config)["eos_token_id"])
    assert_same_logits(theirs, model)


def test_transformers_loads_what_is_converted(model, tmp_path):
    save(model, tmp_path / "mistral", format="mistral")
    convert(tmp_path / "mistral", tmp_path / "hf", format="hf")
    assert_same_logits(from_pretrained(tmp_path / "hf"), model)


def test_what_transformers_saves_is_loaded(model, tmp_path):
    save(model, tmp_path / "ours")
    theirs = from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    loaded = load(tmp_path / "theirs")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_travel_bit_for_bit(dtype, getkey, tmp_path):
    torch = pytest.importorskip("torch")
    model = random_model(tiny(), getkey(), jnp.dtype(dtype))
    save(model, tmp_path / "ours")
    theirs = from_pretrained(tmp_path / "ours", dtype="auto")
    assert str(theirs.dtype) == f"torch.{dtype}"
    table = theirs.model.embed_tokens.weight.detach().view(torch.int16).numpy()
    assert table.tobytes() == weights(model)["embedding"].tobytes()
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_weights(load(tmp_path / "theirs"), model)


def test_a_llama_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(settings).eval()
    theirs.save_pretrained(tmp_path / "llama")
    model = load(tmp_path / "llama")
    assert model.config == hf.read_config(settings.to_dict())
    assert_same_logits(theirs, model)


def test_transformers_knows_every_name_of_the_table(getkey, tmp_path):
    for tied in (False, True):
        config = tiny(tied=tied)
        save(random_model(config, getkey()), tmp_path / f"{tied}")
        theirs = from_pretrained(tmp_path / f"{tied}")
        expected = {name: tuple(value.shape) for name, value in theirs.named_parameters()}
        assert {spec.name("hf"): spec.file_shape(config) for spec in layer_specs(config)} == expected
