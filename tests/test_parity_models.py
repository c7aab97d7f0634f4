"""The models of transformers, live, and whether the recorded ones can be made again."""

import json

import numpy as np
import pytest
from fixtures.model import (
    FLOAT32_TOLERANCE,
    MODELS,
    VARIANTS,
    empty_cache,
    recorded,
    relative_error,
    run,
    run_in_pieces,
)
from safetensors.numpy import load_file

import mistral_eqx as mx


pytestmark = pytest.mark.parity

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "Q: What is the boiling point of water?\nA:",
    "Dear Sir or Madam,",
    "1, 1, 2, 3, 5, 8,",
    "« Liberté, égalité,",
    "<|im_start|>user\nTell me a joke about cats.<|im_end|>\n<|im_start|>assistant\n",
    "Photosynthesis is the process by which green plants make food from light. " * 6,
)


@pytest.fixture(scope="module")
def make_models():
    torch = pytest.importorskip("torch")
    # Torch's threads wait for each other without rest: where other programs run too, two are ten times as slow as one.
    torch.set_num_threads(1)
    pytest.importorskip("transformers")
    from fixtures import make_models

    return make_models


def test_every_variant_is_made(make_models):
    assert sorted(make_models.VARIANTS) == VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_files_can_be_made_again(make_models, variant, tmp_path):
    make_models.write(variant, tmp_path)
    for file in ("config.json", "model.safetensors", "recorded.safetensors"):
        assert (tmp_path / variant / file).is_file()
    old, new = (json.loads((folder / variant / "config.json").read_text()) for folder in (MODELS, tmp_path))
    assert new == old
    # Weights are drawn by numpy: the same numbers everywhere.
    old, new = (load_file(folder / variant / "model.safetensors") for folder in (MODELS, tmp_path))
    assert new.keys() == old.keys()
    for name, array in old.items():
        np.testing.assert_array_equal(new[name], array)
    old, new = recorded(variant), load_file(tmp_path / variant / "recorded.safetensors")
    assert new.keys() == old.keys()
    for name, array in old.items():
        if name.startswith("logits"):
            assert relative_error(new[name], array) < FLOAT32_TOLERANCE / 4
        elif name.endswith("error"):
            # Another processor's 16-bit products round elsewhere.
            assert array / 2 < new[name] < array * 2
        else:
            np.testing.assert_array_equal(new[name], array)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_other_models_of_each_variant(make_models, variant, seed, tmp_path):
    theirs = make_models.random_model(variant, seed)
    theirs.save_pretrained(tmp_path)
    ours = mx.load(tmp_path)
    ids = make_models.prompts(variant, seed)[40]
    expected = make_models.logits(theirs, ids)
    row = ids.astype(np.int32)[None]
    assert relative_error(run(ours, row)[0][0], expected) < FLOAT32_TOLERANCE
    logits, _ = run_in_pieces(ours, row, (5, *(1,) * 15), empty_cache(ours, 1, 44))
    assert relative_error(logits[0], expected[:20]) < FLOAT32_TOLERANCE


def test_64_greedy_tokens_of_smollm2(make_models, smollm2_path, tmp_path):
    """Ten prompts in one batch, each token as transformers gives it for the prompt alone, with the same weights."""
    import transformers

    ours = mx.load(smollm2_path, dtype="float32")
    mx.save(ours, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="float32", attn_implementation="eager"
    )
    tokenizer = mx.load_tokenizer(smollm2_path)
    prompts = [tokenizer.encode(prompt, parse_special=True) for prompt in PROMPTS]
    assert len({len(ids) for ids in prompts}) > 5
    found = np.asarray(mx.generate(ours, prompts, max_new_tokens=64, eos_id=()).tokens)
    for ids, tokens in zip(prompts, found, strict=True):
        assert tokens.tolist() == make_models.greedy(theirs, np.array(ids), 64).tolist()
    # What comes out is text.
    assert len(set(found.reshape(-1).tolist())) > 100
    logits = make_models.logits(theirs, np.array(prompts[-1]))
    assert relative_error(run(ours, np.array([prompts[-1]], np.int32))[0][0], logits) < FLOAT32_TOLERANCE
