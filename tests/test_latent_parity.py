"""Latent attention and its experts as transformers' `Mistral4` computes them, on small random models."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from fixtures.model import FLOAT32_TOLERANCE, empty_cache, padded, relative_error, run, run_in_pieces
from safetensors.numpy import load_file

import mistral_eqx as mx
from mistral_eqx.rope import yarn_magnitude


pytestmark = pytest.mark.parity

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
}
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 0.3,
}
# Settings of transformers, and of its rotary embedding.
VARIANTS = {
    "groups, a dense layer, shares scaled": (
        {
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.7,
            "n_shared_experts": 2,
        },
        {"mscale": 1.0, "mscale_all_dim": 0.0},
    ),
    "the factor of the scores by its own key": (
        {"norm_topk_prob": False, "v_head_dim": 20, "kv_lora_rank": 26},
        {"mscale_all_dim": 1.0, "attention_factor": 1.0},
    ),
}


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def made(torch, settings, rope):
    transformers = pytest.importorskip("transformers")
    from fixtures.make_models import drawn

    settings = {**SMALL, **settings, "rope_parameters": {**ROPE, **rope}}
    config = transformers.Mistral4Config(**settings)
    model = transformers.Mistral4ForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return drawn(model, np.random.default_rng(1))


@pytest.fixture(scope="module", params=VARIANTS)
def theirs(request, torch):
    return made(torch, *VARIANTS[request.param])


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral4")
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


def test_logits_at_every_position_cached_and_in_chunks(theirs, ours, torch, ids):
    expected, row = logits_of(theirs, ids), ids.astype(np.int32)[None]
    assert relative_error(run(ours, row)[0][0], expected) < FLOAT32_TOLERANCE
    for pieces in ((31, *(1,) * 9), (16, 16, 8)):
        logits, _ = run_in_pieces(ours, row, pieces, empty_cache(ours, 1, 44))
        assert relative_error(logits[0], expected) < FLOAT32_TOLERANCE


def test_rows_with_padding_on_the_left(theirs, ours, torch, ids):
    rows = [ids[:12].tolist(), ids[12:21].tolist()]
    padded_ids, positions = padded(rows, 12, "left")
    mask = torch.from_numpy((positions >= 0).astype(np.int64))
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(padded_ids.astype(np.int64)),
            attention_mask=mask,
            position_ids=torch.from_numpy(np.maximum(positions, 0).astype(np.int64)),
        ).logits.numpy()
    logits, _ = run(ours, padded_ids, positions)
    tokens = positions >= 0
    assert relative_error(logits[tokens], expected[tokens]) < FLOAT32_TOLERANCE


def test_greedy_tokens_and_beams(theirs, ours, torch, ids):
    row = torch.from_numpy(ids[:9])[None]
    options = {"attention_mask": torch.ones_like(row), "eos_token_id": None}
    expected = theirs.generate(row, max_new_tokens=48, **options)[0, 9:].tolist()
    prompt = [ids[:9].tolist()]
    assert mx.generate(ours, prompt, max_new_tokens=48, eos_id=()).tokens[0].tolist() == expected
    found = theirs.generate(
        row,
        max_new_tokens=12,
        num_beams=3,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    best = mx.beam_search(ours, prompt, num_beams=3, num_return_sequences=3, max_new_tokens=12, eos_id=())
    assert np.asarray(best.tokens).reshape(3, 12).tolist() == found.sequences[:, 9:].tolist()
    np.testing.assert_allclose(np.ravel(best.scores), found.sequences_scores.numpy(), rtol=FLOAT32_TOLERANCE)


def test_transformers_reads_what_is_written(theirs, ours, folder, torch, ids, tmp_path):
    mx.save(ours, tmp_path / "ours")
    one, other = (load_file(path / "model.safetensors") for path in (tmp_path / "ours", folder))
    assert one.keys() == other.keys()
    for name, array in other.items():
        np.testing.assert_array_equal(one[name], array)
    again, info = type(theirs).from_pretrained(
        tmp_path / "ours", dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    expected = logits_of(theirs, ids)
    assert relative_error(logits_of(again, ids), expected) < FLOAT32_TOLERANCE
    loaded = mx.load(tmp_path / "ours")
    assert loaded.config == ours.config
    for found, array in zip(jax.tree.leaves(loaded), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(found, array)


def test_the_factor_of_the_scores(torch, ids, tmp_path):
    """With equal `mscale` and `mscale_all_dim`, transformers multiplies scores, this package only on request."""
    theirs = made(torch, {"n_routed_experts": 2, "num_experts_per_tok": 1}, {"mscale": 1.0, "mscale_all_dim": 1.0})
    theirs.save_pretrained(tmp_path / "theirs")
    plain, row = mx.load(tmp_path / "theirs"), ids.astype(np.int32)[None]
    assert plain.config.latent.scale == 1
    square = yarn_magnitude(8.0) ** 2
    latent = dataclasses.replace(plain.config.latent, scale=square)
    blocks = tuple(
        dataclasses.replace(block, attention=dataclasses.replace(block.attention, scale=block.attention.scale * square))
        for block in plain.blocks
    )
    scaled = dataclasses.replace(plain, blocks=blocks, config=dataclasses.replace(plain.config, latent=latent))
    expected = logits_of(theirs, ids)
    assert relative_error(run(scaled, row)[0][0], expected) < FLOAT32_TOLERANCE
    assert relative_error(run(plain, row)[0][0], expected) > 1e-2
    # What is saved is the same model in both programs.
    for model in (plain, scaled):
        mx.save(model, tmp_path / "again", overwrite=True)
        again = type(theirs).from_pretrained(tmp_path / "again", dtype="float32", attn_implementation="eager")
        assert math.isclose(again.model.layers[0].self_attn.scaling, model.blocks[0].attention.scale, rel_tol=1e-12)
        assert relative_error(run(model, row)[0][0], logits_of(again, ids)) < FLOAT32_TOLERANCE
