"""Folders of models that also see images or hear audio, of which the text model is loaded."""

import json

import numpy as np
import pytest
from fixtures import quantized
from fixtures.checkpoint import assert_same_weights, edit_json, random_model, tiny
from fixtures.generation import refused
from safetensors.numpy import load_file, save_file

import mistral_eqx as mx
from mistral_eqx.checkpoint import convert, hf
from mistral_eqx.rope import QueryScaling, YarnScaling


SCALED = {"rope_scaling": YarnScaling(16.0, 16384, 1.0), "query_scaling": QueryScaling(0.1, 16384)}
SKIPPED = r"holds a model of images or audio too, which is skipped"


def before_5(name):
    return f"language_model.{name}"


def since_5(name):
    return name.replace("model.", "model.language_model.", 1)


def wrap(folder, renamed, *, text=(), vision="vision_tower.a.weight", type="mistral3", **wrapper):
    """Turns a folder of a text model into a wrapper's; `text` has changed keys of its config."""
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    # numpy has no FP8, so that the names are changed in the header.
    header, numbers = json.loads(content[8:end]), content[end:]
    header = {name if name == "__metadata__" else renamed(name): about for name, about in header.items()}
    header[vision] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [len(numbers), len(numbers) + 16]}
    described = json.dumps(header).encode()
    written = len(described).to_bytes(8, "little") + described + numbers + bytes(16)
    (folder / "model.safetensors").write_bytes(written)
    settings = json.loads((folder / "config.json").read_text())
    wrapper = {"model_type": type, "architectures": ["Some"], "vision_config": {"hidden_size": 3}, **wrapper}
    (folder / "config.json").write_text(json.dumps({**wrapper, "text_config": {**settings, **dict(text)}}))
    return folder


@pytest.mark.parametrize("vision", ["vision_tower.a.weight", "model.multi_modal_projector.b", "audio_tower.c.weight"])
@pytest.mark.parametrize("renamed", [before_5, since_5])
def test_both_forms_of_names_are_the_text_model(renamed, vision, getkey, tmp_path):
    model = random_model(tiny(**SCALED), getkey())
    mx.save(model, tmp_path / "a")
    wrap(tmp_path / "a", renamed, vision=vision)
    with pytest.warns(UserWarning, match=SKIPPED):
        loaded = mx.load(tmp_path / "a")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    mx.save(loaded, tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "ministral3"
    assert_same_weights(mx.load(tmp_path / "text"), model)


@pytest.mark.parametrize(
    ("text", "wrapper", "has_head", "tied"),
    [
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, False, True),
        ({"tie_word_embeddings": False}, {}, False, True),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, True, False),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}, True, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*which is skipped")
def test_whether_the_head_is_the_embedding_table(text, wrapper, has_head, tied, getkey, tmp_path):
    model = random_model(tiny(tied=not has_head), getkey())
    mx.save(model, tmp_path / "a")
    wrap(tmp_path / "a", since_5, text=text, **wrapper)
    loaded = mx.load(tmp_path / "a")
    assert loaded.config.tied == tied
    assert_same_weights(loaded, model)


@pytest.mark.filterwarnings("ignore:.*which is skipped")
def test_a_head_that_is_missing_is_named(getkey, tmp_path):
    mx.save(random_model(tiny(tied=True), getkey()), tmp_path / "a")
    wrap(tmp_path / "a", since_5, text={"tie_word_embeddings": False}, tie_word_embeddings=False)
    with refused("lm_head.weight", "tied"):
        mx.load(tmp_path / "a")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore:.*which is skipped")
def test_quantized_weights_stay_quantized(inside, getkey, tmp_path):
    config = tiny(embed=32, hidden=64, head_dim=32, vocab=64, layers=1, windows=(None,))
    pack, own = quantized.fp8()
    folder, plain = quantized.publish(tmp_path / "a", random_model(config, getkey()), pack, own)
    wrap(folder, before_5, text={} if inside else {"quantization_config": None}, quantization_config=own)
    assert "FP8" in str(mx.load(folder).blocks[0].attention.q_proj.weight)
    assert_same_weights(mx.load(folder, dtype="float32"), mx.load(plain, dtype="float32"))


def test_voxtral_has_a_llama(getkey, tmp_path):
    model = random_model(tiny(), getkey())
    mx.save(model, tmp_path / "a")
    changes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    wrap(tmp_path / "a", before_5, text=changes, type="voxtral", vision="multi_modal_projector.linear_1.weight")
    with pytest.warns(UserWarning, match=SKIPPED):
        assert_same_weights(mx.load(tmp_path / "a"), model)
    # transformers' own defaults for what an old config leaves out.
    config = hf.read_config({"model_type": "voxtral", "text_config": {}})
    assert (config.layers, config.embed, config.rope_theta, config.vocab) == (30, 3072, 1e8, 131072)


@pytest.mark.parametrize("format", ["mistral", "hf"])
def test_a_release_with_a_vision_encoder(format, getkey, tmp_path):
    model, folder = random_model(tiny(**SCALED), getkey()), tmp_path / "a"
    mx.save(model, folder, format="mistral")
    other = {f"{name}.weight": np.ones(2, np.float32) for name in ("vision_encoder.a", "vision_language_adapter.w_in")}
    other |= {f"{name}.weight": np.ones(2, np.float32) for name in ("patch_merger.b", "pre_mm_projector_norm")}
    save_file(load_file(folder / "consolidated.safetensors") | other, folder / "consolidated.safetensors")
    edit_json(folder / "params.json", vision_encoder={"hidden_size": 3})
    if format == "hf":
        # Both layouts in one folder hold the same text model.
        mx.save(model, tmp_path / "b")
        wrap(tmp_path / "b", since_5)
        for file in (tmp_path / "b").glob("[cm]*"):
            file.rename(folder / file.name)
    with pytest.warns(UserWarning, match=SKIPPED):
        loaded = mx.load(folder)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    with pytest.warns(UserWarning, match=SKIPPED):
        convert(folder, tmp_path / "text", format="mistral")
    assert_same_weights(mx.load(tmp_path / "text"), model)


def test_what_a_wrapper_lacks_is_named(getkey, tmp_path):
    mx.save(random_model(tiny(), getkey()), tmp_path / "a")
    wrap(tmp_path / "a", before_5, text={"model_type": "mistral_large4"})
    with refused("model_type 'mistral_large4'", "'mistral3' and 'voxtral'"):
        mx.load(tmp_path / "a")
    edit_json(tmp_path / "a" / "config.json", text_config=None)
    with refused("text_config", "table"):
        mx.load(tmp_path / "a")
    with refused("lacks the key text_config"):
        hf.read_config({"model_type": "mistral3"})


def test_a_tensor_under_two_names_is_refused(getkey, tmp_path):
    mx.save(random_model(tiny(), getkey()), tmp_path / "a")
    wrap(tmp_path / "a", since_5, vision="language_model.model.norm.weight")
    with refused("'model.norm.weight'", "has two names", "language_model"):
        mx.load(tmp_path / "a")
