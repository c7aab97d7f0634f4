"""PEFT loads the adapters that are written here, and the reverse, and both compute the same."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.lora import CONFIG, LINEAR, adapted
from fixtures.model import FLOAT32_TOLERANCE, relative_error, run, small_model

import mistral_eqx as mx


pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers by a name that the latter has changed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

IDS = np.random.default_rng(0).integers(0, CONFIG.vocab, (2, 11))


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    mx.save(small_model(config=dataclasses.replace(CONFIG, windows=(None,) * 4)), folder)
    return folder


def _theirs(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def _transformers(base):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_what_is_saved(peft, base, tmp_path, use_rslora):
    model = adapted(mx.load(base), use_rslora=use_rslora)
    mx.save_lora(model, tmp_path / "adapters", base=str(base))
    theirs = peft.PeftModel.from_pretrained(_transformers(base), tmp_path / "adapters")
    expected = _theirs(theirs)
    assert relative_error(run(model, IDS)[0], expected) < FLOAT32_TOLERANCE
    # The adapters say something.
    assert relative_error(run(mx.load(base), IDS)[0], expected) > 1e-2
    merged = _theirs(theirs.merge_and_unload())
    assert relative_error(run(mx.merge_lora(model), IDS)[0], merged) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("targets", [LINEAR, ("k_proj", "down_proj")], ids=["all", "two"])
def test_what_peft_saves_is_loaded(peft, base, tmp_path, targets):
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=list(targets), init_lora_weights=False)
    theirs = peft.get_peft_model(_transformers(base), config).eval()
    theirs.save_pretrained(tmp_path / "adapters")
    model = mx.load_lora(mx.load(base), tmp_path / "adapters")
    expected = _theirs(theirs)
    assert relative_error(run(model, IDS)[0], expected) < FLOAT32_TOLERANCE
    assert relative_error(run(mx.load(base), IDS)[0], expected) > 1e-2
    # And written again, it is the same file.
    mx.save_lora(model, tmp_path / "again")
    again = mx.load_lora(mx.load(base), tmp_path / "again")
    np.testing.assert_array_equal(run(again, IDS)[0], run(model, IDS)[0])


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_tables_that_peft_trained_whole_are_read(peft, base, tmp_path, module):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module], init_lora_weights=False)
    theirs = peft.get_peft_model(_transformers(base), config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if f"{module}.modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * weight.std())
    theirs.save_pretrained(tmp_path / "adapters")
    model = mx.load_lora(mx.load(base), tmp_path / "adapters")
    assert relative_error(run(model, IDS)[0], _theirs(theirs)) < FLOAT32_TOLERANCE


def test_what_computes_something_else_is_refused(peft, base, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(_transformers(base), config).save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match="use_dora"):
        mx.load_lora(mx.load(base), tmp_path / "adapters", dtype=jnp.float32)
