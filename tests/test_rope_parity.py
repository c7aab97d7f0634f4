"""The scaling of the rotary embedding against transformers, at positions far past the original ones."""

import dataclasses

import numpy as np
import pytest
from fixtures.model import FLOAT32_TOLERANCE, SMALL, empty_cache, relative_error, run, run_in_pieces, small_model
from fixtures.text import tiny as vocabularies

import mistral_eqx as mx
from mistral_eqx.checkpoint import hf
from mistral_eqx.rope import LinearScaling, Llama3Scaling, QueryScaling, YarnScaling, yarn_magnitude


pytestmark = pytest.mark.parity

YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
QUERIES = {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 1e4}
KINDS = {
    "ministral3": ("Ministral3", {**YARN, **QUERIES}),
    "ministral3 untruncated": ("Ministral3", {**YARN, **QUERIES, "truncate": False, "beta_fast": 4.0}),
    "mistral yarn": ("Mistral", YARN),
    "llama linear": ("Llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "llama llama3": ("Llama", LLAMA3),
    "llama yarn": ("Llama", {**YARN, "mscale": 0.7, "mscale_all_dim": 0.2, "beta_fast": 8.0, "beta_slow": 0.5}),
    "llama yarn by factor": ("Llama", {**YARN, "attention_factor": 1.75}),
}
SEQ = 300


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch").set_num_threads(1)
    return pytest.importorskip("transformers")


def their_model(kind, rope):
    """Weights so large that attention picks single tokens out, in float32."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.2,
        rope_parameters=dict(rope),
        **({} if kind == "Llama" else {"sliding_window": None}),
    )
    return getattr(transformers, f"{kind}ForCausalLM")(settings).eval()


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def theirs(request, transformers):
    return their_model(*request.param)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 80, (1, SEQ)).astype(np.int32)


def their_logits(theirs, ids, **more):
    import torch

    with torch.no_grad():
        return theirs(torch.from_numpy(np.asarray(ids, np.int64)), **more).logits.numpy()


def test_logits_and_what_is_saved(transformers, theirs, ids, tmp_path):
    import torch

    theirs.save_pretrained(tmp_path / "theirs")
    ours = mx.load(tmp_path / "theirs")
    expected = their_logits(theirs, ids)
    assert relative_error(run(ours, ids)[0], expected) < FLOAT32_TOLERANCE
    pieces = (100, 150, *(1,) * 50)
    assert relative_error(run_in_pieces(ours, ids, pieces, empty_cache(ours, 1, SEQ))[0], expected) < FLOAT32_TOLERANCE
    # A row with padding on its left, where transformers counts positions by the mask.
    padded, mask = np.concatenate([np.zeros((1, 9), np.int32), ids], axis=1), np.ones((1, SEQ + 9), np.int64)
    mask[:, :9] = 0
    positions = np.concatenate([np.full((1, 9), -1), np.arange(SEQ)[None]], axis=1)
    counted = torch.from_numpy(np.maximum(positions, 0))
    there = their_logits(theirs, padded, attention_mask=torch.from_numpy(mask), position_ids=counted)
    found, _ = run(ours, padded, positions.astype(np.int32))
    assert relative_error(found[:, 9:], there[:, 9:]) < FLOAT32_TOLERANCE
    # What is saved is the same to transformers.
    mx.save(ours, tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    np.testing.assert_array_equal(their_logits(again, ids), expected)
    assert mx.load(tmp_path / "ours").config == ours.config


def test_greedy_tokens(theirs, tmp_path):
    import torch

    theirs.save_pretrained(tmp_path)
    prompt = [5, 6, 7, 8]
    found = mx.generate(mx.load(tmp_path), [prompt], max_new_tokens=64, eos_id=()).tokens[0].tolist()
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None)
    assert found == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_angles(transformers, kind):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model, rope = KINDS[kind]
    settings = getattr(transformers, f"{model}Config")(head_dim=128, max_position_embeddings=256, rope_parameters=rope)
    inv_freq, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](settings)
    ours = hf.read_config(settings.to_dict()).rope
    # They are float32, in a few operations.
    np.testing.assert_allclose(ours.inv_freq, inv_freq.numpy(), rtol=1e-6)
    assert ours.magnitude == pytest.approx(magnitude, rel=1e-15)


def test_every_kind_is_compared(transformers):
    found = {type(hf.read_config(their_model(*kind).config.to_dict()).rope_scaling) for kind in KINDS.values()}
    assert found == {LinearScaling, Llama3Scaling, YarnScaling}
    config = hf.read_config(their_model(*KINDS["ministral3"]).config.to_dict())
    assert dataclasses.replace(config, query_scaling=QueryScaling(0.3, 16)) == config


OF_LLAMA_CPP = {
    "linear": {"rope_scaling": LinearScaling(4.0)},
    "llama3": {"rope_scaling": Llama3Scaling(32.0)},
    "yarn": {"rope_scaling": YarnScaling(16.0, 16, yarn_magnitude(16.0), 4.0, 0.5)},
    "yarn with another magnitude": {"rope_scaling": YarnScaling(16.0, 16, 1.5)},
    "yarn and scaled queries": {"rope_scaling": YarnScaling(16.0, 16, 1.0), "query_scaling": QueryScaling(0.3, 16)},
    "scaled queries": {"query_scaling": QueryScaling(0.3, 16)},
}


@pytest.mark.parametrize("fields", OF_LLAMA_CPP.values(), ids=OF_LLAMA_CPP)
def test_llama_cpp_computes_what_is_written(fields, ids, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    words = vocabularies.write_gguf(tmp_path / "words.gguf", **vocabularies.byte_level_metadata())
    tokenizer = mx.load_tokenizer(words)
    config = dataclasses.replace(SMALL, vocab=tokenizer.vocab, embed=32, head_dim=32, max_positions=512, **fields)
    model = small_model(config=config)
    mx.save(model, tmp_path / "model.gguf", format="gguf", tokenizer=tokenizer)
    # Negative numbers stand for the file's; the binding would give others.
    of_file = {"yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0, "yarn_attn_factor": -1.0}
    in_float32 = {"type_k": 0, "type_v": 0}
    theirs = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=512, n_batch=512, logits_all=True, verbose=False, **in_float32, **of_file
    )
    theirs.eval(ids[0].tolist())
    expected, (found, _) = theirs.scores[:SEQ], run(model, ids)
    # It multiplies the angle from pair to pair in float32, and rounds e^x in the softmax.
    assert relative_error(found[0], expected) < 1e-3
    plain = small_model(config=dataclasses.replace(config, rope_scaling=None, query_scaling=None))
    assert relative_error(run(plain, ids)[0][0], expected) > 1e-2
