"""The text models of wrappers against transformers."""

import json

import numpy as np
import pytest
from fixtures.model import FLOAT32_TOLERANCE, relative_error, run
from safetensors.numpy import load_file, save_file

import mistral_eqx as mx


pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.*which is skipped")]

TEXT = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch").set_num_threads(1)
    return pytest.importorskip("transformers")


def mistral3(transformers, type, **more):
    text = {**TEXT, "model_type": type, "sliding_window": None}
    text |= {"rope_parameters": YARN} if type == "ministral3" else {}
    vision = {**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14}
    settings = transformers.Mistral3Config(text_config=text, vision_config=vision, **more)
    return transformers.Mistral3ForConditionalGeneration(settings)


def voxtral(transformers):
    audio = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = transformers.VoxtralConfig(
        text_config={**TEXT, "model_type": "llama"}, audio_config=audio, audio_token_id=3, tie_word_embeddings=False
    )
    return transformers.VoxtralForConditionalGeneration(settings)


KINDS = {
    "ministral3": lambda transformers: mistral3(transformers, "ministral3", tie_word_embeddings=False),
    "ministral3, tied": lambda transformers: mistral3(transformers, "ministral3"),
    "mistral": lambda transformers: mistral3(transformers, "mistral", tie_word_embeddings=False),
    "voxtral": voxtral,
}


def other_form(name):
    """The names of transformers 5 for those before it, and the other way round."""
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    return name.removeprefix("language_model.") if name.startswith("language_model.lm_head") else name


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_the_text_model(kind, transformers, tmp_path):
    import torch

    torch.manual_seed(0)
    theirs = KINDS[kind](transformers).eval()
    theirs.save_pretrained(tmp_path / "whole")
    ids = np.random.default_rng(0).integers(5, 80, (2, 200))
    ids[ids == 10] = 11  # the id that stands for an image
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids)).logits.numpy()
    ours = mx.load(tmp_path / "whole")
    assert ours.config.tied == ("tied" in kind)
    assert relative_error(run(ours, ids.astype(np.int32))[0], expected) < FLOAT32_TOLERANCE
    # The other form of names is the same model to both.
    weights = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(weights)
    assert any(other_form(name) != name for name in tensors)
    save_file({other_form(name): value for name, value in tensors.items()}, weights, {"format": "pt"})
    again, report = type(theirs).from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        np.testing.assert_array_equal(again(input_ids=torch.from_numpy(ids)).logits.numpy(), expected)
    there = mx.load(tmp_path / "whole")
    assert there.config == ours.config
    assert relative_error(run(there, ids.astype(np.int32))[0], expected) < FLOAT32_TOLERANCE
    # What is saved is a text model that transformers loads.
    mx.save(ours, tmp_path / "text")
    text, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(report.values()), report
    saved = "ministral3" if "ministral3" in kind else "mistral"
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == saved
    with torch.no_grad():
        assert relative_error(text(torch.from_numpy(ids)).logits.numpy(), expected) < FLOAT32_TOLERANCE
