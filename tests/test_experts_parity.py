"""Mixtral as transformers computes it, and llama.cpp: logits, tokens, gradients and files, on small random models."""

import dataclasses
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import FLOAT32_TOLERANCE, empty_cache, relative_error, run, run_in_pieces, small_model
from fixtures.text import tiny as vocabularies
from safetensors.numpy import load_file, save_file

import mistral_eqx as mx


pytestmark = pytest.mark.parity

# Experts, experts per token, and other settings of transformers; 3 experts are not divided by 2 devices.
VARIANTS = {
    "8 of which 2": (8, 2, {}),
    "3 of which 1, tied": (3, 1, {"tie_word_embeddings": True}),
    "5 of which 5, wide heads": (5, 5, {"head_dim": 16}),
    "4 of which 3, one key/value head": (4, 3, {"num_key_value_heads": 1}),
}
VOCAB = 96


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="module", params=VARIANTS)
def theirs(request, torch):
    transformers = pytest.importorskip("transformers")
    from fixtures.make_models import drawn

    experts, per_token, more = VARIANTS[request.param]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "num_local_experts": experts,
        "num_experts_per_tok": per_token,
        **more,
    }
    config = transformers.MixtralConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return drawn(model, np.random.default_rng(len(request.param)))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return mx.load(folder)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(7).integers(0, VOCAB, 40)


def logits_of(theirs, ids):
    from fixtures import make_models

    return make_models.logits_of(theirs, ids)


def test_logits_at_every_position_cached_and_not(theirs, ours, torch, ids):
    expected, row = logits_of(theirs, ids), ids.astype(np.int32)[None]
    assert relative_error(run(ours, row)[0][0], expected) < FLOAT32_TOLERANCE
    logits, _ = run_in_pieces(ours, row, (20, *(1,) * 20), empty_cache(ours, 1, 44))
    assert relative_error(logits[0], expected) < FLOAT32_TOLERANCE


def test_64_greedy_tokens(theirs, ours, torch, ids):
    import transformers

    theirs.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    row = torch.from_numpy(ids[:9])[None]
    expected = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=64)[0, 9:].tolist()
    assert mx.generate(ours, [ids[:9].tolist()], max_new_tokens=64, eos_id=()).tokens[0].tolist() == expected


def test_gradients(theirs, ours, torch, ids):
    tokens = torch.from_numpy(ids)[None]
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(theirs(tokens).logits[0, :-1], tokens[0, 1:]).backward()
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}

    @eqx.filter_jit
    @eqx.filter_grad
    def gradients(model):
        log_probs = jax.nn.log_softmax(model(jnp.asarray(ids[None, :-1], jnp.int32))[0])
        return -jnp.mean(jnp.take_along_axis(log_probs, jnp.asarray(ids[1:, None]), axis=1))

    found = gradients(ours)
    for layer, block in enumerate(found.blocks):
        prefix, layers = f"model.layers.{layer}.", block.feed_forward
        gate, up = np.split(expected[f"{prefix}mlp.experts.gate_up_proj"], 2, axis=1)
        for one, other in (
            (layers.router, expected[f"{prefix}mlp.gate.weight"]),
            (layers.gate_proj, gate),
            (layers.up_proj, up),
            (layers.down_proj, expected[f"{prefix}mlp.experts.down_proj"]),
            (block.attention.v_proj, expected[f"{prefix}self_attn.v_proj.weight"]),
        ):
            own = np.asarray(one.weight.value).reshape(other.shape)
            if one is layers.router and ours.config.routing.per_token == 1:
                # The share of the only expert is 1, whatever its score: the gradient is zero but for rounding.
                assert max(abs(own).max(), abs(other).max()) < FLOAT32_TOLERANCE * abs(gate).max()
                continue
            # Float32's errors in two layers forward and back; logits have FLOAT32_TOLERANCE for the way forward.
            assert relative_error(own, other) < 2 * FLOAT32_TOLERANCE, (layer, type(one).__name__)
    table = expected["model.embed_tokens.weight"]
    assert relative_error(found.embedding.weight.value, table) < 2 * FLOAT32_TOLERANCE


def test_stacked_file_is_the_same_model(theirs, ours, folder, tmp_path):
    """The names that transformers 5 gives the weights in memory, which it reads from files too."""
    shutil.copy(folder / "config.json", tmp_path)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    for one, other in zip(jax.tree.leaves(mx.load(tmp_path)), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(one, other)


def test_transformers_reads_what_is_written(theirs, ours, folder, torch, tmp_path):
    import transformers

    mx.save(ours, tmp_path / "ours")
    one, other = (load_file(path / "model.safetensors") for path in (tmp_path / "ours", folder))
    assert one.keys() == other.keys()
    for name, array in other.items():
        np.testing.assert_array_equal(one[name], array)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="float32", output_loading_info=True
    )
    assert not any(info.values())
    assert type(again) is type(theirs)
    for (name, one), (_, other) in zip(again.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_llama_cpp_runs_what_is_written(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    words = vocabularies.write_gguf(tmp_path / "words.gguf", **vocabularies.byte_level_metadata())
    tokenizer = mx.load_tokenizer(words)
    config = dataclasses.replace(
        small_model().config, vocab=tokenizer.vocab, embed=32, hidden=64, routing=mx.Routing(experts=4, per_token=2)
    )
    model = small_model(config=config)
    mx.save(model, tmp_path / "model.gguf", format="gguf", tokenizer=tokenizer)
    f32 = llama_cpp.GGML_TYPE_F32
    theirs = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=32, logits_all=True, verbose=False, type_k=f32, type_v=f32
    )
    ids = np.random.default_rng(0).integers(0, config.vocab, 24).tolist()
    theirs.eval(ids)
    expected = np.array(theirs.scores[: len(ids)])
    assert relative_error(run(model, np.array([ids], np.int32))[0][0], expected) < FLOAT32_TOLERANCE
